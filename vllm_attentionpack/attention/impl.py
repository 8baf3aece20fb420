"""One compacted attention layer in vLLM's request path. No arithmetic here: see `ops`."""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_attentionpack import ops
from vllm_attentionpack.attention.metadata import AttentionPackMetadata
from vllm_attentionpack.attention.state import EngineState
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.compat import modality_mask
from vllm_attentionpack.errors import UnsupportedModelError
from vllm_attentionpack.kv_cache.spec import block_view


class AttentionPackImpl(AttentionImpl[AttentionPackMetadata]):
    """Stores new tokens as codes and attends to codes.

    With `exact_prefill` the new tokens of a step attend to each other exactly and only the context
    is read from the codes; without, everything is.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        unsupported = {
            "ALiBi": alibi_slopes is not None,
            "a sliding window": sliding_window is not None,
            "logits soft capping": bool(logits_soft_cap),
            f"attention type '{attn_type}'": attn_type != AttentionType.DECODER,
            "KV sharing between layers": kv_sharing_target_layer_name is not None,
            "attention sinks": extra.get("sinks") is not None,
        }
        found = [name for name, present in unsupported.items() if present]
        if found:
            raise UnsupportedModelError(
                f"an attention layer of this model uses {', '.join(found)}, which cannot be served "
                "from a compacted cache. Only causal full attention is supported; serve this model "
                "with another --attention-backend."
            )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.state = EngineState.of(get_current_vllm_config())
        self.codec: LayerCodec | None = None  # bound in AttentionPackBackend.customize_layer_spec

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Encodes the step's new tokens into `kv_cache`; see `ops.store_kv`."""
        assert self.codec is not None
        tokens = slot_mapping.shape[0]
        self.state.ops.store_kv(
            key[:tokens],
            value[:tokens],
            block_view(kv_cache),
            slot_mapping,
            modality_mask(tokens, key.device) if self.codec.num_modalities == 2 else None,
            self.codec,
            kv_cache.shape[2],
        )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: AttentionPackMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of `query` `[T, Hq, D]`; the result goes to `output`, which is returned."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantisation is not supported")
        if attn_metadata is None:  # profiling run
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        if self.state.config.exact_prefill:
            result = self._exact_fresh(
                query[:tokens], key[:tokens], value[:tokens], kv_cache, attn_metadata
            )
        else:
            result, _ = self._from_codes(
                query[:tokens], kv_cache, attn_metadata, attn_metadata.seq_lens, causal=True
            )
        output[:tokens] = result.view_as(output[:tokens])
        return output

    def _exact_fresh(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
    ) -> Tensor:
        fresh, fresh_lse = ops.fresh_attention(query, key, value, metadata.batch, self.scale)
        if not metadata.has_context:
            return fresh
        context, context_lse = self._from_codes(
            query, kv_cache, metadata, metadata.context_lens, causal=False
        )
        return ops.merge_attention(fresh, fresh_lse, context, context_lse)

    def _from_codes(
        self,
        query: Tensor,
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
        seq_lens: Tensor,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        assert self.codec is not None
        compute = self.state.ops
        attended = compute.paged_attention(
            compute.absorb_query(query, self.codec, self.scale),
            block_view(kv_cache),
            metadata.block_table,
            None,
            seq_lens,
            metadata.batch,
            self.codec,
            kv_cache.shape[2],
            causal,
        )
        return compute.up_project(attended, self.codec), attended.lse
