"""One layer's codec: bases and layout, ready to encode tokens into latents and back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import KINDS, GroupLayout, Kind, LayerLayout, PlaneCounts
from vllm_attentionpack.codec.positions import Anchors
from vllm_attentionpack.codec.quantize import (
    choose_scale,
    step_and_distortion,
    to_codes,
    zero_points,
)


@dataclass(frozen=True)
class Basis:
    """The linear maps of one (layer, head group, K|V), one per modality.

    Latents are measured in quantiser steps: the code of a token with scale `s` stands for
    `s * (code - zero_point)`. `R` counts columns (`codec.layout`). A dim that is a pair of them has
    the steps of its whole code: both columns encode it alike, and that of the high part decodes by
    a larger unit. Joint keys and values have one latent, the sum of what either basis encodes.

    Attributes:
        mean: float32 `[M, GD]`. Never stored per token: a constant in every key shifts all logits
            alike, a constant in every value comes back once, since softmax weights sum to one.
        encode: float32 `[M, GD, R]`, `latent = (x - mean) @ encode`.
        decode: float32 `[M, R, GD]`, `x ≈ mean + latent @ decode`.
        weight: float32 `[M, R]`, the squared error (of logits for keys, of layer outputs for
            values) that one squared step of error in each latent dim costs; zero for low parts,
            whose dim is counted with the high one.
    """

    mean: Tensor
    encode: Tensor
    decode: Tensor
    weight: Tensor

    @property
    def num_modalities(self) -> int:
        return self.mean.shape[0]

    def to(self, device: torch.device) -> "Basis":
        return Basis(*(tensor.to(device) for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, in the order of the fields."""
        return {
            "mean": self.mean,
            "encode": self.encode,
            "decode": self.decode,
            "weight": self.weight,
        }


def bases_by_kind(units: Sequence[Basis]) -> dict[Kind, Basis]:
    """The bases of a head group's keys and values.

    Args:
        units: that of K and that of V, or one of both, `[M, 2 GD, R]`, keys first: its rows are
            then shared out, as views.
    """
    if len(units) == 1:
        (joint,) = units
        dims = joint.mean.shape[1] // 2
        units = [
            Basis(joint.mean[:, of], joint.encode[:, of], joint.decode[:, :, of], joint.weight)
            for of in (slice(dims), slice(dims, None))
        ]
    return dict(zip(KINDS, units, strict=True))


class PlaneCodec:
    """Encodes one (head group, K|V): a `Basis` with the plane counts of its layout."""

    def __init__(self, basis: Basis, counts: PlaneCounts) -> None:
        self.basis = basis
        self.counts = counts
        columns = counts.columns

        def per_column(values: Iterable[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(list(values), dtype=dtype, device=basis.mean.device)

        bits = per_column(column.bits for column in columns)
        self.exact = counts.n16 > 0
        #: float32 `[R]`: the code of zero in each column; 0 where latents are stored as bfloat16.
        self.zero_point = torch.zeros_like(bits) if self.exact else zero_points(bits)
        #: float32 `[R]`: the same of whole codes.
        self.whole_zero_point = zero_points(per_column(column.code_bits for column in columns))
        #: float32 `[R]`: quantiser step of whole codes for unit variance.
        self.step = per_column(step_and_distortion(column.code_bits)[0] for column in columns)
        #: float32 `[R]`: the low bits of its whole code that a column lacks.
        self.shift = per_column(column.shift for column in columns)
        self._levels = torch.exp2(bits)
        first = {column.dim: i for i, column in reversed(list(enumerate(columns)))}
        #: int64 `[R]`: where each column's latent is: both of a pair must have one and the same.
        self._source = per_column((first[column.dim] for column in columns), torch.int64)

    def encode(self, x: Tensor, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of tokens whose codes are of nothing else; see `GroupCodec.encode`."""
        return self.quantize(self.project(x, visual), visual)

    def project(self, x: Tensor, visual: Tensor | None) -> Tensor:
        """Latents `[T, R]`, float32; see `GroupCodec.encode` for the arguments."""
        basis, x = self.basis, x.float()
        latent = (x - basis.mean[0]) @ basis.encode[0]
        if visual is not None and basis.num_modalities == 2:
            other = (x - basis.mean[1]) @ basis.encode[1]
            latent = torch.where(visual[:, None], other, latent)
        return latent

    def quantize(self, latent: Tensor, visual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of latents `[T, R]`; see `GroupCodec.encode`."""
        if self.exact:
            return latent, torch.ones(len(latent), device=latent.device)
        weight = self.basis.weight[0]
        if visual is not None and self.basis.num_modalities == 2:
            weight = self.basis.weight[visual.long()]
        latent = latent[:, self._source]
        scale = choose_scale(latent, self.whole_zero_point, self.step, weight)
        whole = to_codes(latent, scale, self.whole_zero_point)
        return torch.floor(whole / torch.exp2(self.shift)) % self._levels, scale

    def reconstruct(self, codes: Tensor, scale: Tensor, visual: Tensor) -> Tensor:
        """The tokens that codes stand for, float32 `[T, GD]`; see `GroupCodec.encode`."""
        return self.rebuild((codes - self.zero_point) * scale[:, None], visual)

    def rebuild(self, latent: Tensor, visual: Tensor) -> Tensor:
        """The tokens of float32 latents `[T, R]`, float32 `[T, GD]`."""
        index = visual.long() if self.basis.num_modalities == 2 else torch.zeros_like(visual.long())
        out = torch.empty(len(latent), self.basis.mean.shape[1], device=latent.device)
        for m in range(self.basis.num_modalities):
            chosen = index == m
            out[chosen] = self.basis.mean[m] + latent[chosen] @ self.basis.decode[m]
        return out


@dataclass(frozen=True)
class GroupCodec:
    """The key and value codecs of one head group; `joint_kv` as in its layout."""

    key: PlaneCodec
    value: PlaneCodec
    joint_kv: bool

    def encode(
        self, x: Mapping[Kind, Tensor], visual: Tensor | None
    ) -> dict[Kind, tuple[Tensor, Tensor]]:
        """Codes and scales of tokens, the same for keys and values where they are joint.

        Args:
            x: keys and values of the head group, `[T, GD]` each, any float dtype.
            visual: bool `[T]`, True for visual tokens; None when all are text. Ignored by a codec
                of one modality.

        Returns:
            Of each kind codes `[T, R]`, float32 whole numbers (bfloat16-valued latents in 16-bit
            planes), and float32 scales `[T]` that are exactly representable in one byte.
        """
        if not self.joint_kv:
            key, value = self.key.encode(x["key"], visual), self.value.encode(x["value"], visual)
            return {"key": key, "value": value}
        latent = self.key.project(x["key"], visual) + self.value.project(x["value"], visual)
        codes = self.key.quantize(latent, visual)
        return {"key": codes, "value": codes}


class LayerCodec:
    """The codec of one attention layer (of this rank's heads).

    Args:
        layout: byte layout, with one entry per head group.
        bases: key and value basis of each head group, in head order.
        anchors: what keys are turned back by before they are encoded; None if they are coded as
            they come.
    """

    def __init__(
        self,
        layout: LayerLayout,
        bases: "list[dict[Kind, Basis]]",
        anchors: Anchors | None = None,
    ) -> None:
        if len(bases) != len(layout.groups):
            raise ValueError(f"{len(bases)} bases for {len(layout.groups)} head groups")
        self.layout = layout
        self.anchors = anchors
        self.groups = [
            GroupCodec(
                PlaneCodec(basis["key"], group.key),
                PlaneCodec(basis["value"], group.value),
                group.joint_kv,
            )
            for basis, group in zip(bases, layout.groups, strict=True)
        ]

    @property
    def num_modalities(self) -> int:
        return self.groups[0].key.basis.num_modalities

    def group_heads(self) -> Iterator[tuple[GroupCodec, slice]]:
        """Each head group with the slice of KV heads that it codes."""
        size = self.layout.heads_per_group
        for g, group in enumerate(self.groups):
            yield group, slice(g * size, (g + 1) * size)

    def to(self, device: torch.device) -> "LayerCodec":
        bases: list[dict[Kind, Basis]] = [
            {"key": g.key.basis.to(device), "value": g.value.basis.to(device)} for g in self.groups
        ]
        return LayerCodec(self.layout, bases, self.anchors and self.anchors.to(device))


def identity_codec(num_kv_heads: int, head_size: int, heads_per_group: int = 1) -> LayerCodec:
    """A codec that stores bfloat16 keys and values as they are: for tests and debugging only.

    Its 16-bit planes keep every bit of a bfloat16 cache, so that whatever differs from a dense
    cache is a fault of the code around the codec.
    """
    dims = heads_per_group * head_size
    counts = PlaneCounts(n16=dims)
    groups = tuple(GroupLayout(counts, counts) for _ in range(num_kv_heads // heads_per_group))
    size = sum(group.bytes_per_token for group in groups)
    eye = torch.eye(dims)[None]
    basis = Basis(torch.zeros(1, dims), eye, eye.clone(), torch.ones(1, dims))
    layout = LayerLayout(groups, heads_per_group, head_size, size)
    return LayerCodec(layout, [{"key": basis, "value": basis} for _ in groups])
