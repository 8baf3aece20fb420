"""Attention to keys that are coded relative to anchors (`codec.positions.Anchors`).

Queries are absorbed once for every span that they meet, turned back by its anchor (`ops.turns`),
and the kernels take the queries of the span that they read. Where spans are very short, rebuilding
keys and turning them to where they stood is less (`ops.rebuilt`).
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.positions import Anchors
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.latents import Part, attend_codes
from vllm_attentionpack.ops.rebuilt import rebuilt_attention
from vllm_attentionpack.ops.turns import PreRope, SpanRows, Turns, span_rows

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


class StepSpans:
    """The anchors of one step, and what all layers derive from them alike.

    Args:
        ops: the implementation.
        size: tokens of a span.
        anchors: int64 `[B, n]`, the position of the first token of each span.
        positions: int32 `[B, L]`, of every token; None where they are the tokens' indices.
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
        positions: Tensor | None,
        batch: QueryBatch,
        context_lens: Tensor,
        block_table: Tensor,
        block_size: int,
    ) -> None:
        self.ops, self.size, self.batch = ops, size, batch
        self.anchors, self.positions = anchors, positions
        self.context_lens, self.block_table, self.block_size = context_lens, block_table, block_size
        self._rebuilds = size <= MAX_REBUILT
        self._derived = _Derived(anchors.device)
        if anchors.device.type != "cpu" and not self._rebuilds:
            _ = self._rows  # not in the first layer: a graph must not capture copies from the host

    @cached_property
    def _rows(self) -> list[SpanRows]:
        return span_rows(self.batch, self.size, causal=False)

    def of(self, requests: Tensor, batch: QueryBatch) -> "StepSpans":
        """Those of some `requests` of the step, int64, with their tokens as `batch`."""
        return StepSpans(
            self.ops,
            self.size,
            self.anchors[requests],
            None if self.positions is None else self.positions[requests],
            batch,
            self.context_lens[requests],
            self.block_table[requests],
            self.block_size,
        )

    def turn_new_keys(self, key: Tensor, anchors: Anchors) -> Tensor:
        """The step's new keys `[T, Hk, D]` as they are coded."""

        def tables() -> tuple[Tensor, Tensor]:
            requests = self._owners()
            tokens = torch.arange(len(requests), device=requests.device)
            tokens += (self.context_lens - self.batch.query_start_loc[:-1])[requests]
            return self._tables(anchors, requests, tokens)

        cos, sin = self._derived.get(("new", anchors), tables)
        return anchors.rotary.turn_by(key, cos, -sin)

    def turn_cached_keys(self, key: Tensor, anchors: Anchors, request: int, first: int) -> Tensor:
        """Keys `[N, Hk, D]` of a request's tokens from `first` on, turned to where they stood."""

        def tables() -> tuple[Tensor, Tensor]:
            tokens = first + torch.arange(len(key), device=key.device)
            return self._tables(anchors, torch.full_like(tokens, request), tokens)

        cos, sin = self._derived.get(("cached", anchors, request, first, len(key)), tables)
        return anchors.rotary.turn_by(key, cos, sin)

    def _tables(self, anchors: Anchors, requests: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[N, P]` of tokens, int64 `[N]`, of requests, int64 `[N]`."""
        spans = (tokens // self.size).clamp(max=self.anchors.shape[1] - 1)
        own = tokens
        if self.positions is not None:
            own = self.positions[requests, tokens.clamp(max=self.positions.shape[1] - 1)]
        return anchors.tables(self.anchors[requests, spans], own)

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
        anchors = codec.anchors
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
                lambda key, request, first: self.turn_cached_keys(key, anchors, request, first),
            )
        merged: Part | None = None
        for turns in self.turns(anchors, causal):
            part = attend_codes(
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
                turns,
            )
            merged = part if merged is None else self.ops.merge_attention(merged, part)
        assert merged is not None
        return merged

    def turns(self, anchors: Anchors, causal: bool = False) -> list[Turns]:
        """Those of each call that the spans of the step take; see `attend`."""
        rows = self._rows
        if causal:
            rows = self._derived.get(
                "causal", lambda: span_rows(self.batch, self.size, causal=True)
            )
        return [self._turns(of_call, anchors) for of_call in rows]

    def _turns(self, rows: SpanRows, anchors: Anchors) -> Turns:
        def make() -> Turns:
            cos, sin = anchors.rotary.tables(self.anchors[rows.requests, rows.spans])
            cos[:, : anchors.pre_rope] = sin[:, : anchors.pre_rope] = 0
            own = self._pre_rope(anchors) if anchors.pre_rope else None
            return Turns(rows, anchors.rotary, cos, sin, own)

        return self._derived.get((rows, anchors), make)

    def _pre_rope(self, anchors: Anchors) -> PreRope:
        def make() -> PreRope:
            # Longer already where positions may be beyond indices (`attention.metadata`).
            tables = anchors.rotary.table(self.batch.max_seq_len + 1, anchors.pre_rope)
            return PreRope(anchors, self.positions, *tables)

        return self._derived.get(("pre-RoPE", anchors), make)

    def _owners(self) -> Tensor:
        """int64 `[T]`: the request of each token."""
        starts = self.batch.query_start_loc
        tokens = torch.arange(self.batch.num_tokens, dtype=starts.dtype, device=starts.device)
        # A graph may have been captured for more tokens than there are: those have no slots.
        owners = torch.searchsorted(starts[1:].contiguous(), tokens, right=True)
        return owners.clamp(max=len(starts) - 2)
