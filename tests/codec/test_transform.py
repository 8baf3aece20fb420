"""Bases: what they keep, what an error costs, what a constant does not."""

import pytest
import torch

from tests.support.cases import fitted_basis, gaussian
from vllm_attentionpack.codec.codec import PlaneCodec
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.codec.positions import Rotary, average_over_positions
from vllm_attentionpack.codec.quantize import step_and_distortion
from vllm_attentionpack.codec.transform import fisher_basis, principal_basis

TOKENS, DIMS = 4000, 64


def moments(data):
    return data.mT @ data / data.shape[-2], data.mean(-2)


def spd(dims, generator):
    a = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    return a @ a.T / dims + 0.05 * torch.eye(dims, dtype=torch.float64)


def test_full_rank_at_eight_bits_reconstructs_to_quantisation_error():
    data = gaussian(TOKENS, DIMS, 0.1, torch.Generator().manual_seed(0))
    basis = fitted_basis(data[None], PlaneCounts(n8=DIMS), heads=2)
    codec = PlaneCodec(basis, PlaneCounts(n8=DIMS))
    codes, scale = codec.encode(data, None)
    back = codec.reconstruct(codes, scale, torch.zeros(TOKENS, dtype=torch.bool))
    error = (back.double() - data).square().sum() / data.square().sum()
    assert error.item() < 2 * step_and_distortion(8)[1]


def test_bases_of_either_modality_are_inverted_beside_other_threads():
    """Two threads that share a batch of 256 dims had LAPACK refuse it (torch 2.13)."""
    generator = torch.Generator().manual_seed(4)
    metric = torch.stack([spd(256, generator) for _ in range(2)])
    second = torch.stack([spd(256, generator) for _ in range(2)])
    mean, count = torch.zeros(2, 256, dtype=torch.float64), torch.tensor([30, 70])
    basis = fisher_basis(second, mean, count, metric, 2, 1e-2)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        turned = basis.encode @ basis.decode
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(turned, torch.eye(256).expand_as(turned).double())


@pytest.mark.parametrize(
    "counts",
    [
        PlaneCounts(n2=64),
        PlaneCounts(n8=8, n4=16, n2=32),
        PlaneCounts(n4=32),
        PlaneCounts(n8=64, n4=40, n2=16, n12=40, n10=16),
    ],
)
def test_measured_distortion_is_what_the_spectrum_predicts(counts):
    """`sum variance_i * d(bits_i)`, in the metric; per-token scales gain or lose a little.

    Codes of many bits gain more: the scale that just fits a token leaves out the tails.
    """
    generator = torch.Generator().manual_seed(1)
    data = gaussian(TOKENS, DIMS, 0.08, generator)
    metric = torch.stack([spd(DIMS // 2, generator) for _ in range(2)])
    second, mean = moments(data[None])
    principal = principal_basis(second, mean, torch.tensor([TOKENS]), [metric], 1e-9)
    distortion = torch.tensor(
        [step_and_distortion(b)[1] for b, n in counts.dims_by_bits.items() for _ in range(n)]
        + [1.0] * (DIMS - counts.rank)
    )
    predicted = (principal.spectrum * distortion).sum().item()

    codec = PlaneCodec(principal.truncate(counts), counts)
    codes, scale = codec.encode(data, None)
    error = codec.reconstruct(codes, scale, torch.zeros(TOKENS, dtype=torch.bool)).double() - data
    halves = error.unflatten(1, (2, -1))
    measured = torch.einsum("thi,hij,thj->t", halves, metric, halves).mean().item()
    assert (0.35 if counts.pairs else 0.75) * predicted < measured < 1.25 * predicted


@pytest.mark.parametrize("prices", [(1.0, 1.0), (0.2, 9.0)])
def test_errors_of_heads_are_those_that_are_foretold(prices):
    """By the metric of each head times its price, and in all what the spectrum says."""
    generator = torch.Generator().manual_seed(5)
    data = gaussian(TOKENS, DIMS, 0.08, generator)
    metric = torch.stack([spd(DIMS // 2, generator) for _ in range(2)])
    second, mean = moments(data[None])
    count = torch.tensor([TOKENS])
    plain = principal_basis(second, mean, count, [metric[:1], metric[1:]], 1e-9)
    priced = plain.priced(prices)
    wanted = principal_basis(
        second, mean, count, [metric[:1] * prices[0], metric[1:] * prices[1]], 1e-9
    )
    assert torch.allclose(priced.spectrum, wanted.spectrum, rtol=1e-4)
    counts = PlaneCounts(n4=16, n2=16)
    codec = PlaneCodec(priced.truncate(counts), counts)
    codes, scale = codec.encode(data, None)
    error = codec.reconstruct(codes, scale, torch.zeros(TOKENS, dtype=torch.bool)).double() - data
    halves = error.unflatten(1, (2, -1))
    measured = torch.einsum("thi,hij,thj->h", halves, metric, halves) / TOKENS
    foretold = priced.errors(counts) / torch.tensor(prices)
    assert torch.allclose(measured, foretold, rtol=0.25)
    kept = sum(step_and_distortion(b)[1] * n for b, n in counts.dims_by_bits.items())
    assert 0 < kept < counts.rank


def test_dearer_heads_lose_less():
    generator = torch.Generator().manual_seed(6)
    data = gaussian(TOKENS, DIMS, 0.08, generator)
    metric = torch.eye(DIMS // 2, dtype=torch.float64).expand(2, -1, -1)
    second, mean = moments(data[None])
    plain = principal_basis(second, mean, torch.tensor([TOKENS]), [metric], 1e-9)
    counts = PlaneCounts(n4=16, n2=16)
    dear = plain.priced((1.0, 100.0)).errors(counts) / torch.tensor([1.0, 100.0])
    assert dear[1] < 0.5 * plain.errors(counts)[1]
    assert dear[0] > plain.errors(counts)[0]


@pytest.mark.parametrize("kinds", [1, 2])
def test_metrics_of_whole_groups_foretell_what_is_lost(kinds):
    """By modality, with what heads have in common, and in either form of a joint basis."""
    generator = torch.Generator().manual_seed(7)
    data = torch.stack([gaussian(TOKENS, DIMS, decay, generator) for decay in (0.08, 0.2)])
    metric = torch.stack([spd(DIMS, generator), 3 * spd(DIMS, generator)])
    second, mean = moments(data)
    count = torch.tensor([TOKENS, TOKENS])
    basis = fisher_basis(second, mean, count, metric, kinds, 1e-9)
    assert torch.allclose(
        basis.encode @ basis.decode, torch.eye(DIMS, dtype=torch.float64), atol=1e-5
    )
    counts = PlaneCounts(n8=8, n4=16, n2=16)

    def lost(basis):
        codec = PlaneCodec(basis.truncate(counts), counts)
        cost = []
        for modality in range(2):
            visual = torch.full((TOKENS,), bool(modality))
            codes, scale = codec.encode(data[modality], visual)
            error = codec.reconstruct(codes, scale, visual).double() - data[modality]
            cost.append(torch.einsum("ti,ij,tj->t", error, metric[modality], error).mean().item())
        return sum(cost) / 2

    measured = lost(basis)
    foretold = basis.errors(counts).sum().item()
    assert 0.75 * foretold < measured < 1.25 * foretold
    plain = torch.eye(DIMS // 2, dtype=torch.float64).expand(2, -1, -1)
    assert measured < 0.9 * lost(principal_basis(second, mean, count, [plain], 1e-9))


def test_a_metric_of_nothing_still_makes_a_basis():
    """A layer whose keys no answer depends on."""
    data = gaussian(TOKENS, DIMS, 0.08, torch.Generator().manual_seed(8))[None]
    nothing = torch.zeros(1, DIMS, DIMS, dtype=torch.float64)
    basis = fisher_basis(*moments(data), torch.tensor([TOKENS]), nothing, 1, 1e-2)
    truncated = basis.truncate(PlaneCounts(n4=16, n2=16))
    assert all(torch.isfinite(tensor).all() for tensor in truncated.tensors().values())


def test_planted_low_rank_is_found():
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(12, DIMS, generator=generator, dtype=torch.float64)
    data = torch.randn(TOKENS, 12, generator=generator, dtype=torch.float64) @ factor
    second, mean = moments(data[None])
    metric = torch.eye(DIMS // 2, dtype=torch.float64).expand(2, -1, -1)
    principal = principal_basis(second, mean, torch.tensor([TOKENS]), [metric], 1e-9)
    spectrum = principal.spectrum
    assert spectrum[:12].sum() / spectrum.sum() > 1 - 1e-9


def test_encode_and_decode_are_inverse_at_full_rank():
    generator = torch.Generator().manual_seed(3)
    data = gaussian(TOKENS, DIMS, 0.1, generator)
    second, mean = moments(data[None])
    metric = torch.stack([spd(DIMS // 2, generator) for _ in range(2)])
    principal = principal_basis(second, mean, torch.tensor([TOKENS]), [metric], 1e-3)
    product = principal.encode[0] @ principal.decode[0]
    assert torch.allclose(product, torch.eye(DIMS, dtype=torch.float64), atol=1e-6)


def test_metric_moves_precision_to_what_queries_read():
    """With one direction read a hundred times more, its error must shrink against the rest."""
    generator = torch.Generator().manual_seed(4)
    data = torch.randn(TOKENS, 32, generator=generator, dtype=torch.float64)
    second, mean = moments(data[None])
    count = torch.tensor([TOKENS])
    plain = torch.eye(32, dtype=torch.float64)[None]
    weighted = plain.clone()
    weighted[0, 5, 5] = 100.0
    counts = PlaneCounts(n8=4, n2=16)
    errors = []
    for metric in (plain, weighted):
        codec = PlaneCodec(
            principal_basis(second, mean, count, [metric], 1e-9).truncate(counts), counts
        )
        codes, scale = codec.encode(data, None)
        back = codec.reconstruct(codes, scale, torch.zeros(TOKENS, dtype=torch.bool))
        errors.append((back.double() - data)[:, 5].square().mean().item())
    assert errors[1] < 0.05 * errors[0]


def test_scarce_modality_leans_on_the_pooled_covariance():
    generator = torch.Generator().manual_seed(5)
    many, few = gaussian(TOKENS, DIMS, 0.1, generator), gaussian(3, DIMS, 0.1, generator)
    moments_of = [moments(many), moments(few)]
    second = torch.stack([m[0] for m in moments_of])
    mean = torch.stack([m[1] for m in moments_of])
    metric = torch.eye(DIMS, dtype=torch.float64)[None]
    principal = principal_basis(second, mean, torch.tensor([TOKENS, 3]), [metric], 1e-3)
    assert torch.isfinite(principal.encode).all()
    assert principal.variance[1].gt(0).sum() == DIMS  # three tokens alone would span two dims
    assert principal.share.tolist() == pytest.approx([TOKENS / (TOKENS + 3), 3 / (TOKENS + 3)])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dims", [20, 12])
def test_position_average_equals_turning_every_token(interleaved, rotary_dims):
    generator = torch.Generator().manual_seed(6)
    planes = rotary_dims // 2
    rotary = Rotary(0.7 ** torch.arange(planes, dtype=torch.float64), interleaved)
    x = torch.randn(30, 2, 20, generator=generator)
    positions = 41
    turned = torch.cat([rotary.turn(x, torch.full((30,), n)) for n in range(positions)]).flatten(1)
    direct_second, direct_mean = moments(turned.double())
    second, mean = moments(x.flatten(1).double())
    averaged = average_over_positions(second, mean, rotary, positions, 20)
    assert torch.allclose(averaged[0], direct_second, atol=1e-6)
    assert torch.allclose(averaged[1], direct_mean, atol=1e-6)


def test_turning_back_undoes_turning():
    rotary = Rotary(0.5 ** torch.arange(8, dtype=torch.float64))
    x = torch.randn(10, 3, 16, generator=torch.Generator().manual_seed(7))
    position = torch.arange(10) * 100
    assert torch.allclose(rotary.turn(rotary.turn(x, position), -position), x, atol=1e-5)


def test_no_rotary_changes_nothing():
    second, mean = moments(gaussian(100, 16, 0.1, torch.Generator().manual_seed(8)))
    assert average_over_positions(second, mean, None, 1000, 16) == (second, mean)
