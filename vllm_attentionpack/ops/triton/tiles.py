"""How the planes of a layer become tensor-core operands: pieces of a power of two of columns.

Host side. A plane is cut into pieces of 16, 32, 64 or 128 bytes per token; each byte holds
`8 / bits` codes, so a piece gives as many operands ("sub-planes") of that width. The columns of
all operands, one after the other, are the padded latent dims that queries and results come in.
All head groups of a layer share the pieces; a group with narrower planes masks what it lacks.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import KINDS, Kind, LayerLayout

#: Widths in bits that the kernels read, in the order of the table of `plane_table`.
KERNEL_BITS = (8, 4, 2)
#: Offsets are stored in units of this; planes start at multiples of it.
_OFFSET_UNIT = 16


@dataclass(frozen=True)
class Cut:
    """How planes are cut.

    Attributes:
        largest: bytes per token of a piece at most, unless `rows` wants more.
        rows: columns of an operand at least; sub-planes of narrower pieces are joined.
        smallest: bytes per token of a piece at least.
    """

    largest: int
    rows: int = 1
    smallest: int = 16


#: Up to this many value columns, four warps hold the sums of a program; one multiprocessor then
#: has room for two programs.
NARROW_COLUMNS = 256
#: The keys beside so few. One piece at a time sits in registers.
NARROW_KEYS = Cut(largest=32)
#: 64 rows, which value columns are, are what the products of four warps want.
_FOUR_WARPS = Cut(largest=64, rows=64)
#: For head groups of so few bytes per token that most of 64 rows would be padding.
_FEW_BYTES = Cut(largest=64)
_FEWEST_BYTES = 64
#: Pieces are wider than the 16 tokens of a program: Triton then shares the columns of a product
#: among the warps. It would share the tokens otherwise, and every warp would hold the same 16.
ENCODING = Cut(largest=64, smallest=32)


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `start + size` of every token of one plane.

    Attributes:
        bits: bits per code.
        start: first byte.
        size: bytes, a power of two; beyond the plane's width they are read as zero.
        column: first of the `8 / bits * size` columns that the piece fills.
        joined: sub-planes of one operand; their columns alternate.
        operand: number of its first operand among those of all pieces.
    """

    bits: int
    start: int
    size: int
    column: int
    joined: int
    operand: int

    @property
    def operands(self) -> int:
        return 8 // self.bits // self.joined


@dataclass(frozen=True)
class KindTiles:
    """The pieces of K or of V of one layer.

    Attributes:
        widths: bytes per token of the planes of `KERNEL_BITS`, per head group.
        pieces: in the order of their columns.
        columns: padded latent dims.
    """

    widths: tuple[tuple[int, int, int], ...]
    pieces: tuple[Piece, ...]
    columns: int

    @classmethod
    def of(cls, layout: LayerLayout, kind: Kind, cut: Cut) -> "KindTiles":
        widths: list[tuple[int, int, int]] = []
        for group in layout.groups:
            dims = dict(getattr(group, kind))
            eight, four, two = (dims[bits] * bits // 8 for bits in KERNEL_BITS)
            widths.append((eight, four, two))
        pieces: list[Piece] = []
        column = operand = 0
        for bits, per_group in zip(KERNEL_BITS, zip(*widths, strict=True), strict=True):
            smallest = max(cut.smallest, cut.rows * bits // 8)
            for start, size in _cut(max(per_group), smallest, max(smallest, cut.largest)):
                joined = min(8 // bits, max(1, cut.rows // size))
                pieces.append(Piece(bits, start, size, column, joined, operand))
                column += 8 // bits * size
                operand += pieces[-1].operands
        return cls(tuple(widths), tuple(pieces), column)

    @classmethod
    def of_values(cls, layout: LayerLayout, wide: Cut) -> "KindTiles":
        """The pieces of the values, as attention takes them; `wide` is for eight warps."""
        most = max(group.value.bytes_per_token for group in layout.groups)
        few = cls.of(layout, "value", _FOUR_WARPS if most >= _FEWEST_BYTES else _FEW_BYTES)
        return few if few.columns <= NARROW_COLUMNS else cls.of(layout, "value", wide)

    @cached_property
    def align(self) -> int:
        """What divides every width, at most 16."""
        return math.gcd(_OFFSET_UNIT, *(width for group in self.widths for width in group))

    def width(self, piece: Piece) -> int:
        """Bytes per token of the piece's plane where all head groups agree, else 0."""
        found = {group[KERNEL_BITS.index(piece.bits)] for group in self.widths}
        return found.pop() if len(found) == 1 else 0

    def full(self, piece: Piece) -> bool:
        """Whether every group's plane covers the piece."""
        plane = KERNEL_BITS.index(piece.bits)
        return all(group[plane] >= piece.start + piece.size for group in self.widths)

    def dims(self, group: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Where the latent dims of a group lie: per sub-plane (columns, latent dims, unit).

        The kernels see the distance of a code from its zero point times `unit`.
        """
        first = 0
        for bits, width in zip(KERNEL_BITS, self.widths[group], strict=True):
            for piece in self.pieces:
                if piece.bits != bits:
                    continue
                held = torch.arange(min(piece.size, max(0, width - piece.start)))
                for sub in range(8 // bits):
                    column = piece.column + sub // piece.joined * piece.joined * piece.size
                    columns = column + held * piece.joined + sub % piece.joined
                    yield columns, first + sub * width + piece.start + held, unit(bits, sub)
            first += 8 // bits * width

    @property
    def uniform(self) -> bool:
        """Whether all head groups have the same planes."""
        return len(set(self.widths)) == 1

    def constants(self, prefix: str) -> dict[str, object]:
        """What the kernels need to know at compile time, under names that start with `prefix`."""
        return {
            f"{prefix}_BITS": tuple(piece.bits for piece in self.pieces),
            f"{prefix}_START": tuple(piece.start for piece in self.pieces),
            f"{prefix}_SIZE": tuple(piece.size for piece in self.pieces),
            f"{prefix}_COLUMN": tuple(piece.column for piece in self.pieces),
            f"{prefix}_JOINED": tuple(piece.joined for piece in self.pieces),
            f"{prefix}_OPERAND": tuple(piece.operand for piece in self.pieces),
            f"{prefix}_WIDTH": tuple(self.width(piece) for piece in self.pieces),
            f"{prefix}_FULL": tuple(self.full(piece) for piece in self.pieces),
            f"{prefix}_ALIGN": self.align,
            f"{prefix}_COLUMNS": self.columns,
        }


def unit(bits: int, sub_plane: int) -> int:
    """What the kernels see a code of the `sub_plane`-th sub-plane multiplied by."""
    return 2 << (bits * sub_plane)


def plane_table(
    layout: LayerLayout, align: dict[Kind, int], block_size: int, device: torch.device
) -> Tensor:
    """Where the planes of every head group lie within a block.

    Returns:
        int32 `[groups, 2, 7]`: for K and V the (width / align, offset / 16) of the planes of
        `KERNEL_BITS`, and the offset / 16 of the scales.
    """
    table = torch.zeros(len(layout.groups), len(KINDS), 2 * len(KERNEL_BITS) + 1, dtype=torch.int32)
    for plane in layout.planes(block_size):
        row = table[plane.group, KINDS.index(plane.kind)]
        if plane.bits:
            at = 2 * KERNEL_BITS.index(plane.bits)
            row[at] = plane.bytes_per_token // align[plane.kind]
            row[at + 1] = plane.offset // _OFFSET_UNIT
        else:
            row[-1] = plane.offset // _OFFSET_UNIT
    return table.to(device)


def plane_constants(
    layout: LayerLayout, tiles: "dict[Kind, KindTiles]", block_size: int
) -> dict[str, object]:
    """Where the planes of a block lie, at compile time, for head groups that are alike.

    The planes of a group begin `GROUP_BYTES` behind those of the one before it, 0 where groups
    differ: `plane_table` is read then. So it is where joint scales lie closer than the kernel has
    it for groups that are alike.
    """
    alike = all(kind_tiles.uniform for kind_tiles in tiles.values())
    alike = alike and not (layout.joint_kv and len(layout.groups) > 1)
    first = {(p.kind, p.bits): p for p in layout.planes(block_size) if p.group == 0}
    group_bytes = first["key", 0].offset // len(layout.groups)
    found: dict[str, object] = {"GROUP_BYTES": group_bytes if alike else 0}
    for kind in KINDS:
        at: tuple[int, ...] = ()
        for piece in tiles[kind].pieces if alike else ():
            plane = first[kind, piece.bits]
            at += (plane.bytes_per_token, plane.offset)
        prefix = kind[0].upper()
        found[f"{prefix}_AT"] = at
        found[f"{prefix}_SCALES"] = first[kind, 0].offset if alike else 0
    return found


def _cut(width: int, smallest: int, largest: int) -> Iterator[tuple[int, int]]:
    """(start, size) of pieces that cover `width` bytes with less than `smallest` to spare."""
    start, left = 0, -(-width // smallest) * smallest
    while left:
        size = min(largest, 1 << (left.bit_length() - 1))
        yield start, size
        start, left = start + size, left - size
