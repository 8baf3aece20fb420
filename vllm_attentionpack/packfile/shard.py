"""This tensor-parallel rank's part of a pack: whole head groups, in rank order."""

from dataclasses import replace

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import LayerLayout
from vllm_attentionpack.errors import PackMismatchError
from vllm_attentionpack.packfile.schema import Pack, PackHeader


def check_shardable(header: PackHeader, tp_size: int) -> None:
    """Raises `PackMismatchError` unless the head groups divide over `tp_size` ranks."""
    groups = header.fingerprint.num_kv_heads // header.heads_per_group
    if groups % tp_size:
        allowed = [n for n in range(1, groups + 1) if groups % n == 0]
        raise PackMismatchError(
            f"tensor_parallel_size is {tp_size}, but the pack codes {header.heads_per_group} KV "
            f"heads jointly, which makes {groups} head group(s): allowed degrees are {allowed}. "
            "Calibrate with a smaller --group-size to shard further."
        )


def shard_layout(layout: LayerLayout, tp_size: int, tp_rank: int) -> LayerLayout:
    """The layout of one rank. All ranks get the bytes of the largest: pages must be equal."""
    per_rank = len(layout.groups) // tp_size
    sizes = [
        sum(group.bytes_per_token for group in layout.groups[r * per_rank : (r + 1) * per_rank])
        for r in range(tp_size)
    ]
    groups = layout.groups[tp_rank * per_rank : (tp_rank + 1) * per_rank]
    size = layout.bytes_per_token if tp_size == 1 else max(sizes)
    return replace(layout, groups=groups, bytes_per_token=size)


def shard_codec(pack: Pack, layer: int, tp_size: int, tp_rank: int) -> LayerCodec:
    """The codec of one layer for one rank (see `check_shardable`)."""
    layout = pack.header.layouts()[layer]
    per_rank = len(layout.groups) // tp_size
    bases = pack.layers[layer].bases[tp_rank * per_rank : (tp_rank + 1) * per_rank]
    return LayerCodec(shard_layout(layout, tp_size, tp_rank), bases, pack.layers[layer].anchors)
