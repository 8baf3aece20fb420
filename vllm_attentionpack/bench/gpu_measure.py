"""Times of the GPU kernels beside dense attention, and of other launch shapes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from vllm_attentionpack.bench import baselines
from vllm_attentionpack.bench.gpu_pages import BLOCK_SIZE, Pages, Run
from vllm_attentionpack.bench.roofline import GOAL_SHAPES, decode, dense_decode
from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.triton import ops as host

#: What a dry run measures.
DRY_LAYER = LayerShape(4, 2, 64, 2, 8)


@dataclass(frozen=True)
class Goal:
    """What the speed-up over the best dense bfloat16 attention should be."""

    layer: LayerShape
    requests: int
    context: int
    speed_up: float


_GOALS = (4.0, 4.0, 4.0, 2.5, 2.5, 4.0, 1.5, 0.9)
GOALS = tuple(Goal(*shape, goal) for shape, goal in zip(GOAL_SHAPES, _GOALS, strict=True))


def measure_machine(run: Run) -> dict[str, float]:
    """Copy bandwidth in bytes per second (read and write counted) and bfloat16 matrix rate."""
    size, side = (1 << 20, 128) if run.dry else (1 << 31, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    copy = run.seconds(lambda: target.copy_(source))
    a, b = (torch.randn(side, side, device=run.device).bfloat16() for _ in range(2))
    return {
        "copy_bytes_per_second": 2 * size / copy,
        "matmul_flops": 2 * side**3 / run.seconds(lambda: a @ b),
    }


def measure_decode(run: Run, goal: Goal, copy_rate: float) -> dict[str, Any]:
    """One decode step against every dense attention that is installed."""
    layer, requests, context = goal.layer, goal.requests, goal.context
    if run.dry:
        layer, requests, context = DRY_LAYER, 2, 200
    dtype = torch.float16 if run.dry else torch.bfloat16
    ours, attend = _measure_ours(run, layer, requests, context, dtype)
    dense = baselines.decode(layer, requests, context, run.device, dtype, run.seconds)
    best, best_fp8, turboquant = (best_of(dense[held]) for held in ("dense", "fp8", "turboquant"))
    work = decode(layer, requests, context)
    return {
        "layer": layer.name,
        "requests": requests,
        "context": context,
        "ours_seconds": ours,
        "attend_seconds": attend,
        "dense_seconds": dense,
        "speed_up": best / ours if best else None,
        "speed_up_over_fp8": best_fp8 / ours if best_fp8 else None,
        "speed_up_over_turboquant": turboquant / ours if turboquant else None,
        "goal": goal.speed_up,
        "share_of_copy_bandwidth": work[1].bytes / attend / copy_rate,
        "dense_bytes": dense_decode(layer, requests, context).bytes,
    }


def _measure_ours(
    run: Run, layer: LayerShape, requests: int, context: int, dtype: torch.dtype
) -> tuple[float, float]:
    """Seconds of a whole decode step, and of attention alone."""
    pages = Pages.make(layer, requests, context, 1, run.device, dtype)
    absorbed = kernels.absorb_query(pages.query, pages.codec, 0.1)

    def attend() -> None:
        kernels.paged_attention(
            absorbed,
            pages.cache,
            pages.table,
            None,
            pages.lens,
            pages.batch,
            pages.codec,
            BLOCK_SIZE,
            False,
        )

    return run.seconds(lambda: pages.attend(kernels)), run.seconds(attend)


def measure_prefill(run: Run) -> dict[str, Any]:
    """A chunk of new tokens over a cached context, and the encoding of a prompt."""
    layer = LayerShape(32, 8, 128, 8, 8)
    context, chunk, prompt = 32768, 2048, 8192
    if run.dry:
        layer, context, chunk, prompt = DRY_LAYER, 100, 20, 64
    dtype = torch.float16 if run.dry else torch.bfloat16
    pages = Pages.make(layer, 1, context, chunk, run.device, dtype)
    ours = run.seconds(lambda: pages.attend(kernels), repeats=5)
    codec = pages.codec
    key = torch.randn(prompt, layer.kv_heads, layer.head_size, device=run.device, dtype=dtype)
    cache = torch.zeros(
        -(-prompt // BLOCK_SIZE),
        codec.layout.block_bytes(BLOCK_SIZE),
        dtype=torch.uint8,
        device=run.device,
    )
    slots = torch.arange(prompt, device=run.device)
    store = run.seconds(lambda: kernels.store_kv(key, key, cache, slots, None, codec, BLOCK_SIZE))
    return {
        "layer": layer.name,
        "context": context,
        "chunk": chunk,
        "context_attention_seconds": ours,
        "dense_context_attention_seconds": baselines.prefill(
            layer, context, chunk, run.device, dtype, run.seconds
        ),
        "prompt": prompt,
        "store_seconds": store,
        "dense_prompt_attention_seconds": baselines.prefill(
            layer, 0, prompt, run.device, dtype, run.seconds
        ),
    }


def tune(run: Run) -> Iterator[dict[str, Any]]:
    """Times of other launch shapes for the main decode shape; the first is the one in use."""
    goal = GOALS[0]
    layer, requests, context = goal.layer, goal.requests, goal.context
    if run.dry:
        layer, requests, context = DRY_LAYER, 2, 200
    dtype = torch.float16 if run.dry else torch.bfloat16
    pages = Pages.make(layer, requests, context, 1, run.device, dtype)
    heads = layer.query_heads // len(pages.codec.layout.groups)
    chosen = host.attend_shape
    changes: list[dict[str, int]] = [{}]
    for tile, warps in ((64, 4), (64, 8), (128, 8)):
        for rows in (16, 32):
            for stages in (1, 2, 3):
                changes.append({"tile": tile, "warps": warps, "rows": rows, "stages": stages})
    for change in changes[: 3 if run.dry else None]:
        if run.seconds_left() < 30:
            return
        row: dict[str, Any] = dict(change)
        if "rows" in change:
            change = change | {"query_tiles": -(-heads // change["rows"])}

        def shaped(*args: Any, change: dict[str, int] = change) -> Any:
            return replace(chosen(*args), **change)

        try:
            with mock.patch.object(host, "attend_shape", shaped):
                row["seconds"] = run.seconds(lambda: pages.attend(kernels), repeats=5)
        except Exception as error:  # a shape that does not fit the chip is a finding, not a fault
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        yield row


def best_of(seconds: dict[str, float | str]) -> float | None:
    """The shortest time among times and errors by name; None if there is no time."""
    return min((t for t in seconds.values() if isinstance(t, float)), default=None)
