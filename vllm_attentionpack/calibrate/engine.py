"""The real engine, in this process, under the statistics backend; and the loop that feeds it."""

import logging
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from vllm_attentionpack import plugin
from vllm_attentionpack.compat.autograd import plain_cpu_layers
from vllm_attentionpack.engine import engine_arguments, shut_down, start
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.evaluate.data import Dataset
from vllm_attentionpack.evaluate.prompts import PromptRenderer, RenderedPrompt, enqueue

if TYPE_CHECKING:
    from vllm import LLM

#: What gathering needs: hooks run in eager mode only, a cached prefix would not be seen again, and
#: sums are kept in this process.
_FORCED: Mapping[str, Any] = {
    "attention_backend": plugin.STATISTICS_BACKEND,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
}

#: A wave of prompts is handed over at once, so that the engine can batch them.
_PROMPTS_PER_WAVE = 32
_MULTIPROCESSING = "VLLM_ENABLE_V1_MULTIPROCESSING"


class Progress(Protocol):
    """Told after each wave: the fraction done, in [0, 1], and the tokens seen."""

    def __call__(self, fraction: float, tokens: int) -> None: ...


@contextmanager
def statistics_engine(model: str, seed: int, engine_args: Mapping[str, Any]) -> Iterator["LLM"]:
    """Starts vLLM in this process on the statistics backend and shuts it down in the end.

    Raises:
        ConfigError: `engine_args` contradicts what gathering needs, or vLLM refuses it or the
            model.
    """
    for name, value in _FORCED.items():
        if engine_args.get(name, value) != value:
            raise ConfigError(
                f"the engine argument '{name}' is {engine_args[name]!r}, but calibration needs "
                f"{value!r}. Leave it out."
            )
    if "model" in engine_args:
        raise ConfigError(
            f"the engine arguments name the model '{engine_args['model']}', but the one to "
            f"calibrate is '{model}'. Leave 'model' out of them."
        )
    with _in_process(), _fewer_warnings():
        plugin.register()
        with plain_cpu_layers():
            llm = start(engine_arguments(model, {"seed": seed, **engine_args, **_FORCED}))
        try:
            yield llm
        finally:
            shut_down(llm)


@contextmanager
def _in_process() -> Iterator[None]:
    before = os.environ.get(_MULTIPROCESSING)
    os.environ[_MULTIPROCESSING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_MULTIPROCESSING]
        else:
            os.environ[_MULTIPROCESSING] = before


@contextmanager
def _fewer_warnings() -> Iterator[None]:
    """Drops a warning that vLLM's CPU worker gives for every image, in the middle of the bar.

    Remove when vLLM gives it once.
    """
    logger = logging.getLogger("vllm.v1.worker.cpu_worker")

    def keep(record: logging.LogRecord) -> bool:
        return "torch.set_num_threads" not in str(record.msg)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def feed(
    llm: "LLM",
    dataset: Dataset,
    tokens_seen: "TokenCount",
    max_tokens: int | None,
    seed: int,
    progress: Progress,
) -> None:
    """Runs the items through the engine, answers included, in an order drawn by `seed`.

    Args:
        llm: from `statistics_engine`.
        dataset: the items.
        tokens_seen: counts the tokens that recorders saw.
        max_tokens: stop after the wave in which this many were seen; None for no limit.
        seed: the same seed gives the same order.
        progress: told after each wave.

    Raises:
        CalibrationDataError: an item that the engine refuses (too long, images that the model does
            not take), with its line number.
    """
    order = list(dataset.items)
    random.Random(seed).shuffle(order)
    renderer = PromptRenderer(llm)
    budget = llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    wave: list[RenderedPrompt] = []
    for done, item in enumerate(order, start=1):
        for prompt in renderer.render(item):
            wave.append(prompt)
            left = budget if max_tokens is None else min(budget, max_tokens - tokens_seen())
            size = sum(len(waiting.token_ids) for waiting in wave)
            if len(wave) < _PROMPTS_PER_WAVE and size < left:
                continue
            _run(llm, wave)
            wave = []
            fraction = done / len(order)
            if max_tokens is not None:
                fraction = max(fraction, min(1.0, tokens_seen() / max_tokens))
            progress(fraction, tokens_seen())
            if max_tokens is not None and tokens_seen() >= max_tokens:
                return
    if wave:
        _run(llm, wave)
    progress(1.0, tokens_seen())


class TokenCount(Protocol):
    """The number of tokens seen so far."""

    def __call__(self) -> int: ...


def _run(llm: "LLM", wave: list[RenderedPrompt]) -> None:
    from vllm import SamplingParams

    # The one token that vLLM must generate is sampled from the last logits and never attended.
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    for rendered in wave:
        enqueue(llm, rendered, sampling)
    llm.wait_for_completion(use_tqdm=False)
