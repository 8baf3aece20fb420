"""Attention to keys and values that are rebuilt from their codes, a slab of tokens at a time.

For keys that are coded where they do not stand: one rebuilt key serves all queries, wherever they
are. The products of rebuilding grow with rank times head size per token, those of absorbing a query
with the same per span: rebuilding is for short spans and for many queries.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.fresh import merge_attention

if TYPE_CHECKING:
    from vllm_attentionpack.ops.select import Ops

#: Bytes that the logits, the keys and the values of one slab may take, each in float32.
_SLAB_BYTES = 1 << 25

#: From rebuilt keys `[N, Hk, D]` of a request (row, first token) to keys where they stood.
Turn = Callable[[Tensor, int, int], Tensor]


def rebuilt_attention(
    ops: "Ops",
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    starts: Tensor | None,
    stops: Tensor,
    batch: QueryBatch,
    codec: LayerCodec,
    block_size: int,
    causal: bool,
    scale: float,
    turn: Turn,
) -> tuple[Tensor, Tensor]:
    """Attends to the codes of each request's tokens `starts` to `stops`, by rebuilding them.

    Args:
        ops: with `decompress`.
        query: `[T, Hq, D]`.
        kv_cache: see `ops.reference.paged_attention`, as are those up to `causal`.
        block_table: int `[B, max_blocks]`.
        starts: int `[B]`; None for 0.
        stops: int `[B]`.
        batch: how the tokens belong to requests.
        codec: the layer's codec.
        block_size: `S`.
        causal: True if each query sees one token less than the next.
        scale: softmax scale.
        turn: of rebuilt keys.

    Returns:
        The output, float32 `[T, Hq, D]`, and the natural log-sum-exp `[T, Hq]`; `-inf` over no
        token.
    """
    out = torch.zeros(query.shape, device=query.device)
    lse = torch.full(query.shape[:2], float("-inf"), device=query.device)
    values = 2 * codec.layout.num_kv_heads * codec.layout.head_size
    for request, (first, last) in enumerate(pairwise(batch.host_starts)):
        count = last - first
        longest = batch.max_seq_lens[request] - (0 if causal else count)
        if not count or longest <= 0:
            continue
        end = stops[request].expand(count)
        if causal:
            end = end - torch.arange(count - 1, -1, -1, device=query.device)
        start = 0 if starts is None else starts[request]
        token_bytes = 4 * (values + query.shape[1] * count)
        slab = max(1, _SLAB_BYTES // token_bytes // block_size) * block_size
        parts = []
        for begin in range(0, longest, slab):
            tokens = min(slab, longest - begin)
            # Beyond a request's blocks may stand anything.
            blocks = block_table[request, begin // block_size :].clamp(0, len(kv_cache) - 1)
            key, value = ops.decompress(kv_cache, blocks, tokens, codec, block_size, query.dtype)
            position = begin + torch.arange(tokens, device=query.device)
            seen = (position >= start) & (position < end[:, None])  # [q, n]
            parts.append(_attend(query[first:last], turn(key, request, begin), value, seen, scale))
        out[first:last], lse[first:last] = parts[0] if len(parts) == 1 else merge_attention(*parts)
    return out, lse


def _attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of `[q, Hq, D]` to `[n, Hk, D]` where `seen` `[q, n]`."""
    kv_heads = key.shape[1]
    q = query.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3) * scale  # [Hk, rep, q, D]
    # What a free slot holds is anything, and no number of it must meet a weight of zero.
    value = value.float().masked_fill(~seen.any(0)[:, None, None], 0.0)
    logits = q.flatten(1, 2) @ key.float().permute(1, 2, 0)  # [Hk, rep * q, n]
    logits = logits.unflatten(1, (-1, len(query))).masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)  # [Hk, rep, q]
    weights = (logits - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp_()
    out = weights.flatten(1, 2) @ value.transpose(0, 1)  # [Hk, rep * q, D]
    out = out.unflatten(1, (-1, len(query))).permute(2, 0, 1, 3).flatten(1, 2)
    return out, lse.permute(2, 0, 1).flatten(1)
