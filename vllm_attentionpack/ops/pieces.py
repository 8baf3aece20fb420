"""How spans of requests are cut into calls of `paged_attention`. Host side, once per step."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.ops.batch import QueryBatch

#: Queries, each turned back for one span, that are attended in one call: bounds its memory.
MAX_TURNED = 8192


@dataclass(frozen=True, eq=False)
class Piece:
    """Spans of requests that are attended in one call: `V` of them, met by `N` turned queries.

    Attributes:
        requests: int64 `[V]`, rows of the step's block table.
        spans: int64 `[V]`, which span of the request.
        tokens: int64 `[N]`, the query of the step that each turned one comes from.
        owners: int64 `[N]`, the span that it meets.
        rows: int64 `[T, n]`, the turned queries of each query of the step; `N` for none.
        batch: the spans as requests.
        causal: as `paged_attention` has it.
    """

    requests: Tensor
    spans: Tensor
    tokens: Tensor
    owners: Tensor
    rows: Tensor
    batch: QueryBatch
    causal: bool

    def bounds(
        self, starts: Tensor | None, stops: Tensor, size: int, block_size: int
    ) -> tuple[Tensor | None, Tensor]:
        """Where each span is read from and to, counted from the block that its first token is in.

        Args:
            starts: int `[B]`, see `paged_attention`.
            stops: int `[B]`.
            size: tokens of a span.
            block_size: `S`.
        """
        # In the dtypes that are given: kernels are compiled for them.
        first = (self.spans * size).to(stops.dtype)
        offset = first % block_size
        # All queries of a causal piece but the last see less; those that see it all are elsewhere.
        seen = (stops[self.requests] - first).clamp(max=size - self.causal)
        if starts is None:
            return offset if size % block_size else None, seen + offset
        return (starts[self.requests] - first).clamp(min=0) + offset, seen + offset


def context_pieces(batch: QueryBatch, size: int, block_size: int) -> list[Piece]:
    """The spans of every request's context, each met by all queries of the request.

    Args:
        batch: of the step.
        size: tokens of a span.
        block_size: `S`.
    """
    starts = np.array(batch.host_starts)
    lengths = np.diff(starts)
    contexts = np.array(batch.max_seq_lens) - lengths
    counts = np.where(lengths > 0, np.maximum(1, -(-contexts // size)), 0)
    requests = np.repeat(np.arange(len(counts)), counts)
    spans = np.arange(len(requests)) - (counts.cumsum() - counts)[requests]
    entries = np.stack([requests, spans, starts[requests], starts[requests + 1]], axis=1)
    return _in_calls(entries, batch, size + block_size, causal=False)


def causal_pieces(
    batch: QueryBatch, size: int, block_size: int, stops: Sequence[int]
) -> list[Piece]:
    """The same where each query sees one token less than the next.

    A query that sees all of a span meets it like a context; only those that end within it are
    causal there.

    Args:
        batch: of the step.
        size: tokens of a span.
        block_size: `S`.
        stops: what the last query of each request sees.
    """
    whole, partly = [], []
    for request, (first, stop) in enumerate(pairwise(batch.host_starts)):
        if stop == first:
            continue
        shown = [stops[request] - (stop - 1 - token) for token in (first, stop - 1)]
        for span in range(max(0, -(-shown[1] // size))):
            begin, end = span * size, (span + 1) * size
            # The first query that sees anything of the span, and the first that sees all of it.
            some = min(max(first, first + begin + 1 - shown[0]), stop)
            every = min(max(first, first + end - shown[0]), stop)
            if every < stop:
                whole.append((request, span, every, stop))
            if some < every:
                partly.append((request, span, some, every))
    return [
        piece
        for entries, causal in ((whole, False), (partly, True))
        for piece in _in_calls(np.array(entries).reshape(-1, 4), batch, size + block_size, causal)
    ]


def _in_calls(entries: np.ndarray, batch: QueryBatch, longest: int, causal: bool) -> list[Piece]:
    """Entries `[V, 4]` are (request, span, first query, one past the last).

    No span reaches beyond `longest` tokens of its blocks.
    """
    entries = entries[entries[:, 1].argsort(kind="stable")]
    queries = (entries[:, 3] - entries[:, 2]).cumsum()
    pieces, start, taken = [], 0, 0
    while start < len(entries):
        stop = max(start + 1, int(queries.searchsorted(taken + MAX_TURNED, side="right")))
        pieces.append(_piece(entries[start:stop], batch, longest, causal))
        start, taken = stop, queries[stop - 1]
    return pieces


def _piece(entries: np.ndarray, batch: QueryBatch, longest: int, causal: bool) -> Piece:
    device = batch.query_start_loc.device
    requests, spans, firsts, stops = entries.T
    lengths = stops - firsts
    starts = np.concatenate([[0], lengths.cumsum()])
    owners = np.repeat(np.arange(len(entries)), lengths)
    tokens = firsts[owners] + np.arange(starts[-1]) - starts[owners]
    order = tokens.argsort(kind="stable")
    sorted_tokens = tokens[order]
    within = np.arange(len(order)) - np.searchsorted(sorted_tokens, sorted_tokens)
    rows = np.full((batch.num_tokens, within.max() + 1), len(order))
    rows[sorted_tokens, within] = order

    def on_device(x: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    return Piece(
        on_device(requests),
        on_device(spans),
        on_device(tokens),
        on_device(owners),
        on_device(rows),
        QueryBatch.build(starts.tolist(), (longest + lengths).tolist(), device),
        causal,
    )
