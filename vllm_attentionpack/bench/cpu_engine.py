"""`attentionpack bench engine --device cpu`: vLLM with its dense cache and with ours.

A model with random weights and small dense layers, so that attention is what takes the time. Both
engines run in this process, one after the other, with the same bytes of KV cache.

All prompts but their last token are the same, and both engines keep them in their prefix cache:
prefill is paid once, for its products grow with the square of the context (a minute for 8k tokens
on two cores), and every request of the batch then decodes over the whole context.
"""

import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from vllm_attentionpack import plugin
from vllm_attentionpack.bench.synthetic import save_dummy_model, synthetic_pack
from vllm_attentionpack.calibrate.assemble import Budget
from vllm_attentionpack.calibrate.settings import (
    DEFAULT_ANCHOR_SPAN,
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
)
from vllm_attentionpack.config import SECTION
from vllm_attentionpack.engine import shut_down
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.packfile import save_pack
from vllm_attentionpack.packfile.schema import Fingerprint


@dataclass(frozen=True)
class Setup:
    """The model and the load.

    Attributes:
        ratio: compression.
        group: KV heads coded jointly; what CPUs are fastest with (see docs/log.md).
        context: tokens of a prompt that all share; one follows.
        batch: requests at a time.
        new_tokens: decoded per request.
        sinks: first tokens of a request that stay exact.
        window: its last tokens that do.
        anchor_span: tokens whose keys share an anchor; 0 for none.
        pre_rope: code planes that turn far within a span pre-RoPE.
        joint_kv: code keys and values by one latent for both.
        repeats: runs of decoding.
        length: tokens of a request at its end.
        kv_bytes: bytes of KV cache of each engine; holds the batch densely.
    """

    layers: int = 4
    heads: int = 32
    kv_heads: int = 8
    head_size: int = 128
    hidden_size: int = 256
    ratio: float = 8.0
    group: int = 2
    context: int = 8192
    batch: int = 8
    new_tokens: int = 16
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    anchor_span: int = DEFAULT_ANCHOR_SPAN
    pre_rope: bool = False
    joint_kv: bool = False
    repeats: int = 3

    @property
    def length(self) -> int:
        return self.context + 1 + self.new_tokens

    @property
    def kv_bytes(self) -> int:
        per_token = self.layers * self.kv_heads * self.head_size * 4
        blocks = -(-self.length // 128) + 1
        return (self.batch * blocks + 2) * 128 * per_token


@dataclass(frozen=True)
class Figures:
    """One engine.

    Attributes:
        prefill: tokens per second of one prompt.
        decode: tokens per second over the whole batch, the median of the runs.
        largest_batch: requests of the setup that fit into the cache at a time.
    """

    prefill: float
    decode: float
    largest_batch: float


def compare(setup: Setup) -> dict[str, Any]:
    """Runs both engines; see `Setup`.

    Returns:
        `decode_speedup` and `prefill_ratio` (our rate over the dense one), `batch_ratio` (our
        largest batch over the dense one), and both engines' figures.

    Raises:
        ConfigError: head groups that do not divide the heads.
        BudgetError: the ratio cannot be met.
    """
    if setup.kv_heads % setup.group:
        raise ConfigError(
            f"the group size is {setup.group}, but the model has {setup.kv_heads} KV heads. Choose "
            "a divisor of them."
        )
    # before the dense run, not after it
    shape = setup.layers, setup.kv_heads, setup.head_size, setup.group, setup.joint_kv
    Budget(*shape).bytes_per_token(setup.ratio)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_dummy_model(
            model,
            num_layers=setup.layers,
            num_heads=setup.heads,
            num_kv_heads=setup.kv_heads,
            head_size=setup.head_size,
            hidden_size=setup.hidden_size,
            max_position=setup.length,
        )
        pack = Path(folder) / "model.pack.safetensors"
        dense = _run(model, setup, None, pack)
        ours = _run(model, setup, pack, pack)
    return {
        "decode_speedup": ours.decode / dense.decode,
        "prefill_ratio": ours.prefill / dense.prefill,
        "batch_ratio": ours.largest_batch / dense.largest_batch,
        "dense": asdict(dense),
        "ours": asdict(ours),
        "setup": asdict(setup),
    }


def _run(model: Path, setup: Setup, pack: Path | None, new_pack: Path) -> Figures:
    """Starts an engine, with `pack` a compacted one; a dense one writes `new_pack`."""
    # The engine in this process: what is measured then is not the way between two.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    plugin.register()
    from vllm import LLM

    arguments: dict[str, Any] = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "block_size": 128,
        "max_model_len": setup.length,
        # Uncut, so that the prefill of both attends to exact keys.
        "max_num_batched_tokens": setup.length,
        "max_num_seqs": setup.batch,
        "kv_cache_memory_bytes": setup.kv_bytes,
        "seed": 0,
    }
    if pack is not None:
        arguments["attention_backend"] = plugin.BACKEND
        section = {"pack": str(pack), "sinks": setup.sinks, "window": setup.window}
        arguments["additional_config"] = {SECTION: section}
    llm = LLM(**arguments)
    try:
        if pack is None:
            _write_pack(llm, setup, new_pack)
        cache = llm.llm_engine.vllm_config.cache_config
        tokens = cache.kv_cache_size_tokens or 0
        return _measure(llm, setup, tokens / setup.length)
    finally:
        shut_down(llm)


def _write_pack(llm: Any, setup: Setup, path: Path) -> None:
    from vllm_attentionpack.attention.fingerprint import fingerprint

    found: Fingerprint = fingerprint(llm.llm_engine.vllm_config.model_config)
    names = [f"model.layers.{i}.self_attn.attn" for i in range(setup.layers)]
    keys = setup.anchor_span, setup.pre_rope, setup.joint_kv
    save_pack(synthetic_pack(found, names, setup.group, setup.ratio, setup.length, *keys), path)


def _measure(llm: Any, setup: Setup, largest_batch: float) -> Figures:
    from vllm import SamplingParams

    prefix = np.random.default_rng(0).integers(3, 1000, setup.context).tolist()
    prompts = [{"prompt_token_ids": [*prefix, 3 + i]} for i in range(setup.batch)]

    def seconds(requests: int, new_tokens: int) -> float:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        llm.generate(prompts[:requests], sampling, use_tqdm=False)
        return time.perf_counter() - start

    warm_up = SamplingParams(max_tokens=2, detokenize=False)
    llm.generate([{"prompt_token_ids": [5] * 64}], warm_up, use_tqdm=False)
    prefill = seconds(1, 1)
    # What a run takes beyond its first step: all steps are of one token per request.
    steps = median(
        seconds(setup.batch, setup.new_tokens) - seconds(setup.batch, 1)
        for _ in range(setup.repeats)
    )
    return Figures(
        prefill=(setup.context + 1) / prefill,
        decode=setup.batch * (setup.new_tokens - 1) / steps,
        largest_batch=largest_batch,
    )
