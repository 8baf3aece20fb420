"""Packs made without calibration."""

from collections.abc import Callable, Sequence

from vllm_attentionpack.codec.codec import LayerCodec, identity_codec
from vllm_attentionpack.codec.layout import KINDS, PlaneCounts
from vllm_attentionpack.packfile.schema import (
    FORMAT_VERSION,
    Fingerprint,
    GroupHeader,
    LayerHeader,
    LayerPack,
    Pack,
    PackHeader,
    PlaneHeader,
    Provenance,
)


def pack_of(
    make_codec: Callable[[int], LayerCodec],
    fingerprint: Fingerprint,
    layer_names: Sequence[str],
    max_context: int = 1 << 20,
) -> Pack:
    """A pack from one codec per layer; `make_codec` gets the layer's index."""
    codecs = [make_codec(i) for i in range(len(layer_names))]
    header = PackHeader(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        provenance=Provenance(
            model="test",
            data_sha256="0" * 64,
            tokens=0,
            visual_tokens=0,
            seed=0,
            vllm_version="test",
            attentionpack_version="test",
        ),
        heads_per_group=codecs[0].layout.heads_per_group,
        num_modalities=codecs[0].num_modalities,
        ratio=1.0,
        max_context=max_context,
        layers=tuple(
            LayerHeader(
                name=name,
                bytes_per_token=codec.layout.bytes_per_token,
                groups=tuple(
                    GroupHeader(key=_planes(group.key), value=_planes(group.value))
                    for group in codec.layout.groups
                ),
            )
            for name, codec in zip(layer_names, codecs, strict=True)
        ),
    )
    layers = [
        LayerPack(
            bases=[{kind: getattr(g, kind).basis for kind in KINDS} for g in codec.groups],
            variance=[
                {kind: getattr(g, kind).basis.mean * 0 for kind in KINDS} for g in codec.groups
            ],
        )
        for codec in codecs
    ]
    return Pack(header, layers)


def identity_pack(
    fingerprint: Fingerprint, layer_names: Sequence[str], heads_per_group: int = 1
) -> Pack:
    """A pack that stores bfloat16 keys and values as they are."""
    codec = identity_codec(fingerprint.num_kv_heads, fingerprint.head_size, heads_per_group)
    return pack_of(lambda _: codec, fingerprint, layer_names)


def _planes(counts: PlaneCounts) -> PlaneHeader:
    return PlaneHeader(n8=counts.n8, n4=counts.n4, n2=counts.n2, n16=counts.n16)
