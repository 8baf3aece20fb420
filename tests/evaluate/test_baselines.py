"""Baselines: bytes by formula, errors by theory."""

import pytest
import torch

from vllm_attentionpack.evaluate.baselines.hadamard import hadamard, random_rotation
from vllm_attentionpack.evaluate.baselines.oscar import Oscar
from vllm_attentionpack.evaluate.baselines.request_svd import RequestSvd
from vllm_attentionpack.evaluate.baselines.scalar import (
    BFloat16,
    Fp8PerTensor,
    Int4PerTokenHead,
    Int8PerTokenHead,
)
from vllm_attentionpack.evaluate.baselines.turboquant import TurboQuant, lloyd_max
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, Tokens

LAYERS, KV_HEADS, D, T = 3, 2, 64, 500
SHAPE = CacheShape(tuple(f"layers.{i}" for i in range(LAYERS)), 4, KV_HEADS, D)
UNITS = LAYERS * KV_HEADS


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, T, KV_HEADS, D, generator=generator)
    return key, value


def tokens(visual: int = 0) -> Tokens:
    return Tokens([T], torch.arange(T) < visual, torch.arange(T))


def relative_error(read: torch.Tensor, x: torch.Tensor) -> float:
    return float((read - x).square().sum() / x.square().sum())


@pytest.mark.parametrize(
    ("codec", "slot"),
    [
        (BFloat16(SHAPE), 256),
        (Fp8PerTensor(SHAPE), 128),
        (Int8PerTokenHead(SHAPE), 136),
        (Int4PerTokenHead(SHAPE), 72),
        (TurboQuant(SHAPE, 8, 4, False), 64 + 36),
        (TurboQuant(SHAPE, 4, 4, True), 34 + 36),
        (TurboQuant(SHAPE, 3, 3, True), 26 + 28),
        (TurboQuant(SHAPE, 4, 4, True, lloyd_values=True), 68),
    ],
    ids=lambda x: type(x).__name__,
)
def test_bytes_of_a_slot(codec, slot: int) -> None:
    assert codec.request_bytes(10, 0) == 10 * UNITS * slot


def test_dense_boundary_layers_are_counted_and_exact(data) -> None:
    codec = TurboQuant(SHAPE, 3, 3, True, exact_layers=1)
    assert codec.bytes_per_token == KV_HEADS * (54 + 2 * 256)
    assert codec.reconstruct(0, *data, tokens())[0] is data[0]
    assert relative_error(codec.reconstruct(1, *data, tokens())[0], data[0]) > 0.01


# Lloyd-Max of a unit Gaussian: J. Max, "Quantizing for minimum distortion" (1960), table I.
@pytest.mark.parametrize(
    ("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)]
)
def test_lloyd_max_reaches_the_published_distortion(bits: int, distortion: float) -> None:
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-x * x / 2)
    level = lloyd_max(bits).double()
    error = (x - level[torch.bucketize(x, (level[1:] + level[:-1]) / 2)]).square()
    assert float((error * density).sum() / density.sum()) == pytest.approx(distortion, rel=2e-3)


def test_errors_are_those_of_theory_on_gaussian_data(data) -> None:
    def errors(codec) -> tuple[float, float]:
        read = codec.reconstruct(1, *data, tokens())
        return relative_error(read[0], data[0]), relative_error(read[1], data[1])

    assert max(errors(BFloat16(SHAPE))) < 2**-16  # relative steps of 2^-8, half of it at most
    assert max(errors(Int8PerTokenHead(SHAPE))) < 1e-4
    # a uniform step of range / 15 with a range of about 4.9 standard deviations
    assert errors(Int4PerTokenHead(SHAPE))[1] == pytest.approx((4.9 / 15) ** 2 / 12, rel=0.25)
    key, value = errors(TurboQuant(SHAPE, 4, 4, True))
    assert key == pytest.approx(0.0095, rel=0.1)
    assert value == pytest.approx((4.9 / 15) ** 2 / 12, rel=0.25)
    assert errors(TurboQuant(SHAPE, 8, 3, False))[0] < 1e-3  # e4m3: 3 bits of mantissa


def test_norm_correction_keeps_norms(data) -> None:
    key = data[0]
    plain, corrected = (
        TurboQuant(SHAPE, 3, 3, nc).reconstruct(0, *data, tokens())[0] for nc in (False, True)
    )
    torch.testing.assert_close(corrected.norm(dim=-1), key.norm(dim=-1), rtol=1e-3, atol=1e-3)
    assert (plain.norm(dim=-1) - key.norm(dim=-1)).abs().mean() > 0.01


@pytest.mark.parametrize("size", [8, 64, 96])
def test_rotations_are_orthonormal(size: int) -> None:
    turn = random_rotation(size)
    torch.testing.assert_close(turn @ turn.T, torch.eye(size), rtol=0, atol=1e-5)


def test_hadamard_wants_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="96 is not a power of two"):
        hadamard(96)


def test_oscar_spreads_outlier_channels(data) -> None:
    """The rotation's point: a channel twenty times as large must not eat the four levels."""
    exact = ExactTokens(4, 64, beside_codes=False)
    key = data[0].clone()
    key[..., 3] *= 20
    heads = torch.cat([key, key], dim=1).transpose(0, 1)  # four queries like their keys
    second = heads.mT @ heads / T
    codec = Oscar(SHAPE, [second] * LAYERS, [(key, data[1])] * LAYERS, exact)
    read = codec.reconstruct(0, key, data[1], tokens())
    others = [i for i in range(D) if i != 3]
    low, high = key.amin(-1, keepdim=True), key.amax(-1, keepdim=True)
    step = (high - low) / 3
    plain = ((key - low) / step).round() * step + low
    wanted = relative_error(plain[..., others], key[..., others])
    assert relative_error(read[0][..., others], key[..., others]) < 0.5 * wanted
    # values have no outliers: four levels from least to largest, some clipped
    assert relative_error(read[1], data[1]) < 0.3
    assert codec.bytes_per_token == UNITS * 2 * (D * 2 / 8 + 4)
    assert codec.request_bytes(1000, 0) == 932 * codec.bytes_per_token + 68 * SHAPE.dense_bytes


def test_request_svd_stores_factors_of_visual_tokens_only(data) -> None:
    codec = RequestSvd(SHAPE, 16, 8)
    visual = 300
    read_key, read_value = codec.reconstruct(0, *data, tokens(visual))
    assert torch.equal(read_key[visual:], data[0][visual:])
    flat = data[0][:visual].flatten(1)
    spectrum = torch.linalg.svdvals(flat).square()
    wanted = float(spectrum[16:].sum() / spectrum.sum())
    assert relative_error(read_key[:visual], data[0][:visual]) == pytest.approx(wanted, rel=0.01)
    dims = KV_HEADS * D
    stored = (visual + dims) * (16 + 8) * 2 * LAYERS
    assert codec.request_bytes(T, visual) == (T - visual) * SHAPE.dense_bytes + stored
    coarse = codec.coarse_value(0, data[1], tokens(visual))
    assert relative_error(coarse, data[1]) > relative_error(read_value, data[1])


def test_request_svd_keeps_few_tokens_dense(data) -> None:
    codec = RequestSvd(SHAPE, 64, 64)
    assert torch.equal(codec.reconstruct(0, *data, tokens(40))[0], data[0])
    assert codec.request_bytes(T, 40) == T * SHAPE.dense_bytes
