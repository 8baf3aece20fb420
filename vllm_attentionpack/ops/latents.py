"""Attention in latent space from end to end: what every caller of the three ops does alike."""

from typing import TYPE_CHECKING

from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.turns import Turns

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
    turns: Turns | None = None,
) -> Part:
    """`absorb_query`, `paged_attention` and `up_project`, one after the other.

    Args:
        ops: the implementation.
        query: `[T, Hq, D]`.
        kv_cache: see `ops.reference.paged_attention`, as are those up to `causal`.
        scale: softmax scale.
        turns: of the queries for each span, where keys are coded relative to anchors; what lies
            beyond their spans is not seen.

    Returns:
        The output, float32 `[T, Hq, D]`, and the log-sum-exp.
    """
    attended = ops.paged_attention(
        ops.absorb_query(query, codec, scale, turns),
        kv_cache,
        block_table,
        starts,
        stops,
        batch,
        codec,
        block_size,
        causal,
    )
    return ops.up_project(attended, codec), attended.lse
