"""Packs made without calibration."""

from collections.abc import Callable, Sequence

from vllm_attentionpack.codec.codec import LayerCodec, identity_codec
from vllm_attentionpack.codec.positions import Anchors
from vllm_attentionpack.packfile import Fingerprint, Pack
from vllm_attentionpack.packfile.uncalibrated import uncalibrated_pack


def pack_of(
    make_codec: Callable[[int], LayerCodec],
    fingerprint: Fingerprint,
    layer_names: Sequence[str],
    max_context: int = 1 << 20,
) -> Pack:
    """A pack from one codec per layer; `make_codec` gets the layer's index."""
    codecs = [make_codec(i) for i in range(len(layer_names))]
    return uncalibrated_pack(codecs, fingerprint, layer_names, 1.0, max_context)


def identity_pack(
    fingerprint: Fingerprint,
    layer_names: Sequence[str],
    heads_per_group: int = 1,
    anchors: Anchors | None = None,
) -> Pack:
    """A pack that stores bfloat16 keys and values as they are, or turned back by anchors."""
    codec = identity_codec(fingerprint.num_kv_heads, fingerprint.head_size, heads_per_group)
    codec.anchors = anchors
    return pack_of(lambda _: codec, fingerprint, layer_names)
