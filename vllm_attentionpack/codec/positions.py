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

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """How one attention layer turns its heads.

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

    def turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turns heads by `positions` (negative ones turn back).

        Args:
            x: float `[T, H, D]`.
            positions: int or float `[T]`.

        Returns:
            float32 `[T, H, D]`.
        """
        first, second = (d.to(x.device) for d in self.plane_dims(x.shape[-1]))
        angle = positions[:, None].double() * self.plane_frequencies(x.shape[-1]).to(x.device)
        cos, sin = angle.cos().float()[:, None], angle.sin().float()[:, None]
        x = x.float()
        a, b = x[..., first], x[..., second]
        out = torch.empty_like(x)
        out[..., first] = a * cos - b * sin
        out[..., second] = a * sin + b * cos
        return out


def average_over_positions(
    second: Tensor, mean: Tensor, rotary: Rotary | None, num_positions: int, head_size: int
) -> tuple[Tensor, Tensor]:
    """Moments of a vector of heads, turned by every position below `num_positions` alike often.

    Args:
        second: float64 `[n, n]`, `E[x xᵀ]` (not centred) of `n = heads * head_size` dims.
        mean: float64 `[n]`, `E[x]`.
        rotary: None for a layer without rotary embedding, which changes nothing.
        num_positions: `N`, at least 1.
        head_size: `D`.

    Returns:
        The averaged second moment and mean, as given.
    """
    if rotary is None:
        return second, mean
    heads = second.shape[0] // head_size
    first, other = rotary.plane_dims(head_size)
    base = torch.arange(heads)[:, None] * head_size
    a, b = (base + first).flatten(), (base + other).flatten()
    w = rotary.plane_frequencies(head_size).repeat(heads)

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
