"""The attention backend ATTENTIONPACK, as vLLM's selector sees it."""

from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_attentionpack.attention.impl import AttentionPackImpl
from vllm_attentionpack.attention.metadata import AttentionPackMetadataBuilder
from vllm_attentionpack.codec.layout import BLOCK_SIZE_MULTIPLE
from vllm_attentionpack.errors import PackMismatchError
from vllm_attentionpack.kv_cache.spec import compacted_spec, shared_pool_spec


class AttentionPackBackend(AttentionBackend):
    """Causal full attention on compacted pages; everything else is refused."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "ATTENTIONPACK"

    @staticmethod
    def get_impl_cls() -> type[AttentionPackImpl]:
        return AttentionPackImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionPackMetadataBuilder]:
        return AttentionPackMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: AttentionSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_SIZE_MULTIPLE)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 16 == 0

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        # Launches are sized for the longest query that the host knows of.
        return False

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_layer_spec(
        cls, layer: Attention, spec: AttentionSpec, vllm_config: VllmConfig
    ) -> AttentionSpec:
        """Hands `layer` its codec and returns its page (called once the model is built).

        Raises:
            PackMismatchError: the layer is not in the pack or has other heads.
        """
        impl = layer.impl
        state = impl.state
        codec = state.codec(layer.layer_name)
        found = (layer.num_kv_heads, layer.head_size, layer.head_size_v)
        expected = (codec.layout.num_kv_heads, codec.layout.head_size, codec.layout.head_size)
        if found != expected:
            raise PackMismatchError(
                f"layer '{layer.layer_name}' has (KV heads, head size, value head size) = {found} "
                f"on this rank, the pack was made for {expected}. Calibrate this model again."
            )
        impl.codec = codec
        pages = state.pages(spec, vllm_config) if state.has_exact_cache else None
        if state.shares_pool:
            page_bytes = pages and pages.page_bytes
            return shared_pool_spec(spec, state.largest_bytes_per_token, page_bytes)
        return compacted_spec(spec, codec.layout, pages and pages.block_size)
