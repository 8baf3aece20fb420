"""Packs of codecs that no calibration made: for benchmarks and tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import Basis, LayerCodec
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.codec.positions import common_span
from vllm_attentionpack.packfile.schema import (
    FORMAT_VERSION,
    Fingerprint,
    GroupHeader,
    LayerHeader,
    LayerPack,
    Pack,
    PackHeader,
    Provenance,
    RotaryHeader,
)


def uncalibrated_pack(
    codecs: Sequence[LayerCodec],
    fingerprint: Fingerprint,
    layer_names: Sequence[str],
    ratio: float,
    max_context: int,
) -> Pack:
    """A pack from one codec per layer, with spectra of zeros and a provenance that says nothing.

    Args:
        codecs: in the order of `layer_names`; alike in heads per group and modalities.
        fingerprint: of the model that the pack shall fit.
        layer_names: vLLM's names of the attention layers.
        ratio: stated as the compression that was asked for.
        max_context: see `PackHeader`.
    """
    header = PackHeader(
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        provenance=Provenance(
            model="none",
            data_sha256="0" * 64,
            tokens=0,
            visual_tokens=0,
            seed=0,
            vllm_version="none",
            attentionpack_version="none",
        ),
        heads_per_group=codecs[0].layout.heads_per_group,
        num_modalities=codecs[0].num_modalities,
        ratio=ratio,
        max_context=max_context,
        anchor_span=common_span(codec.anchors for codec in codecs),
        layers=tuple(
            LayerHeader(
                name=name,
                bytes_per_token=codec.layout.bytes_per_token,
                groups=tuple(map(GroupHeader.of, codec.layout.groups)),
                rotary=RotaryHeader.of(codec.anchors),
            )
            for name, codec in zip(layer_names, codecs, strict=True)
        ),
    )
    layers = []
    for codec in codecs:
        bases: list[dict[Kind, Basis]] = [
            {kind: getattr(group, kind).basis for kind in KINDS} for group in codec.groups
        ]
        flat = torch.zeros(codec.num_modalities, codec.layout.coded_dims)
        spectra: list[dict[Kind, Tensor]] = [{kind: flat for kind in KINDS} for _ in bases]
        layers.append(LayerPack(bases, spectra, codec.anchors))
    return Pack(header, layers)
