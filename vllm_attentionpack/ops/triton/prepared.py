"""What the kernels read beside the pages: bases of one layer in the order of their operands.

Derived from the codec once, when a layer is first used; a pure function of the codec.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import KINDS, Kind, units_of
from vllm_attentionpack.codec.positions import PRE_ROPE_GROUP_DIMS
from vllm_attentionpack.codec.quantize import step_and_distortion
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops.triton.chip import Chip, chip
from vllm_attentionpack.ops.triton.tiles import (
    ENCODING,
    NARROW_COLUMNS,
    NARROW_KEYS,
    KindTiles,
    plane_constants,
    plane_table,
)

#: Accumulators of one program: value columns times rows of queries, float32.
MAX_ACCUMULATORS = 1 << 15
SMALLEST_ROWS = 16
#: Columns of keys that are rebuilt in one pass, about: their sums take registers.
_PASS_COLUMNS = 32
_SMALLEST_PLANES = 4
#: Bases are stored as float16 times a power of two that brings their largest entry to about this.
_LARGEST_ENTRY = 256.0


@dataclass(frozen=True)
class HalfBasis:
    """A basis in float16 with its power of two.

    Attributes:
        values: float16 `[heads or groups, M, rows, columns]`.
        scale: float32 `[heads or groups, M]`; `values * scale` is the basis.
    """

    values: Tensor
    scale: Tensor

    @classmethod
    def of(cls, basis: Tensor) -> "HalfBasis":
        largest = basis.abs().amax((-2, -1)).clamp_min(1e-30)
        scale = torch.exp2(torch.ceil(torch.log2(largest / _LARGEST_ENTRY)))
        return cls((basis / scale[..., None, None]).half().contiguous(), scale.contiguous())


@dataclass(frozen=True)
class Encoder:
    """The encoding side of K, of V or, for either, of both where they are joint.

    Attributes:
        basis: `[groups, M, G * D, C]`, or `2 * G * D` rows, K first, where K and V are joint.
        mean: float32 `[groups, M, G * D]`, or as many.
        weight: float32 `[groups, M, C]`, zero where padded.
        steps: quantiser step for unit variance of each piece.
        codes: float32 `[groups, 3, C]`: of each column's whole code the zero point, the quantiser
            step for unit variance, and the low bits that the column lacks.
        pairs: whether any column holds but a part of a code; only then is `codes` read.
    """

    basis: HalfBasis
    mean: Tensor
    weight: Tensor
    steps: tuple[float, ...]
    codes: Tensor
    pairs: bool


@dataclass(frozen=True)
class PreRopeBasis:
    """What rebuilds the planes of keys that are coded pre-RoPE, some KV heads in a pass.

    Attributes:
        planes: of a head, padded.
        heads: KV heads of a pass, a power of two; those beyond the group's are zero.
        passes: over the codes.
        basis: float16 `[groups, M, passes, 2, C, heads * planes]`, first and second dims.
        scale: float32 `[groups, M]`, see `HalfBasis`.
        mean: float32 `[groups, M, passes, 2, heads * planes]`.
    """

    planes: int
    heads: int
    passes: int
    basis: Tensor
    scale: Tensor
    mean: Tensor


@dataclass
class Prepared:
    """The codec of one layer as the kernels take it; `C` are padded columns (see `tiles`)."""

    owner: "ref[LayerCodec]"
    device: torch.device
    chip: Chip
    tables: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        layout = self.codec.layout
        if any(getattr(group, kind).n16 for group in layout.groups for kind in KINDS):
            raise ConfigError(
                "the ops 'triton' read planes of 8, 4 and 2 bits; this pack holds 16-bit latents, "
                "which exist for tests and debugging. Serve it with ops = 'reference'."
            )
        anchors, dims = self.codec.anchors, layout.coded_dims
        if anchors is not None and anchors.pre_rope and dims > PRE_ROPE_GROUP_DIMS:
            raise ConfigError(
                f"a head group of this pack has {dims} dims, and planes of its keys are coded "
                f"pre-RoPE, which the ops 'triton' read in groups of up to {PRE_ROPE_GROUP_DIMS}. "
                "Calibrate with a smaller --group-size ('auto' fits) or without --pre-rope, or "
                "serve with ops = 'reference'."
            )
        columns = self.tiles["value"].columns
        if columns * SMALLEST_ROWS > MAX_ACCUMULATORS:
            raise ConfigError(
                f"a head group of this pack keeps {columns} value dims (padding included); the ops "
                f"'triton' take up to {MAX_ACCUMULATORS // SMALLEST_ROWS}. Calibrate with fewer "
                "heads per group or a higher ratio, or serve with ops = 'reference'."
            )

    @property
    def codec(self) -> LayerCodec:
        """Not held: `_prepared` lets go of what is prepared only when nothing else holds it."""
        codec = self.owner()
        assert codec is not None
        return codec

    @cached_property
    def tiles(self) -> dict[Kind, KindTiles]:
        """The operands of attention."""
        layout = self.codec.layout
        fit = self.chip.fit
        values = KindTiles.of_values(layout, fit.values)
        keys = fit.keys if values.columns > NARROW_COLUMNS else NARROW_KEYS
        return {"key": KindTiles.of(layout, "key", keys), "value": values}

    @cached_property
    def encoding_tiles(self) -> dict[Kind, KindTiles]:
        """The operands of `store_kv`."""
        return {kind: KindTiles.of(self.codec.layout, kind, ENCODING) for kind in KINDS}

    def make(self) -> None:
        """All that is otherwise made at first use, but for tables of a block size."""
        _ = self.encoders, self.query_basis, self.key_mean, self.value_basis, self.value_mean
        _ = self.own

    def plane_constants(self, block_size: int) -> dict[str, object]:
        """See `tiles.plane_constants`."""
        return plane_constants(self.codec.layout, self.tiles, block_size)

    def planes(self, block_size: int) -> Tensor:
        """int32 `[groups, 2, 7]`, see `plane_table`."""
        if block_size not in self.tables:
            align: dict[Kind, int] = {kind: tiles.align for kind, tiles in self.tiles.items()}
            self.tables[block_size] = plane_table(self.codec.layout, align, block_size, self.device)
        return self.tables[block_size]

    @cached_property
    def query_basis(self) -> HalfBasis:
        """`[Hk, M, D, C]`: queries to the operands of the key planes, for base-2 logits."""
        return HalfBasis.of(self._decode("key").mT * math.log2(math.e))

    @cached_property
    def key_mean(self) -> Tensor:
        """float32 `[Hk, M, D]`: the mean key, for base-2 logits."""
        return self._mean("key").mul(math.log2(math.e)).contiguous()

    @cached_property
    def value_basis(self) -> HalfBasis:
        """`[Hk, M, C, D]`: sums of the operands of the value planes to heads."""
        return HalfBasis.of(self._decode("value"))

    @cached_property
    def value_mean(self) -> Tensor:
        """float32 `[Hk, M, D]`."""
        return self._mean("value").contiguous()

    @cached_property
    def own(self) -> PreRopeBasis | None:
        """None if no plane is coded pre-RoPE."""
        anchors, layout = self.codec.anchors, self.codec.layout
        if anchors is None or not anchors.pre_rope:
            return None
        size = layout.heads_per_group
        planes = max(_SMALLEST_PLANES, power_of_two(anchors.pre_rope))
        heads = min(power_of_two(size), max(1, _PASS_COLUMNS // planes))
        planes = max(planes, SMALLEST_ROWS // heads)  # products are of 16 columns or more

        def in_passes(x: Tensor) -> Tensor:
            """`[Hk, ..., D]` to `[groups, passes, 2, ..., heads * planes]`."""
            x = torch.stack(anchors.pre_rope_planes(x))  # [2, Hk, ..., F]
            x = pad(x, (0, planes - x.shape[-1])).movedim(1, -2)  # [2, ..., Hk, F]
            x = x.unflatten(-2, (-1, size))
            x = pad(x, (0, 0, 0, -size % heads)).unflatten(-2, (-1, heads)).flatten(-2)
            # [2, ..., groups, passes, heads * planes]
            return x.movedim((-3, -2), (0, 1))

        basis = in_passes(self._decode("key").flatten(1, 2))  # [.., passes, 2, M * C, ..]
        basis = basis.unflatten(3, (self.codec.num_modalities, -1)).movedim(3, 1)
        mean = in_passes(self._mean("key")).movedim(3, 1)
        half = HalfBasis.of(basis.flatten(2, 4))
        return PreRopeBasis(
            planes,
            heads,
            basis.shape[2],
            half.values.view(basis.shape),
            half.scale,
            mean.contiguous(),
        )

    @cached_property
    def encoders(self) -> "dict[Kind, Encoder]":
        """What `store_kv` reads for K and for V."""
        units = units_of(self.codec.layout.joint_kv)
        made = [(kinds, self._encoder(kinds)) for kinds in units]
        return {kind: encoder for kinds, encoder in made for kind in kinds}

    def _encoder(self, kinds: "tuple[Kind, ...]") -> "Encoder":
        kind = kinds[0]
        layout, tiles = self.codec.layout, self.encoding_tiles[kind]
        dims = len(kinds) * layout.group_dims
        shape = (len(layout.groups), self.codec.num_modalities, tiles.columns)
        basis = torch.zeros(*shape[:2], dims, tiles.columns, device=self.device)
        weight = torch.zeros(shape, device=self.device)
        codes = torch.zeros(shape[0], 3, tiles.columns, device=self.device)
        for g, (group, _) in enumerate(self.codec.group_heads()):
            plane = getattr(group, kind)
            whole = torch.stack([plane.whole_zero_point, plane.step, plane.shift])
            encode = torch.cat([getattr(group, of).basis.encode for of in kinds], 1)
            for columns, latent, _ in tiles.dims(g):
                basis[g][..., columns] = encode[..., latent]
                weight[g][..., columns] = plane.basis.weight[..., latent]
                codes[g][:, columns] = whole[:, latent]
        means = [
            torch.cat([getattr(group, of).basis.mean for of in kinds], 1)
            for group, _ in self.codec.group_heads()
        ]
        steps = tuple(step_and_distortion(piece.bits)[0] for piece in tiles.pieces)
        pairs = any(getattr(group, kind).pairs for group in layout.groups)
        return Encoder(HalfBasis.of(basis), torch.stack(means), weight, steps, codes, pairs)

    def _decode(self, kind: Kind) -> Tensor:
        """float32 `[Hk, M, C, D]`: the decode basis with a row per column, zero where padded."""
        layout, tiles = self.codec.layout, self.tiles[kind]
        heads, dims = layout.heads_per_group, layout.head_size
        out = torch.zeros(
            layout.num_kv_heads, self.codec.num_modalities, tiles.columns, dims, device=self.device
        )
        for g, (group, of) in enumerate(self.codec.group_heads()):
            decode = getattr(group, kind).basis.decode.to(self.device)  # [M, R, G * D]
            decode = decode.unflatten(-1, (heads, dims)).permute(2, 0, 1, 3)  # [G, M, R, D]
            for columns, latent, unit in tiles.dims(g):
                out[of, :, columns] = decode[:, :, latent] / unit
        return out

    def _mean(self, kind: Kind) -> Tensor:
        """float32 `[Hk, M, D]`."""
        size = (self.codec.layout.heads_per_group, -1)
        means = [getattr(group, kind).basis.mean for group, _ in self.codec.group_heads()]
        return torch.cat([mean.unflatten(-1, size).transpose(0, 1) for mean in means])


def power_of_two(n: int) -> int:
    """The smallest at or above `n`."""
    return 1 << max(0, n - 1).bit_length()


_prepared: "WeakKeyDictionary[LayerCodec, Prepared]" = WeakKeyDictionary()


def prepare(codec: LayerCodec) -> Prepared:
    """The prepared codec, made at its first use and kept for as long as the codec lives."""
    found = _prepared.get(codec)
    if found is None:
        device = codec.groups[0].key.basis.mean.device
        found = Prepared(ref(codec), device, chip(device))
        _prepared[codec] = found
    return found
