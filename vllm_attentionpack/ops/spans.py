"""Attention to keys that are coded relative to anchors (`codec.positions.Anchors`).

A span of a request goes to `paged_attention` like a request of its own: with its part of the block
table, its bounds, and the request's queries turned back by its anchor. So no kernel knows of
anchors; what they cost is one absorption of the queries per span, and the merge of the spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.ops.batch import QueryBatch

if TYPE_CHECKING:
    from vllm_attentionpack.ops.select import Ops

#: Queries, each turned back for one span, that are attended in one call: bounds its memory.
_MAX_TURNED = 8192

#: Output `[T, Hq, D]` and natural log-sum-exp `[T, Hq]` of the attention to some of the keys.
Part = tuple[Tensor, Tensor]


class _Turns:
    """Cosines and sines of turns by some positions, made once for all layers that turn alike."""

    def __init__(self, positions: Tensor) -> None:
        self.positions = positions
        self._made: dict[object, tuple[Tensor, Tensor]] = {}

    def by(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """See `Rotary.tables`."""
        if rotary.identity not in self._made:
            self._made[rotary.identity] = rotary.tables(self.positions)
        return self._made[rotary.identity]


@dataclass(frozen=True)
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
        self, starts: Tensor | None, stops: Tensor, size: int
    ) -> tuple[Tensor | None, Tensor]:
        """Where each span is read from and to, counted from its first token.

        Args:
            starts: int `[B]`, see `paged_attention`.
            stops: int `[B]`.
            size: tokens of a span.
        """
        first = self.spans * size
        # All queries of a causal piece but the last see less; those that see it all are elsewhere.
        local_stops = (stops[self.requests] - first).clamp(max=size - self.causal).int()
        if starts is None:
            return None, local_stops
        return (starts[self.requests] - first).clamp(min=0).int(), local_stops


def context_pieces(batch: QueryBatch, size: int) -> list[Piece]:
    """The spans of every request's context, each met by all queries of the request.

    Args:
        batch: of the step.
        size: tokens of a span.
    """
    entries = []
    for request, (first, stop) in enumerate(pairwise(batch.host_starts)):
        context = batch.max_seq_lens[request] - (stop - first)
        if stop > first:
            entries += [(request, span, first, stop) for span in range(max(1, -(-context // size)))]
    return _in_calls(entries, batch, size, causal=False)


def causal_pieces(batch: QueryBatch, size: int, stops: Sequence[int]) -> list[Piece]:
    """The same where each query sees one token less than the next.

    A query that sees all of a span meets it like a context; only those that end within it are
    causal there.

    Args:
        batch: of the step.
        size: tokens of a span.
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
    pieces = _in_calls(whole, batch, size, causal=False)
    return pieces + _in_calls(partly, batch, size, causal=True)


def _in_calls(
    entries: list[tuple[int, int, int, int]], batch: QueryBatch, size: int, causal: bool
) -> list[Piece]:
    """Entries are (request, span, first query, one past the last)."""
    entries = sorted(entries, key=lambda entry: entry[1])
    pieces, start, taken = [], 0, 0
    for index, (_, _, first, stop) in enumerate(entries):
        if taken and taken + stop - first > _MAX_TURNED:
            pieces.append(_piece(entries[start:index], batch, size, causal))
            start, taken = index, 0
        taken += stop - first
    if taken:
        pieces.append(_piece(entries[start:], batch, size, causal))
    return pieces


def _piece(
    entries: list[tuple[int, int, int, int]], batch: QueryBatch, size: int, causal: bool
) -> Piece:
    device = batch.query_start_loc.device
    requests, spans, firsts, stops = np.array(entries).T
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
        QueryBatch.build(starts.tolist(), (size + lengths).tolist(), device),
        causal,
    )


class StepSpans:
    """The anchors of one step, and what all layers derive from them alike.

    Args:
        size: tokens of a span, whole blocks.
        anchors: int64 `[B, n]`, the position of the first token of each span.
        batch: of the step.
        context_lens: int `[B]`, tokens of each request before this step.
        block_table: int32 `[B, max_blocks]`.
        block_size: `S`.
    """

    def __init__(
        self,
        size: int,
        anchors: Tensor,
        batch: QueryBatch,
        context_lens: Tensor,
        block_table: Tensor,
        block_size: int,
    ) -> None:
        self.size, self.anchors, self.batch = size, anchors, batch
        self.block_size = block_size
        blocks = size // block_size
        missing = anchors.shape[1] * blocks - block_table.shape[1]
        table = torch.nn.functional.pad(block_table, (0, max(0, missing)))
        self._blocks = table[:, : anchors.shape[1] * blocks].unflatten(1, (-1, blocks))
        self._context_lens = context_lens
        self._all_turns = _Turns(anchors)

    def of(self, requests: Tensor, batch: QueryBatch) -> "StepSpans":
        """Those of some `requests` of the step, int64, with their tokens as `batch`."""
        return StepSpans(
            self.size,
            self.anchors[requests],
            batch,
            self._context_lens[requests],
            self._blocks[requests].flatten(1),
            self.block_size,
        )

    def turn_new_keys(self, key: Tensor, rotary: Rotary) -> Tensor:
        """The step's new keys `[T, Hk, D]`, each turned back by its anchor."""
        cos, sin = self._new_turns.by(rotary)
        return rotary.turn_by(key, cos, -sin)

    def turn_cached_keys(self, key: Tensor, rotary: Rotary, request: int, first: int) -> Tensor:
        """Keys `[N, Hk, D]` of a request's tokens from `first` on, turned to where they stood."""
        spans = (first + torch.arange(len(key), device=key.device)) // self.size
        cos, sin = (table[request, spans] for table in self._all_turns.by(rotary))
        return rotary.turn_by(key, cos, sin)

    def attend(
        self,
        ops: "Ops",
        query: Tensor,
        kv_cache: Tensor,
        starts: Tensor | None,
        stops: Tensor,
        codec: LayerCodec,
        causal: bool,
        scale: float,
    ) -> Part:
        """As `absorb_query`, `paged_attention` and `up_project` together, span by span.

        Args:
            ops: the implementation.
            query: `[T, Hq, D]`.
            kv_cache: see `ops.reference.paged_attention`, as are the others.
            starts: int `[B]`; None for 0.
            stops: int `[B]`.
            codec: with anchors.
            causal: True if each query sees one token less than the next.
            scale: softmax scale.

        Returns:
            The output, float32 `[T, Hq, D]`, and the log-sum-exp.
        """
        assert codec.anchors is not None
        rotary = codec.anchors.rotary
        merged: Part | None = None
        pieces = self._causal_pieces(stops) if causal else self._context_pieces
        for piece, turns, blocks in pieces:
            cos, sin = turns.by(rotary)
            local_starts, local_stops = piece.bounds(starts, stops, self.size)
            attended = ops.paged_attention(
                ops.absorb_query(rotary.turn_by(query[piece.tokens], cos, -sin), codec, scale),
                kv_cache,
                blocks,
                local_starts,
                local_stops,
                piece.batch,
                codec,
                self.block_size,
                piece.causal,
            )
            part = _merge_rows(ops.up_project(attended, codec), attended.lse, piece.rows)
            merged = part if merged is None else ops.merge_attention(merged, part)
        if merged is None:  # no query sees anything
            lse = torch.full(query.shape[:2], float("-inf"), device=query.device)
            return torch.zeros(query.shape, device=query.device), lse
        return merged

    @cached_property
    def _new_turns(self) -> _Turns:
        starts = self.batch.query_start_loc.long()
        device = starts.device
        lengths = starts[1:] - starts[:-1]
        count = self.batch.num_tokens
        requests = torch.arange(len(lengths), device=device)
        requests = requests.repeat_interleave(lengths, output_size=count)
        index = torch.arange(count, device=device) - starts[requests] + self._context_lens[requests]
        return _Turns(self.anchors[requests, index // self.size])

    @cached_property
    def _context_pieces(self) -> list[tuple[Piece, _Turns, Tensor]]:
        return [self._prepared(piece) for piece in context_pieces(self.batch, self.size)]

    def _causal_pieces(self, stops: Tensor) -> list[tuple[Piece, _Turns, Tensor]]:
        pieces = causal_pieces(self.batch, self.size, stops.tolist())
        return [self._prepared(piece) for piece in pieces]

    def _prepared(self, piece: Piece) -> tuple[Piece, _Turns, Tensor]:
        anchors = self.anchors[piece.requests, piece.spans]
        return piece, _Turns(anchors[piece.owners]), self._blocks[piece.requests, piece.spans]


def _merge_rows(out: Tensor, lse: Tensor, rows: Tensor) -> Part:
    """Merges what the turned queries of each query gave.

    Args:
        out: float32 `[N, Hq, D]`.
        lse: float32 `[N, Hq]`.
        rows: int64 `[T, n]`, `N` for none.
    """
    missing = rows == len(out)
    rows = rows.masked_fill(missing, 0)
    logs = lse[rows].masked_fill_(missing[..., None], float("-inf"))  # [T, n, Hq]
    total = logs.logsumexp(1)
    shares = (logs - torch.where(total.isinf(), 0.0, total)[:, None]).exp_()
    return torch.einsum("tnh,tnhd->thd", shares, out[rows]), total
