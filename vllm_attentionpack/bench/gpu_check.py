"""What `scripts/gpu_check.sh` runs: the kernels on a GPU, against the reference and against others.

Parts: `rates` (copy bandwidth and matrix rate), `correct` (every kernel against the reference on
the same bytes), `decode` and `prefill` (with the encoding of new tokens) against dense attention,
`tune` (other launch shapes). None imports vLLM unless it is there to be measured. What fails or is
out of time is reported as such and ends nothing else. `--dry-run` takes the same path with tiny
shapes on a CPU, in Triton's interpreter: its times mean nothing, its comparisons do.
"""

import argparse
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from vllm_attentionpack.bench import baselines
from vllm_attentionpack.bench.roofline import GOAL_SHAPES, decode, dense_decode
from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops import QueryBatch, reference
from vllm_attentionpack.ops import triton as kernels

#: Operands are float16, whose relative rounding is 2**-11; sums keep about ten bits.
TOLERANCE = 2e-3
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Goal:
    """What the speed-up over the best dense bfloat16 attention should be."""

    layer: LayerShape
    requests: int
    context: int
    speed_up: float


class OutOfTime(BaseException):
    """The budget is used up. Not an `Exception`: those are caught and reported, part by part."""


_GOALS = (4.0, 4.0, 4.0, 2.5, 2.5, 4.0, 1.5, 0.9)
GOALS = tuple(Goal(*shape, goal) for shape, goal in zip(GOAL_SHAPES, _GOALS, strict=True))


@dataclass
class Run:
    """One run of the check: where, how large, until when."""

    device: torch.device
    dry: bool
    deadline: float

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def seconds(self, step: Callable[[], Any], repeats: int = 20) -> float:
        """Median seconds of `step`, captured as a CUDA graph, the second-level cache cold."""
        if self.dry:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        flush = torch.empty(1 << 28, dtype=torch.uint8, device=self.device)
        times = []
        for _ in range(repeats):
            flush.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            graph.replay()
            after.record()
            torch.cuda.synchronize()
            times.append(before.elapsed_time(after) / 1e3)
        return statistics.median(times)


@dataclass
class Pages:
    """Random codes of `requests` contexts and a decode step's queries."""

    codec: LayerCodec
    cache: Tensor
    table: Tensor
    lens: Tensor
    batch: QueryBatch
    query: Tensor

    @classmethod
    def make(
        cls,
        layer: LayerShape,
        requests: int,
        context: int,
        query_len: int,
        device: torch.device,
        dtype: torch.dtype,
        block_size: int = BLOCK_SIZE,
    ) -> "Pages":
        codec = layer.codec(device)
        blocks = -(-(context + query_len) // block_size)
        order = torch.randperm(requests * blocks, device=device).int()
        cache = torch.randint(
            0,
            256,
            (requests * blocks, codec.layout.block_bytes(block_size)),
            dtype=torch.uint8,
            device=device,
        )
        for plane in codec.layout.planes(block_size):
            if plane.bits == 0:  # scales near one: random ones would leave a single token in sight
                cache[:, plane.offset : plane.offset + block_size].remainder_(16).add_(56)
        starts = [query_len * i for i in range(requests + 1)]
        return cls(
            codec,
            cache,
            order.view(requests, blocks),
            torch.full((requests,), context, dtype=torch.int32, device=device),
            QueryBatch.build(starts, [context + query_len] * requests, device),
            torch.randn(
                requests * query_len, layer.query_heads, layer.head_size, device=device, dtype=dtype
            ),
        )

    def attend(self, ops: Any, causal: bool = False, block_size: int = BLOCK_SIZE) -> Any:
        scale = self.query.shape[-1] ** -0.5
        attended = ops.paged_attention(
            ops.absorb_query(self.query, self.codec, scale),
            self.cache,
            self.table,
            None,
            self.lens,
            self.batch,
            self.codec,
            block_size,
            causal,
        )
        return ops.up_project(attended, self.codec), attended.lse


def check_correct(run: Run) -> list[dict[str, Any]]:
    """Every kernel against the reference, in the dtypes that are served.

    Layers and dtypes are checked side by side, each in a process of its own: kernels take longer to
    compile than to run, and what is compiled here the measurements find in Triton's cache.
    """
    if run.dry:
        layers = [LayerShape(4, 2, 64, 2, 8), LayerShape(4, 2, 64, 1, 4, modalities=2)]
        dtypes = [torch.float16]
    else:
        layers = [
            LayerShape(32, 8, 128, 8, 8),
            LayerShape(32, 8, 128, 8, 4),
            LayerShape(32, 8, 128, 1, 8, modalities=2),
            LayerShape(32, 32, 128, 8, 8, modalities=2),
            LayerShape(16, 4, 64, 4, 8),
            LayerShape(16, 4, 80, 4, 8),
            LayerShape(16, 4, 96, 4, 8),
            LayerShape(16, 1, 256, 1, 8),
        ]
        dtypes = [torch.bfloat16, torch.float16]
    work = [(layer, dtype) for dtype in dtypes for layer in layers]
    deadline = time.monotonic() + 0.6 * run.seconds_left()
    rows: list[dict[str, Any]] = []
    # A CUDA context does not survive a fork.
    with multiprocessing.get_context("spawn").Pool(min(len(work), os.cpu_count() or 1)) as pool:
        running = [pool.apply_async(_check_layer, (run, *one)) for one in work]
        for (layer, dtype), found in zip(work, running, strict=True):
            try:
                rows += found.get(max(0.0, deadline - time.monotonic()))
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"[:300]
                row = {"what": layer.name, "dtype": str(dtype), "error": reason, "passed": False}
                rows.append(row)
    return rows


def _check_layer(run: Run, layer: LayerShape, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows = [_check_store(run, layer, dtype)]
    steps = [(1000, 1, 128), (333, 5, 16), (700, 200, 64)]
    if run.dry:
        steps = [(40, 1, 16), (200, 3, 32)]
    for context, query_len, block_size in steps:
        pages = Pages.make(layer, 3, context, query_len, run.device, dtype, block_size)
        causal = query_len > 1
        out, lse = pages.attend(kernels, causal, block_size)
        want, want_lse = pages.attend(reference, causal, block_size)
        error = ((out - want).abs().max() / want.abs().max()).item()
        lse_error = (lse - want_lse).abs().max().item()
        rows.append(
            {
                "what": f"attention, {layer.name}, {context}+{query_len}, S={block_size}",
                "dtype": str(dtype),
                "error": error,
                "lse_error": lse_error,
                "passed": error < TOLERANCE and lse_error < 2 * TOLERANCE,
            }
        )
    return rows


def _check_store(run: Run, layer: LayerShape, dtype: torch.dtype) -> dict[str, Any]:
    """The share of bytes that the two versions store differently: a code on an edge may fall."""
    codec, tokens, size = layer.codec(run.device), 32 if run.dry else 300, 16
    key, value = (
        torch.randn(tokens, layer.kv_heads, layer.head_size, device=run.device, dtype=dtype)
        for _ in range(2)
    )
    slots = torch.randperm(tokens + 20, device=run.device)[:tokens]
    visual = torch.rand(tokens, device=run.device) < 0.5
    caches = []
    for ops in (kernels, reference):
        cache = torch.zeros(
            -(-(tokens + 20) // size),
            codec.layout.block_bytes(size),
            dtype=torch.uint8,
            device=run.device,
        )
        ops.store_kv(key, value, cache, slots, visual, codec, size)
        caches.append(cache)
    different = (caches[0] != caches[1]).float().mean().item()
    return {
        "what": f"store, {layer.name}",
        "dtype": str(dtype),
        "error": different,
        "passed": different < 0.05 and bool(caches[0].any()),
    }


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
        layer, requests, context = LayerShape(4, 2, 64, 2, 8), 2, 200
    dtype = torch.float16 if run.dry else torch.bfloat16
    ours, attend = _measure_ours(run, layer, requests, context, dtype)
    dense = baselines.decode(layer, requests, context, run.device, dtype, run.seconds)
    best = _best(dense["dense"])
    best_fp8 = _best(dense["fp8"])
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
        layer, context, chunk, prompt = LayerShape(4, 2, 64, 2, 8), 100, 20, 64
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


def tune(run: Run) -> list[dict[str, Any]]:
    """Times of other launch shapes for the main decode shape; the first is the one in use."""
    from vllm_attentionpack.ops.triton import ops as host

    goal = GOALS[0]
    layer, requests, context = goal.layer, goal.requests, goal.context
    if run.dry:
        layer, requests, context = LayerShape(4, 2, 64, 2, 8), 2, 200
    dtype = torch.float16 if run.dry else torch.bfloat16
    pages = Pages.make(layer, requests, context, 1, run.device, dtype)
    chosen = host.attend_shape
    changes: list[dict[str, int]] = [{}]
    for tile, warps in ((64, 4), (64, 8), (128, 8)):
        for rows in (16, 32):
            for stages in (1, 2, 3):
                changes.append({"tile": tile, "warps": warps, "rows": rows, "stages": stages})
    rows_out = []
    for change in changes[: 3 if run.dry else None]:
        if run.seconds_left() < 30:
            break

        def shaped(*args: Any, change: dict[str, int] = change, **kwargs: Any) -> Any:
            shape = chosen(*args, **kwargs)
            if "rows" in change:
                heads = layer.query_heads // len(pages.codec.layout.groups)
                change = change | {"query_tiles": -(-heads // change["rows"])}
            return replace(shape, **change)

        row: dict[str, Any] = dict(change)
        try:
            with mock.patch.object(host, "attend_shape", shaped):
                row["seconds"] = run.seconds(lambda: pages.attend(kernels), repeats=5)
        except Exception as error:  # a shape that does not fit the chip is a finding, not a fault
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows_out.append(row)
    return rows_out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu_check.json")
    parser.add_argument("--budget", type=float, default=400, help="seconds for all parts")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in the interpreter")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry_run else "cuda")
    reason = kernels.unavailable(device)
    if reason:
        print(f"gpu_check: the kernels cannot run here: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    run = Run(device, options.dry_run, time.monotonic() + options.budget)
    result: dict[str, Any] = {"dry_run": run.dry, "machine": _machine(run), "correct": []}
    options.out.mkdir(parents=True, exist_ok=True)
    name = "gpu_check_dry_run.json" if run.dry else "gpu_check.json"

    def save() -> None:
        (options.out / name).write_text(json.dumps(result, indent=1) + "\n")

    def out_of_time(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, options.budget)
    try:
        _measure(run, result, save)
    except OutOfTime:
        result["out_of_time"] = True
    save()
    print(_table(result))
    passed = result["correct"] and all(row["passed"] for row in result["correct"])
    return 0 if passed else 1


def _measure(run: Run, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Fills `result` part by part, the most important first."""
    result["rates"] = measure_machine(run)
    result["correct"] = check_correct(run)
    save()
    result["decode"] = []
    for goal in GOALS[:1] if run.dry else GOALS:
        row: dict[str, Any] = {
            "layer": goal.layer.name,
            "requests": goal.requests,
            "context": goal.context,
        }
        try:
            row = measure_decode(run, goal, result["rates"]["copy_bytes_per_second"])
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {error}"[:300]
        result["decode"].append(row)
        save()
    try:
        result["prefill"] = measure_prefill(run)
    except Exception as error:
        result["prefill"] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    save()
    result["tune"] = tune(run)


def _machine(run: Run) -> dict[str, str]:
    import triton

    name = "none (interpreter)" if run.dry else torch.cuda.get_device_name(run.device)
    return {"gpu": name, "torch": torch.__version__, "triton": triton.__version__}


def _table(result: dict[str, Any]) -> str:
    correct, rates = result["correct"], result.get("rates")
    passed = sum(row["passed"] for row in correct)
    lines = [
        f"gpu_check on {result['machine']['gpu']}: {passed} of {len(correct)} comparisons passed"
        + (
            f"; copy {rates['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"bf16 matmul {rates['matmul_flops'] / 1e12:.0f} TFLOP/s"
            if rates
            else ""
        )
    ]
    failed = [row for row in correct if not row["passed"]]
    lines += [f"FAILED {row['what']}, {row['dtype']}: {row['error']}" for row in failed[:8]]
    lines += [
        "| layer | requests x context | ours | best dense | speed-up | over fp8 | goal "
        "| of copy rate |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result.get("decode", []):
        start = f"| {row['layer']} | {row['requests']} x {row['context']} "
        if "failed" in row:
            lines.append(f"{start}| failed: {row['failed'][:100]} | | | | | |")
            continue
        best = _best(row["dense_seconds"]["dense"])
        lines.append(
            f"{start}| {row['ours_seconds'] * 1e6:.1f} us "
            f"| {f'{best * 1e6:.1f} us' if best else 'none ran'} "
            f"| {_times(row['speed_up'])} | {_times(row['speed_up_over_fp8'])} | {row['goal']} "
            f"| {row['share_of_copy_bandwidth']:.0%} |"
        )
    prefill = result.get("prefill", {"failed": "not reached"})
    if "failed" in prefill:
        lines.append(f"prefill and store failed: {prefill['failed'][:100]}")
    else:
        dense = _best(prefill["dense_prompt_attention_seconds"])
        share = f"{prefill['store_seconds'] / dense:.1%}" if dense else "unknown share"
        context = _best(prefill["dense_context_attention_seconds"])
        times = context / prefill["context_attention_seconds"] if context else None
        lines.append(
            f"store of {prefill['prompt']} tokens: {prefill['store_seconds'] * 1e6:.1f} us, {share}"
            " of the layer's dense prompt attention (goal: at most 5 %); "
            f"{prefill['chunk']} new tokens over {prefill['context']}: "
            f"{prefill['context_attention_seconds'] * 1e6:.1f} us, {_times(times)} times as fast "
            "as dense"
        )
    if result.get("out_of_time"):
        lines.append("out of time: later parts are missing")
    return "\n".join(lines)


def _best(seconds: dict[str, float | str]) -> float | None:
    return min((t for t in seconds.values() if isinstance(t, float)), default=None)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
