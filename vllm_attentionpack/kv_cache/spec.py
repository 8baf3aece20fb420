"""The page of one compacted layer in vLLM's terms; all sizes come from its `LayerLayout`."""

from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attentionpack.codec.layout import LayerLayout, check_block_size

Spec = TypeVar("Spec", bound=AttentionSpec)


def compacted_spec(spec: Spec, layout: LayerLayout, block_size: int | None = None) -> Spec:
    """The spec of a layer whose tokens take `layout.bytes_per_token` bytes.

    vLLM's page is `[head slots, S, bytes]`; a plane-major block has no per-token struct, so it is
    declared as one slot of raw bytes, which vLLM allocates as one contiguous run per block.

    Args:
        spec: the dense spec of the layer.
        layout: of its tokens.
        block_size: what an exact cache prescribes; None keeps that of `spec`.
    """
    return replace(
        spec,
        block_size=check_block_size(block_size or spec.block_size),
        num_head_slots=1,
        state_content_bytes=layout.bytes_per_token,
        dtype=torch.uint8,
    )


def shared_pool_spec(spec: Spec, bytes_per_token: int, page_bytes: int | None = None) -> Spec:
    """The spec of a compacted layer whose blocks come from one pool with those of dense layers.

    vLLM pads all pages of a pool to the largest, so a compacted page of `S` tokens would take the
    bytes of a dense one and save nothing. Instead a block holds as many times `S` tokens as fit.

    Args:
        spec: the dense spec of the layer.
        bytes_per_token: the same for all compacted layers, which vLLM then puts into few groups.
        page_bytes: what vLLM must pad to, where it would not see it by itself.
    """
    dense_tokens = check_block_size(spec.block_size)
    times = max(1, spec.page_size_bytes // (dense_tokens * bytes_per_token))
    return replace(
        spec,
        block_size=times * dense_tokens,
        num_head_slots=1,
        state_content_bytes=bytes_per_token,
        page_size_padded=page_bytes,
        dtype=torch.uint8,
    )


def block_view(kv_cache: Tensor) -> Tensor:
    """vLLM's view of a layer's cache, `[num_blocks, 1, S, bytes]`, as `[num_blocks, S * bytes]`.

    Blocks may lie apart. Raises `RuntimeError` where they are not contiguous, rather than copying.
    """
    return kv_cache.view(kv_cache.shape[0], -1)
