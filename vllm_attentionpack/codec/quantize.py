"""Codes and scales: the uniform quantiser of the latent dims and the one-byte per-token scale."""

import math
from functools import cache

import torch
from torch import Tensor

#: A scale is `2 ** (exponent / SCALE_STEPS_PER_OCTAVE)`; 7 bits of exponent, one bit of modality.
SCALE_STEPS_PER_OCTAVE = 8
SCALE_ZERO_POINT = 64
MODALITY_BIT = 0x80


@cache
def step_and_distortion(bits: int) -> tuple[float, float]:
    """Step and mean squared error of the best uniform quantiser of a unit Gaussian.

    The quantiser has `2**bits` levels `(u - (2**bits - 1)/2) * step` (mid-rise, symmetric). The
    error is the closed form of J. Max, "Quantizing for minimum distortion" (1960), minimised over
    the step. `bits == 0` drops the dim (error 1); `bits == 16` is bfloat16, taken as exact.
    """
    if bits == 0:
        return 1.0, 1.0
    if bits == 16:
        return 1.0, 0.0
    low, high = 1e-4, 4.0
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-9:  # golden-section search: the error is unimodal in the step
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        if _gaussian_error(bits, a) < _gaussian_error(bits, b):
            high = b
        else:
            low = a
    return low, _gaussian_error(bits, low)


def _gaussian_error(bits: int, step: float) -> float:
    half = 2 ** (bits - 1)
    edges = [i * step for i in range(half)] + [math.inf]
    error = 0.0
    for i in range(half):
        level, lo, hi = (i + 0.5) * step, edges[i], edges[i + 1]
        mass = (math.erf(hi / math.sqrt(2)) - math.erf(lo / math.sqrt(2))) / 2
        pdf_lo = math.exp(-lo * lo / 2) / math.sqrt(2 * math.pi)
        pdf_hi = 0.0 if math.isinf(hi) else math.exp(-hi * hi / 2) / math.sqrt(2 * math.pi)
        first = pdf_lo - pdf_hi
        second = mass + lo * pdf_lo - (0.0 if math.isinf(hi) else hi * pdf_hi)
        error += 2 * (second - 2 * level * first + level * level * mass)
    return error


def encode_scale(scale: Tensor, visual: Tensor | None) -> Tensor:
    """Packs positive scales and the modality of each token into bytes.

    Args:
        scale: float `[...]`, positive; rounded to the nearest representable one in the logarithm
            and clamped to `[2**-8, 2**(63/8)]`.
        visual: bool, broadcastable to `scale`, or None for all text.

    Returns:
        uint8 `[...]`.
    """
    exponent = torch.round(torch.log2(scale) * SCALE_STEPS_PER_OCTAVE) + SCALE_ZERO_POINT
    byte = exponent.clamp(0, MODALITY_BIT - 1).to(torch.uint8)
    return byte if visual is None else byte + visual.to(torch.uint8) * MODALITY_BIT


def decode_scale(byte: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `encode_scale`: float32 scales and the bool modality (True: visual)."""
    exponent = (byte & (MODALITY_BIT - 1)).to(torch.float32) - SCALE_ZERO_POINT
    return torch.exp2(exponent / SCALE_STEPS_PER_OCTAVE), byte >= MODALITY_BIT


def zero_points(bits: Tensor) -> Tensor:
    """The code (not an integer) that stands for zero, per latent dim: `(2**bits - 1) / 2`."""
    return (torch.exp2(bits.to(torch.float32)) - 1) / 2


def to_codes(latent: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantises latents that are measured in steps.

    Args:
        latent: float32 `[T, R]`, in units of each dim's quantiser step at scale 1.
        scale: float32 `[T]`.
        zero_point: float32 `[R]`, see `zero_points`.

    Returns:
        float32 `[T, R]` of whole numbers in `[0, 2 * zero_point]`.
    """
    codes = torch.round(latent / scale[:, None] + zero_point)
    return torch.minimum(codes.clamp_min(0), 2 * zero_point)


def choose_scale(latent: Tensor, zero_point: Tensor, step: Tensor, weight: Tensor) -> Tensor:
    """The byte-representable scale of each token that costs the least weighted error.

    Candidates around the token's root mean square and around the scale at which the largest code
    just fits: neither alone is good at 2 bits (docs/log.md).

    Args:
        latent: float32 `[T, R]`, in steps.
        zero_point: float32 `[R]`.
        step: float32 `[R]`, the quantiser step for unit variance: `latent * step` has unit
            variance over the calibration data.
        weight: float32 `[R]` or `[T, R]`, squared error of the whitened latent per squared step.

    Returns:
        float32 `[T]`.
    """
    rms = (latent * step).square().mean(-1).sqrt()
    fit = (latent.abs() / (zero_point + 0.5)).amax(-1)
    best_error = best_scale = None
    for candidate in (rms, 0.8 * rms, 1.3 * rms, fit, 0.8 * fit):
        scale, _ = decode_scale(encode_scale(candidate.clamp_min(1e-9), None))
        error = latent - (to_codes(latent, scale, zero_point) - zero_point) * scale[:, None]
        error = (error.square() * weight).sum(-1)
        if best_error is None or best_scale is None:
            best_error, best_scale = error, scale
        else:
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
    assert best_scale is not None
    return best_scale


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs the codes of one plane into bytes.

    Args:
        codes: whole numbers `[T, n]` below `2**bits`, any dtype; bfloat16-valued latents for 16.
        bits: 2, 4, 8 or 16.

    Returns:
        uint8 `[T, n * bits / 8]`; byte `j` holds the dims `j, j + n/c, ...`, lowest bits first.
    """
    if bits == 16:
        return codes.to(torch.bfloat16).contiguous().view(torch.uint8)
    per_byte = 8 // bits
    parts = codes.to(torch.uint8).unflatten(-1, (per_byte, -1))
    packed = parts[..., 0, :].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i, :] << (i * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_codes`: float32 `[..., n]`."""
    if bits == 16:
        return packed.contiguous().view(torch.bfloat16).to(torch.float32)
    mask = 2**bits - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.cat(parts, dim=-1).to(torch.float32)
