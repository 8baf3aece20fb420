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
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_attentionpack.codec.codec import LayerCodec, PlaneCodec
from vllm_attentionpack.codec.layout import KINDS, Kind, LayerLayout, PlaneCounts
from vllm_attentionpack.ops.cpu.library import Kernels
from vllm_attentionpack.ops.cpu.maps import FloatMap, Map, MapList, PackedMap
from vllm_attentionpack.ops.cpu.structures import SIDE_FIELDS
from vllm_attentionpack.ops.pages import planes_by_owner


@dataclass(frozen=True)
class EncodeTables:
    """One (head group, K|V) of `store_kv`.

    Attributes:
        maps: per modality, `[1, T, 1, GD]` less the mean to `[1, T, 1, R]`.
        mean: float32 `[M, GD]`.
        step: float32 `[R]`.
        weight: float32 `[M, R]`.
    """

    maps: list[Map]
    mean: Tensor
    step: Tensor
    weight: Tensor


class CpuPlan:
    """The tables of one layer for the kernels of one instruction set.

    `packed`: whether the maps may be matrices of 16-bit integers. Planes of bfloat16 latents, which
    are there to change nothing, keep float32.

    Attributes:
        absorb: per head group, `[G, T, repeats, D]` to the latent query of each modality in the
            kernels' order, then the logit of each mean key, `[.., M * (Rk + 1)]`, and zeros.
        up: per head group, the inverse for values, with the weights of the means last,
            `[G, T, repeats, M * (lanes of V + 1) or more]` to `[.., D]`.
        encode: per head group and kind.
        query_widths, widths: per head group, floats of a row that `absorb` gives and `up` takes:
            whole panels, since a vector that lies across two cache lines costs twice as much.
        own_basis, own_mean: per head group, what rebuilds planes that are coded pre-RoPE, see
            `calls.attend`; empty if there are none.
    """

    def __init__(self, codec: LayerCodec, kernels: Kernels, packed: bool) -> None:
        layout = codec.layout
        modalities = codec.num_modalities
        lanes, panel = kernels.lanes, kernels.panel
        absorbs: list[Map] = []
        ups: list[Map] = []
        self.encode: list[dict[Kind, EncodeTables]] = []
        self.query_widths: list[int] = []
        self.widths: list[int] = []

        def map_of(matrix: Tensor, counts: PlaneCounts, runs: Sequence[int]) -> Map:
            if packed and not counts.n16:
                return PackedMap(matrix, kernels, runs)
            return FloatMap(matrix)

        def tables_of(source: PlaneCodec) -> EncodeTables:
            basis = source.basis
            maps = [map_of(matrix[None], source.counts, [len(matrix)]) for matrix in basis.encode]
            return EncodeTables(maps, basis.mean, source.step, basis.weight.contiguous())

        for group, _ in codec.group_heads():
            counts = group.key.counts
            decode, mean = _by_head(group.key, layout)
            decode = decode[:, :, key_order(counts)]
            absorb = torch.cat([decode.flatten(1, 2), mean], 1).mT  # [G, D, M * (R + 1)]
            absorb = pad(absorb, (0, -absorb.shape[2] % panel))
            absorbs.append(map_of(absorb, counts, [layout.head_size]))
            self.query_widths.append(absorb.shape[2])
            counts = group.value.counts
            decode, mean = _by_head(group.value, layout)
            order = value_order(counts, lanes)
            decode = torch.where((order >= 0)[:, None], decode[:, :, order.clamp_min(0)], 0.0)
            up = torch.cat([decode.flatten(1, 2), mean], 1)
            ups.append(map_of(up, counts, [*value_lanes(counts, lanes) * modalities, modalities]))
            self.widths.append(up.shape[1] + -up.shape[1] % panel)
            self.encode.append({kind: tables_of(getattr(group, kind)) for kind in KINDS})
        self.absorb, self.up = MapList(absorbs), MapList(ups)
        self.own_basis, self.own_mean = _own_planes(codec)
        self._owner = ref(codec)  # held, it would never be let go of by `_PLANS`
        self._tables: dict[int, Tensor] = {}
        self._decode: dict[torch.dtype, list[dict[Kind, tuple[Tensor, Tensor]]]] = {}

    @property
    def _codec(self) -> LayerCodec:
        codec = self._owner()
        assert codec is not None
        return codec

    def table(self, block_size: int) -> Tensor:
        """int64 `[groups, 2, SIDE_FIELDS]`: `Group` of csrc/api.h for each head group."""
        if block_size not in self._tables:
            widths: dict[Kind, list[int]] = {"key": self.query_widths, "value": self.widths}
            self._tables[block_size] = _layout_table(self._codec.layout, block_size, widths)
        return self._tables[block_size]

    def decode(self, dtype: torch.dtype) -> list[dict[Kind, tuple[Tensor, Tensor]]]:
        """Per head group and kind the basis in `dtype`: decode `[M, R, GD]`, mean `[M, GD]`."""
        if dtype not in self._decode:
            self._decode[dtype] = [
                {
                    kind: (plane.basis.decode.to(dtype), plane.basis.mean.to(dtype))
                    for kind in KINDS
                    for plane in [getattr(group, kind)]
                }
                for group, _ in self._codec.group_heads()
            ]
        return self._decode[dtype]


_PLANS: "WeakKeyDictionary[LayerCodec, dict[tuple[str, bool], CpuPlan]]" = WeakKeyDictionary()


def plan_of(codec: LayerCodec, kernels: Kernels, packed: bool) -> CpuPlan:
    """The plan of a codec; made when first asked for and kept as long as the codec lives."""
    plans = _PLANS.setdefault(codec, {})
    key = kernels.name, packed
    if key not in plans:
        plans[key] = CpuPlan(codec, kernels, packed)
    return plans[key]


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


def _own_planes(codec: LayerCodec) -> tuple[list[Tensor], list[Tensor]]:
    if codec.anchors is None or not codec.anchors.pre_rope:
        return [], []
    planes = codec.anchors.pre_rope_planes
    bases, means = [], []
    for group, _ in codec.group_heads():
        decode, mean = _by_head(group.key, codec.layout)
        decode = decode[:, :, key_order(group.key.counts)]  # [G, M, R, D]
        bases.append(torch.stack(planes(decode), 2))
        means.append(torch.stack(planes(mean), 2))
    return (
        [basis.permute(1, 0, 2, 4, 3).contiguous() for basis in bases],  # [M, G, 2, F, R]
        [mean.transpose(0, 1).contiguous() for mean in means],
    )


def _by_head(codec: PlaneCodec, layout: LayerLayout) -> tuple[Tensor, Tensor]:
    """The basis by KV head of the group: decode `[G, M, R, D]` and mean `[G, M, D]`."""
    decode = codec.basis.decode.unflatten(-1, (-1, layout.head_size)).permute(2, 0, 1, 3)
    mean = codec.basis.mean.unflatten(-1, (-1, layout.head_size)).permute(1, 0, 2)
    return decode, mean


def _layout_table(layout: LayerLayout, block_size: int, widths: dict[Kind, list[int]]) -> Tensor:
    table = torch.zeros(len(layout.groups), len(KINDS), SIDE_FIELDS, dtype=torch.int64)
    for (group, kind), owned in planes_by_owner(layout, block_size).items():
        *codes, scales = owned
        counts = getattr(layout.groups[group], kind)
        numbers = [len(codes), counts.num_columns, scales.offset, widths[kind][group]]
        numbers += [counts.n12, counts.n10]
        for plane in codes:
            numbers += [plane.bits, plane.dims, plane.bytes_per_token, plane.offset]
        table[group, KINDS.index(kind), : len(numbers)] = torch.tensor(numbers)
    return table
