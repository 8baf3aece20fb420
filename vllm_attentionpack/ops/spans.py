"""Attention to keys that are coded relative to anchors (`codec.positions.Anchors`).

A span of a request goes to `paged_attention` like a request of its own: with its part of the block
table, its bounds, and the request's queries turned back by its anchor; what that costs is one
absorption of the queries per span, and the merge of the spans. Kernels that read queries of their
own for every span save the merge (`SPANS` of `ops.cpu`). Where spans are very short, rebuilding
keys and turning them to where they stood is less (`ops.rebuilt`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.rebuilt import rebuilt_attention

if TYPE_CHECKING:
    from vllm_attentionpack.ops.select import Ops

#: Queries, each turned back for one span, that are attended in one call: bounds its memory.
MAX_TURNED = 8192

#: Spans up to this long are read by rebuilding their keys: measured on CPUs (docs/log.md).
MAX_REBUILT = 4

_Made = TypeVar("_Made")

#: Output `[T, Hq, D]` and natural log-sum-exp `[T, Hq]` of the attention to some of the keys.
Part = tuple[Tensor, Tensor]


class _Derived:
    """What layers derive alike from the tensors of a step: made once, by whoever asks first.

    But in a CUDA graph that is being captured by each for itself: its tensors must come out of the
    graph's own work, and what was made before it began would stay what it was.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[object, Any] = {}

    def get(self, name: object, make: Callable[[], _Made]) -> _Made:
        if _capturing(self._device):
            return make()
        if name not in self._made:
            self._made[name] = make()
        found: _Made = self._made[name]
        return found


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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


def reserve_turns(query: Tensor) -> None:
    """Takes and frees what turning the most queries takes, alike to `query` `[..., Hq, D]`.

    They are gathered, widened to float32, turned, and brought back to their dtype.
    """
    size = 2 * query.element_size() + 2 * torch.float32.itemsize
    shape = (MAX_TURNED, *query.shape[-2:], size)
    torch.empty(shape, dtype=torch.uint8, device=query.device)


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


class StepSpans:
    """The anchors of one step, and what all layers derive from them alike.

    Args:
        size: tokens of a span.
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
        self.context_lens, self.block_table, self.block_size = context_lens, block_table, block_size
        # Here, not in the first layer: a graph must not capture copies from the host.
        # Unless another way is sure to be taken.
        rebuilds = size <= MAX_REBUILT
        self._pieces = [] if rebuilds else context_pieces(batch, size, block_size)
        self._derived = _Derived(anchors.device)

    def of(self, requests: Tensor, batch: QueryBatch) -> "StepSpans":
        """Those of some `requests` of the step, int64, with their tokens as `batch`."""
        return StepSpans(
            self.size,
            self.anchors[requests],
            batch,
            self.context_lens[requests],
            self.block_table[requests],
            self.block_size,
        )

    def turn_new_keys(self, key: Tensor, rotary: Rotary) -> Tensor:
        """The step's new keys `[T, Hk, D]`, each turned back by its anchor."""
        cos, sin = self._derived.get(("new", rotary), lambda: rotary.tables(self._new_anchors()))
        return rotary.turn_by(key, cos, -sin)

    def turn_cached_keys(self, key: Tensor, rotary: Rotary, request: int, first: int) -> Tensor:
        """Keys `[N, Hk, D]` of a request's tokens from `first` on, turned to where they stood."""
        spans = (first + torch.arange(len(key), device=key.device)) // self.size
        tables = self._derived.get(("cached", rotary), lambda: rotary.tables(self.anchors))
        cos, sin = (table[request, spans] for table in tables)
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
        if self.size <= MAX_REBUILT:
            return rebuilt_attention(
                ops,
                query,
                kv_cache,
                self.block_table,
                starts,
                stops,
                self.batch,
                codec,
                self.block_size,
                causal,
                scale,
                lambda key, request, first: self.turn_cached_keys(key, rotary, request, first),
            )
        spans, tokens = self.anchors.shape[1], self.batch.num_tokens
        if ops.SPANS and spans * tokens <= MAX_TURNED:
            cos, sin = self._derived.get(
                ("all", rotary), lambda: rotary.tables(self.anchors[self._owners()].T.flatten())
            )
            repeated = query.expand(spans, *query.shape).flatten(0, 1)
            attended = ops.paged_attention(
                ops.absorb_query(rotary.turn_by(repeated, cos, -sin), codec, scale),
                kv_cache,
                self.block_table,
                starts,
                stops,
                self.batch,
                codec,
                self.block_size,
                causal,
                self.size,
            )
            return ops.up_project(attended, codec), attended.lse
        merged: Part | None = None
        for piece in self._causal_pieces(stops) if causal else self._pieces:
            cos, sin = self._turns(piece, rotary)
            local_starts, local_stops = piece.bounds(starts, stops, self.size, self.block_size)
            attended = ops.paged_attention(
                ops.absorb_query(rotary.turn_by(query[piece.tokens], cos, -sin), codec, scale),
                kv_cache,
                self._blocks(piece),
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

    def _causal_pieces(self, stops: Tensor) -> list[Piece]:
        known = tuple(stops.tolist())
        return self._derived.get(
            known, lambda: causal_pieces(self.batch, self.size, self.block_size, known)
        )

    def _turns(self, piece: Piece, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, P]` of the anchor that each turned query meets."""

        def make() -> tuple[Tensor, Tensor]:
            return rotary.tables(self.anchors[piece.requests, piece.spans][piece.owners])

        return self._derived.get((piece, rotary), make)

    def _blocks(self, piece: Piece) -> Tensor:
        """int32 `[V, blocks]`: the block table of a piece."""
        size, block_size = self.size, self.block_size
        # Spans that do not divide blocks, nor blocks them, reach into one more.
        blocks = -(-size // block_size) + bool(size % block_size and block_size % size)

        def make() -> Tensor:
            table = self.block_table
            columns = torch.arange(blocks, device=table.device)
            columns = piece.spans[:, None] * size // block_size + columns
            return table[piece.requests[:, None], columns.clamp(max=table.shape[1] - 1)]

        return self._derived.get(piece, make)

    def _new_anchors(self) -> Tensor:
        """int64 `[T]`: those of the new tokens."""
        requests = self._owners()
        tokens = torch.arange(len(requests), device=requests.device)
        within = tokens - self.batch.query_start_loc[requests]
        spans = (within + self.context_lens[requests]) // self.size
        return self.anchors[requests, spans.clamp(max=self.anchors.shape[1] - 1)]

    def _owners(self) -> Tensor:
        """int64 `[T]`: the request of each token."""
        starts = self.batch.query_start_loc
        tokens = torch.arange(self.batch.num_tokens, dtype=starts.dtype, device=starts.device)
        # A graph may have been captured for more tokens than there are: those have no slots.
        owners = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
        return owners.clamp(max=len(starts) - 2)


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
    return out[rows].mul_(shares[..., None]).sum(1), total
