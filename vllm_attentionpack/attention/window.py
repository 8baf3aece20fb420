"""The second cache of compacted layers: exact sinks and recent tokens.

vLLM gives a cache to every attention layer of the model, so the compacted layers get a companion
that computes nothing and owns their exact cache. Its metadata holds what is the same for all of
them: where the exact tokens of this step lie, and between them the range that is read from codes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from vllm_attentionpack.attention.state import EngineState, in_flight_tokens
from vllm_attentionpack.kv_cache.exact import ExactWindowSpec
from vllm_attentionpack.ops.exact import ExactTokens, locate_exact


@dataclass
class ExactWindowMetadata(AttentionMetadata):
    """One step of the exact cache: the cached tokens that are read from it."""

    tokens: ExactTokens


class ExactWindowMetadataBuilder(AttentionMetadataBuilder[ExactWindowMetadata]):
    """Builds `ExactWindowMetadata`."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, ExactWindowSpec)
        self.spec = kv_cache_spec
        layers = get_layers_from_vllm_config(vllm_config, ExactWindowLayer, layer_names)
        self.exact_prefill = next(iter(layers.values())).state.config.exact_prefill
        requests = vllm_config.scheduler_config.max_num_seqs + 1
        self.room = ExactTokens.empty(requests, kv_cache_spec.sinks, kv_cache_spec.window, device)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """As of the compacted layers."""
        return EngineState.of(vllm_config).cudagraph_support(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **_: Any,
    ) -> ExactWindowMetadata:
        common = common_attn_metadata
        context_lens = common.compute_num_computed_tokens()
        tokens = locate_exact(
            common.block_table_tensor,
            context_lens,
            self.spec.block_size,
            self.spec.sinks,
            self.spec.window,
        )
        if not self.exact_prefill:
            # Queries of one step see different windows; those of a chunk find theirs in it.
            starts = common.query_start_loc
            tokens = tokens.without_window(starts[1:] - starts[:-1] > 1, context_lens)
        return ExactWindowMetadata(tokens.kept_in(self.room))


class ExactWindowBackend(AttentionBackend):
    """What vLLM must know of the exact cache to allocate it; it is never called."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "ATTENTIONPACK_EXACT"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("the exact cache has no attention of its own")

    @staticmethod
    def get_builder_cls() -> type[ExactWindowMetadataBuilder]:
        return ExactWindowMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(
        kv_cache_spec: AttentionSpec | None = None,
    ) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Layers side by side in a block: only so may their bytes differ.
        return (KVCacheLayout.BLHNC,)


class SharedPoolExactWindowBackend(ExactWindowBackend):
    """Beside dense layers, whose backends seldom know blocks of several layers."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


class ExactWindowLayer(AttentionLayerBase):
    """Owns the exact cache of compacted attention layers that share a block.

    Args:
        name: its own, in vLLM's terms.
        owners: the compacted layers by name, alike in heads and dtype.
        state: of the engine.
    """

    def __init__(self, name: str, owners: Mapping[str, Attention], state: EngineState) -> None:
        first = next(iter(owners.values()))
        self.name = name
        self.place = {owner: index for index, owner in enumerate(owners)}
        self.state = state
        self.num_heads = first.num_heads
        self.num_kv_heads = first.num_kv_heads
        self.head_size = first.head_size
        self.dtype = first.kv_cache_torch_dtype
        self.kv_cache = torch.tensor([])

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SharedPoolExactWindowBackend if self.state.shares_pool else ExactWindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactWindowSpec:
        state, geometry = self.state, self.state.geometry
        assert geometry is not None, "vLLM asks for companions after the layers themselves"
        return ExactWindowSpec(
            block_size=geometry.exact_block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.dtype,
            num_head_slots=1,
            state_content_bytes=geometry.exact_bytes_per_token,
            page_size_padded=geometry.page_bytes if state.shares_pool else None,
            sinks=state.sinks,
            window=state.window,
            margin=in_flight_tokens(vllm_config),
        )

    def pages(self, owner: str) -> Tensor:
        """One owner's part of the cache, `[num_blocks, S, 2, Hk, D]`."""
        shape = (len(self.place), 2, self.num_kv_heads, self.head_size)
        return self.kv_cache[:, 0].unflatten(-1, shape)[:, :, self.place[owner]]
