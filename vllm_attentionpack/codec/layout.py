"""Where every byte of a compacted KV-cache block lies. The only byte arithmetic of the project.

A block of `S` tokens is plane-major. For each head group in turn, then each of K and V, come the
planes in the order of `BIT_WIDTHS`, each `[S, bytes per token of the plane]`; after the planes of
all groups come the scales, one byte per (group, K|V), each `[S]`; then the padding, if any::

    | g0.K.8 | g0.K.4 | g0.K.2 | g0.V.8 | ... | g1.K.8 | ... | g0.K.scale | g0.V.scale | ... | pad |

A kernel so streams one plane of one head group contiguously. Plane bytes are multiples of
`PLANE_QUANTUM` and `S` is a multiple of `BLOCK_SIZE_MULTIPLE`, so that every plane starts at a
multiple of 16 bytes within a block whose own start is so aligned.

Latent dims are ordered by decreasing variance, so the first dims sit in the widest plane. Within a
plane of `b` bits and `n` dims, byte `j` of a token holds the dims `j, j + n/c, j + 2n/c, ...`
(`c = 8/b` codes per byte, lowest bits first): unpacking is a shift and a mask per sub-plane, and no
interleaving.

A few dims may want finer codes than the widest plane has. Those of 12 and 10 bits are stored as two
codes, *columns* from here on: the high 8 bits are among the first of the plane of 8 bits, the low 4
or 2 bits among the last of the plane of 4 or 2. A code is linear in its parts, so to whoever reads
them both are columns like all others, whose units differ by a power of two (`codec.Basis`); only
encoding knows of pairs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["key", "value"]
KINDS: tuple[Kind, Kind] = ("key", "value")

#: Bits per code that a plane can have. 16 holds bfloat16 latents as they are; it exists for
#: the identity packs of tests and never comes out of the allocator.
BIT_WIDTHS = (16, 8, 4, 2)
#: A plane takes a multiple of this many bytes per token, so that it can be read as 32-bit words.
PLANE_QUANTUM = 4
#: Bytes of one per-token scale (see `quantize.encode_scale`).
SCALE_BYTES = 1
#: `S` must be a multiple of this.
BLOCK_SIZE_MULTIPLE = 16
#: Bytes of one dense bfloat16 element: `compression_ratio` is measured against it for every model.
DENSE_BYTES = 2


@dataclass(frozen=True)
class Column:
    """One stored code of a token.

    Attributes:
        dim: the latent dim that it is of, in the order of falling variance.
        bits: stored.
        code_bits: of the dim's whole code.
        shift: of the whole code, bits below those that are stored.
    """

    dim: int
    bits: int
    code_bits: int
    shift: int = 0

    @property
    def low(self) -> bool:
        """Whether the other part of a pair is the higher one."""
        return self.code_bits > self.bits + self.shift


@dataclass(frozen=True)
class PlaneCounts:
    """How many columns of one (head group, K|V) have 16, 8, 4 and 2 bits, and how many are pairs.

    Raises `ValueError` when a plane is not a multiple of `PLANE_QUANTUM` bytes per token, or has
    fewer columns than there are parts for it.

    Attributes:
        n8: columns of 8 bits, the high parts of pairs included.
        n4: of 4 bits, the low parts of `n12` included.
        n2: of 2 bits, the low parts of `n10` included.
        n16: of bfloat16.
        n12: dims of 12 bits.
        n10: dims of 10 bits.
    """

    n8: int = 0
    n4: int = 0
    n2: int = 0
    n16: int = 0
    n12: int = 0
    n10: int = 0

    def __post_init__(self) -> None:
        for bits, dims in self:
            if dims < 0 or dims * bits % (8 * PLANE_QUANTUM):
                raise ValueError(
                    f"a plane of {bits}-bit latent dims must hold a multiple of "
                    f"{8 * PLANE_QUANTUM // bits} dims, got {dims}"
                )
        pairs = self.n12, self.n10
        if min(pairs) < 0 or sum(pairs) > self.n8 or self.n12 > self.n4 or self.n10 > self.n2:
            raise ValueError(
                f"{self.n12} latent dims of 12 bits and {self.n10} of 10 want as many codes of 8 "
                f"bits, and of 4 and 2; there are {self.n8}, {self.n4} and {self.n2}"
            )
        if self.n16 and (self.n8 or self.n4 or self.n2):
            raise ValueError("16-bit latents cannot be mixed with quantised ones")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields (bits, columns) from the widest plane to the narrowest, empty ones included."""
        return iter(((16, self.n16), (8, self.n8), (4, self.n4), (2, self.n2)))

    @property
    def rank(self) -> int:
        """Retained latent dims."""
        return self.num_columns - self.pairs

    @property
    def num_columns(self) -> int:
        """Codes of a token, `R`."""
        return self.n16 + self.n8 + self.n4 + self.n2

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the codes of one token, without the scale."""
        return sum(bits * dims for bits, dims in self) // 8

    @property
    def pairs(self) -> int:
        """Dims that take two columns."""
        return self.n12 + self.n10

    @property
    def dims_by_bits(self) -> dict[int, int]:
        """How many dims have codes of so many bits, widest first; none that no dim has."""
        dims = {16: self.n16, 12: self.n12, 10: self.n10, 8: self.n8 - self.pairs}
        dims |= {4: self.n4 - self.n12, 2: self.n2 - self.n10}
        return {bits: count for bits, count in dims.items() if count}

    @property
    def columns(self) -> tuple[Column, ...]:
        """The `R` columns, in the order of the planes."""
        twelve, ten = range(self.n12), range(self.n12, self.n12 + self.n10)
        high = [Column(d, 8, 12, 4) for d in twelve] + [Column(d, 8, 10, 2) for d in ten]
        low = {4: [Column(d, 4, 12) for d in twelve], 2: [Column(d, 2, 10) for d in ten]}
        columns, dim = list(high), len(high)
        for bits, count in self:
            last = low.get(bits, [])
            alone = count - len(last) - (len(high) if bits == 8 else 0)
            columns += [Column(dim + i, bits, bits) for i in range(alone)] + last
            dim += alone
        return tuple(columns)


def units_of(joint_kv: bool) -> tuple[tuple[Kind, ...], ...]:
    """Which of K and V are coded together, in the order of their bytes."""
    return (KINDS,) if joint_kv else tuple((kind,) for kind in KINDS)


def unit_name(kinds: tuple[Kind, ...]) -> str:
    """K, V or KV."""
    return "".join(kind[0].upper() for kind in kinds)


@dataclass(frozen=True)
class GroupLayout:
    """Plane counts of one head group.

    Attributes:
        key: of the planes that keys are read from.
        value: that values are read from.
        joint_kv: whether these are the same planes: keys and values then share latents, as in
            multi-head latent attention (DeepSeek-V2, section 2.1.2), and their scale.
    """

    key: PlaneCounts
    value: PlaneCounts
    joint_kv: bool = False

    def __post_init__(self) -> None:
        if self.joint_kv and self.key != self.value:
            raise ValueError(f"joint keys and values have the same planes, got {self}")

    @classmethod
    def of(cls, units: Sequence[PlaneCounts]) -> "GroupLayout":
        """Of the counts of K and of V, or of both at once."""
        return cls(units[0], units[-1], joint_kv=len(units) == 1)

    @property
    def units(self) -> tuple[tuple[Kind, ...], ...]:
        """Which of K and V are coded together."""
        return units_of(self.joint_kv)

    @property
    def bytes_per_token(self) -> int:
        return sum(getattr(self, kinds[0]).bytes_per_token + SCALE_BYTES for kinds in self.units)


@dataclass(frozen=True)
class Plane:
    """One contiguous run of a block: `[S, bytes_per_token]` bytes from `offset` on.

    `dims` counts columns; `bits` is 0 for a plane of scales.
    """

    group: int
    kind: Kind
    bits: int
    dims: int
    bytes_per_token: int
    offset: int


@dataclass(frozen=True)
class LayerLayout:
    """The layout of one attention layer: its head groups and the padding to its page-size class.

    Attributes:
        groups: plane counts of each head group, in head order.
        heads_per_group: `G`.
        head_size: `D`.
        bytes_per_token: bytes that a token takes in this layer, padding included; at least the sum
            over the groups.
    """

    groups: tuple[GroupLayout, ...]
    heads_per_group: int
    head_size: int
    bytes_per_token: int

    def __post_init__(self) -> None:
        if self.bytes_per_token < self.content_bytes_per_token:
            raise ValueError(
                f"{self.bytes_per_token} bytes per token cannot hold the "
                f"{self.content_bytes_per_token} bytes of the head groups"
            )
        if len({group.joint_kv for group in self.groups}) > 1:
            raise ValueError("keys and values of some head groups are joint, those of others not")
        for group in self.groups:
            if max(group.key.rank, group.value.rank) > self.coded_dims:
                raise ValueError(
                    f"a rank exceeds the {self.coded_dims} dims of a head group: {group}"
                )

    @property
    def group_dims(self) -> int:
        """Of the keys of a head group, and of its values: `GD`."""
        return self.heads_per_group * self.head_size

    @property
    def joint_kv(self) -> bool:
        """Whether the keys and values of every head group are joint (all are alike)."""
        return self.groups[0].joint_kv

    @property
    def coded_dims(self) -> int:
        """What the latents of a head group are of: `GD`, or `2 GD` where K and V are joint."""
        return self.group_dims * len(units_of(self.joint_kv)[0])

    @cached_property
    def content_bytes_per_token(self) -> int:
        """Bytes per token without padding."""
        return sum(group.bytes_per_token for group in self.groups)

    @property
    def num_kv_heads(self) -> int:
        return len(self.groups) * self.heads_per_group

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes per token of a dense bfloat16 cache of this layer."""
        return 2 * self.num_kv_heads * self.head_size * DENSE_BYTES

    @property
    def compression_ratio(self) -> float:
        """Dense bfloat16 bytes over stored bytes; scales and padding count."""
        return self.dense_bytes_per_token / self.bytes_per_token

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of `block_size` tokens, padding included."""
        return check_block_size(block_size) * self.bytes_per_token

    def planes(self, block_size: int) -> tuple[Plane, ...]:
        """Every plane of a block of `block_size` tokens in the order of its bytes.

        Those of joint keys and values are there once for either, at the same offset.
        """
        check_block_size(block_size)
        planes: list[Plane] = []
        offset = 0

        def add(group: int, kinds: tuple[Kind, ...], bits: int, dims: int, width: int) -> None:
            nonlocal offset
            planes.extend(Plane(group, kind, bits, dims, width, offset) for kind in kinds)
            offset += width * block_size

        for g, group in enumerate(self.groups):
            for kinds in group.units:
                for bits, dims in getattr(group, kinds[0]):
                    if dims:
                        add(g, kinds, bits, dims, bits * dims // 8)
        for g, group in enumerate(self.groups):
            for kinds in group.units:
                add(g, kinds, 0, 1, SCALE_BYTES)
        return tuple(planes)


def check_block_size(block_size: int) -> int:
    """Returns `block_size`; raises `ValueError` when no block can have that many tokens."""
    if block_size <= 0 or block_size % BLOCK_SIZE_MULTIPLE:
        raise ValueError(
            f"block size {block_size} is not a positive multiple of {BLOCK_SIZE_MULTIPLE}"
        )
    return block_size


def compression_ratio(layers: "list[LayerLayout] | tuple[LayerLayout, ...]") -> float:
    """Dense bfloat16 bytes over stored bytes of a whole model; scales and padding count."""
    dense = sum(layer.dense_bytes_per_token for layer in layers)
    return dense / sum(layer.bytes_per_token for layer in layers)
