"""Attention in latent space from end to end: what every caller of the three ops does alike."""

from typing import TYPE_CHECKING

from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops.batch import QueryBatch

if TYPE_CHECKING:
    from vllm_attentionpack.ops.select import Ops

#: Output `[T, Hq, D]` and natural log-sum-exp `[T, Hq]` of the attention to some of the keys.
Part = tuple[Tensor, Tensor]


def attend_codes(
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
    span: int = 0,
) -> Part:
    """`absorb_query`, `paged_attention` and `up_project`, one after the other.

    Args:
        ops: the implementation.
        query: `[T, Hq, D]`; with `span`, `[n * T, Hq, D]`, those for the first span first.
        kv_cache: see `ops.reference.paged_attention`, as are those up to `causal`.
        scale: softmax scale.
        span: tokens that are met by queries of their own, where `ops.SPANS`; 0 if one query of a
            token meets all.

    Returns:
        The output, float32 `[T, Hq, D]`, and the log-sum-exp.
    """
    within = {"span": span} if span else {}
    attended = ops.paged_attention(
        ops.absorb_query(query, codec, scale),
        kv_cache,
        block_table,
        starts,
        stops,
        batch,
        codec,
        block_size,
        causal,
        **within,
    )
    return ops.up_project(attended, codec), attended.lse
