"""The streaming accumulator against moments computed in one go from plain tensors."""

import pytest
import torch

from vllm_attentionpack.calibrate.moments import MomentAccumulator, auto_group_size
from vllm_attentionpack.codec.positions import Anchors, Rotary, pre_rope_planes

HQ, HK, D, G, T = 6, 4, 16, 2, 200
N = HK // G
ROTARY = Rotary(torch.tensor([1.0, 0.3, 0.1, 0.02], dtype=torch.float64))
POSITIONS = torch.arange(T) * 3 + 5


def tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # means far from zero, heads that depend on each other
    mix = torch.randn(HK * D, HK * D, generator=generator)
    query = torch.randn(T, HQ, D, generator=generator) + 1
    key = (torch.randn(T, HK * D, generator=generator) @ mix).view(T, HK, D) + 3
    value = (torch.randn(T, HK * D, generator=generator) @ mix.T).view(T, HK, D) - 2
    return query, key, value


def visual_mask() -> torch.Tensor:
    return torch.arange(T) % 3 == 1


def accumulate(
    rotary: Rotary | None, *sizes: int, visual: torch.Tensor | None, joint_kv: bool = False
) -> MomentAccumulator:
    """Adds the same tokens in pieces of `sizes`."""
    query, key, value = tokens(0)
    if rotary is not None:
        query, key = rotary.turn(query, POSITIONS), rotary.turn(key, POSITIONS)
    moments = MomentAccumulator(HQ, HK, D, G, rotary, joint_kv)
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        moments.add(
            query[part],
            key[part],
            value[part],
            None if rotary is None else POSITIONS[part],
            None if visual is None else visual[part],
        )
        start += size
    assert start == T
    return moments


def expected_group(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = x.double().view(len(x), N, G * D)
    return torch.einsum("tna,tnb->nab", grouped, grouped) / len(x), grouped.mean(0)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sizes", [(T,), (1, 99, 100), (7, 64, 29, 100)])
def test_two_modalities_equal_direct_computation(sizes: tuple[int, ...]) -> None:
    query, key, value = tokens(0)
    visual = visual_mask()
    result = accumulate(None, *sizes, visual=visual).finalize(64, 2)
    assert result.count.tolist() == [int((~visual).sum()), int(visual.sum())]
    for m, chosen in enumerate((~visual, visual)):
        for moments, x in ((result.key, key), (result.value, value)):
            second, mean = expected_group(x[chosen])
            close(moments.second[m], second)
            close(moments.mean[m], mean)
    q = query.double()
    close(result.query, torch.einsum("tha,thb->hab", q, q) / T)


def test_pooling_modalities_equals_never_parting_them() -> None:
    pooled = accumulate(ROTARY, 150, 50, visual=visual_mask()).finalize(1000, 1)
    plain = accumulate(ROTARY, 150, 50, visual=None).finalize(1000, 1)
    assert pooled.count.tolist() == plain.count.tolist() == [T]
    close(pooled.key.second, plain.key.second)
    close(pooled.value.mean, plain.value.mean)


def test_rotated_moments_are_those_of_every_position_alike() -> None:
    """Turned back by their own positions and averaged, instead of taken where they stood."""
    query, key, value = tokens(0)
    num_positions = 37
    result = accumulate(ROTARY, 100, 100, visual=None).finalize(num_positions, 1)
    everywhere_key = torch.cat(
        [ROTARY.turn(key, torch.full((T,), n)) for n in range(num_positions)]
    )
    second, mean = expected_group(everywhere_key)
    close(result.key.second[0], second)
    close(result.key.mean[0], mean)
    everywhere_query = torch.cat(
        [ROTARY.turn(query, torch.full((T,), n)) for n in range(num_positions)]
    ).double()
    close(
        result.query,
        torch.einsum("tha,thb->hab", everywhere_query, everywhere_query) / len(everywhere_query),
    )
    second, mean = expected_group(value)  # values do not turn
    close(result.value.second[0], second)
    close(result.value.mean[0], mean)


def test_keys_may_be_averaged_over_fewer_positions_than_queries() -> None:
    near, far = (accumulate(ROTARY, 100, 100, visual=None).finalize(n, 1) for n in (37, 1000))
    moments = accumulate(ROTARY, 100, 100, visual=None)
    anchored = moments.finalize(1000, 1, moments.anchors(37, 1000))
    close(anchored.key.second, near.key.second)
    close(anchored.key.mean, near.key.mean)
    close(anchored.query, far.query)
    assert not torch.allclose(anchored.key.second, far.key.second)


def test_planes_coded_pre_rope_stay_as_at_position_0() -> None:
    """And the others are averaged over one span, what they have in common included."""
    key = tokens(0)[1]
    span, planes = 37, 2
    moments = accumulate(ROTARY, 100, 100, visual=None)
    anchors = Anchors(ROTARY, span, planes)
    result = moments.finalize(1000, 1, anchors)
    turns = []
    for n in range(span):
        cos, sin = ROTARY.tables(torch.full((T,), n))
        cos[:, :planes], sin[:, :planes] = 1, 0
        turns.append(ROTARY.turn_by(key, cos, sin))
    second, mean = expected_group(torch.cat(turns))
    close(result.key.second[0], second)
    close(result.key.mean[0], mean)


@pytest.mark.parametrize("planes", [0, 2])
def test_joint_moments_hold_what_keys_and_values_have_in_common(planes: int) -> None:
    """Of keys at every position of a span, values where they are."""
    span = 37
    moments = accumulate(ROTARY, 100, 100, visual=visual_mask(), joint_kv=True)
    anchors = Anchors(ROTARY, span, planes)
    result = moments.finalize(1000, 2, anchors)
    apart = accumulate(ROTARY, 100, 100, visual=visual_mask()).finalize(1000, 2, anchors)
    joint = result.joint_kv
    assert joint is not None and apart.joint_kv is None
    for name in ("key", "value"):
        close(getattr(result, name).second, getattr(apart, name).second)
        close(getattr(result, name).mean, getattr(apart, name).mean)
    close(result.query, apart.query)
    _, key, value = tokens(0)
    for m, chosen in enumerate((~visual_mask(), visual_mask())):
        pairs = []
        for n in range(span):
            cos, sin = ROTARY.tables(torch.full((T,), n))
            cos[:, :planes], sin[:, :planes] = 1, 0
            grouped = ROTARY.turn_by(key, cos, sin).view(T, N, G * D), value.view(T, N, G * D)
            pairs.append(torch.cat(grouped, -1)[chosen].double())
        both = torch.cat(pairs)
        close(joint.second[m], torch.einsum("tna,tnb->nab", both, both) / len(both))
        close(joint.mean[m], both.mean(0))


def test_which_planes_are_coded_pre_rope() -> None:
    """Those that turn by more than a few radians within a span; none of a layer without RoPE."""
    rotary = Rotary(2.0 ** -torch.arange(10, dtype=torch.float64))
    assert pre_rope_planes(rotary, 64, 8) == 3  # 64, 32, 16 radians; then 8
    assert pre_rope_planes(rotary, 4, 8) == 0
    assert pre_rope_planes(rotary, 64, 4) == 4
    moments = MomentAccumulator(1, 1, 20, 1, rotary)
    assert moments.anchors(64, 1000, pre_rope_turn=8) == Anchors(rotary, 64, 3)
    assert moments.anchors(64, 1000) == Anchors(rotary, 64)
    # One span holds all: its anchor is position 0, but those planes turn far within it.
    assert moments.anchors(64, 16, pre_rope_turn=8) == Anchors(rotary, 64, 1)
    assert moments.anchors(64, 16) is None
    assert moments.anchors(0, 1000, pre_rope_turn=8) is None
    assert MomentAccumulator(1, 1, 20, 1, None).anchors(64, 1000, pre_rope_turn=8) is None


def test_visual_tokens_alone_are_one_modality() -> None:
    moments = accumulate(None, T, visual=torch.ones(T, dtype=torch.bool))
    assert moments.count.tolist() == [0, T]
    result = moments.finalize(1, 1)
    close(result.key.mean[0], expected_group(tokens(0)[1])[1])


@pytest.mark.parametrize(
    ("heads", "size", "expected"),
    [(8, 128, 8), (32, 128, 8), (2, 64, 2), (12, 128, 6), (7, 128, 7), (1, 2048, 1), (10, 256, 2)],
)
def test_auto_group_size_divides_and_stays_below_1024_dims(
    heads: int, size: int, expected: int
) -> None:
    assert auto_group_size(heads, size) == expected
    assert auto_group_size(heads, size, size) == 1
