"""Second moments of rotated keys and queries over all positions, from moments taken at none.

Rotary embeddings make the statistics of a key depend on where it stands, so a basis calibrated on
short prompts does not fit long ones. Rotations by a common shift commute with every rotary variant
(plain, M-RoPE with its three axes, partial rotary, scaled frequencies): a key at position `p + n`
is the key at position `p` turned by `n`. So the collector turns each key back by its own position
(for M-RoPE by its temporal one, which leaves the spatial offsets within an image in place), and
`average_over_positions` turns the moments forward again, averaged over every position to be served.

A plane of a head is the pair of dims that one frequency turns, written as a complex number
`z = a + ib`. With `phi(w) = mean over n < N of exp(iwn)` the averages are exact and closed::

    E[z_i conj(z_j)] -> phi(w_i - w_j) E[z_i conj(z_j)]
    E[z_i z_j]       -> phi(w_i + w_j) E[z_i z_j]
    E[z_i]           -> phi(w_i) E[z_i]
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

#: Joint dims of a head group, at most, where planes are coded pre-RoPE and GPUs are to serve: what
#: is rebuilt of wider ones does not fit (docs/gpu.md).
PRE_ROPE_GROUP_DIMS = 256


@dataclass(frozen=True, eq=False)
class Rotary:
    """How attention layers turn their heads; one object for all that turn alike.

    Attributes:
        frequencies: float64 `[P]`, radians per position of each plane, scaling included.
        interleaved: True if plane `i` is the dims `(2i, 2i + 1)` (GPT-J), False if it is
            `(i, i + P)` (NeoX). Dims from `2P` on do not turn.
    """

    frequencies: Tensor
    interleaved: bool = False

    def plane_dims(self, head_size: int) -> tuple[Tensor, Tensor]:
        """The first and second dim of every plane, `[D/2]` each; what does not turn comes last."""
        rotary = torch.arange(2 * len(self.frequencies))
        rest = torch.arange(len(rotary), head_size)
        if self.interleaved:
            first, second = rotary[0::2], rotary[1::2]
        else:
            first, second = rotary.chunk(2)
        return torch.cat([first, rest[0::2]]), torch.cat([second, rest[1::2]])

    def plane_frequencies(self, head_size: int) -> Tensor:
        """float64 `[D/2]`: the frequency of every plane of `plane_dims`, 0 where nothing turns."""
        frequencies = torch.zeros(head_size // 2, dtype=torch.float64)
        frequencies[: len(self.frequencies)] = self.frequencies
        return frequencies

    @cached_property
    def _elsewhere(self) -> "dict[torch.device, Rotary]":
        return {self.frequencies.device: self}

    def to(self, device: torch.device) -> "Rotary":
        """The same on `device`, one object for all who ask."""
        if device not in self._elsewhere:
            self._elsewhere[device] = Rotary(self.frequencies.to(device), self.interleaved)
        return self._elsewhere[device]

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of turns by `positions` `[...]`, float32 `[..., P]` each."""
        return self.tables_at(positions[..., None])

    def tables_at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same where each plane has a position of its own, `[..., P]` or `[..., 1]`."""
        angle = positions.double() * self.frequencies.to(positions.device)
        return angle.cos().float(), angle.sin().float()

    @cached_property
    def _kept(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def table(self, count: int, planes: int) -> tuple[Tensor, Tensor]:
        """`tables` of `count` or more positions from 0 on, first planes only; made once, kept."""
        kept = self._kept.get(planes)
        if kept is None or len(kept[0]) < count:
            first = Rotary(self.frequencies[:planes])
            kept = first.tables(torch.arange(count, device=self.frequencies.device))
            self._kept[planes] = kept
        return kept

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns heads by `positions` (negative ones turn back).

        Args:
            x: float `[T, H, D]`.
            positions: int or float `[T]`.

        Returns:
            float32 `[T, H, D]`.
        """
        return self.turn_by(x.float(), *self.tables(positions))

    def turn_by(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turns heads by given angles; with `-sin`, back.

        Args:
            x: float `[T, H, D]`.
            cos: float32 `[T, P]`, see `tables`.
            sin: float32 `[T, P]`.

        Returns:
            `[T, H, D]` in the dtype of `x`.
        """
        turning = 2 * cos.shape[-1]
        cos, sin = cos[:, None], sin[:, None]
        wide = x.float()
        out = torch.empty_like(wide, memory_format=torch.contiguous_format)
        out[..., turning:] = wide[..., turning:]
        (a, b), (out_a, out_b) = self.planes(wide), self.planes(out)
        # In place: temporaries of this size take ten times as long as the products.
        torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out_b).addcmul_(a, sin)
        return out.to(x.dtype)

    def planes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views `[..., P]` of the first and the second dim of every plane of heads `[..., D]`."""
        x = x[..., : 2 * len(self.frequencies)]
        if self.interleaved:
            return x[..., 0::2], x[..., 1::2]
        first, second = x.chunk(2, dim=-1)
        return first, second


@dataclass(frozen=True)
class Anchors:
    """Keys coded by their distance from an anchor instead of by their position.

    The tokens of a request are cut into spans; the anchor of a span is the position of its first
    token. A key is turned back by its anchor before it is coded, and a query by the same before it
    meets the codes of that span, which leaves every logit as it was. So a basis need only hold for
    the positions of one span, not for those of the longest context.

    Planes that turn far within a span gain nothing from that. The first `pre_rope` of them are
    coded as they were before RoPE, turned back by the key's own position: then all that is coded
    hardly turns within a span, and what planes have in common stays in common. Those few are
    rebuilt and turned when they are read, and meet the query as it comes.

    Attributes:
        rotary: how the layer turns its heads.
        span: tokens that share an anchor.
        pre_rope: planes.
    """

    rotary: Rotary
    span: int
    pre_rope: int = 0

    def to(self, device: torch.device) -> "Anchors":
        return replace(self, rotary=self.rotary.to(device))

    def pre_rope_planes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Views `[..., F]` of the two dims of the planes that are coded pre-RoPE."""
        first, second = self.rotary.planes(x)
        return first[..., : self.pre_rope], second[..., : self.pre_rope]

    @property
    def drift(self) -> Rotary:
        """How what is coded turns from one token of a span to the next."""
        frequencies = self.rotary.frequencies.clone()
        frequencies[: self.pre_rope] = 0
        return Rotary(frequencies, self.rotary.interleaved)

    def tables(self, anchors: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines by which keys are turned back before they are coded.

        Args:
            anchors: int `[...]`, that of each key.
            positions: int `[...]`, its own; read where `pre_rope`.

        Returns:
            float32 `[..., P]` each.
        """
        if not self.pre_rope:
            return self.rotary.tables(anchors)
        own = torch.arange(len(self.rotary.frequencies), device=anchors.device) < self.pre_rope
        by = torch.where(own, positions[..., None], anchors[..., None])
        return self.rotary.tables_at(by)


def pre_rope_planes(rotary: Rotary, span: int, turn: float) -> int:
    """How many planes turn by more than `turn` radians within a span; those before them, too."""
    fast = (rotary.frequencies * span > turn).nonzero()
    return int(fast.max()) + 1 if len(fast) else 0


def common_span(anchors: "Iterable[Anchors | None]") -> int:
    """Of the layers that have anchors, all alike; 0 if none has."""
    return max((found.span for found in anchors if found is not None), default=0)


def average_over_positions(
    second: Tensor,
    mean: Tensor,
    rotary: Rotary | None,
    num_positions: int,
    head_size: int,
    turning: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Moments of a vector of heads, turned by every position below `num_positions` alike often.

    Args:
        second: float64 `[n, n]`, `E[x xᵀ]` (not centred) of `n = heads * head_size` dims.
        mean: float64 `[n]`, `E[x]`.
        rotary: None for a layer without rotary embedding, which changes nothing.
        num_positions: `N`, at least 1.
        head_size: `D`.
        turning: heads that turn, the first ones; all by default.

    Returns:
        The averaged second moment and mean, as given.
    """
    if rotary is None:
        return second, mean
    heads = second.shape[0] // head_size
    first, other = rotary.plane_dims(head_size)
    base = torch.arange(heads)[:, None] * head_size
    a, b = (base + first).flatten(), (base + other).flatten()
    turns = (torch.arange(heads) < (heads if turning is None else turning)).double()
    w = (turns[:, None] * rotary.plane_frequencies(head_size)).flatten()

    aa, ab, bb = second[a][:, a], second[a][:, b], second[b][:, b]
    ba = ab.T
    hermitian = torch.complex(aa + bb, ba - ab) * _phi(w[:, None] - w[None, :], num_positions)
    symmetric = torch.complex(aa - bb, ab + ba) * _phi(w[:, None] + w[None, :], num_positions)
    out = torch.empty_like(second)
    out[a[:, None], a] = (hermitian.real + symmetric.real) / 2
    out[b[:, None], b] = (hermitian.real - symmetric.real) / 2
    out[a[:, None], b] = (symmetric.imag - hermitian.imag) / 2
    out[b[:, None], a] = (symmetric.imag + hermitian.imag) / 2

    turned = torch.complex(mean[a], mean[b]) * _phi(w, num_positions)
    out_mean = torch.empty_like(mean)
    out_mean[a], out_mean[b] = turned.real, turned.imag
    return out, out_mean


def _phi(frequency: Tensor, num_positions: int) -> Tensor:
    """Mean of `exp(i * frequency * n)` over `n = 0 .. num_positions - 1`, complex128."""
    half = frequency / 2
    sine = torch.sin(half)
    still = sine.abs() < 1e-12
    ratio = torch.sin(half * num_positions) / (num_positions * torch.where(still, 1.0, sine))
    ratio = torch.where(still, 1.0, ratio)
    phase = half * (num_positions - 1)
    return ratio * torch.complex(phase.cos(), phase.sin())
