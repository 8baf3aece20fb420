"""What the parts of `gpu_check` share: how a step is timed, and contexts of random codes."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_attentionpack.bench.shapes import LayerShape
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops import QueryBatch
from vllm_attentionpack.ops.latents import attend_codes

BLOCK_SIZE = 128


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
        return attend_codes(
            ops,
            self.query,
            self.cache,
            self.table,
            None,
            self.lens,
            self.batch,
            self.codec,
            block_size,
            causal,
            self.query.shape[-1] ** -0.5,
        )
