"""Queries turned back by the anchors of the spans that they meet. Host side, once per step.

A query meets a span's codes turned back by the span's anchor (`codec.positions.Anchors`). All such
pairs of a call are rows: those of one request side by side, its first span first, and in each span
all its queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.ops.batch import QueryBatch

#: Turned queries of one call: bounds its memory.
MAX_TURNED = 8192


@dataclass(frozen=True, eq=False)
class SpanRows:
    """The rows of one call: `N` pairs of a query and a span.

    Attributes:
        size: tokens of a span.
        first: the first span of a request that the call reads.
        stop: one past the last.
        row_starts: int32 `[B]`, the first row of each request.
        tokens: int32 `[N]`, the query of each row.
        requests: int64 `[N]`, the request of each row.
        spans: int64 `[N]`, the span of each row.
    """

    size: int
    first: int
    stop: int
    row_starts: Tensor
    tokens: Tensor
    requests: Tensor
    spans: Tensor

    @property
    def start_token(self) -> int:
        """Of a request, the first that the call reads."""
        return self.first * self.size

    @property
    def stop_token(self) -> int:
        """One past the last."""
        return self.stop * self.size


@dataclass(frozen=True, eq=False)
class PreRope:
    """The planes of keys that are coded pre-RoPE (`Anchors.pre_rope`): the first `F` of a head.

    They are rebuilt, turned by the key's own position, and meet the query as it comes.

    Attributes:
        anchors: of the layer.
        positions: int32 `[B, L]`, of each request's tokens; None where they are their indices.
        cos: float32 `[positions, F]`, of every position.
        sin: float32 `[positions, F]`.
    """

    anchors: Anchors
    positions: Tensor | None
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, eq=False)
class Turns:
    """Rows with the angles that their queries are turned back by.

    Attributes:
        rows: which query meets which span.
        rotary: how the layer turns its heads.
        cos: float32 `[N, P]`, of the anchors; zero for planes that are coded pre-RoPE, as is `sin`,
            so that absorbed queries have none of them.
        sin: float32 `[N, P]`.
        pre_rope: how those planes are met; None where there are none.
    """

    rows: SpanRows
    rotary: Rotary
    cos: Tensor
    sin: Tensor
    pre_rope: PreRope | None = None

    def back(self, query: Tensor) -> Tensor:
        """The turned queries `[N, Hq, D]` of `query` `[T, Hq, D]`."""
        return self.rotary.turn_by(query[self.rows.tokens], self.cos, -self.sin)


def span_rows(batch: QueryBatch, size: int, causal: bool) -> list[SpanRows]:
    """The rows of a step, in as few calls as `MAX_TURNED` allows.

    Args:
        batch: of the step.
        size: tokens of a span.
        causal: whether queries see the step's own tokens, too.
    """
    starts = np.array(batch.host_starts)
    lengths = np.diff(starts)
    tokens = np.array(batch.max_seq_lens) - (0 if causal else lengths)
    counts = np.where(lengths > 0, -(-tokens // size), 0).clip(min=0)
    return [
        _rows(batch, size, first, stop, counts) for first, stop in pairwise(_cuts(lengths, counts))
    ]


def _cuts(lengths: np.ndarray, counts: np.ndarray) -> Iterator[int]:
    """Spans at which calls begin and end; at least one call."""
    longest = max(1, int(counts.max(initial=0)))
    # Rows of a span: the queries of the requests that reach it.
    rows = np.bincount(counts, lengths, longest + 1)[:0:-1].cumsum()[::-1]
    ends = rows.cumsum()
    start = 0
    yield start
    while start < longest:
        taken = ends[start] - rows[start]
        start = max(start + 1, int(ends.searchsorted(taken + MAX_TURNED, side="right")))
        yield start


def _rows(batch: QueryBatch, size: int, first: int, stop: int, counts: np.ndarray) -> SpanRows:
    device = batch.query_start_loc.device
    starts = np.array(batch.host_starts)
    lengths = np.diff(starts)
    spans = (counts - first).clip(0, stop - first)  # of each request, in this call
    rows = spans * lengths
    row_starts = rows.cumsum() - rows
    requests = np.repeat(np.arange(len(rows)), rows)
    within = np.arange(len(requests)) - row_starts[requests]
    span, query = np.divmod(within, np.maximum(lengths[requests], 1))

    def on_device(x: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(x).to(dtype).to(device)

    return SpanRows(
        size,
        first,
        stop,
        on_device(row_starts, torch.int32),
        on_device(starts[requests] + query, torch.int32),
        on_device(requests, torch.int64),
        on_device(first + span, torch.int64),
    )
