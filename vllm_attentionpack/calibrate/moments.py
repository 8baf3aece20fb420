"""Streaming second moments of the queries, keys and values of one attention layer.

Keys and queries are turned back by their own position (`codec.positions`), so that prompts of any
length serve any context; `finalize` turns their moments forward again, averaged over all positions.
Values do not turn.

Products are float32 matrix products on the device of the activations; sums are float32 on the
host, where they take no room of the KV cache. Tokens are taken relative to the mean of the first
ones, so that large constant keys cancel before they are squared and not after. Second moments are
symmetric: of their blocks of heads only the upper half is kept. Host memory in bytes, over all
layers::

    layers * (modalities * 2 * (Hk / G) * G (G + 1) / 2 * D**2 + Hq * D**2) * 4

which is 0.36 GB for 32 layers, 32 query and 8 KV heads x 128, G = 8 and two modalities, and 1.3 GB
for 32 KV heads at G = 8. What keys and values have in common, which joint ones need, makes blocks
of 2 G heads instead of two of G: 0.37 and 1.3 GB at G = 4, which `auto` then takes. Gradients
(`calibrate.gradients`) are summed alike, without queries: nearly as much again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import units_of
from vllm_attentionpack.codec.positions import (
    PRE_ROPE_GROUP_DIMS,
    Anchors,
    Rotary,
    average_over_positions,
    pre_rope_planes,
)

#: `auto` groups heads up to this many joint dims: beyond it a basis costs more to store and to
#: apply than further heads gain.
MAX_AUTO_GROUP_DIMS = 1024

#: Text, then visual.
_MODALITIES = 2


def auto_group_dims(pre_rope: bool, joint_kv: bool) -> int:
    """Up to how many dims of keys `auto` groups heads; where V's are joint with them, half."""
    most = PRE_ROPE_GROUP_DIMS if pre_rope else MAX_AUTO_GROUP_DIMS
    return most // len(units_of(joint_kv)[0])


def auto_group_size(num_kv_heads: int, head_size: int, most_dims: int = MAX_AUTO_GROUP_DIMS) -> int:
    """The largest divisor of `num_kv_heads` with at most `most_dims` joint dims; 1 always may."""
    return max(
        size
        for size in range(1, num_kv_heads + 1)
        if num_kv_heads % size == 0 and (size == 1 or size * head_size <= most_dims)
    )


@dataclass(frozen=True)
class GroupMoments:
    """Moments of the keys or the values of all head groups; `n` head groups of `GD` dims.

    Attributes:
        second: float64 `[M, n, GD, GD]`, `E[x xᵀ]`, not centred.
        mean: float64 `[M, n, GD]`.
    """

    second: Tensor
    mean: Tensor


@dataclass(frozen=True)
class LayerMoments:
    """The averaged moments of one layer.

    Attributes:
        key: of the keys as they are coded, at any position below `num_positions` or, relative to
            an anchor, of one span.
        value: of the values.
        joint_kv: of both, `2 GD` dims, keys first; None where they were not gathered together.
        query: float64 `[Hq, D, D]`, `E[q qᵀ]` over all tokens and positions below `num_positions`.
        count: int64 `[M]`, tokens of each modality.
    """

    key: GroupMoments
    value: GroupMoments
    query: Tensor
    count: Tensor
    joint_kv: GroupMoments | None = None


@dataclass(frozen=True)
class _Sums:
    """Sums over the tokens of one modality; mutated in place.

    `U` units of `B` heads: the `n` head groups of the keys, then those of the values, of `G` heads
    each; or, joint, `n` of `2 G` heads, keys first.

    Attributes:
        shift: float32 `[U, B * D]`, subtracted from every token.
        second: float32 `[U, B (B + 1) / 2, D, D]`, the upper blocks of the second sums.
        first: float64 `[U, B * D]`.
    """

    shift: Tensor
    second: Tensor
    first: Tensor

    @classmethod
    def zero(cls, shift: Tensor, blocks: Tensor, head_size: int) -> "_Sums":
        second = torch.zeros(len(shift), blocks.shape[1], head_size, head_size)
        return cls(shift, second, torch.zeros_like(shift, dtype=torch.float64))


class MomentAccumulator:
    """Sums the moments of one layer over calls.

    Args:
        num_query_heads: `Hq`; 0 where queries do not matter.
        num_kv_heads: `Hk`.
        head_size: `D`.
        heads_per_group: `G`, a divisor of `Hk`.
        rotary: how the layer turns keys and queries; None if it does not.
        joint_kv: whether to gather what keys and values have in common.
    """

    def __init__(
        self,
        num_query_heads: int,
        num_kv_heads: int,
        head_size: int,
        heads_per_group: int,
        rotary: Rotary | None,
        joint_kv: bool = False,
    ) -> None:
        self.head_size = head_size
        self.rotary = rotary
        self.count = torch.zeros(_MODALITIES, dtype=torch.int64)
        self._groups = num_kv_heads // heads_per_group
        self._dims = heads_per_group * head_size
        self._joint_kv = joint_kv
        unit_heads = heads_per_group * (2 if joint_kv else 1)
        self._blocks = torch.triu_indices(unit_heads, unit_heads)
        self._query = torch.zeros(num_query_heads, head_size, head_size)
        # per modality, once tokens of it are seen
        self._sums: list[_Sums | None] = [None] * _MODALITIES

    def add(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor | None,
        visual: Tensor | None,
    ) -> None:
        """Adds the tokens of one call.

        Args:
            query: `[T, Hq, D]`, rotated, any float dtype.
            key: `[T, Hk, D]`, rotated.
            value: `[T, Hk, D]`.
            positions: `[T]`, what keys and queries were turned by; ignored without `rotary`.
            visual: bool `[T]`, None when all are text.
        """
        if self.rotary is not None:
            assert positions is not None
            query = self.rotary.turn(query, -positions)
            key = self.rotary.turn(key, -positions)
        heads = query.float().transpose(0, 1)  # [Hq, T, D]
        self._query += (heads.mT @ heads).cpu()
        if visual is None or not bool(visual.any()):
            self._add_modality(0, key, value)
        else:
            self._add_modality(0, key[~visual], value[~visual])
            self._add_modality(1, key[visual], value[visual])

    def _add_modality(self, modality: int, key: Tensor, value: Tensor) -> None:
        if len(key) == 0:
            return
        x = torch.cat([self._grouped(key), self._grouped(value)], dim=-1 if self._joint_kv else 0)
        sums = self._sums[modality]
        if sums is None:
            sums = self._sums[modality] = _Sums.zero(x.mean(1).cpu(), self._blocks, self.head_size)
        x = x - sums.shift.to(x.device)[:, None]
        sums.second.add_(self._packed(x.mT @ x).cpu())
        sums.first.add_(x.sum(1, dtype=torch.float64).cpu())
        self.count[modality] += len(key)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.float().reshape(len(x), self._groups, self._dims).transpose(0, 1)

    def _packed(self, square: Tensor) -> Tensor:
        """`[U, B * D, B * D]` -> the upper blocks `[U, B (B + 1) / 2, D, D]`."""
        size = self.head_size
        blocks = square.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        return blocks[:, self._blocks[0], self._blocks[1]]

    def _moments(self, modality: int) -> tuple[Tensor, Tensor]:
        """float64 sums over tokens: second `[U, B * D, B * D]` and first `[U, B * D]`."""
        sums, count = self._sums[modality], self.count[modality]
        assert sums is not None
        upper, lower = self._blocks
        size, dims = self.head_size, sums.first.shape[1]
        heads = dims // size
        blocks = torch.empty(len(sums.first), heads, heads, size, size, dtype=torch.float64)
        packed = sums.second.double()
        blocks[:, lower, upper] = packed.mT
        blocks[:, upper, lower] = packed
        second = blocks.transpose(2, 3).reshape(-1, dims, dims)
        shift, first = sums.shift.double(), sums.first
        cross = first[:, :, None] * shift[:, None, :]
        second += cross + cross.mT + count * shift[:, :, None] * shift[:, None, :]
        return second, first + count * shift

    def anchors(
        self, span: int, num_positions: int, pre_rope_turn: float | None = None
    ) -> Anchors | None:
        """What keys are coded relative to, at anchors `span` tokens apart.

        Planes that turn by more than `pre_rope_turn` radians within a span are coded pre-RoPE, none
        where that is None.

        Returns None, for keys as they come, if `span` is 0, if one span holds all `num_positions`
        (its only anchor is position 0) and no plane is coded pre-RoPE, and where the layer does not
        turn.
        """
        if self.rotary is None or span == 0:
            return None
        planes = 0
        if pre_rope_turn is not None:
            planes = pre_rope_planes(self.rotary, min(span, num_positions), pre_rope_turn)
        if span >= num_positions and not planes:
            return None
        return Anchors(self.rotary, span, planes)

    def finalize(
        self, num_positions: int, num_modalities: int, anchors: Anchors | None = None
    ) -> LayerMoments:
        """Averages over tokens and, where the layer turns, over positions.

        Args:
            num_positions: keys and queries are taken at every position below it alike often.
            num_modalities: 1 pools text and visual tokens, 2 keeps them apart (both must have been
                seen).
            anchors: keys are taken at the positions of one span instead; None for as they come.
        """
        seen = [self._moments(m) for m, sums in enumerate(self._sums) if sums is not None]
        if num_modalities == 1:
            count = self.count.sum().reshape(1)
            seconds = torch.stack([second for second, _ in seen]).sum(0)[None]
            firsts = torch.stack([first for _, first in seen]).sum(0)[None]
        else:
            assert len(seen) == num_modalities
            count = self.count.clone()
            seconds = torch.stack([second for second, _ in seen])
            firsts = torch.stack([first for _, first in seen])
        seconds = seconds / count[:, None, None, None]
        firsts = firsts / count[:, None, None]
        n, dims, joint_kv = self._groups, self._dims, None
        turned = self._turned(
            GroupMoments(seconds[:, :n], firsts[:, :n]),
            anchors.drift if anchors else self.rotary,
            min(anchors.span, num_positions) if anchors else num_positions,
        )
        if self._joint_kv:
            joint_kv = turned
            key = GroupMoments(joint_kv.second[..., :dims, :dims], joint_kv.mean[..., :dims])
            value = GroupMoments(joint_kv.second[..., dims:, dims:], joint_kv.mean[..., dims:])
        else:
            key, value = turned, GroupMoments(seconds[:, n:], firsts[:, n:])
        query = self._query.double() / self.count.sum()
        for head in query:
            head.copy_(
                average_over_positions(
                    head, torch.zeros_like(head[0]), self.rotary, num_positions, self.head_size
                )[0]
            )
        return LayerMoments(key, value, query, count, joint_kv)

    def _turned(
        self, moments: GroupMoments, rotary: Rotary | None, num_positions: int
    ) -> GroupMoments:
        second, mean = torch.empty_like(moments.second), torch.empty_like(moments.mean)
        for m in range(second.shape[0]):
            for n in range(second.shape[1]):
                second[m, n], mean[m, n] = average_over_positions(
                    moments.second[m, n],
                    moments.mean[m, n],
                    rotary,
                    num_positions,
                    self.head_size,
                    self._dims // self.head_size,
                )
        return GroupMoments(second, mean)
