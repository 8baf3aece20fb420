"""The ops as Triton kernels for CUDA GPUs.

Tensor cores take float16 operands in every model dtype: codes are whole numbers below 256 and exact
in it, queries and results in latent space and the bases are rounded to it (11 bits, where bfloat16
has 8), and sums are float32. Nothing here waits for the device or depends on what lies there, so
all of it can be captured in CUDA graphs; tensors that a call returns come from PyTorch's allocator,
which gives a graph its own pool.
"""

from vllm_attentionpack.ops.reference import decompress
from vllm_attentionpack.ops.triton.ops import (
    PackedLatent,
    PackedQuery,
    absorb_query,
    exact_attention,
    merge_attention,
    paged_attention,
    reserve,
    store_kv,
    unavailable,
    up_project,
)
from vllm_attentionpack.ops.triton.warmup import warm_up

__all__ = [
    "PackedLatent",
    "PackedQuery",
    "absorb_query",
    "decompress",
    "exact_attention",
    "merge_attention",
    "paged_attention",
    "reserve",
    "store_kv",
    "unavailable",
    "up_project",
    "warm_up",
]
