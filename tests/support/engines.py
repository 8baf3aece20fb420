"""vLLM engines in the process of the tests, where schedules and pages can be looked at."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_attentionpack import plugin
from vllm_attentionpack.attention.impl import AttentionPackImpl
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.config import SECTION
from vllm_attentionpack.engine import shut_down

#: Small, so that capacity is soon reached; eager, because compiling takes longer than the tests.
_DEFAULTS = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "max_model_len": 1024,
    "seed": 0,
}


#: For checkpoints without a tokenizer.
TOKEN_IDS_ONLY = {"skip_tokenizer_init": True}


def compacted(pack: Path, **section: Any) -> dict[str, Any]:
    """The engine arguments that serve from `pack`; `section` as in `ServeConfig`."""
    return {
        "attention_backend": plugin.BACKEND,
        "additional_config": {SECTION: {"pack": str(pack), **section}},
    }


@dataclass(frozen=True)
class Engine:
    """A running engine.

    Attributes:
        llm: vLLM's.
        messages: what the plugin logged while it started.
    """

    llm: Any
    messages: list[str]

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def cache_config(self) -> Any:
        return self.llm.llm_engine.vllm_config.cache_config

    @property
    def kv_caches(self) -> dict[str, Tensor]:
        """vLLM's view of every layer's cache by layer name."""
        return {name: layer.kv_cache for name, layer in self._attention_layers()}

    @property
    def codecs(self) -> dict[str, LayerCodec]:
        """The codec of every compacted layer by layer name."""
        return {name: impl.codec for name, impl in self._compacted_layers()}

    @property
    def allocated_bytes(self) -> int:
        """Bytes behind all caches, shared memory counted once."""
        storages = [cache.untyped_storage() for cache in self.kv_caches.values()]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    @property
    def declared_page_bytes(self) -> dict[str, int]:
        """Bytes of a block by layer name, as vLLM was told."""
        specs = self.core.model_executor.get_kv_cache_specs()[0]
        return {name: spec.page_size_bytes for name, spec in specs.items()}

    def poison_free_blocks(self) -> int:
        """Fills the null block and all free blocks that hold no cached prefix with ones.

        As bfloat16, float16 or float32 that is no number: whoever reads it shows it. Returns how
        many blocks were filled.
        """
        pool = self.scheduler.kv_cache_manager.block_pool
        blocks = [pool.null_block, *pool.free_block_queue.get_all_free_blocks()]
        ids = [block.block_id for block in blocks if block.block_hash is None]
        for cache in self.kv_caches.values():
            cache.view(torch.uint8)[ids] = 255
        return len(ids)

    @property
    def used_blocks(self) -> int:
        """Blocks that a request holds; one is vLLM's own and never free."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def request(self, request_id: str) -> Any:
        """The scheduler's view of an unfinished request."""
        return self.scheduler.requests[request_id]

    def block_ids(self, request_id: str, group: int = 0) -> list[int]:
        """The blocks of a running request in one KV-cache group."""
        return self.scheduler.kv_cache_manager.get_block_ids(request_id)[group]

    def generate(
        self, prompts: Sequence[Any], sampling: Any, keep_cache: bool = False
    ) -> list[Any]:
        """All prompts at once; without `keep_cache` the prefix cache is emptied first."""
        assert keep_cache or self.llm.reset_prefix_cache()
        return self.llm.generate(list(prompts), sampling, use_tqdm=False)

    def add(self, prompt: Any, sampling: Any) -> str:
        """Hands over a request, which `step` will run; returns the id that the scheduler uses."""
        (request_id,) = self.llm.enqueue(prompt, sampling, use_tqdm=False)
        return request_id

    def step(self) -> dict[str, Any]:
        """One scheduler step; what requests have so far that got a token, by id."""
        names = {name.rpartition("-")[0]: name for name in self.scheduler.requests}
        return {names[output.request_id]: output for output in self.llm.llm_engine.step()}

    def finish(self) -> dict[str, Any]:
        """Steps until no request is left; the last output of each by id."""
        last: dict[str, Any] = {}
        while self.llm.llm_engine.has_unfinished_requests():
            last.update(self.step())
        return last

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests wherever they are."""
        self.llm.llm_engine.abort_request(list(request_ids), internal=True)

    @contextmanager
    def at_most(self, tokens: int) -> Iterator[None]:
        """Steps of at most `tokens` tokens, as `max_num_batched_tokens` would make them."""
        before = self.scheduler.max_num_scheduled_tokens
        self.scheduler.max_num_scheduled_tokens = tokens
        try:
            yield
        finally:
            self.scheduler.max_num_scheduled_tokens = before

    @contextmanager
    def schedules(self) -> Iterator[list[dict[str, int]]]:
        """Yields a list that grows by the tokens of each request, step by step."""
        schedule, seen = self.scheduler.schedule, []

        def record(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.num_scheduled_tokens:
                seen.append(dict(output.num_scheduled_tokens))
            return output

        self.scheduler.schedule = record
        try:
            yield seen
        finally:
            del self.scheduler.schedule

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Cached values read as zero: what a cache that is never really read would give."""
        layers = self._compacted_layers()
        before = [impl.codec for _, impl in layers]
        for _, impl in layers:
            impl.codec = _forgetful(impl.codec)
        try:
            yield
        finally:
            for (_, impl), codec in zip(layers, before, strict=True):
                impl.codec = codec

    def _attention_layers(self) -> list[tuple[str, Any]]:
        layers = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        return [(name, layer) for name, layer in layers.items() if hasattr(layer, "kv_cache")]

    def _compacted_layers(self) -> list[tuple[str, AttentionPackImpl]]:
        return [
            (name, layer.impl)
            for name, layer in self._attention_layers()
            if isinstance(getattr(layer, "impl", None), AttentionPackImpl)
        ]


def _forgetful(codec: LayerCodec) -> LayerCodec:
    changed = codec.to(torch.device("cpu"))
    for group in changed.groups:
        group.value.basis.decode.zero_()
    return changed


class Engines:
    """One engine at a time: vLLM's process groups are global, so the next replaces the last."""

    def __init__(self) -> None:
        self._current: Engine | None = None
        self._arguments: dict[str, Any] | None = None

    def get(self, model: str | Path, **arguments: Any) -> Engine:
        """The engine with these arguments of `vllm.LLM`; started unless it is the running one."""
        wanted = {**_DEFAULTS, **arguments, "model": str(model)}
        if self._current is None or wanted != self._arguments:
            self.close()
            self._current, self._arguments = _start(wanted), wanted
        return self._current

    def close(self) -> None:
        """Shuts down the running engine, if any."""
        if self._current is not None:
            current, self._current = self._current, None
            shut_down(current.llm)


def _start(arguments: dict[str, Any]) -> Engine:
    from vllm import LLM

    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, level = Keep(), plugin.logger.level
    plugin.logger.addHandler(handler)
    plugin.logger.setLevel(logging.INFO)  # whatever VLLM_LOGGING_LEVEL says
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            return Engine(LLM(**arguments), messages)
    finally:
        plugin.logger.removeHandler(handler)
        plugin.logger.setLevel(level)
