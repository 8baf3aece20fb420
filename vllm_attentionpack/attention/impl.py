"""One compacted attention layer in vLLM's request path. No arithmetic here: see `ops`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_attentionpack import ops
from vllm_attentionpack.attention.dense_prefill import DenseStep
from vllm_attentionpack.attention.metadata import AttentionPackMetadata
from vllm_attentionpack.attention.state import EngineState
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.compat import modality_mask
from vllm_attentionpack.errors import UnsupportedModelError
from vllm_attentionpack.kv_cache.spec import block_view
from vllm_attentionpack.ops.latents import Part, attend_codes
from vllm_attentionpack.ops.turns import MAX_TURNED


class AttentionPackImpl(AttentionImpl[AttentionPackMetadata]):
    """Stores new tokens as codes and attends to codes, sinks and recent tokens excepted.

    With `exact_prefill` the new tokens of a step attend to each other exactly and only the context
    is read as it is stored; without, everything is.
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
        layer: AttentionLayer,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Stores the step's new tokens as codes and, where it has room for them, as they are."""
        assert self.codec is not None
        tokens = slot_mapping.shape[0]
        self.state.ops.store_kv(
            self._anchored(key[:tokens], layer),
            value[:tokens],
            block_view(kv_cache),
            slot_mapping,
            modality_mask(tokens, key.device) if self.codec.num_modalities == 2 else None,
            self.codec,
            kv_cache.shape[2],
        )
        if self.state.has_exact_cache:
            exact = self.state.exact_layers[layer.layer_name]
            slots = get_forward_context().slot_mapping[exact.name]
            ops.store_exact(key[:tokens], value[:tokens], exact.pages(layer.layer_name), slots)

    def _anchored(self, key: Tensor, layer: AttentionLayer) -> Tensor:
        """New keys as they are coded."""
        assert self.codec is not None
        steps = get_forward_context().attn_metadata
        spans = steps[layer.layer_name].spans if steps else None
        if spans is None or self.codec.anchors is None:
            return key
        turned = spans.turn_new_keys(key[: spans.batch.num_tokens], self.codec.anchors)
        return torch.cat([turned, key[len(turned) :]])  # what pads a step has no slot

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        self.state.add_exact_layers()

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
            if self.codec is not None:
                tokens = turned = query.shape[0]
                if self.codec.anchors is not None and self.state.most_spans > 1:
                    turned = max(tokens, MAX_TURNED)
                self.state.ops.reserve(tokens, turned, self.num_heads, self.codec)
            return output.fill_(0)
        tokens = attn_metadata.num_actual_tokens
        fresh = _Fresh(query[:tokens], key[:tokens], value[:tokens])
        exact = self._exact_cache(layer)
        dense = attn_metadata.dense
        if dense is None:
            result = self._attend(fresh, kv_cache, attn_metadata, exact)
            output[:tokens] = result.view_as(output[:tokens])
            return output
        self._attend_densely(fresh, kv_cache, attn_metadata, dense, exact, output)
        if dense.rest is not None:
            if exact is not None:
                exact = _ExactCache(exact.pages, exact.tokens.of(dense.rest_requests))
            result = self._attend(fresh.of(dense.rest_tokens), kv_cache, dense.rest, exact)
            output[dense.rest_tokens] = result.view_as(output[dense.rest_tokens]).to(output.dtype)
        return output

    def _attend(
        self,
        fresh: "_Fresh",
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
        exact: "_ExactCache | None",
    ) -> Tensor:
        attend = self._fresh_exactly if self.state.config.exact_prefill else self._fresh_as_codes
        parts = attend(fresh, kv_cache, metadata, exact)
        return parts[0][0] if len(parts) == 1 else self.state.ops.merge_attention(*parts)[0]

    def _attend_densely(
        self,
        fresh: "_Fresh",
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
        dense: DenseStep,
        exact: "_ExactCache | None",
        output: Tensor,
    ) -> None:
        assert self.codec is not None
        dense.workspace.attend(
            dense,
            fresh.query,
            fresh.key,
            fresh.value,
            block_view(kv_cache),
            metadata.block_table,
            metadata.spans,
            self.codec,
            kv_cache.shape[2],
            None if exact is None else (exact.pages, exact.tokens),
            self.scale,
            output.view(-1, self.num_heads, self.head_size),
        )

    def _fresh_exactly(
        self,
        fresh: "_Fresh",
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
        exact: "_ExactCache | None",
    ) -> list[Part]:
        """New tokens see each other as they are, and the context as it is stored."""
        batch = metadata.batch
        attend = self.state.fresh_attention
        parts = [attend(fresh.query, fresh.key, fresh.value, batch, self.scale)]
        if not metadata.has_context:
            return parts
        starts, stops = None, metadata.context_lens
        if exact is not None:
            starts, stops = exact.tokens.starts, exact.tokens.stops
            parts.append(self._exactly(fresh.query, exact, batch))
        parts.append(self._codes(fresh.query, kv_cache, metadata, starts, stops, causal=False))
        return parts

    def _fresh_as_codes(
        self,
        fresh: "_Fresh",
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
        exact: "_ExactCache | None",
    ) -> list[Part]:
        """New tokens see each other as later tokens will see them: to measure the codec."""
        context_lens, seq_lens = metadata.context_lens, metadata.seq_lens
        if exact is None:
            return [self._codes(fresh.query, kv_cache, metadata, None, seq_lens, causal=True)]
        batch, state = metadata.batch, self.state
        parts = [
            ops.recent_attention(
                fresh.query,
                fresh.key,
                fresh.value,
                batch,
                self.scale,
                context_lens,
                state.sinks,
                state.window,
            ),
        ]
        if batch.max_query_len > state.window:
            starts, stops = context_lens.clamp(min=state.sinks), seq_lens - state.window
            parts.append(self._codes(fresh.query, kv_cache, metadata, starts, stops, causal=True))
        if metadata.has_context:
            tokens = exact.tokens
            parts += [
                self._exactly(fresh.query, exact, batch),
                self._codes(
                    fresh.query, kv_cache, metadata, tokens.starts, tokens.stops, causal=False
                ),
            ]
        return parts

    def _codes(
        self,
        query: Tensor,
        kv_cache: Tensor,
        metadata: AttentionPackMetadata,
        starts: Tensor | None,
        stops: Tensor,
        causal: bool,
    ) -> Part:
        assert self.codec is not None
        if metadata.spans is not None and self.codec.anchors is not None:
            return metadata.spans.attend(
                query, block_view(kv_cache), starts, stops, self.codec, causal, self.scale
            )
        return attend_codes(
            self.state.ops,
            query,
            block_view(kv_cache),
            metadata.block_table,
            starts,
            stops,
            metadata.batch,
            self.codec,
            kv_cache.shape[2],
            causal,
            self.scale,
        )

    def _exactly(self, query: Tensor, exact: "_ExactCache", batch: ops.QueryBatch) -> Part:
        return self.state.ops.exact_attention(query, exact.pages, exact.tokens, batch, self.scale)

    def _exact_cache(self, layer: AttentionLayer) -> "_ExactCache | None":
        """The layer's exact cache in this step; None without one."""
        if not self.state.has_exact_cache:
            return None
        exact = self.state.exact_layers[layer.layer_name]
        metadata = get_forward_context().attn_metadata[exact.name]
        return _ExactCache(exact.pages(layer.layer_name), metadata.tokens)


@dataclass(frozen=True)
class _Fresh:
    """The new tokens of a step: `[T, Hq, D]` and twice `[T, Hk, D]`."""

    query: Tensor
    key: Tensor
    value: Tensor

    def of(self, tokens: Tensor) -> "_Fresh":
        return _Fresh(self.query[tokens], self.key[tokens], self.value[tokens])


@dataclass(frozen=True)
class _ExactCache:
    """One layer's exact pages `[num_blocks, S, 2, Hk, D]` and which of their tokens are read."""

    pages: Tensor
    tokens: ops.ExactTokens
