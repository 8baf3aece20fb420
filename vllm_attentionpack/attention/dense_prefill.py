"""Prefill on CPUs by vLLM's own attention op, as a dense cache would have it.

Where many new tokens read a context, rebuilding it once is cheaper than absorbing every one of them
into latents: the context's keys and values are decompressed into scratch pages in vLLM's dense
layout, the new tokens are put behind them, and vLLM's op attends to all in one go. MLA models are
prefilled so, too (DeepSeek-V2, arXiv 2405.04434).
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, _get_attn_isa

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops import ExactTokens, QueryBatch
from vllm_attentionpack.ops.select import Ops
from vllm_attentionpack.ops.spans import StepSpans

if TYPE_CHECKING:
    from vllm_attentionpack.attention.metadata import AttentionPackMetadata

#: A chunk with a context of fewer new tokens is attended to faster in latents.
MIN_QUERIES = 64
#: Of one layer's keys and values in dense form, for all requests of a step; what goes beyond it is
#: read in latents.
WORKSPACE_BYTES = 1 << 28
#: Tokens, about, that are decompressed at a time: bounds what comes on top of the workspace.
_SLAB = 4096
_BLOCK_SIZE = 128


def unavailable(head_size: int, dtype: torch.dtype) -> str | None:
    """Why dense prefill cannot be used on this CPU; None if it can."""
    if dtype != torch.bfloat16:
        return f"it is for bfloat16, the model is {dtype}"
    if not torch.cpu._is_avx512_supported():
        return "without AVX-512 PyTorch's attention is faster"
    if head_size not in CPUAttentionBackend.get_supported_head_sizes():
        return f"vLLM's op does not take heads of {head_size}"
    return None


@dataclass(frozen=True)
class DenseStep:
    """The requests of one step that are prefilled densely, and all others.

    Attributes:
        workspace: where to.
        requests: the former, rows of the step's block table.
        contexts: tokens that each of them has in the cache.
        tokens: int64, their new tokens.
        slots: where each of them begins in the workspace.
        fresh_slots: int64, of their new tokens.
        query_start_loc: int32 `[requests + 1]`.
        seq_lens: int32 `[requests]`.
        block_table: int32, of the workspace.
        last_blocks: int64, of it, where each of them ends.
        schedule: of vLLM's op.
        rest: the other requests, as a step of their own; None where there are none.
        rest_requests: int64, rows of the step's block table.
        rest_tokens: int64, their new tokens.
    """

    workspace: "DensePrefill"
    requests: list[int]
    contexts: list[int]
    tokens: Tensor
    slots: list[int]
    fresh_slots: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    last_blocks: Tensor
    schedule: Tensor
    rest: "AttentionPackMetadata | None"
    rest_requests: Tensor
    rest_tokens: Tensor


class DensePrefill:
    """The workspace and its plan of a step; one per worker and KV-cache group.

    Args:
        num_heads: query heads, `Hq`.
        num_kv_heads: `Hk`.
        head_size: `D`.
        ops: with `decompress`.
    """

    def __init__(self, num_heads: int, num_kv_heads: int, head_size: int, ops: Ops) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.ops = ops
        self.dtype = torch.bfloat16
        self.isa = _get_attn_isa(self.dtype, _BLOCK_SIZE, head_size, "auto")
        self.max_tokens = WORKSPACE_BYTES // (2 * num_kv_heads * head_size * 2)
        self.pages = torch.empty(0, num_kv_heads, 2 * _BLOCK_SIZE, head_size, dtype=self.dtype)

    def plan(self, step: "AttentionPackMetadata") -> DenseStep | None:
        """Which requests of a step go this way; None if none does."""
        starts = step.batch.host_starts
        contexts = step.context_lens.tolist()
        chosen, slots, used = [], [], 0
        for request, (first, stop) in enumerate(pairwise(starts)):
            queries, context = stop - first, contexts[request]
            blocks = -(-(context + queries) // _BLOCK_SIZE)
            enough = MIN_QUERIES if context else 2
            if queries >= enough and (used + blocks) * _BLOCK_SIZE <= self.max_tokens:
                chosen.append(request)
                slots.append(used * _BLOCK_SIZE)
                used += blocks
        if not chosen:
            return None
        self._reserve(used)
        others = sorted(set(range(len(contexts))) - set(chosen))
        rest_tokens = _tokens_of(others, starts)
        lengths = [starts[r + 1] - starts[r] for r in chosen]
        totals = [contexts[r] + n for r, n in zip(chosen, lengths, strict=True)]
        query_start_loc = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        seq_lens = torch.tensor(totals, dtype=torch.int32)
        longest = -(-max(totals) // _BLOCK_SIZE)
        first_blocks = torch.tensor(slots, dtype=torch.int32) // _BLOCK_SIZE
        return DenseStep(
            self,
            chosen,
            [contexts[r] for r in chosen],
            _tokens_of(chosen, starts),
            slots,
            torch.cat(
                [
                    torch.arange(slot + total - n, slot + total)
                    for slot, total, n in zip(slots, totals, lengths, strict=True)
                ]
            ),
            query_start_loc,
            seq_lens,
            first_blocks[:, None] + torch.arange(longest, dtype=torch.int32),
            (first_blocks + (seq_lens - 1) // _BLOCK_SIZE).long(),
            self._schedule(query_start_loc, seq_lens),
            _subset(step, others, rest_tokens) if others else None,
            torch.tensor(others, dtype=torch.int64),
            rest_tokens,
        )

    def attend(
        self,
        dense: DenseStep,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        spans: StepSpans | None,
        codec: LayerCodec,
        block_size: int,
        exact: tuple[Tensor, ExactTokens] | None,
        scale: float,
        out: Tensor,
    ) -> None:
        """Attention of the chosen requests' new tokens to all tokens before them.

        Args:
            dense: of this step.
            query: `[T, Hq, D]` of the whole step.
            key: `[T, Hk, D]`.
            value: `[T, Hk, D]`.
            kv_cache: uint8 `[num_blocks, block_bytes]`.
            block_table: int `[B, max_blocks]`.
            spans: of the whole step, where keys have anchors.
            codec: the layer's codec.
            block_size: `S`.
            exact: exact pages `[num_blocks, S', 2, Hk, D]` and which of their tokens are read.
            scale: softmax scale.
            out: `[T, Hq, D]`, contiguous; mutated where `dense.tokens` are.
        """
        # The op reads whole tiles: a NaN that another request has left behind the last token would
        # spoil this one, weight zero or not.
        self.pages[dense.last_blocks] = 0
        whole = dense.rest is None
        slab = max(1, _SLAB // block_size) * block_size  # begins with a block
        query, key, value = (
            (x if whole else x[dense.tokens]).contiguous() for x in (query, key, value)
        )
        for request, context, slot in zip(dense.requests, dense.contexts, dense.slots, strict=True):
            for first in range(0, context, slab):
                blocks = block_table[request, first // block_size :]
                tokens = min(slab, context - first)
                old_key, old_value = self.ops.decompress(
                    kv_cache, blocks, tokens, codec, block_size, self.dtype
                )
                if spans is not None and codec.anchors is not None:
                    old_key = spans.turn_cached_keys(old_key, codec.anchors, request, first)
                self._write(old_key, old_value, slot + first + torch.arange(tokens))
            if exact is not None and context:
                self._write_exact(*exact, request, context, slot)
        self._write(key, value, dense.fresh_slots)
        result = out[: len(query)] if whole else torch.empty_like(query)
        key_cache, value_cache = self.pages.chunk(2, dim=2)
        vllm_ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=key_cache,
            value_cache=value_cache,
            output=result,
            query_start_loc=dense.query_start_loc,
            seq_lens=dense.seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=dense.block_table,
            softcap=0,
            scheduler_metadata=dense.schedule,
            s_aux=None,
        )
        if not whole:
            out[dense.tokens] = result

    def _reserve(self, blocks: int) -> None:
        if len(self.pages) < blocks:
            self.pages = self.pages.new_empty(blocks, *self.pages.shape[1:])

    def _schedule(self, query_start_loc: Tensor, seq_lens: Tensor) -> Tensor:
        return vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def _write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        key_cache, value_cache = self.pages.chunk(2, dim=2)
        vllm_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, self.isa)

    def _write_exact(
        self, pages: Tensor, tokens: ExactTokens, request: int, context: int, slot: int
    ) -> None:
        """Puts the exact tokens of a request in the place of their codes."""
        position = tokens.positions(context)
        present = tokens.present[request]
        found = tokens.slots[request][present]
        key, value = pages[found // pages.shape[1], found % pages.shape[1]].unbind(1)
        self._write(key.contiguous(), value.contiguous(), slot + position[present])


def _tokens_of(requests: list[int], starts: tuple[int, ...]) -> Tensor:
    ranges = [torch.arange(starts[r], starts[r + 1]) for r in requests]
    return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)


def _subset(
    step: "AttentionPackMetadata", requests: list[int], tokens: Tensor
) -> "AttentionPackMetadata":
    """Some requests of a step, with all of their `tokens`, as one."""
    starts = step.batch.host_starts
    lengths = [starts[r + 1] - starts[r] for r in requests]
    longest = [step.batch.max_seq_lens[r] for r in requests]
    context_lens = step.context_lens[requests]
    batch = QueryBatch.build([0, *accumulate(lengths)], longest, context_lens.device)
    return type(step)(
        num_actual_tokens=sum(lengths),
        batch=batch,
        seq_lens=step.seq_lens[requests],
        context_lens=context_lens,
        has_context=bool(context_lens.any()),
        block_table=step.block_table[requests],
        slot_mapping=step.slot_mapping[tokens],
        spans=step.spans.of(torch.tensor(requests), batch) if step.spans else None,
    )
