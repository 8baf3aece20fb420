"""Compiles what steps will launch before requests come, by steps that see nothing."""

import torch

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.exact import ExactTokens
from vllm_attentionpack.ops.triton.ops import (
    absorb_query,
    exact_attention,
    merge_attention,
    paged_attention,
    store_kv,
    up_project,
)
from vllm_attentionpack.ops.triton.prepared import prepare
from vllm_attentionpack.ops.turns import PreRope, Turns, span_rows

#: New tokens of a step: decoding, and more than any program takes.
_NEW_TOKENS = (1, 128)


def _turns(codec: LayerCodec, batch: QueryBatch, max_seq_len: int) -> list[Turns | None]:
    """Those of the steps that there are; all have the same few rows, which see nothing."""
    anchors = codec.anchors
    if anchors is None:
        return [None]
    device = batch.query_start_loc.device
    some = QueryBatch.build(batch.host_starts, (batch.num_tokens + 1,), device)
    (rows,) = span_rows(some, anchors.span, causal=False)
    tables = anchors.rotary.tables(torch.zeros_like(rows.spans))
    if not anchors.pre_rope:
        return [None, Turns(rows, anchors.rotary, *tables)]
    own = PreRope(anchors, None, *anchors.rotary.table(max_seq_len + 1, anchors.pre_rope))
    return [Turns(rows, anchors.rotary, *tables, own)]


def warm_up(
    query_heads: int,
    dtype: torch.dtype,
    codec: LayerCodec,
    block_size: int,
    max_seq_len: int,
    exact: tuple[int, int, int] | None,
) -> None:
    device, layout = prepare(codec).device, codec.layout
    heads, size = layout.num_kv_heads, layout.head_size
    cache = torch.zeros(1, layout.block_bytes(block_size), dtype=torch.uint8, device=device)
    blocks = -(-max_seq_len // block_size)
    table = torch.zeros(1, blocks, dtype=torch.int32, device=device)
    starts, stops = None, torch.zeros(1, dtype=torch.int32, device=device)
    if exact is not None:
        sinks, window, exact_block_size = exact
        seen = ExactTokens.empty(1, sinks, window, device)
        starts, stops = seen.starts, seen.stops
        pages = torch.zeros(1, exact_block_size, 2, heads, size, dtype=dtype, device=device)
    # The number of splits, which grows with the longest request, is a constant of their merge.
    lengths = [*(1 << n for n in range((max_seq_len - 1).bit_length())), max_seq_len]
    for tokens in _NEW_TOKENS:
        query = torch.zeros(tokens, query_heads, size, dtype=dtype, device=device)
        new = torch.zeros(tokens, heads, size, dtype=dtype, device=device)
        nowhere = torch.full((tokens,), -1, device=device)
        for visual in (None, nowhere >= 0)[: codec.num_modalities]:
            store_kv(new, new, cache, nowhere, visual, codec, block_size)
        for longest in lengths:
            batch = QueryBatch.build((0, tokens), (longest,), device)
            for turns in _turns(codec, batch, max_seq_len):
                absorbed = absorb_query(query, codec, 1.0, turns)
                attended = paged_attention(
                    absorbed, cache, table, starts, stops, batch, codec, block_size, False
                )
        parts = [(query, attended.lse), (up_project(attended, codec), attended.lse)]
        if exact is not None:
            parts.append(exact_attention(query, pages, seen, batch, 1.0))
        merge_attention(*parts)
        if codec.anchors is not None:  # of calls that share the spans of a step
            merge_attention(parts[1], parts[1])
