"""Compute on compacted pages: one name per op, the plain PyTorch reference behind each for now.

The request path of one attention layer, in order: `store_kv` and `store_exact` (new tokens into
pages); `fresh_attention` (the tokens of this step to each other), `exact_attention` (to exact sinks
and recent tokens), `absorb_query`, `paged_attention` and `up_project` (to the codes of all others);
`merge_attention`. Imports no vLLM.
"""

from vllm_attentionpack.ops.batch import QueryBatch, Segment
from vllm_attentionpack.ops.exact import (
    ExactTokens,
    exact_attention,
    locate_exact,
    recent_attention,
    store_exact,
)
from vllm_attentionpack.ops.fresh import fresh_attention, merge_attention
from vllm_attentionpack.ops.reference import (
    AbsorbedQuery,
    AttendedLatent,
    absorb_query,
    decompress,
    paged_attention,
    store_kv,
    up_project,
)

__all__ = [
    "AbsorbedQuery",
    "AttendedLatent",
    "ExactTokens",
    "QueryBatch",
    "Segment",
    "absorb_query",
    "decompress",
    "exact_attention",
    "fresh_attention",
    "locate_exact",
    "merge_attention",
    "paged_attention",
    "recent_attention",
    "store_exact",
    "store_kv",
    "up_project",
]
