"""Tensor parallelism: the shards of a pack are the pack."""

from functools import cache

import pytest
import torch
from torch import Tensor

from tests.support.cases import fitted_basis, gaussian, joint_bases
from tests.support.oracle import reconstruct
from tests.support.packs import pack_of
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import KINDS, GroupLayout, LayerLayout, PlaneCounts
from vllm_attentionpack.errors import PackMismatchError
from vllm_attentionpack.packfile import Fingerprint, Pack
from vllm_attentionpack.packfile.shard import check_shardable, shard_codec, shard_layout

HEAD_SIZE = 32
BLOCK_SIZE = 32
PADDING = 5
#: Degrees that divide the head groups: 8, then 4, then 2, then 1 of them.
DEGREES = {1: (1, 2, 4, 8), 2: (1, 2, 4), 4: (1, 2), 8: (1,)}
CASES = [(g, tp) for g, degrees in DEGREES.items() for tp in degrees]


def counts(number: int) -> PlaneCounts:
    """Different planes for every group, so that a wrong group or a wrong size shows."""
    return PlaneCounts(n8=4 * (1 + number % 3), n4=8 * (number % 2), n2=16 * (number == 3))


def uneven_codec(heads_per_group: int, seed: int, joint_kv: bool) -> LayerCodec:
    """Eight KV heads; no two neighbouring groups have the same bytes."""
    generator = torch.Generator().manual_seed(seed)
    dims = heads_per_group * HEAD_SIZE
    groups, bases = [], []
    for g in range(8 // heads_per_group):
        planes = {"key": counts(g + 1), "value": counts(g + 1 if joint_kv else g)}
        of = 2 * dims if joint_kv else dims
        data = torch.stack([gaussian(2 * of, of, 0.05, generator) for _ in range(2)])
        groups.append(GroupLayout(**planes, joint_kv=joint_kv))
        bases.append(
            joint_bases(data, planes["key"], heads_per_group)
            if joint_kv
            else {kind: fitted_basis(data, planes[kind], heads_per_group) for kind in KINDS}
        )
    size = sum(group.bytes_per_token for group in groups) + PADDING
    return LayerCodec(LayerLayout(tuple(groups), heads_per_group, HEAD_SIZE, size), bases)


@cache
def uneven_pack(heads_per_group: int, joint_kv: bool = False) -> Pack:
    fingerprint = Fingerprint(
        architecture="Test",
        num_layers=2,
        num_query_heads=16,
        num_kv_heads=8,
        head_size=HEAD_SIZE,
        rope="{}",
    )
    return pack_of(lambda i: uneven_codec(heads_per_group, i, joint_kv), fingerprint, ["a", "b"])


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(6, 8, HEAD_SIZE, generator=generator), torch.arange(6) % 3 == 0


@pytest.mark.parametrize(("heads_per_group", "tp_size"), CASES)
@pytest.mark.parametrize("joint_kv", [False, True])
def test_shards_reconstruct_to_the_whole(heads_per_group, tp_size, joint_kv):
    pack = uneven_pack(heads_per_group, joint_kv)
    x, visual = tokens()
    check_shardable(pack.header, tp_size)
    for layer in range(2):
        shards = [shard_codec(pack, layer, tp_size, rank) for rank in range(tp_size)]
        assert [s.layout.num_kv_heads for s in shards] == [8 // tp_size] * tp_size
        parts = [
            reconstruct(shard, heads, heads.flip(0), visual)
            for shard, heads in zip(shards, x.chunk(tp_size, dim=1), strict=True)
        ]
        wholes = reconstruct(pack.codec(layer), x, x.flip(0), visual)
        for of_kind, whole in zip(zip(*parts, strict=True), wholes, strict=True):
            assert whole.std() > 0.1  # not all groups are dropped
            torch.testing.assert_close(torch.cat(of_kind, dim=1), whole, rtol=0, atol=0)


@pytest.mark.parametrize(("heads_per_group", "tp_size"), CASES)
def test_pages_of_all_ranks_are_equal_and_hold_the_largest(heads_per_group, tp_size):
    layout = uneven_pack(heads_per_group).header.layouts()[0]
    shards = [shard_layout(layout, tp_size, rank) for rank in range(tp_size)]
    contents = [shard.content_bytes_per_token for shard in shards]
    (page,) = {shard.block_bytes(BLOCK_SIZE) for shard in shards}
    largest = max(contents) + (PADDING if tp_size == 1 else 0)
    assert page == BLOCK_SIZE * largest
    assert sum(contents) == layout.content_bytes_per_token
    for shard in shards:
        last = shard.planes(BLOCK_SIZE)[-1]
        assert last.offset + last.bytes_per_token * BLOCK_SIZE <= page


def test_the_cases_have_ranks_of_unequal_content():
    layout = uneven_pack(1).header.layouts()[0]
    assert len({shard_layout(layout, 4, r).content_bytes_per_token for r in range(4)}) > 1


def test_one_rank_gets_the_layout_as_it_is():
    layout = uneven_pack(2).header.layouts()[1]
    assert shard_layout(layout, 1, 0) == layout


@pytest.mark.parametrize(
    ("heads_per_group", "tp_size"),
    [(g, tp) for g, allowed in DEGREES.items() for tp in (*range(2, 9), 16) if tp not in allowed],
)
def test_degrees_that_split_a_head_group_are_refused(heads_per_group, tp_size):
    header = uneven_pack(heads_per_group).header
    with pytest.raises(PackMismatchError) as caught:
        check_shardable(header, tp_size)
    message = str(caught.value)
    assert f"tensor_parallel_size is {tp_size}," in message
    assert f"codes {heads_per_group} KV heads jointly" in message
    assert f"makes {8 // heads_per_group} head group(s)" in message
    assert f"allowed degrees are {list(DEGREES[heads_per_group])}" in message
    assert "Calibrate with a smaller --group-size" in message
