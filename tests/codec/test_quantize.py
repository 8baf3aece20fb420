"""Quantiser, scales, packing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_attentionpack.codec.quantize import (
    choose_scale,
    decode_scale,
    encode_scale,
    pack_codes,
    step_and_distortion,
    to_codes,
    unpack_codes,
    zero_points,
)


@pytest.mark.parametrize(
    ("bits", "step", "distortion"),
    # Max, "Quantizing for minimum distortion" (1960), table II: uniform output levels.
    [(1, 1.596, 0.3634), (2, 0.9957, 0.1188), (3, 0.5860, 0.03744), (4, 0.3352, 0.01154)],
)
def test_gaussian_quantiser_matches_the_published_table(bits, step, distortion):
    found = step_and_distortion(bits)
    assert found == (pytest.approx(step, rel=2e-4), pytest.approx(distortion, rel=5e-4))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_distortion_formula_matches_simulation(bits):
    step, distortion = step_and_distortion(bits)
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(bits)) / step
    zero = zero_points(torch.tensor([float(bits)]))
    codes = to_codes(x[:, None], torch.ones(len(x)), zero)
    error = ((codes - zero).squeeze() - x) * step
    assert error.square().mean().item() == pytest.approx(distortion, rel=0.04)  # rare tails


@given(st.integers(0, 127), st.booleans())
def test_scale_bytes_round_trip(exponent, visual):
    byte = torch.tensor([exponent + 128 * visual], dtype=torch.uint8)
    scale, modality = decode_scale(byte)
    assert modality.item() == visual
    assert encode_scale(scale, torch.tensor([visual])).item() == byte.item()


def test_scale_rounds_to_within_half_a_step_and_clamps():
    scale = torch.logspace(-2, 2, 1000)
    rounded, _ = decode_scale(encode_scale(scale, None))
    assert (rounded / scale).log2().abs().max().item() <= 1 / 16 + 1e-5
    extreme, _ = decode_scale(encode_scale(torch.tensor([1e-30, 1e30]), None))
    assert extreme.tolist() == pytest.approx([2**-8, 2 ** (63 / 8)])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_round_trips_and_puts_sub_planes_where_the_layout_says(bits):
    codes = torch.randint(0, 2**bits, (7, 32), generator=torch.Generator().manual_seed(0))
    packed = pack_codes(codes, bits)
    assert packed.shape == (7, 32 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits), codes.float())
    width = packed.shape[1]
    for sub in range(8 // bits):
        part = (packed >> (sub * bits)) & (2**bits - 1)
        assert torch.equal(part.long(), codes[:, sub * width : (sub + 1) * width])


def test_sixteen_bits_hold_bfloat16_exactly():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert torch.equal(unpack_codes(pack_codes(x, 16), 16), x.float())


def test_chosen_scale_beats_no_scale_on_outlier_tokens():
    generator = torch.Generator().manual_seed(0)
    bits = torch.full((64,), 2.0)
    step = torch.full((64,), step_and_distortion(2)[0])
    zero = zero_points(bits)
    latent = torch.randn(100, 64, generator=generator) / step
    latent[:10] *= 30.0
    weight = torch.ones(64)

    def error(scale):
        coded = (to_codes(latent, scale, zero) - zero) * scale[:, None]
        return (coded - latent).square().sum(-1) / latent.square().sum(-1)

    chosen = error(choose_scale(latent, zero, step, weight))
    fixed = error(torch.ones(100))
    assert fixed[:10].min() > 0.8
    assert chosen[:10].max() < 0.25
    assert chosen.mean() < fixed.mean()
