"""Layers to compile and measure the GPU kernels on: codecs without calibration, of real sizes."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_attentionpack.codec.allocate import fill, unit_curve
from vllm_attentionpack.codec.codec import Basis, LayerCodec, bases_by_kind
from vllm_attentionpack.codec.layout import (
    DENSE_BYTES,
    PLANE_QUANTUM,
    SCALE_BYTES,
    GroupLayout,
    Kind,
    LayerLayout,
    PlaneCounts,
    units_of,
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
        joint_kv: one latent for the keys and values of a head group.
    """

    query_heads: int
    kv_heads: int
    head_size: int
    heads_per_group: int
    ratio: float
    modalities: int = 1
    spread: float = 6.0
    joint_kv: bool = False

    @property
    def name(self) -> str:
        return (
            f"{self.query_heads}/{self.kv_heads}x{self.head_size} "
            f"G={self.heads_per_group} ratio {self.ratio:g}"
            + (f" M={self.modalities}" if self.modalities > 1 else "")
            + (" joint K/V" if self.joint_kv else "")
            + (" with pairs" if any(group.key.pairs for group in self.layout().groups) else "")
        )

    def layout(self) -> LayerLayout:
        """Planes by the allocator, for variances that fall exponentially."""
        units = units_of(self.joint_kv)
        dims = self.heads_per_group * self.head_size * len(units[0])
        curve = unit_curve(np.exp(-self.spread * np.arange(dims) / dims))
        dense = len(units) * dims * DENSE_BYTES
        budget = (dense / self.ratio - len(units) * SCALE_BYTES) // PLANE_QUANTUM
        spent = fill([curve] * len(units), [KEY_WEIGHT, 1.0][: len(units)], int(budget))
        group = GroupLayout.of([curve.choices[quanta] for quanta in spent])
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
            found = [
                _random_basis(
                    layout.coded_dims,
                    getattr(group, kinds[0]),
                    self.modalities,
                    device,
                    seed + len(bases),
                )
                for kinds in group.units
            ]
            bases.append(bases_by_kind(found))
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
        root=one[None],
        variance=torch.ones(modalities, dims, dtype=torch.float64, device=device),
        share=torch.full((modalities,), 1 / modalities, device=device),
    )
    return basis.truncate(counts)
