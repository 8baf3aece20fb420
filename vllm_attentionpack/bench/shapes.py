"""Layers to compile and measure the GPU kernels on: codecs without calibration, of real sizes."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_attentionpack.codec.allocate import fill, unit_curve
from vllm_attentionpack.codec.codec import Basis, LayerCodec
from vllm_attentionpack.codec.layout import (
    DENSE_BYTES,
    KINDS,
    PLANE_QUANTUM,
    SCALE_BYTES,
    GroupLayout,
    Kind,
    LayerLayout,
    PlaneCounts,
)
from vllm_attentionpack.codec.transform import PrincipalBasis

#: What a key error costs beside a value error: gives keys about twice the bytes of values, which is
#: what calibration of the reference VLM gives them (docs/log.md).
KEY_WEIGHT = 6.0


@dataclass(frozen=True)
class LayerShape:
    """One attention layer and its compression.

    Attributes:
        query_heads: `Hq`.
        kv_heads: `Hk`.
        head_size: `D`.
        heads_per_group: `G`.
        ratio: dense bfloat16 bytes over stored bytes, to be met or exceeded.
        modalities: `M`.
        spread: how fast variances fall over the dims of a head group: the last is `exp(-spread)` of
            the first.
    """

    query_heads: int
    kv_heads: int
    head_size: int
    heads_per_group: int
    ratio: float
    modalities: int = 1
    spread: float = 6.0

    @property
    def name(self) -> str:
        return (
            f"{self.query_heads}/{self.kv_heads}x{self.head_size} "
            f"G={self.heads_per_group} ratio {self.ratio:g}"
            + (f" M={self.modalities}" if self.modalities > 1 else "")
            + (" with pairs" if any(group.key.pairs for group in self.layout().groups) else "")
        )

    def layout(self) -> LayerLayout:
        """Planes by the allocator, for variances that fall exponentially."""
        dims = self.heads_per_group * self.head_size
        curve = unit_curve(np.exp(-self.spread * np.arange(dims) / dims))
        dense = 2 * dims * DENSE_BYTES
        budget = (dense / self.ratio - 2 * SCALE_BYTES) // PLANE_QUANTUM
        key, value = fill([curve, curve], [KEY_WEIGHT, 1.0], int(budget))
        group = GroupLayout(curve.choices[key], curve.choices[value])
        groups = (group,) * (self.kv_heads // self.heads_per_group)
        size = sum(g.bytes_per_token for g in groups)
        return LayerLayout(groups, self.heads_per_group, self.head_size, size)

    def codec(self, device: torch.device, seed: int = 0) -> LayerCodec:
        """A codec for keys and values that are standard normal in every dim.

        Its bases are random and orthogonal; latents are measured in quantiser steps as they would
        be after calibration. With `device` "meta" nothing is computed.
        """
        layout = self.layout()
        bases: list[dict[Kind, Basis]] = []
        for group in layout.groups:
            pair: dict[Kind, Basis] = {}
            for kind in KINDS:
                counts = getattr(group, kind)
                pair[kind] = _random_basis(
                    layout.heads_per_group * layout.head_size,
                    counts,
                    self.modalities,
                    device,
                    seed + len(bases),
                )
            bases.append(pair)
        return LayerCodec(layout, bases)


def _random_basis(
    dims: int, counts: PlaneCounts, modalities: int, device: torch.device, seed: int
) -> Basis:
    generator = torch.Generator(device="cpu").manual_seed(seed)
    turns = []
    for _ in range(modalities):
        # A few reflections mix all dims at a fraction of the cost of a random orthogonal matrix.
        turn = torch.eye(dims, device=device)
        for _ in range(8):
            v = torch.randn(dims, generator=generator).to(device)
            v = v / v.norm()
            turn = turn - 2 * turn @ v[:, None] * v
        turns.append(turn)
    one = torch.eye(dims, dtype=torch.float64, device=device)[None]
    basis = PrincipalBasis(
        mean=torch.zeros(modalities, dims, device=device),
        vectors=torch.stack(turns),
        root=one,
        inverse=one,
        variance=torch.ones(modalities, dims, dtype=torch.float64, device=device),
        share=torch.full((modalities,), 1 / modalities, device=device),
    )
    return basis.truncate(counts)
