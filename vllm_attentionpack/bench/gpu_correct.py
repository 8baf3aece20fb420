"""The GPU kernels against the reference on the same bytes, in the dtypes that are served."""

import multiprocessing
import os
import time
from typing import Any

import torch

from vllm_attentionpack.bench.gpu_pages import Pages, Run
from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.ops import QueryBatch, reference
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.exact import ExactTokens

#: Operands are float16, whose relative rounding is 2**-11; sums keep about ten bits.
TOLERANCE = 2e-3


def check_correct(run: Run) -> list[dict[str, Any]]:
    """Every kernel against the reference, in the dtypes that are served.

    Layers and dtypes are checked side by side, each in a process of its own: kernels take longer to
    compile than to run, and what is compiled here the measurements find in Triton's cache.
    """
    if run.dry:
        layers = [
            LayerShape(4, 2, 64, 2, 8),
            LayerShape(4, 2, 64, 1, 4, modalities=2, spread=24, joint_kv=True),
        ]
        dtypes = [torch.float16]
    else:
        layers = [
            LayerShape(32, 8, 128, 8, 8),
            LayerShape(32, 8, 128, 8, 4),
            LayerShape(32, 8, 128, 2, 4, spread=24),
            LayerShape(32, 8, 128, 1, 8, modalities=2),
            LayerShape(32, 8, 128, 1, 8, modalities=2, joint_kv=True),
            LayerShape(32, 8, 128, 2, 8, joint_kv=True),
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
                late = isinstance(error, multiprocessing.TimeoutError)
                reason = "out of time" if late else f"{type(error).__name__}: {error}"[:300]
                row = {"what": layer.name, "dtype": str(dtype), "error": reason, "passed": False}
                rows.append(row)
    return rows


def _check_layer(run: Run, layer: LayerShape, dtype: torch.dtype) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows = [_check_store(run, layer, dtype), _check_exact(run, layer, dtype)]
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


def _check_exact(run: Run, layer: LayerShape, dtype: torch.dtype) -> dict[str, Any]:
    """Exact tokens, some of them absent, merged with those of another step."""
    requests, most, size, blocks = 3, 67, 8, 40
    heads = layer.kv_heads, layer.head_size
    pages = torch.randn(blocks, size, 2, *heads, device=run.device).to(dtype)
    slots = torch.randperm(blocks * size, device=run.device)[: requests * most].view(requests, most)
    present = torch.rand(requests, most, device=run.device) < 0.8
    none = torch.zeros(requests, dtype=torch.int64, device=run.device)
    tokens = ExactTokens(slots, present, none, none, 4)
    starts = [0, 1, 6, 7]
    batch = QueryBatch.build(starts, [200] * requests, run.device)
    query = torch.randn(starts[-1], layer.query_heads, layer.head_size, device=run.device).to(dtype)
    found, want = (
        ops.merge_attention(
            ops.exact_attention(query, pages, tokens, batch, layer.head_size**-0.5),
            (query, torch.zeros(query.shape[:2], device=run.device)),
        )
        for ops in (kernels, reference)
    )
    error = ((found[0] - want[0]).abs().max() / want[0].abs().max()).item()
    lse_error = (found[1] - want[1]).abs().max().item()
    # Softmax weights meet values in the model's dtype, of which bfloat16 has eight bits.
    tolerance = TOLERANCE * (4 if dtype == torch.bfloat16 else 1)
    return {
        "what": f"exact tokens, {layer.name}",
        "dtype": str(dtype),
        "error": error,
        "lse_error": lse_error,
        "passed": error < tolerance and lse_error < 2 * TOLERANCE,
    }


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
