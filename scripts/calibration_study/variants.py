"""Codecs that a pack file cannot hold: other bit widths, codebooks and scales, for comparison.

Everything is float arithmetic on latents of unit variance; bytes are counted, not laid out. Dims
are given bits in runs of `GRANULE`, finer than any kernel could use, so that a format with more bit
widths is compared at its best.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.codec.quantize import decode_scale, encode_scale, step_and_distortion
from vllm_attentionpack.codec.transform import PrincipalBasis
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, TokenCodec, Tokens

GRANULE = 4


@dataclass(frozen=True)
class Format:
    """How latents are stored.

    Attributes:
        bits: bit widths that a dim can have besides 0.
        codebook: levels of a unit Gaussian for a bit width.
        scale: rounds scales to what is stored.
        scale_bytes: bytes of one stored scale.
        per_plane: a scale for every bit width rather than for the whole head group.
        candidates: multiples of a token's root mean square that are tried as its scale.
        fits: multiples of the scale at which the largest code just fits.
    """

    bits: tuple[int, ...] = (2, 4, 8)
    codebook: str = "uniform"
    scale: str = "log8"
    scale_bytes: int = 1
    per_plane: bool = False
    candidates: tuple[float, ...] = (1.0, 0.8, 1.3)
    fits: tuple[float, ...] = (1.0, 0.8)


@cache
def levels(bits: int, codebook: str) -> Tensor:
    """float32 `[2**bits]`, rising: what the codes of a unit Gaussian stand for."""
    if codebook == "uniform" or bits > 6:  # finer codebooks differ by less than their rounding
        step, _ = step_and_distortion(bits)
        return (torch.arange(2**bits) - (2**bits - 1) / 2) * step
    return torch.tensor(_lloyd_max(bits), dtype=torch.float32)


def _lloyd_max(bits: int) -> np.ndarray:
    """The quantiser of least mean squared error (S. Lloyd, 1957; J. Max, 1960)."""
    x = np.linspace(-8, 8, 200_001)
    weight = np.exp(-x * x / 2)
    point = np.asarray(levels(bits, "uniform"), dtype=np.float64)
    for _ in range(3000):
        owner = np.searchsorted((point[1:] + point[:-1]) / 2, x)
        mass = np.bincount(owner, weight, len(point))
        moved = np.bincount(owner, weight * x, len(point)) / np.maximum(mass, 1e-300)
        if np.abs(moved - point).max() < 1e-7:
            break
        point = moved
    return point


@cache
def distortion(bits: int, codebook: str) -> float:
    """Mean squared error of the codebook on a unit Gaussian."""
    if bits == 0:
        return 1.0
    if codebook == "uniform" or bits > 6:
        return step_and_distortion(bits)[1]
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    error = (x - quantize(x.float(), levels(bits, codebook)).double()).square()
    weight = torch.exp(-x * x / 2)
    return float((error * weight).sum() / weight.sum())


def quantize(x: Tensor, level: Tensor) -> Tensor:
    """The nearest level of every element."""
    return level[torch.bucketize(x, (level[1:] + level[:-1]) / 2)]


def round_scale(scale: Tensor, how: str) -> Tensor:
    """What is left of a scale when it is stored."""
    if how == "none":
        return torch.ones_like(scale)
    if how == "float":
        return scale
    if how == "bf16":
        return scale.bfloat16().float()
    if how == "fp8":
        return scale.clamp(2**-9, 448).to(torch.float8_e4m3fn).float().clamp_min(2**-9)
    if how == "log8":
        return decode_scale(encode_scale(scale, None))[0]
    if how == "log4":  # four steps to the octave: what six bits would hold
        return torch.exp2((torch.log2(scale) * 4).round() / 4)
    raise ValueError(how)


def spend(
    spectra: Sequence[np.ndarray], weights: Sequence[float], budget_bits: float, form: Format
) -> list[np.ndarray]:
    """Bits of every dim: each run of dims climbs the convex hull of its bit widths, best first."""
    steps = _hull(form)
    bits = [np.zeros(len(s), dtype=np.int64) for s in spectra]
    heap: list[tuple[float, int, int, int]] = []

    def push(unit: int, run: int, at: int) -> None:
        if at + 1 < len(steps):
            (b0, d0), (b1, d1) = steps[at], steps[at + 1]
            mass = spectra[unit][run : run + GRANULE].sum() * weights[unit]
            heapq.heappush(heap, (-mass * (d0 - d1) / (b1 - b0), unit, run, at))

    for unit, spectrum in enumerate(spectra):
        for run in range(0, len(spectrum), GRANULE):
            push(unit, run, 0)
    left = budget_bits
    while heap:
        _, unit, run, at = heapq.heappop(heap)
        cost = GRANULE * (steps[at + 1][0] - steps[at][0])
        if cost > left:
            continue
        left -= cost
        bits[unit][run : run + GRANULE] = steps[at + 1][0]
        push(unit, run, at + 1)
    return bits


def _hull(form: Format) -> list[tuple[int, float]]:
    points = [(b, distortion(b, form.codebook)) for b in (0, *sorted(form.bits))]
    hull = [points[0]]
    while hull[-1][0] < points[-1][0]:
        b0, d0 = hull[-1]
        hull.append(max((p for p in points if p[0] > b0), key=lambda p: (d0 - p[1]) / (p[0] - b0)))
    return hull


class VariantCodec(TokenCodec):
    """Principal bases with any `Format`.

    Args:
        shape: of the cache.
        bases: per layer, per head group, of keys and values.
        prices: of the distortion of each layer's keys and values.
        ratio: against bfloat16; scales count.
        form: see `Format`.
        exact: exact tokens beside the codes.
    """

    def __init__(
        self,
        shape: CacheShape,
        bases: "Sequence[Sequence[dict[Kind, PrincipalBasis]]]",
        prices: Mapping[tuple[int, Kind], float],
        ratio: float,
        form: Format,
        exact: ExactTokens | None = None,
    ) -> None:
        units = [
            (i, g, kind) for i, of in enumerate(bases) for g in range(len(of)) for kind in KINDS
        ]
        spectra = [bases[i][g][kind].spectrum.numpy() for i, g, kind in units]
        weights = [prices[i, kind] for i, _, kind in units]
        budget = 8 * shape.dense_bytes / ratio
        planes = len(form.bits) if form.per_plane else 1
        fixed = 8 * len(units) * planes * form.scale_bytes if form.scale != "none" else 0
        chosen = spend(spectra, weights, budget - fixed, form)
        super().__init__(shape, (sum(b.sum() for b in chosen) + fixed) / 8, exact)
        self._groups = len(bases[0])
        self.bits = dict(zip(units, chosen, strict=True))
        self._parts = {
            unit: _Part(bases[unit[0]][unit[1]][unit[2]], bits, form)
            for unit, bits in self.bits.items()
        }

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        return _by_group(
            key,
            value,
            self._groups,
            lambda g, kind, part: self._parts[layer, g, kind](part, tokens.visual),
        )


def _by_group(
    key: Tensor, value: Tensor, groups: int, read: Callable[[int, Kind, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Keys and values `[T, Hk, D]` as `read` gives back those `[T, GD]` of each head group."""
    result = []
    for kind, x in zip(KINDS, (key, value), strict=True):
        split = x.flatten(1).chunk(groups, dim=1)
        parts = [read(g, kind, part) for g, part in enumerate(split)]
        result.append(torch.cat(parts, dim=1).view_as(x))
    return result[0], result[1]


class _Part:
    """One (layer, head group, K|V)."""

    def __init__(self, basis: PrincipalBasis, bits: np.ndarray, form: Format) -> None:
        order = np.argsort(-bits, kind="stable")
        assert (order[: (bits > 0).sum()] == np.arange((bits > 0).sum())).all()
        rank = int((bits > 0).sum())
        floor = basis.variance.amax(1, keepdim=True).clamp_min(1e-30) * 1e-12
        sigma = basis.variance.maximum(floor)[:, :rank].sqrt()  # [M, R]
        self._mean = basis.mean.float()
        self._encode = (basis.encode.double()[:, :, :rank] / sigma[:, None]).float()
        self._decode = (basis.decode.double()[:, :rank] * sigma[:, :, None]).float()
        self._weight = sigma.square().float()
        self._form = form
        kept = bits[:rank]
        self._planes = [
            (
                slice(int(np.argmax(kept == b)), int(np.argmax(kept == b) + (kept == b).sum())),
                int(b),
            )
            for b in sorted(set(kept.tolist()), reverse=True)
        ]

    def __call__(self, x: Tensor, visual: Tensor) -> Tensor:
        which = visual.long() if len(self._mean) == 2 else torch.zeros_like(visual.long())
        out = torch.empty_like(x)
        for m in range(len(self._mean)):
            rows = which == m
            z = (x[rows] - self._mean[m]) @ self._encode[m]
            out[rows] = self._mean[m] + self._read(z, self._weight[m]) @ self._decode[m]
        return out

    def _read(self, z: Tensor, weight: Tensor) -> Tensor:
        groups = [[p] for p in self._planes] if self._form.per_plane else [self._planes]
        result = torch.empty_like(z)
        for planes in groups:
            if not planes:
                continue
            span = slice(planes[0][0].start, planes[-1][0].stop)
            result[:, span] = self._scaled(z[:, span], weight[span], planes, span.start)
        return result

    def _scaled(
        self, z: Tensor, weight: Tensor, planes: list[tuple[slice, int]], offset: int
    ) -> Tensor:
        form = self._form
        rms = z.square().mean(1).sqrt()
        top = torch.ones(z.shape[1])
        for dims, bits in planes:
            level = levels(bits, form.codebook)
            top[dims.start - offset : dims.stop - offset] = 1.5 * level[-1] - 0.5 * level[-2]
        fit = (z.abs() / top).amax(1)
        tried = [rms * c for c in form.candidates] + [fit * c for c in form.fits]
        best = best_error = None
        for candidate in tried or [torch.ones(len(z))]:
            scale = round_scale(candidate.clamp_min(1e-6), form.scale)[:, None]
            read = (
                torch.cat(
                    [
                        quantize(
                            z[:, d.start - offset : d.stop - offset] / scale,
                            levels(b, form.codebook),
                        )
                        for d, b in planes
                    ],
                    dim=1,
                )
                * scale
            )
            error = ((read - z).square() * weight).sum(1)
            if best is None or best_error is None:
                best, best_error = read, error
            else:
                better = error < best_error
                best = torch.where(better[:, None], read, best)
                best_error = torch.where(better, error, best_error)
        assert best is not None
        return best


class IdealCodec(TokenCodec):
    """What codes of unbounded length would do at the same bits: the Gaussian test channel.

    Reverse water-filling over the latents of all layers, `D = min(level / price, variance)` for
    each dim of a modality, and of each latent `x` what the channel that reaches this distortion at
    `log2(variance / D) / 2` bits hands on: `a x + sqrt(a D) noise`, `a = 1 - D / variance` (Cover
    & Thomas, ch. 10.3). Variances are times the square of each token's scale, which costs nothing
    here. No quantiser of Gaussian latents with these variances loses less in the metric that the
    bases minimise; latents of a model are not quite Gaussian.

    Args:
        shape: of the cache.
        bases: per layer, per head group, of keys and values.
        prices: of the distortion of each layer's keys and values.
        ratio: against bfloat16.
    """

    def __init__(
        self,
        shape: CacheShape,
        bases: "Sequence[Sequence[dict[Kind, PrincipalBasis]]]",
        prices: Mapping[tuple[int, Kind], float],
        ratio: float,
    ) -> None:
        super().__init__(shape, shape.dense_bytes / ratio)
        self._bases = bases
        units = [(i, g, k) for i, of in enumerate(bases) for g in range(len(of)) for k in KINDS]
        self._distortion: dict[tuple[int, int, Kind], Tensor] = {}
        variances = [bases[i][g][kind].variance.clamp_min(1e-30) for i, g, kind in units]
        weights = [prices[i, kind] for i, _, kind in units]
        levels = [
            water_level(
                np.concatenate([v[m].numpy() * w for v, w in zip(variances, weights, strict=True)]),
                8 * shape.dense_bytes / ratio,
            )
            for m in range(len(variances[0]))
        ]
        for unit, variance, weight in zip(units, variances, weights, strict=True):
            level = torch.tensor(levels, dtype=torch.float64)[:, None] / weight
            self._distortion[unit] = torch.minimum(level, variance)

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(layer)
        bases = self._bases[layer]
        return _by_group(
            key,
            value,
            len(bases),
            lambda g, kind, part: self._read(
                bases[g][kind], self._distortion[layer, g, kind], part, tokens, generator
            ),
        )

    @staticmethod
    def _read(
        basis: PrincipalBasis, spent: Tensor, x: Tensor, tokens: Tokens, generator: torch.Generator
    ) -> Tensor:
        out = torch.empty_like(x)
        which = tokens.visual.long() * (len(basis.mean) - 1)
        for m in range(len(basis.mean)):
            rows = which == m
            latent = (x[rows] - basis.mean[m].float()) @ basis.encode[m].float()
            variance = basis.variance[m].clamp_min(1e-30)
            kept = 1 - spent[m] / variance
            scale = (latent.square() / variance.float())[:, kept > 0].mean(1, keepdim=True).sqrt()
            noise = torch.randn(latent.shape, generator=generator) * scale
            read = latent * kept.float() + noise * (kept * spent[m]).sqrt().float()
            out[rows] = basis.mean[m].float() + read @ basis.decode[m].float()
        return out


def water_level(variance: np.ndarray, bits: float) -> float:
    """The distortion of every dim that is given bits when `bits` are spent over all dims."""
    low, high = 0.0, float(variance.max())
    for _ in range(200):
        level = (low + high) / 2
        rate = np.maximum(0.5 * np.log2(variance / max(level, 1e-300)), 0).sum()
        low, high = (level, high) if rate > bits else (low, level)
    return high
