"""What one engine makes of the data: generated answers, and scores of the given ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_attentionpack import plugin
from vllm_attentionpack.config import SECTION
from vllm_attentionpack.engine import engine_arguments, shut_down, start
from vllm_attentionpack.evaluate.data import ChatItem, Item
from vllm_attentionpack.evaluate.prompts import PromptRenderer, RenderedPrompt, enqueue

if TYPE_CHECKING:
    from vllm import LLM

#: Tokens that a generated answer may have beyond the given one, so that a longer one shows.
_EXTRA_TOKENS = 8


@dataclass(frozen=True)
class Scored:
    """The distributions at the scored positions of one item.

    Attributes:
        target: float64 `[n]`, log-probability of each token that was given.
        token_ids: int64 `[n, K]`, the `K` likeliest tokens, likeliest first.
        logprobs: float64 `[n, K]`, theirs.
    """

    target: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Answers:
    """What one engine makes of the data.

    Attributes:
        generated: the greedy answer to each item, None for items without an answer.
        scored: teacher forcing on each item, None for items with nothing to score.
        kv_tokens: capacity of the KV cache in tokens, as vLLM reports it.
    """

    generated: list[str | None]
    scored: list[Scored | None]
    kv_tokens: int


def run_engine(
    model: str,
    items: Sequence[Item],
    pack: Path | None,
    engine_args: Mapping[str, Any],
    top_logprobs: int,
) -> Answers:
    """Starts vLLM, answers every item, scores every given answer, shuts vLLM down.

    With a pack every token, prompts included, attends to codes (`exact_prefill` off): an answer
    token that comes from an exact prefill would measure nothing.

    Args:
        model: name or path.
        items: chats and texts.
        pack: path of the pack; None serves densely.
        engine_args: further arguments of `vllm.LLM`.
        top_logprobs: `K`, at most the size of the vocabulary.

    Raises:
        CalibrationDataError: an item that the engine refuses, with its line number.
        ConfigError: vLLM refuses the model or its arguments.
    """
    plugin.register()
    arguments = engine_arguments(model, {"max_logprobs": -1, **engine_args})
    if pack is not None:
        # By kind, since a pack of a model that mixes in sliding windows leaves those layers dense.
        kinds = {plugin.FULL_ATTENTION: plugin.BACKEND}
        arguments["attention_config"] = {
            **arguments.get("attention_config", {}),
            "backend_per_kind": kinds,
        }
        arguments["additional_config"] = {
            SECTION: {"pack": str(pack), "exact_prefill": False},
        }
    llm = start(arguments)
    try:
        cache = llm.llm_engine.vllm_config.cache_config
        vocabulary = llm.model_config.get_vocab_size()
        return Answers(
            generated=_generate(llm, items),
            scored=score(llm, items, min(top_logprobs, vocabulary)),
            kv_tokens=cache.kv_cache_size_tokens or 0,
        )
    finally:
        shut_down(llm)


def _generate(llm: "LLM", items: Sequence[Item]) -> list[str | None]:
    from vllm import SamplingParams

    renderer = PromptRenderer(llm)
    asked = [
        i for i, item in enumerate(items) if isinstance(item, ChatItem) and item.answer is not None
    ]
    prompts, sampling = [], []
    for i in asked:
        item = items[i]
        (with_answer,) = renderer.render(item)
        (without,) = renderer.render(item, with_answer=False)
        prompts.append(without)
        length = with_answer.num_scored_tokens + _EXTRA_TOKENS
        sampling.append(SamplingParams(temperature=0.0, max_tokens=length))
    answers: list[str | None] = [None] * len(items)
    for i, output in zip(asked, _run(llm, prompts, sampling), strict=True):
        answers[i] = output.outputs[0].text
    return answers


def score(llm: "LLM", items: Sequence[Item], top: int) -> list[Scored | None]:
    """Teacher forcing: the distributions at the answer of each chat and in each text.

    Args:
        llm: a running engine.
        items: chats and texts; None is returned for those with nothing to score.
        top: `K` of `Scored`.
    """
    from vllm import SamplingParams

    renderer = PromptRenderer(llm)
    prompts, owners = [], []
    for i, item in enumerate(items):
        for prompt in renderer.render(item):
            if prompt.num_scored_tokens:
                prompts.append(prompt)
                owners.append(i)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=1, prompt_logprobs=top, flat_logprobs=True, detokenize=False
    )
    parts: list[list[Scored]] = [[] for _ in items]
    outputs = _run(llm, prompts, [sampling] * len(prompts))
    for i, prompt, output in zip(owners, prompts, outputs, strict=True):
        parts[i].append(_read_logprobs(output.prompt_logprobs, prompt.num_scored_tokens, top))
    return [_concatenate(scored) if scored else None for scored in parts]


def _run(llm: "LLM", prompts: Sequence[RenderedPrompt], sampling: Sequence[Any]) -> list[Any]:
    for rendered, parameters in zip(prompts, sampling, strict=True):
        enqueue(llm, rendered, parameters)
    outputs = llm.wait_for_completion(use_tqdm=True)
    return sorted(outputs, key=lambda output: int(output.request_id.partition("-")[0]))


def _read_logprobs(flat: Any, positions: int, top: int) -> Scored:
    """The last `positions` of vLLM's flat log-probabilities: the given token, then the top."""
    target = np.empty(positions)
    token_ids = np.empty((positions, top), dtype=np.int64)
    logprobs = np.empty((positions, top))
    for row, position in enumerate(range(len(flat) - positions, len(flat))):
        start, stop = flat.start_indices[position], flat.end_indices[position]
        ids = np.asarray(flat.token_ids[start:stop], dtype=np.int64)
        values = np.asarray(flat.logprobs[start:stop], dtype=np.float64)
        target[row] = values[0]
        token_ids[row], logprobs[row] = ids[1:], values[1:]
    return Scored(target, token_ids, logprobs)


def _concatenate(parts: Sequence[Scored]) -> Scored:
    return Scored(
        np.concatenate([part.target for part in parts]),
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
    )
