"""What the decoder of a running engine is given for each prompt, kept for replay."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vllm_attentionpack import compat
from vllm_attentionpack.errors import CalibrationDataError, UnsupportedModelError
from vllm_attentionpack.evaluate.data import Item
from vllm_attentionpack.evaluate.prompts import PromptRenderer, RenderedPrompt, enqueue

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class Recorded:
    """One prompt as the decoder saw it, `T` tokens.

    Attributes:
        owner: index of its item.
        input_ids: int `[T]`, None where the decoder was given embeddings.
        inputs_embeds: `[T, hidden]`, None where it was given ids.
        positions: int `[T]`, or `[3, T]` under M-RoPE.
        visual: bool `[T]`.
        targets: int64 `[n]`, the last `n` tokens, which are scored.
        hidden: `[T, hidden]`, what the decoder made of it: checks the replay.
    """

    owner: int
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    positions: Tensor
    visual: Tensor
    targets: Tensor
    hidden: Tensor

    @property
    def length(self) -> int:
        return self.positions.shape[-1]

    @property
    def temporal_positions(self) -> Tensor:
        """int `[T]`; see `codec.positions`."""
        return self.positions[0] if self.positions.ndim == 2 else self.positions


def record(llm: "LLM", items: Sequence[Item], max_tokens: int | None = None) -> list[Recorded]:
    """Runs every prompt of the items alone, answers included.

    Args:
        llm: from `calibrate.engine.statistics_engine`.
        items: chats and texts; prompts with nothing to score are left out.
        max_tokens: stop before the prompt that would exceed this many, the first one excepted.

    Raises:
        CalibrationDataError: nothing to score, or an item that the engine refuses, with its line
            number.
        UnsupportedModelError: the decoder takes something that is not recorded.
    """
    renderer = PromptRenderer(llm)
    recorded: list[Recorded] = []
    tokens = 0
    for owner, item in enumerate(items):
        for prompt in renderer.render(item):
            if not prompt.num_scored_tokens:
                continue
            found = _record_one(llm, owner, prompt)
            tokens += found.length
            if recorded and max_tokens is not None and tokens > max_tokens:
                return recorded
            recorded.append(found)
    if not recorded:
        raise CalibrationDataError(
            "none of the items has an answer or a text to score. Give texts, or chats with answers."
        )
    return recorded


def _record_one(llm: "LLM", owner: int, rendered: RenderedPrompt) -> Recorded:
    from vllm import SamplingParams

    (tape,) = llm.apply_model(_Tape)
    try:
        enqueue(llm, rendered, SamplingParams(max_tokens=1, temperature=0.0))
        llm.wait_for_completion(use_tqdm=False)
    finally:
        tape.remove()
    scored = rendered.num_scored_tokens
    targets = torch.tensor(rendered.token_ids[len(rendered.token_ids) - scored :])
    return Recorded(owner=owner, targets=targets, **tape.joined())


class _Tape:
    """Hooks a model and keeps what it is called with, chunk by chunk of one prompt."""

    def __init__(self, model: nn.Module) -> None:
        self._chunks: list[dict[str, Tensor | None]] = []
        self._handle = model.register_forward_hook(self._see, with_kwargs=True)

    def _see(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        from vllm.forward_context import get_forward_context

        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return
        if args or not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{type(module).__name__} is not called, or does not answer, as replay expects. "
                "Leave out --validate and --ratio auto for this model."
            )
        tokens = next(iter(metadata.values())).num_actual_tokens
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        visual = compat.modality_mask(output.shape[0], output.device)
        if visual is None:
            visual = torch.zeros(tokens, dtype=torch.bool, device=output.device)
        self._chunks.append(
            {
                "input_ids": None if ids is None else ids[:tokens].clone(),
                "inputs_embeds": None if embeds is None else embeds[:tokens].clone(),
                "positions": kwargs["positions"][..., :tokens].clone(),
                "visual": visual[:tokens].clone(),
                "hidden": output[:tokens].clone(),
            }
        )

    def remove(self) -> None:
        self._handle.remove()

    def joined(self) -> dict[str, Any]:
        """The chunks of the prompt as one."""
        result: dict[str, Tensor | None] = {}
        for name in self._chunks[0]:
            parts = [part for part in (chunk[name] for chunk in self._chunks) if part is not None]
            result[name] = torch.cat(parts, dim=-1 if name == "positions" else 0) if parts else None
        return result


@contextmanager
def replay_context(
    vllm_config: Any, metadata: Any, tokens: int, infer: bool = True
) -> Iterator[None]:
    """The forward context of a replayed step; nothing is written to the engine's cache.

    Not in inference mode unless `infer`.
    """
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    with (
        torch.inference_mode(infer),
        set_current_vllm_config(vllm_config),
        set_forward_context(metadata, vllm_config, num_tokens=tokens, slot_mapping={}),
    ):
        yield
