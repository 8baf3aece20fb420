"""Attention to keys that are coded relative to anchors (`codec.positions.Anchors`).

A span of a request goes to `paged_attention` like a request of its own: with its part of the block
table, its bounds, and the request's queries turned back by its anchor; what that costs is one
absorption of the queries per span, and the merge of the spans. Kernels that read queries of their
own for every span save the merge (`SPANS` of `ops.cpu`). Where spans are very short, rebuilding
keys and turning them to where they stood is less (`ops.rebuilt`).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.positions import Rotary
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.latents import Part, attend_codes
from vllm_attentionpack.ops.pieces import MAX_TURNED, Piece, causal_pieces, context_pieces
from vllm_attentionpack.ops.rebuilt import rebuilt_attention

if TYPE_CHECKING:
    from vllm_attentionpack.ops.select import Ops

#: Spans up to this long are read by rebuilding their keys: measured on CPUs (docs/log.md).
MAX_REBUILT = 4

_Made = TypeVar("_Made")


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


def reserve_turns(query: Tensor) -> None:
    """Takes and frees what turning the most queries takes, alike to `query` `[..., Hq, D]`.

    They are gathered, widened to float32, turned, and brought back to their dtype.
    """
    size = 2 * query.element_size() + 2 * torch.float32.itemsize
    shape = (MAX_TURNED, *query.shape[-2:], size)
    torch.empty(shape, dtype=torch.uint8, device=query.device)


class StepSpans:
    """The anchors of one step, and what all layers derive from them alike.

    Args:
        ops: the implementation.
        size: tokens of a span.
        anchors: int64 `[B, n]`, the position of the first token of each span.
        batch: of the step.
        context_lens: int `[B]`, tokens of each request before this step.
        block_table: int32 `[B, max_blocks]`.
        block_size: `S`.
    """

    def __init__(
        self,
        ops: "Ops",
        size: int,
        anchors: Tensor,
        batch: QueryBatch,
        context_lens: Tensor,
        block_table: Tensor,
        block_size: int,
    ) -> None:
        self.ops, self.size, self.anchors, self.batch = ops, size, anchors, batch
        self.context_lens, self.block_table, self.block_size = context_lens, block_table, block_size
        self._rebuilds = size <= MAX_REBUILT
        self._within = ops.SPANS and anchors.shape[1] * batch.num_tokens <= MAX_TURNED
        cuts = not (self._rebuilds or self._within)
        # Here, not in the first layer: a graph must not capture copies from the host.
        self._pieces = context_pieces(batch, size, block_size) if cuts else []
        self._derived = _Derived(anchors.device)

    def of(self, requests: Tensor, batch: QueryBatch) -> "StepSpans":
        """Those of some `requests` of the step, int64, with their tokens as `batch`."""
        return StepSpans(
            self.ops,
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
        query: Tensor,
        kv_cache: Tensor,
        starts: Tensor | None,
        stops: Tensor,
        codec: LayerCodec,
        causal: bool,
        scale: float,
    ) -> Part:
        """As `attend_codes`, with each query turned back by the anchors that it meets.

        Args:
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
        if self._rebuilds:
            return rebuilt_attention(
                self.ops,
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
        if self._within:
            cos, sin = self._derived.get(
                ("all", rotary), lambda: rotary.tables(self.anchors[self._owners()].T.flatten())
            )
            repeated = query.expand(self.anchors.shape[1], *query.shape).flatten(0, 1)
            return attend_codes(
                self.ops,
                rotary.turn_by(repeated, cos, -sin),
                kv_cache,
                self.block_table,
                starts,
                stops,
                self.batch,
                codec,
                self.block_size,
                causal,
                scale,
                self.size,
            )
        merged: Part | None = None
        for piece in self._causal_pieces(stops) if causal else self._pieces:
            cos, sin = self._turns(piece, rotary)
            local_starts, local_stops = piece.bounds(starts, stops, self.size, self.block_size)
            out, lse = attend_codes(
                self.ops,
                rotary.turn_by(query[piece.tokens], cos, -sin),
                kv_cache,
                self._blocks(piece),
                local_starts,
                local_stops,
                piece.batch,
                codec,
                self.block_size,
                piece.causal,
                scale,
            )
            part = _merge_rows(out, lse, piece.rows)
            merged = part if merged is None else self.ops.merge_attention(merged, part)
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
