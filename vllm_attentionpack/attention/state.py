"""What the layers of one engine share: configuration and pack, loaded once per worker process."""

import logging
from dataclasses import dataclass, field

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.config import ServeConfig, serve_config
from vllm_attentionpack.errors import PackMismatchError
from vllm_attentionpack.ops.select import Ops, select_ops
from vllm_attentionpack.packfile import Pack, load_pack
from vllm_attentionpack.packfile.shard import check_shardable, shard_codec, shard_layout
from vllm_attentionpack.plugin import BACKEND

logger = logging.getLogger("vllm.attentionpack")

_ATTRIBUTE = "_attentionpack_state"


def shares_pool(vllm_config: VllmConfig) -> bool:
    """Whether blocks of compacted layers come from one pool with those of dense layers."""
    layers = get_layers_from_vllm_config(vllm_config, Attention).values()
    return any(layer.attn_backend.get_name() != BACKEND for layer in layers)


@dataclass
class EngineState:
    """Configuration, pack and the codecs handed to layers so far, by layer name."""

    config: ServeConfig
    pack: Pack
    tp_size: int
    tp_rank: int
    num_stages: int
    device: torch.device
    ops: Ops
    codecs: dict[str, LayerCodec] = field(default_factory=dict)
    reported: bool = False

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> "EngineState":
        """The state of the engine that `vllm_config` belongs to; loads the pack the first time.

        It lives on the configuration object, which lives as long as the engine does, so that two
        engines of one process never share it.
        """
        state = getattr(vllm_config, _ATTRIBUTE, None)
        if state is None:
            config = serve_config(vllm_config.additional_config)
            pack = load_pack(config.pack)
            tp_size = vllm_config.parallel_config.tensor_parallel_size
            check_shardable(pack.header, tp_size)
            device = torch.device(vllm_config.device_config.device_type)
            name, ops, passed_over = select_ops(config.ops, device)
            for other, reason in passed_over.items():
                logger.info("AttentionPack: the ops '%s' cannot be used: %s", other, reason)
            logger.info("AttentionPack: attention runs on the ops '%s'", name)
            state = cls(
                config,
                pack,
                tp_size,
                tp_rank=get_tensor_model_parallel_rank(),
                num_stages=vllm_config.parallel_config.pipeline_parallel_size,
                device=device,
                ops=ops,
            )
            object.__setattr__(vllm_config, _ATTRIBUTE, state)
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
    def largest_bytes_per_token(self) -> int:
        """Of this rank's layers; ranks agree."""
        layouts = self.pack.header.layouts()
        return max(shard_layout(x, self.tp_size, self.tp_rank).bytes_per_token for x in layouts)

    def report(self, spec: AttentionSpec, num_blocks: int, shared: bool) -> None:
        """Logs once what the cache of this worker holds.

        Args:
            spec: of one compacted layer, as vLLM allocated it.
            num_blocks: of the pool.
            shared: see `shares_pool`.

        Raises:
            PackMismatchError: the pack has layers that the model lacks.
        """
        if self.reported:
            return
        self.reported = True
        missing = [layer.name for layer in self.pack.header.layers if layer.name not in self.codecs]
        if missing and self.num_stages == 1:
            raise PackMismatchError(
                f"the pack '{self.config.pack}' holds the layer '{missing[0]}' "
                f"({len(missing)} of {len(self.pack.header.layers)}), which the model lacks. "
                "Calibrate this model again."
            )
        layouts = [codec.layout for codec in self.codecs.values()]
        dense = sum(layout.dense_bytes_per_token for layout in layouts)
        if shared:
            stored = len(layouts) * spec.page_size_bytes / spec.block_size
            room = "pages shared with dense layers"
        else:
            stored = sum(layout.bytes_per_token for layout in layouts)
            room = f"{num_blocks * spec.block_size} tokens fit"
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
