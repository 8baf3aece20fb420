"""Compute on compacted pages: one name per op, the plain PyTorch reference behind each for now.

The request path of one attention layer, in order: `store_kv` (new tokens into pages),
`absorb_query`, `paged_attention` (over the codes), `up_project`, and `fresh_attention` with
`merge_attention` where the tokens of this step attend to each other exactly. Imports no vLLM.
"""

from vllm_attentionpack.ops.batch import QueryBatch, Segment
from vllm_attentionpack.ops.fresh import fresh_attention, merge_attention
from vllm_attentionpack.ops.reference import (
    AbsorbedQuery,
    AttendedLatent,
    absorb_query,
    paged_attention,
    store_kv,
    up_project,
)

__all__ = [
    "AbsorbedQuery",
    "AttendedLatent",
    "QueryBatch",
    "Segment",
    "absorb_query",
    "fresh_attention",
    "merge_attention",
    "paged_attention",
    "store_kv",
    "up_project",
]
