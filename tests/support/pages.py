"""Reading the pages of an engine."""

import torch
from torch import Tensor

from tests.support.engines import Engine
from vllm_attentionpack.codec.quantize import MODALITY_BIT
from vllm_attentionpack.kv_cache.spec import block_view


def visual_bits(engine: Engine, blocks: list[int], tokens: int) -> Tensor:
    """The modality of the first `tokens` tokens in `blocks`, wherever it is stored.

    Returns:
        bool `[n, tokens]`: one row for each layer, head group, K and V.
    """
    size = engine.cache_config.block_size
    rows = []
    for name, codec in engine.codecs.items():
        pages = block_view(engine.kv_caches[name])[blocks]
        for plane in codec.layout.planes(size):
            if plane.bits == 0:
                scales = pages[:, plane.offset : plane.offset + size]
                rows.append(scales.flatten()[:tokens] >= MODALITY_BIT)
    return torch.stack(rows)
