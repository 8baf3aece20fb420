"""What the kernels need to know of a codec: layouts as numbers, and matrices in the kernels' order.

The kernels take latent dims in the order in which unpacking finds them, so that no code is ever
moved: the matrices of `absorb_query` and `up_project` have their columns and rows permuted
instead.

*Keys* are read as 32-bit words. A word yields, for each code `k` of a byte and each of its lower
two bytes, a pair of dims: that of the byte and that of the byte two further on.
*Values* are read in chunks of as many bytes as a vector has lanes; a chunk yields one vector per
code of a byte. A last chunk that is not full leaves lanes that stand for no dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_attentionpack.codec.codec import LayerCodec, PlaneCodec
from vllm_attentionpack.codec.layout import KINDS, Kind, LayerLayout, Plane, PlaneCounts
from vllm_attentionpack.ops.cpu.library import SIDE_FIELDS

#: Most rows of a packed matrix that share the scales of their columns, and the largest integer: the
#: sum of so many products of two such integers fits 32 bits. Both as in csrc.
SEGMENT, LARGEST = 128, 4095
BLOCK_VECTORS = 4


@dataclass(frozen=True)
class EncodeTables:
    """One (head group, K|V) of `store_kv`.

    Attributes:
        encode: float32 `[M, GD, R]`.
        bias: float32 `[M, R]`, the latent of the mean.
        step: float32 `[R]`.
        weight: float32 `[M, R]`.
    """

    encode: Tensor
    bias: Tensor
    step: Tensor
    weight: Tensor

    @classmethod
    def of(cls, codec: PlaneCodec) -> "EncodeTables":
        basis = codec.basis
        bias = (basis.mean[:, None] @ basis.encode)[:, 0]
        return cls(basis.encode.contiguous(), bias, codec.step, basis.weight.contiguous())


@dataclass(frozen=True)
class PackedMatrix:
    """Matrices of 16-bit integers in the order of `library.project`.

    Attributes:
        matrix: int16 `[B, panels, steps, columns of a panel, 2]`: a step is two rows, a panel what
            `BLOCK_VECTORS` vectors hold; zero where there is no row or column.
        scale: float32 `[B, segments, columns of all panels]`, of the columns of each segment.
        bounds: int64 `[segments + 1]`, the first row of each segment and the end.
        width: columns.
    """

    matrix: Tensor
    scale: Tensor
    bounds: Tensor
    width: int

    @classmethod
    def of(cls, matrix: Tensor, lanes: int, runs: Sequence[int]) -> "PackedMatrix":
        """From float32 `[B, depth, width]`.

        `runs`: numbers of rows that are multiplied with numbers of one magnitude, even but for the
        last. Rounding is to the largest of a segment, and a segment is part of one run.
        """
        panel = BLOCK_VECTORS * lanes
        width = matrix.shape[2]
        panels = -(-width // panel)
        matrix = pad(matrix, (0, panels * panel - width, 0, matrix.shape[1] % 2))
        lengths = [min(SEGMENT, run - at) for run in runs for at in range(0, run, SEGMENT)]
        bounds = torch.tensor([0, *accumulate(lengths)])
        parts = matrix.split([n + n % 2 for n in lengths], 1)
        scales = [part.abs().amax(1, keepdim=True).clamp_min(1e-30) / LARGEST for part in parts]
        steps = torch.cat([part / scale for part, scale in zip(parts, scales, strict=True)], 1)
        steps = steps.round().to(torch.int16).unflatten(1, (-1, 2)).unflatten(3, (panels, panel))
        ordered = steps.permute(0, 3, 1, 4, 2).contiguous()
        return cls(ordered, torch.cat(scales, 1), bounds, width)


class CpuPlan:
    """The tables of one layer for vectors of `lanes` lanes.

    Attributes:
        absorb: float32 `[G, D, M * (Rk + 1)]` per head group: `q @ absorb` is the latent query of
            each modality in the kernels' order, then the logit of each mean key.
        up: float32 `[G, M * (lanes of V + 1), D]` per head group: the inverse for values, with the
            means in the last rows.
        packed_absorb: the same for models in bfloat16.
        packed_up: likewise.
        encode: per head group and kind.
        widths: rows of each `up`.
    """

    def __init__(self, codec: LayerCodec, lanes: int) -> None:
        layout = codec.layout
        self.absorb: list[Tensor] = []
        self.up: list[Tensor] = []
        self.encode: list[dict[Kind, EncodeTables]] = []
        for group, _ in codec.group_heads():
            decode, mean = _by_head(group.key, layout)
            decode = decode[:, :, key_order(group.key.counts)]
            self.absorb.append(
                torch.cat([decode.flatten(1, 2), mean], 1).mT.contiguous()  # [G, D, M * (R + 1)]
            )
            decode, mean = _by_head(group.value, layout)
            order = value_order(group.value.counts, lanes)
            decode = torch.where((order >= 0)[:, None], decode[:, :, order.clamp_min(0)], 0.0)
            self.up.append(torch.cat([decode.flatten(1, 2), mean], 1))
            self.encode.append({kind: EncodeTables.of(getattr(group, kind)) for kind in KINDS})
        modalities = codec.num_modalities
        self.packed_absorb = [
            PackedMatrix.of(matrix, lanes, [layout.head_size]) for matrix in self.absorb
        ]
        self.packed_up = [
            PackedMatrix.of(
                matrix, lanes, [*value_lanes(group.value, lanes) * modalities, modalities]
            )
            for matrix, group in zip(self.up, layout.groups, strict=True)
        ]
        self.widths = [up.shape[1] for up in self.up]
        self._layout = layout
        self._tables: dict[int, Tensor] = {}

    def table(self, block_size: int) -> Tensor:
        """int64 `[groups, 2, SIDE_FIELDS]`: `Group` of csrc/api.h for each head group."""
        if block_size not in self._tables:
            self._tables[block_size] = _layout_table(self._layout, block_size)
        return self._tables[block_size]


_PLANS: "WeakKeyDictionary[LayerCodec, dict[int, CpuPlan]]" = WeakKeyDictionary()


def plan_of(codec: LayerCodec, lanes: int) -> CpuPlan:
    """The plan of a codec; made when first asked for and kept as long as the codec lives."""
    plans = _PLANS.setdefault(codec, {})
    if lanes not in plans:
        plans[lanes] = CpuPlan(codec, lanes)
    return plans[lanes]


def key_order(counts: PlaneCounts) -> Tensor:
    """int64 `[R]`: the latent dim at each place of the kernels' order for keys."""
    order: list[int] = []
    start = 0
    for bits, dims in counts:
        if bits == 16:
            order += range(start, start + dims)
        elif dims:
            stride = bits * dims // 8  # bytes per token: dims of one byte are that far apart
            order += (
                start + k * stride + word + byte
                for word in range(0, stride, 4)
                for k in range(8 // bits)
                for byte in (0, 2, 1, 3)
            )
        start += dims
    return torch.tensor(order)


def value_order(counts: PlaneCounts, lanes: int) -> Tensor:
    """int64 `[lanes of V]`: the latent dim at each place of the result, -1 for none."""
    order: list[int] = []
    start = 0
    for bits, dims in counts:
        per_byte = 1 if bits == 16 else 8 // bits
        stride = dims // per_byte
        for chunk in range(0, stride, lanes):
            for k in range(per_byte):
                order += (
                    start + k * stride + at if at < stride else -1
                    for at in range(chunk, chunk + lanes)
                )
        start += dims
    return torch.tensor(order)


def value_lanes(counts: PlaneCounts, lanes: int) -> list[int]:
    """How many places each plane has in `value_order`."""
    widths = []
    for bits, dims in counts:
        per_byte = 1 if bits == 16 else 8 // bits
        if dims:
            widths.append(-(-dims // (per_byte * lanes)) * lanes * per_byte)
    return widths


def _by_head(codec: PlaneCodec, layout: LayerLayout) -> tuple[Tensor, Tensor]:
    """The basis by KV head of the group: decode `[G, M, R, D]` and mean `[G, M, D]`."""
    decode = codec.basis.decode.unflatten(-1, (-1, layout.head_size)).permute(2, 0, 1, 3)
    mean = codec.basis.mean.unflatten(-1, (-1, layout.head_size)).permute(1, 0, 2)
    return decode, mean


def _layout_table(layout: LayerLayout, block_size: int) -> Tensor:
    owners: dict[tuple[int, Kind], list[Plane]] = {}
    for plane in layout.planes(block_size):
        owners.setdefault((plane.group, plane.kind), []).append(plane)
    table = torch.zeros(len(layout.groups), len(KINDS), SIDE_FIELDS, dtype=torch.int64)
    for (group, kind), owned in owners.items():
        *codes, scales = owned
        numbers = [len(codes), getattr(layout.groups[group], kind).rank, scales.offset]
        for plane in codes:
            numbers += [plane.bits, plane.dims, plane.bytes_per_token, plane.offset]
        table[group, KINDS.index(kind), : len(numbers)] = torch.tensor(numbers)
    return table
