"""Codecs measured on recorded prompts: divergence, agreement, accuracy, bytes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.errors import CalibrationDataError, UnsupportedModelError
from vllm_attentionpack.evaluate.data import ChatItem, Item
from vllm_attentionpack.evaluate.simulate.codec import (
    CacheShape,
    DenseCodec,
    ExactTokens,
    SimulatedCodec,
    Tokens,
)
from vllm_attentionpack.evaluate.simulate.recording import Recorded, record, replay_context
from vllm_attentionpack.evaluate.simulate.step import Observer, SimulatedStep

if TYPE_CHECKING:
    from vllm import LLM

#: Tokens that are replayed at once; longer prompts run alone.
_STEP_TOKENS = 8192
#: Rows of logits that are made at once.
LOGIT_ROWS = 512
#: Largest relative difference of replayed and recorded hidden states: rounding to bfloat16 through
#: tens of layers stays well below it, a forgotten input does not.
REPLAY_TOLERANCE = 0.2


@dataclass(frozen=True)
class Figures:
    """What a codec costs on a set of items; see `evaluate.compare.Comparison`.

    Attributes:
        kl: nats per scored token.
        kl_error: its standard error, items taken as independent.
        top1: share of scored tokens with the dense model's likeliest token.
        accuracy: share of answers that greedy decoding would give whole; None without answers.
        items: number of items.
        tokens: number of scored tokens.
    """

    kl: float
    kl_error: float
    top1: float
    accuracy: float | None
    items: int
    tokens: int


@dataclass(frozen=True)
class Scores:
    """Per-item sums, `[N]` each: `kl`, `same` (top-1 agreements), `right` (0 or 1), `tokens`."""

    kl: np.ndarray
    same: np.ndarray
    right: np.ndarray
    tokens: np.ndarray

    def mean_kl(self) -> float:
        """Nats per token, the mean over items: long items do not count more than short ones."""
        scored = self.tokens > 0
        return float((self.kl[scored] / self.tokens[scored]).mean())

    def figures(self, items: Sequence[Item], chosen: Sequence[int]) -> Figures:
        """The figures of the chosen items, those that were not scored left out."""
        index = np.asarray([i for i in chosen if self.tokens[i] > 0], dtype=np.int64)
        tokens = int(self.tokens[index].sum())
        asked = [i for i in index if _has_answer(items[i])]
        kl = float(self.kl[index].sum() / tokens)
        deviation = self.kl[index] - kl * self.tokens[index]
        return Figures(
            kl=kl,
            kl_error=float(np.sqrt((deviation**2).sum()) / tokens),
            top1=float(self.same[index].sum() / tokens),
            accuracy=float(self.right[asked].mean()) if asked else None,
            items=len(index),
            tokens=tokens,
        )


def _has_answer(item: Item) -> bool:
    return isinstance(item, ChatItem) and item.answer is not None


class Simulator:
    """Replays recorded prompts of a running engine under any codec.

    Args:
        llm: from `calibrate.engine.statistics_engine`; must outlive this object.
        shape: the layers to compare.
        items: what to measure on.
        max_tokens: leave out items beyond this many tokens; the first prompt always counts.

    Attributes:
        model: vLLM's.

    Raises:
        UnsupportedModelError: the replay does not give what the engine gave.
        CalibrationDataError: an item that the engine refuses.
    """

    def __init__(
        self,
        llm: "LLM",
        shape: CacheShape,
        items: Sequence[Item],
        max_tokens: int | None = None,
    ) -> None:
        self.shape = shape
        self.items = items
        self._config: Any = llm.llm_engine.vllm_config
        (self.model,) = llm.apply_model(lambda model: model)
        self.recorded = record(llm, items, max_tokens)
        self.device = self.recorded[0].positions.device
        self._layers = {name: i for i, name in enumerate(shape.layer_names)}
        self._dense = self._hidden(DenseCodec(shape))
        self._check_replay()

    def measure(self, codec: SimulatedCodec) -> Scores:
        """Scores of every item under `codec`."""
        return self._score(self._hidden(codec))

    def check_codes_are_read(self, exact: ExactTokens) -> None:
        """Sees to it that some token is read from its code beside `exact` ones.

        Raises:
            CalibrationDataError: all prompts are exact throughout, and every loss would be nil.
        """
        count = exact.sinks + exact.recent
        # Of a prompt's last token, which is only predicted, nothing is read.
        if all(prompt.length - 1 <= count for prompt in self.recorded):
            raise CalibrationDataError(
                f"the longest of {len(self.recorded)} prompts to measure has "
                f"{max(prompt.length for prompt in self.recorded)} tokens, all of which stay exact "
                f"(sinks {exact.sinks}, window {exact.recent}): nothing would be read from codes, "
                "and no loss seen. Give longer items, or a smaller --window; a fixed --ratio "
                "without --validate needs no measuring if 'sensitivity' is 'uniform'."
            )

    def dense(self) -> Scores:
        """The same of the dense cache: accuracy, at no divergence."""
        return self._score(self._dense)

    def bytes_per_token(self, codec: SimulatedCodec, owners: Sequence[int] | None = None) -> float:
        """Mean over all recorded tokens, or those of some items, of the bytes that are stored."""
        chosen = None if owners is None else set(owners)
        prompts = [r for r in self.recorded if chosen is None or r.owner in chosen]
        total = sum(codec.request_bytes(r.length, int(r.visual.sum())) for r in prompts)
        return total / sum(prompt.length for prompt in prompts)

    @property
    def tokens(self) -> int:
        """Recorded tokens."""
        return sum(prompt.length for prompt in self.recorded)

    def observe(self, observer: Observer) -> None:
        """Shows the dense keys, values and queries of every step, in the order of `batches`."""
        for batch in self.batches():
            self._run(batch, DenseCodec(self.shape), observer)

    def batches(self) -> Iterator[list[Recorded]]:
        """The prompts of each step."""
        batch: list[Recorded] = []
        for prompt in self.recorded:
            if batch and sum(r.length for r in batch) + prompt.length > _STEP_TOKENS:
                yield batch
                batch = []
            batch.append(prompt)
        if batch:
            yield batch

    def scored_hidden(self, prompt: Recorded, codec: SimulatedCodec) -> Tensor:
        """The hidden states `[n, hidden]` that predict the prompt's scored tokens."""
        (hidden,) = self._run([prompt], codec, None)
        return _scored(prompt, hidden).clone()

    @contextmanager
    def differentiated(self, prompt: Recorded, codec: SimulatedCodec) -> Iterator[Tensor]:
        """The same with what autograd needs, for backwards in the context."""
        tokens = tokens_of([prompt])
        step = SimulatedStep(tokens, codec, self._layers)
        with torch.enable_grad(), replay_context(self._config, step, prompt.length, infer=False):
            # what was recorded in inference mode cannot be part of a graph: copies can
            yield _scored(prompt, self._forward([prompt], torch.clone))

    def _hidden(self, codec: SimulatedCodec) -> list[Tensor]:
        """`scored_hidden` of every prompt."""
        result = []
        for batch in self.batches():
            for prompt, hidden in zip(batch, self._run(batch, codec, None), strict=True):
                result.append(_scored(prompt, hidden).clone())
        return result

    def _run(
        self, batch: Sequence[Recorded], codec: SimulatedCodec, observer: Observer | None
    ) -> list[Tensor]:
        tokens = tokens_of(batch)
        step = SimulatedStep(tokens, codec, self._layers, observer)
        with replay_context(self._config, step, sum(tokens.lengths)):
            return list(self._forward(batch).split(list(tokens.lengths)))

    def _forward(
        self, batch: Sequence[Recorded], given: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Tensor:
        inputs = {
            name: _joined([getattr(prompt, name) for prompt in batch], dim)
            for name, dim in (("input_ids", 0), ("inputs_embeds", 0), ("positions", -1))
        }
        inputs = {name: None if x is None else given(x) for name, x in inputs.items()}
        hidden: Tensor = self.model(**inputs, intermediate_tensors=None)
        return hidden

    def target_logprobs(self, codec: SimulatedCodec) -> list[np.ndarray]:
        """Of each recorded prompt the log-probabilities `[n]` of its scored tokens."""
        result = []
        for prompt, hidden in zip(self.recorded, self._hidden(codec), strict=True):
            logprobs = _log_probabilities(self.model, hidden).double().cpu()
            result.append(logprobs.gather(1, prompt.targets[:, None])[:, 0].numpy())
        return result

    def _score(self, hidden: Sequence[Tensor]) -> Scores:
        sums = {name: np.zeros(len(self.items)) for name in ("kl", "same", "tokens")}
        right = np.ones(len(self.items))
        owners = np.concatenate([np.full(len(r.targets), r.owner) for r in self.recorded])
        targets = torch.cat([r.targets for r in self.recorded])
        dense, read = torch.cat(self._dense), torch.cat(list(hidden))
        for start in range(0, len(targets), LOGIT_ROWS):
            rows = slice(start, start + LOGIT_ROWS)
            p, q = (_log_probabilities(self.model, x[rows]) for x in (dense, read))
            kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
            top = q.argmax(-1)
            owner = owners[rows]
            np.add.at(sums["kl"], owner, kl.double().cpu().numpy())
            np.add.at(sums["same"], owner, (top == p.argmax(-1)).cpu().numpy())
            np.add.at(sums["tokens"], owner, 1.0)
            wrong = (top.cpu() != targets[rows]).numpy()
            right[owner[wrong]] = 0
        return Scores(right=right, **sums)

    def _check_replay(self) -> None:
        """Raises unless replaying densely gives what the engine's own attention gave."""
        for prompt, replayed in zip(self.recorded, self._dense, strict=True):
            error = replay_error(prompt, replayed)
            if not error <= REPLAY_TOLERANCE:
                raise UnsupportedModelError(
                    f"replaying a prompt gives hidden states {error:.0%} off those of the "
                    f"engine (at most {REPLAY_TOLERANCE:.0%} is rounding): the model keeps state "
                    "that is not recorded. Leave out --validate and --ratio auto for it."
                )


def grouped(
    items: Sequence[Item], keys: Sequence[str] = ("modality", "kind")
) -> dict[str, list[int]]:
    """Indices of the items by the values of their extra keys, as `key=value`."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for key in keys:
        for i, item in enumerate(items):
            if value := item.extra.get(key):
                groups[f"{key}={value}"].append(i)
    return dict(groups)


def replay_error(prompt: Recorded, replayed: Tensor) -> float:
    """How far the hidden states `[n, hidden]` of scored tokens are from the engine's, relative."""
    expected = _scored(prompt, prompt.hidden).float()
    return float((replayed.float() - expected).norm() / expected.norm().clamp_min(1e-30))


def tokens_of(batch: Sequence[Recorded]) -> Tokens:
    """What codecs are told of the tokens of a step."""
    return Tokens(
        [prompt.length for prompt in batch],
        torch.cat([prompt.visual for prompt in batch]),
        torch.cat([prompt.temporal_positions for prompt in batch]),
    )


def _scored(prompt: Recorded, hidden: Tensor) -> Tensor:
    """Of hidden states `[T, hidden]` those that predict scored tokens."""
    return hidden[prompt.length - len(prompt.targets) - 1 : prompt.length - 1]


def _joined(parts: Sequence[Tensor | None], dim: int) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present, dim=dim) if present else None


@torch.inference_mode()
def _log_probabilities(model: Any, hidden: Tensor) -> Tensor:
    logits = model.compute_logits(hidden)
    return logits.float().log_softmax(-1)
