"""Byte arithmetic: no overlap, no gap, every byte counted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_attentionpack.codec.layout import (
    GroupLayout,
    LayerLayout,
    PlaneCounts,
    compression_ratio,
)

counts = st.builds(
    PlaneCounts,
    n8=st.integers(0, 7).map(lambda n: 4 * n),
    n4=st.integers(0, 4).map(lambda n: 8 * n),
    n2=st.integers(0, 4).map(lambda n: 16 * n),
)
groups = st.lists(st.builds(GroupLayout, counts, counts), min_size=1, max_size=5).map(tuple)
joint_groups = st.lists(
    counts.map(lambda both: GroupLayout(both, both, joint_kv=True)), min_size=1, max_size=5
).map(tuple)


@given(groups, st.sampled_from([16, 32, 48, 128]), st.integers(0, 7))
def test_planes_tile_the_block_without_overlap_or_gap(groups, block_size, padding):
    content = sum(group.bytes_per_token for group in groups)
    layout = LayerLayout(groups, 2, 64, content + padding)
    offset = 0
    for plane in layout.planes(block_size):
        assert plane.offset == offset
        assert plane.offset % 16 == 0
        assert plane.bytes_per_token == (plane.bits * plane.dims // 8 if plane.bits else 1)
        offset += plane.bytes_per_token * block_size
    assert offset == block_size * content
    assert layout.block_bytes(block_size) == offset + padding * block_size
    coded = sum(p.dims for p in layout.planes(block_size) if p.bits)
    assert coded == sum(g.key.num_columns + g.value.num_columns for g in groups)


@given(joint_groups, st.sampled_from([16, 48]), st.integers(0, 7))
def test_joint_keys_and_values_have_the_same_planes(groups, block_size, padding):
    content = sum(group.bytes_per_token for group in groups)
    assert content == sum(group.key.bytes_per_token + 1 for group in groups)
    layout = LayerLayout(groups, 2, 64, content + padding)
    keys, values = (
        [
            (plane.group, plane.bits, plane.dims, plane.bytes_per_token, plane.offset)
            for plane in layout.planes(block_size)
            if plane.kind == kind
        ]
        for kind in ("key", "value")
    )
    assert keys == values
    offset = 0
    for *_, width, at in keys:
        assert at == offset
        offset += width * block_size
    assert offset == block_size * content


def test_joint_groups_of_other_kinds_are_refused():
    key, value = PlaneCounts(n8=16), PlaneCounts(n8=12)
    with pytest.raises(ValueError, match="same planes"):
        GroupLayout(key, value, joint_kv=True)
    with pytest.raises(ValueError, match="some head groups"):
        LayerLayout((GroupLayout(key, key, joint_kv=True), GroupLayout(key, key)), 1, 64, 99)


def test_a_rank_of_joint_keys_and_values_may_be_that_of_both():
    both = PlaneCounts(n8=32)
    assert LayerLayout((GroupLayout(both, both, joint_kv=True),), 1, 16, 33).coded_dims == 32
    with pytest.raises(ValueError, match="exceeds the 16 dims"):
        LayerLayout((GroupLayout(both, both),), 1, 16, 66)


def test_ratio_counts_scales_and_padding():
    group = GroupLayout(PlaneCounts(n8=16, n4=16), PlaneCounts(n4=32, n2=16))
    assert group.bytes_per_token == (16 + 8) + (16 + 4) + 2
    layout = LayerLayout((group,), 2, 64, group.bytes_per_token + 18)
    assert layout.dense_bytes_per_token == 2 * 2 * 64 * 2
    assert layout.compression_ratio == 512 / 64
    other = LayerLayout((group,), 2, 64, 128)
    assert compression_ratio([layout, other]) == 1024 / 192


@pytest.mark.parametrize("arguments", [{"n8": 3}, {"n4": 4}, {"n2": 8}, {"n8": -4}])
def test_planes_that_are_not_whole_words_are_refused(arguments):
    with pytest.raises(ValueError, match="multiple of"):
        PlaneCounts(**arguments)


def test_columns_of_pairs():
    """High parts first in the plane of 8 bits, low parts last in theirs, dims in one order."""
    counts = PlaneCounts(n8=8, n4=16, n2=16, n12=3, n10=2)
    assert (counts.num_columns, counts.rank) == (40, 35)
    assert counts.dims_by_bits == {12: 3, 10: 2, 8: 3, 4: 13, 2: 14}
    columns = counts.columns
    assert [c.bits for c in columns] == [8] * 8 + [4] * 16 + [2] * 16
    assert [c.dim for c in columns[:8]] == list(range(8))
    assert [c.dim for c in columns[8:24]] == [*range(8, 21), 0, 1, 2]
    assert [c.dim for c in columns[24:]] == [*range(21, 35), 3, 4]
    assert [(c.code_bits, c.shift) for c in columns[:6]] == [(12, 4)] * 3 + [(10, 2)] * 2 + [(8, 0)]
    assert {c.dim for c in columns if c.low} == set(range(5))
    for dim in range(5):
        parts = [c for c in columns if c.dim == dim]
        assert sum(c.bits for c in parts) == parts[0].code_bits


@pytest.mark.parametrize("pairs", [{"n12": 9}, {"n12": 4, "n10": 5}, {"n10": -1}, {"n8": 0}])
def test_pairs_without_their_parts_are_refused(pairs):
    with pytest.raises(ValueError, match="of 10 want as many codes of 8"):
        PlaneCounts(**{"n8": 8, "n4": 8, "n2": 16, "n12": 4} | pairs)


def test_sixteen_bit_planes_stand_alone():
    with pytest.raises(ValueError, match="mixed"):
        PlaneCounts(n16=16, n8=4)


def test_size_below_the_content_is_refused():
    group = GroupLayout(PlaneCounts(n8=16), PlaneCounts(n8=16))
    with pytest.raises(ValueError, match="cannot hold"):
        LayerLayout((group,), 1, 64, group.bytes_per_token - 1)


@pytest.mark.parametrize("block_size", [0, -16, 8, 24])
def test_block_sizes_that_break_alignment_are_refused(block_size):
    group = GroupLayout(PlaneCounts(n8=16), PlaneCounts(n8=16))
    with pytest.raises(ValueError, match="multiple of 16"):
        LayerLayout((group,), 1, 64, group.bytes_per_token).block_bytes(block_size)
