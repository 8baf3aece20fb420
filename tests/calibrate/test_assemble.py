"""From planted moments to a pack: budgets, units of the metrics, and what low rank buys."""

from dataclasses import replace

import pytest
import torch

from vllm_attentionpack.calibrate.assemble import Assembler, Budget, assemble
from vllm_attentionpack.calibrate.metrics import (
    KEY_PRICE,
    LayerStatistics,
    key_metric,
    output_energy,
    value_metric,
)
from vllm_attentionpack.calibrate.moments import GroupMoments, LayerMoments
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import PLANE_QUANTUM, GroupLayout, LayerLayout
from vllm_attentionpack.errors import BudgetError, ConfigError

HQ, HK, D, G, RANK = 4, 4, 32, 2, 10
N = HK // G


def planted(
    seed: int, modalities: int = 2, gram_scale: float = 1.0, joint_kv: bool = False
) -> tuple[LayerStatistics, torch.Tensor]:
    """A layer whose keys and values lie in `RANK` of each group's dims, per modality.

    Where they are joint, both follow from the same `RANK` numbers. Returns the statistics and, for
    the first modality, samples `[T, HK, D]` of keys.
    """
    generator = torch.Generator().manual_seed(seed)

    def moments(dims: int) -> tuple[GroupMoments, torch.Tensor]:
        basis = torch.randn(modalities, N, RANK, dims, generator=generator, dtype=torch.float64)
        mean = torch.randn(modalities, N, dims, generator=generator, dtype=torch.float64)
        covariance = basis.mT @ basis
        second = covariance + mean[..., :, None] * mean[..., None, :]
        latent = torch.randn(500, N, 1, RANK, generator=generator, dtype=torch.float64)
        sample = (latent @ basis[0]).squeeze(2) + mean[0]
        return GroupMoments(second, mean), sample[..., : G * D].reshape(500, HK, D)

    joint = None
    if joint_kv:
        joint, sample = moments(2 * G * D)
        keys, values = slice(G * D), slice(G * D, None)
        key, value = (
            GroupMoments(joint.second[..., of, of], joint.mean[..., of]) for of in (keys, values)
        )
    else:
        key, sample = moments(G * D)
        value, _ = moments(G * D)
    weight = torch.randn(HQ, D, 3 * D, generator=generator, dtype=torch.float64) * gram_scale
    query = torch.randn(HQ, 50, D, generator=generator, dtype=torch.float64)
    count = torch.tensor([3000, 1000][:modalities])
    layer_moments = LayerMoments(key, value, query.mT @ query / 50, count, joint)
    return LayerStatistics(
        f"layers.{seed}.attn", D**-0.5, layer_moments, weight @ weight.mT
    ), sample


@pytest.mark.parametrize("ratio", [2.5, 4, 7.3, 8, 12])
@pytest.mark.parametrize("modalities", [1, 2])
def test_budget_is_met_and_nearly_used(ratio: float, modalities: int) -> None:
    layers = [planted(seed, modalities)[0] for seed in range(3)]
    headers, packs = assemble(layers, ratio=ratio, heads_per_group=G, regularization=1e-2)
    dense = len(layers) * HK * D * 2 * 2
    stored = sum(header.bytes_per_token for header in headers)
    assert stored <= dense / ratio
    # all dims at 8 bits are more than what is worth spending, so only small budgets are used up
    assert stored > 0.9 * dense / ratio
    assert [header.name for header in headers] == [layer.name for layer in layers]
    for header, pack in zip(headers, packs, strict=True):
        assert len(header.groups) == N
        for group, bases, variance in zip(header.groups, pack.bases, pack.variance, strict=True):
            for kind in ("key", "value"):
                columns = getattr(group, kind).counts().num_columns
                assert bases[kind].encode.shape == (modalities, G * D, columns)
                assert bases[kind].encode.dtype == torch.float32
                assert variance[kind].shape == (modalities, G * D)


def test_joint_keys_and_values_lose_less_where_both_follow_from_the_same() -> None:
    shared = planted(0, joint_kv=True)[0]
    apart = replace(shared, moments=replace(shared.moments, joint_kv=None))
    joint = Assembler([shared], G, 1e-3)
    assert joint.budget.fixed_bytes == N < Assembler([apart], G, 1e-3).budget.fixed_bytes
    lost, lost_apart = (
        sum(assembler.at(16).distortion.values())
        for assembler in (joint, Assembler([apart], G, 1e-3))
    )
    assert lost < 0.2 * lost_apart
    (header,), (pack,) = (found := joint.at(16)).headers, found.packs
    assert header.bytes_per_token <= HK * D * 4 / 16
    for group, bases, variance in zip(header.groups, pack.bases, pack.variance, strict=True):
        assert group.joint_kv and group.key == group.value
        assert torch.equal(variance["key"], variance["value"])
        assert variance["key"].shape == (2, 2 * G * D)
        for kind in ("key", "value"):
            columns = group.key.counts().num_columns
            assert bases[kind].decode.shape == (2, columns, G * D)


def test_joint_keys_and_values_are_coded_by_what_either_is_worth() -> None:
    """Prices of keys and values turn the basis that both share."""
    assembler = Assembler([planted(0, joint_kv=True)[0]], G, 1e-2)
    even, dear = (  # fewer bytes than the planted dims want
        assembler.at(30, sensitivity={(0, "key"): price, (0, "value"): 1.0}).distortion
        for price in (1.0, 1000.0)
    )
    assert dear[0, "key"] < 0.95 * even[0, "key"]
    assert dear[0, "value"] > even[0, "value"]
    nothing = assembler.at(30, sensitivity={(0, "key"): 0.0, (0, "value"): 1.0}).distortion
    assert nothing[0, "value"] <= even[0, "value"] * (1 + 1e-6)


def test_planted_low_rank_survives_eightfold_compaction() -> None:
    layer, sample = planted(0)
    (header,), (pack,) = assemble([layer], ratio=8, heads_per_group=G, regularization=1e-3)
    groups = tuple(GroupLayout(g.key.counts(), g.value.counts()) for g in header.groups)
    codec = LayerCodec(LayerLayout(groups, G, D, header.bytes_per_token), pack.bases)
    text = torch.zeros(len(sample), dtype=torch.bool)
    for group, heads in codec.group_heads():
        x = sample[:, heads].reshape(len(sample), -1).float()
        rebuilt = group.key.reconstruct(*group.key.encode(x, text), text)
        noise = (rebuilt - x).square().sum() / (x - x.mean(0)).square().sum()
        assert float(noise) < 0.01  # rank 10 of 64 dims: 10 x 4 bits and more fit easily


def test_key_price_is_output_energy_of_logit_errors() -> None:
    """`key_metric` against its definition, head by head."""
    layer, _ = planted(1, modalities=1)
    second = layer.moments.value.second[0].view(N, G, D, G, D)
    mean = layer.moments.value.mean[0].view(HK, D)
    for head in range(HK):
        block = second[head // G, head % G, :, head % G, :]
        covariance = block - torch.outer(mean[head], mean[head])
        price = KEY_PRICE * layer.scale**2 * torch.trace(layer.gram[head] @ covariance)
        torch.testing.assert_close(key_metric(layer)[head], price * layer.moments.query[head])
        torch.testing.assert_close(value_metric(layer)[head], layer.gram[head])
    energy = sum(
        float(torch.trace(layer.gram[h] @ second[h // G, h % G, :, h % G, :])) for h in range(HK)
    )
    assert output_energy(layer) == pytest.approx(energy)


def test_layers_are_priced_relative_to_their_own_output() -> None:
    """An output projection ten times as large changes neither ranks nor bits."""
    plain = [planted(0)[0], planted(1)[0]]
    loud = [plain[0], planted(1, gram_scale=10.0)[0]]
    options = {"ratio": 8, "heads_per_group": G, "regularization": 1e-2}
    assert assemble(plain, **options)[0] == assemble(loud, **options)[0]


def test_layer_weights_move_bytes() -> None:
    layers = [planted(0)[0], planted(1)[0]]
    options = {"ratio": 10, "heads_per_group": G, "regularization": 1e-2}
    even, _ = assemble(layers, **options)
    tilted, _ = assemble(layers, layer_weights=[100.0, 0.01], **options)
    assert tilted[0].bytes_per_token > even[0].bytes_per_token
    assert tilted[1].bytes_per_token < even[1].bytes_per_token


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [1.0, 1.0, 1.0]])
def test_bad_layer_weights_are_refused(weights: list[float]) -> None:
    layers = [planted(0)[0], planted(1)[0]]
    with pytest.raises(ConfigError, match="expected 2 positive numbers, one per layer"):
        assemble(layers, ratio=8, heads_per_group=G, regularization=1e-2, layer_weights=weights)


@pytest.mark.parametrize("ratio", [0.5, 1.9, 26.0, 1000.0])
def test_unreachable_ratio_names_the_range(ratio: float) -> None:
    # dense: 512 bytes; least: 4 units x (4 + 1) = 20 bytes; most: 4 units x (64 + 1) = 260 bytes
    layer, _ = planted(0)
    with pytest.raises(BudgetError, match=r"smallest ratio is 1\.97 .* largest is 25\.60"):
        assemble([layer], ratio=ratio, heads_per_group=G, regularization=1e-2)


def test_the_named_range_can_be_met() -> None:
    layer, _ = planted(0)
    assert Budget(1, HK, D, G).ratio_range() == (512 / 260, 512 / 20)
    for ratio, bytes_per_token in ((25.6, 20), (1.97, 260)):
        (header,), _ = assemble([layer], ratio=ratio, heads_per_group=G, regularization=1e-2)
        assert header.bytes_per_token <= bytes_per_token


def test_a_layer_without_output_takes_no_bytes_from_the_others() -> None:
    alive, dead = planted(0)[0], replace(planted(1)[0], gram=torch.zeros(HQ, D, D).double())
    assembler = Assembler([dead, alive], G, 1e-2)
    assembled = assembler.at(16)
    smallest = assembler.budget.fixed_bytes + 2 * N * PLANE_QUANTUM
    assert assembled.headers[0].bytes_per_token == smallest
    assert assembled.headers[1].bytes_per_token == assembler.budget.bytes_per_token(16) - smallest
    lost = assembled.distortion
    assert lost[0, "key"] == lost[0, "value"] == 0 < lost[1, "key"]
    for pack in assembled.packs:
        for bases in pack.bases:
            assert all(x.isfinite().all() for b in bases.values() for x in b.tensors().values())
