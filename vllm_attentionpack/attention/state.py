"""What the layers of one engine share: configuration and pack, loaded once per worker process."""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attentionpack.attention.prefill import DENSE, UNCAPTURED, FreshAttention, select_prefill
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import LayerLayout
from vllm_attentionpack.config import ServeConfig, serve_config
from vllm_attentionpack.errors import PackMismatchError
from vllm_attentionpack.kv_cache.pages import PageGeometry, exact_blocks, page_geometry
from vllm_attentionpack.kv_cache.spec import shared_pool_spec
from vllm_attentionpack.ops.select import Ops, select_ops
from vllm_attentionpack.ops.spans import MAX_REBUILT
from vllm_attentionpack.ops.turns import MAX_TURNED
from vllm_attentionpack.packfile import Pack, load_pack
from vllm_attentionpack.packfile.shard import check_shardable, shard_codec, shard_layout
from vllm_attentionpack.plugin import BACKEND

if TYPE_CHECKING:
    from vllm_attentionpack.attention.window import ExactWindowLayer

logger = logging.getLogger("vllm.attentionpack")

#: The name of an exact cache is that of its first owner with this behind it.
_SUFFIX = ".exact"
_ATTRIBUTE = "_attentionpack_state"


def in_flight_tokens(vllm_config: VllmConfig) -> int:
    """The most tokens that have slots behind the processed ones of a request that decodes.

    Those of the steps under way, drafts included, and those that a drafter with a cache of its own
    fills ahead.
    """
    added = vllm_config.max_concurrent_batches * (1 + vllm_config.num_speculative_tokens)
    return int(added + vllm_config.num_lookahead_tokens)


@dataclass
class EngineState:
    """Configuration, pack, and what was derived from them for this worker.

    Attributes:
        prefill: the library for exact attention among new tokens, by name.
        layers: vLLM's attention layers by name, for a model and its drafter.
        codecs: handed to layers so far, by layer name.
        exact_layers: the companions of compacted layers, by the names of the latter.
        warm: layouts and block sizes whose kernels are compiled.
        geometry: the pages, where there is an exact cache; None before the first layer asked.
    """

    config: ServeConfig
    pack: Pack
    tp_size: int
    tp_rank: int
    num_stages: int
    max_model_len: int
    device: torch.device
    ops: Ops
    ops_name: str
    fresh_attention: FreshAttention
    prefill: str
    layers: dict[str, Any]
    codecs: dict[str, LayerCodec] = field(default_factory=dict)
    exact_layers: "dict[str, ExactWindowLayer]" = field(default_factory=dict)
    geometry: PageGeometry | None = None
    reported: bool = False
    warm: set[tuple[LayerLayout, int]] = field(default_factory=set)

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "EngineState":
        """The state of the engine that `vllm_config` belongs to; loads the pack the first time.

        It lives on an object that lives as long as the engine does, so that two engines of one
        process never share it; the one that holds the engine's layers, because vLLM gives the
        parts of a model copies of its configuration.
        """
        home = vllm_config.compilation_config
        state = getattr(home, _ATTRIBUTE, None)
        if state is None:
            config = serve_config(vllm_config.additional_config)
            pack = load_pack(config.pack)
            tp_size = vllm_config.parallel_config.tensor_parallel_size
            check_shardable(pack.header, tp_size)
            device = torch.device(vllm_config.device_config.device_type)
            name, ops, passed_over = select_ops(config.ops, device)
            for other, reason in passed_over.items():
                logger.info("AttentionPack: the ops '%s' cannot be used: %s", other, reason)
            model = vllm_config.model_config
            prefill, fresh_attention = select_prefill(
                config.prefill, device, model.dtype, model.get_head_size()
            )
            logger.info(
                "AttentionPack: attention runs on the ops '%s', among new tokens on '%s'",
                name,
                prefill,
            )
            state = cls(
                config,
                pack,
                tp_size,
                tp_rank=get_tensor_model_parallel_rank(),
                num_stages=vllm_config.parallel_config.pipeline_parallel_size,
                max_model_len=model.max_model_len,
                device=device,
                ops=ops,
                ops_name=name,
                fresh_attention=fresh_attention,
                prefill=prefill,
                layers=vllm_config.compilation_config.static_forward_context,
            )
            object.__setattr__(home, _ATTRIBUTE, state)
        return state

    def codec(self, layer_name: str) -> LayerCodec:
        """This rank's codec of one layer.

        Raises:
            PackMismatchError: the pack has no such layer.
        """
        if layer_name not in self.codecs:
            names = [layer.name for layer in self.pack.header.layers]
            if layer_name not in names:
                raise PackMismatchError(
                    f"the model has the attention layer '{layer_name}', but the pack "
                    f"'{self.config.pack}' holds only {', '.join(names[:3])}, ... "
                    f"({len(names)} layers). Calibrate this model again."
                )
            codec = shard_codec(self.pack, names.index(layer_name), self.tp_size, self.tp_rank)
            self.codecs[layer_name] = codec.to(self.device)
        return self.codecs[layer_name]

    @property
    def sinks(self) -> int:
        """Tokens at the start of a request that stay exact."""
        return min(self.config.exact_tokens(self.pack.header)[0], self.max_model_len)

    @property
    def window(self) -> int:
        """Tokens at the end of a request that stay exact, the newest included."""
        return min(self.config.exact_tokens(self.pack.header)[1], self.max_model_len)

    @property
    def prefills_densely(self) -> bool:
        """Whether long chunks go to vLLM's own op (`attention.dense_prefill`)."""
        return self.prefill == DENSE and self.config.exact_prefill

    @property
    def span(self) -> int:
        """Tokens that share an anchor; 0 if no key is turned back, not even in a second span."""
        span = self.pack.header.anchor_span
        return span if span < self.max_model_len or self.pre_rope else 0

    @property
    def pre_rope(self) -> bool:
        """Whether planes of keys are coded pre-RoPE."""
        return any(layer.rotary and layer.rotary.pre_rope for layer in self.pack.header.layers)

    @property
    def most_spans(self) -> int:
        """Of the longest request, where keys have anchors; one for none."""
        return -(-self.max_model_len // (self.span or self.max_model_len))

    @property
    def has_exact_cache(self) -> bool:
        return self.config.keeps_exact(self.pack.header)

    def cudagraph_support(self, vllm_config: VllmConfig) -> AttentionCGSupport:
        """Batches of equal query length (decoding, drafts to verify), if the ops are Triton's.

        Of single tokens only, where several of one request go to a provider that is not captured.
        """
        if self.ops_name != "triton" or not self.config.exact_prefill:
            return AttentionCGSupport.NEVER
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0  # tokens
        if self.span and (self.span <= MAX_REBUILT or captured * self.most_spans > MAX_TURNED):
            # A graph does the work of the longest requests whatever is asked of it.
            return AttentionCGSupport.NEVER
        if self.prefill == UNCAPTURED:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return AttentionCGSupport.UNIFORM_BATCH

    def add_exact_layers(self) -> None:
        """Gives the compacted layers of the loaded model their exact caches. Idempotent."""
        from vllm_attentionpack.attention.window import ExactWindowLayer

        if not self.has_exact_cache or self.exact_layers:
            return
        owners = self.compacted_layers
        together = [[name] for name in owners] if self.shares_pool else [list(owners)]
        for names in together:
            name = names[0] + _SUFFIX
            exact = ExactWindowLayer(name, {owner: owners[owner] for owner in names}, self)
            self.layers[name] = exact
            self.exact_layers.update(dict.fromkeys(names, exact))

    @property
    def compacted_layers(self) -> dict[str, Attention]:
        """This worker's, by name."""
        return {
            name: layer
            for name, layer in self.layers.items()
            if isinstance(layer, Attention) and layer.attn_backend.get_name() == BACKEND
        }

    @property
    def shares_pool(self) -> bool:
        """Whether blocks of compacted layers come from one pool with those of dense layers."""
        attention = [layer for layer in self.layers.values() if isinstance(layer, Attention)]
        return len(attention) > len(self.compacted_layers)

    def pages(self, spec: AttentionSpec, vllm_config: VllmConfig) -> PageGeometry:
        """The blocks of the two caches, chosen when the first layer asks with its dense `spec`."""
        if self.geometry is None:
            dense_bytes = spec.page_size_bytes // spec.block_size
            if self.shares_pool:
                stored = self.largest_bytes_per_token
                compacted = shared_pool_spec(spec, stored)
                self.geometry = PageGeometry(
                    compacted.block_size,
                    spec.block_size,
                    spec.page_size_bytes,
                    stored,
                    dense_bytes,
                )
            else:
                layers = [self.codec(name).layout for name in self.compacted_layers]
                cache = vllm_config.cache_config
                chosen = spec.block_size if cache.user_specified_block_size else None
                # Block sizes for the layers of all pipeline stages: vLLM wants them to agree.
                tokens = page_geometry(
                    sum(layout.bytes_per_token for layout in self.layouts),
                    len(self.layouts) * dense_bytes,
                    chosen,
                )
                self.geometry = tokens.holding(
                    sum(layout.bytes_per_token for layout in layers), len(layers) * dense_bytes
                )
        return self.geometry

    @property
    def layouts(self) -> list[LayerLayout]:
        """This rank's share of every layer in the pack, those of other pipeline stages included."""
        layouts = self.pack.header.layouts()
        return [shard_layout(layout, self.tp_size, self.tp_rank) for layout in layouts]

    @property
    def largest_bytes_per_token(self) -> int:
        """Of all layers; ranks agree."""
        return max(layout.bytes_per_token for layout in self.layouts)

    def warm_up(
        self, layers: Mapping[str, Attention], spec: AttentionSpec, vllm_config: VllmConfig
    ) -> None:
        """Compiles the kernels of layers that have pages of `spec`, for each layout once."""
        dtype, block_size, exact = vllm_config.model_config.dtype, spec.block_size, None
        if self.geometry is not None:
            exact = self.sinks, self.window, self.geometry.exact_block_size
        for name, layer in layers.items():
            codec = self.codec(name)
            if (codec.layout, block_size) in self.warm:
                continue
            self.warm.add((codec.layout, block_size))
            start = time.monotonic()
            self.ops.warm_up(layer.num_heads, dtype, codec, block_size, self.max_model_len, exact)
            if (seconds := time.monotonic() - start) > 1:
                logger.info(
                    "AttentionPack: compiled the kernels of layers like '%s' in %.0f s; the next "
                    "start finds them in Triton's cache",
                    name,
                    seconds,
                )

    def report(self, spec: AttentionSpec, vllm_config: VllmConfig) -> None:
        """Logs once what the cache of this worker holds; `spec` is that of one compacted layer.

        To measure CUDA graphs vLLM makes a cache of a few blocks first, before it knows how many
        there will be: nothing is logged of that one.

        Raises:
            PackMismatchError: the pack has layers that the model lacks.
        """
        if self.reported:
            return
        missing = [layer.name for layer in self.pack.header.layers if layer.name not in self.codecs]
        if missing and self.num_stages == 1:
            raise PackMismatchError(
                f"the pack '{self.config.pack}' holds the layer '{missing[0]}' "
                f"({len(missing)} of {len(self.pack.header.layers)}), which the model lacks. "
                "Calibrate this model again."
            )
        num_blocks = vllm_config.cache_config.num_gpu_blocks
        if not num_blocks:
            return
        self.reported = True
        layouts = [codec.layout for codec in self.codecs.values()]
        dense = sum(layout.dense_bytes_per_token for layout in layouts)
        stored: float = sum(layout.bytes_per_token for layout in layouts)
        room = f"{num_blocks * spec.block_size} tokens fit"
        if self.shares_pool:
            stored = len(layouts) * spec.page_size_bytes / spec.block_size
            room = "blocks shared with dense layers"
        elif self.geometry is not None:
            stored = self.geometry.page_bytes / self.geometry.block_size
            room = "blocks shared with exact tokens"
        logger.info(
            "AttentionPack: %.2fx compacted KV cache, %d -> %d bytes per token, %s "
            "(%d blocks of %d)",
            dense / stored,
            dense,
            stored,
            room,
            num_blocks,
            spec.block_size,
        )
        if self.geometry is not None:
            self._report_exact_cache(self.geometry, vllm_config)

    def _report_exact_cache(self, pages: PageGeometry, vllm_config: VllmConfig) -> None:
        longest = vllm_config.model_config.max_model_len
        margin = in_flight_tokens(vllm_config)
        logger.info(
            "AttentionPack: exact are the first %d and the last %d tokens of a request, in at most "
            "%d blocks of %d tokens beside the %d of %d that %d tokens take; padding is %.1f %% of "
            "the compacted pages and %.1f %% of the exact ones; a request of %d tokens takes "
            "%.2f times less than densely",
            self.sinks,
            self.window,
            exact_blocks(pages.exact_block_size, self.sinks, self.window, margin, longest),
            pages.exact_block_size,
            -(-longest // pages.block_size),
            pages.block_size,
            longest,
            100 * pages.padding,
            100 * pages.exact_padding,
            longest,
            longest
            * pages.exact_bytes_per_token
            / pages.request_bytes(longest, self.sinks, self.window, margin),
        )
