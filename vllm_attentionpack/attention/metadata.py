"""Per-step metadata of the compacted attention layers."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attentionpack.attention.dense_prefill import DensePrefill, DenseStep
from vllm_attentionpack.attention.state import EngineState
from vllm_attentionpack.compat import positions_every
from vllm_attentionpack.ops import QueryBatch
from vllm_attentionpack.ops.spans import StepSpans

if TYPE_CHECKING:
    from vllm_attentionpack.attention.impl import AttentionPackImpl


@dataclass
class AttentionPackMetadata(AttentionMetadata):
    """One step of one KV-cache group.

    Attributes:
        num_actual_tokens: new tokens without padding, `T`.
        batch: how the new tokens belong to requests.
        seq_lens: int32 `[B]`, tokens of each request after this step.
        context_lens: int32 `[B]`, tokens of each request before this step.
        has_context: False if all `context_lens` are known to be 0.
        block_table: int32 `[B, max_blocks]`.
        slot_mapping: int64 `[T]`.
        spans: where keys are turned back before they are coded; None where none of the step is,
            the anchor of the first span being position 0.
        dense: the requests that are prefilled densely; None if there are none.
    """

    num_actual_tokens: int
    batch: QueryBatch
    seq_lens: Tensor
    context_lens: Tensor
    has_context: bool
    block_table: Tensor
    slot_mapping: Tensor
    spans: StepSpans | None = None
    dense: DenseStep | None = None


class AttentionPackMetadataBuilder(AttentionMetadataBuilder[AttentionPackMetadata]):
    """Builds `AttentionPackMetadata` and, once per engine, logs the capacity."""

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        state: EngineState = next(iter(layers.values())).impl.state
        state.report(kv_cache_spec, vllm_config)
        state.warm_up(layers, kv_cache_spec, vllm_config)
        self.block_size = kv_cache_spec.block_size
        self.ops, self.span = state.ops, state.span
        self.dense_prefill = _dense_prefill(state, [layer.impl for layer in layers.values()])
        # A captured graph reads the address that it saw at capture: one buffer for all steps.
        requests = vllm_config.scheduler_config.max_num_seqs + 1
        # One more than the longest request has: what is scheduled ahead may reach into it.
        spans = vllm_config.model_config.max_model_len // self.span + 2 if self.span else 0
        self.context_lens = torch.zeros(requests, dtype=torch.int32, device=device)
        self.anchors = torch.zeros(requests, spans, dtype=torch.int64, device=device)
        # Of all tokens, where some planes are turned by them and they are not the tokens' indices.
        self.positions: Tensor | None = None
        self.pre_rope = state.pre_rope
        if self.pre_rope:
            tokens = vllm_config.model_config.max_model_len
            self.most_positions = tokens + 2
            if vllm_config.model_config.uses_mrope:
                self.positions = torch.zeros(requests, tokens, dtype=torch.int32, device=device)
                # Frames of a video may lie further apart than they have tokens; vLLM's own table of
                # M-RoPE angles allows for as much.
                self.most_positions = 4 * tokens
            for name in layer_names:
                anchors = state.codec(name).anchors
                if anchors is not None:  # made now, not in a step that is captured
                    anchors.rotary.table(self.most_positions, anchors.pre_rope)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """See `EngineState.cudagraph_support`."""
        return EngineState.of(vllm_config).cudagraph_support(vllm_config)

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> AttentionPackMetadata:
        """Sized for the longest requests and with a context, whatever the sample batch has."""
        metadata = self.build(0, common_attn_metadata)
        longest = (self.vllm_config.model_config.max_model_len,) * common_attn_metadata.num_reqs
        batch = replace(metadata.batch, max_seq_lens=longest)
        captured = replace(metadata, batch=batch, has_context=True)
        if self.span:
            captured.spans = self._spans(captured)
        return captured

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **_: Any,
    ) -> AttentionPackMetadata:
        common = common_attn_metadata
        starts = common.query_start_loc_cpu.tolist()
        bound = common.seq_lens_cpu_upper_bound
        if bound is None:
            longest = [common.max_seq_len] * common.num_reqs
            has_context = True
        else:
            longest = bound[: common.num_reqs].tolist()
            has_context = any(
                n > stop - start
                for n, start, stop in zip(longest, starts, starts[1:], strict=False)
            )
        context_lens = self.context_lens[: common.num_reqs]
        context_lens.copy_(common.compute_num_computed_tokens())
        metadata = AttentionPackMetadata(
            num_actual_tokens=common.num_actual_tokens,
            batch=QueryBatch.build(starts, longest, self.device, common.query_start_loc),
            seq_lens=common.seq_lens,
            context_lens=context_lens,
            has_context=has_context,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )
        if self.pre_rope or (self.span and metadata.batch.max_seq_len > self.span):
            metadata.spans = self._spans(metadata)
        if self.dense_prefill is not None:
            metadata.dense = self.dense_prefill.plan(metadata)
        return metadata

    def _spans(self, metadata: AttentionPackMetadata) -> StepSpans:
        requests = len(metadata.context_lens)
        count = min(-(-metadata.batch.max_seq_len // self.span), self.anchors.shape[1])
        anchors = self.anchors[:requests, :count]
        known = positions_every(self.span, count, requests, self.device)
        if known is None:  # positions are those in the request
            known = torch.arange(count, device=self.device) * self.span
        anchors.copy_(known)
        positions = self.positions
        if positions is not None:
            count = min(metadata.batch.max_seq_len, positions.shape[1])
            positions = positions[:requests, :count]
            every = positions_every(1, count, requests, self.device)
            positions.copy_(torch.arange(count, device=self.device) if every is None else every)
            positions.clamp_(max=self.most_positions - 1)
        return StepSpans(
            self.ops,
            self.span,
            anchors,
            positions,
            metadata.batch,
            metadata.context_lens,
            metadata.block_table,
            self.block_size,
        )


def _dense_prefill(state: EngineState, layers: "list[AttentionPackImpl]") -> DensePrefill | None:
    """Where the engine uses it; the layers of a KV-cache group are alike in their heads."""
    if not state.prefills_densely:
        return None
    (shape,) = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for layer in layers}
    return DensePrefill(*shape, state.ops)
