"""Absorb, attend and up-project as GPU kernels against the reference on the same bytes."""

import pytest
import torch

from tests.support.cases import random_codec
from tests.support.paging import attend_codes, paged_batch
from vllm_attentionpack.codec.layout import GroupLayout, LayerLayout, PlaneCounts
from vllm_attentionpack.ops import reference
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.triton import launch, prepared, warmup
from vllm_attentionpack.ops.triton.chip import Chip

CONTEXTS = [0, 1, 17, 140, 0]
FRESH = [5, 1, 1, 3, 0]

#: Operands are float16: eleven bits, of which sums over dims and tokens keep about ten.
TOLERANCE = 2e-3


def assert_close(found, wanted):
    (out, lse), (want, want_lse) = found, wanted
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    seen = ~want_lse.isneginf()
    assert seen.any()
    assert (lse - want_lse)[seen].abs().max().item() < TOLERANCE * 2
    assert (out - want).abs().max().item() < TOLERANCE * want.abs().max().item()


# (KV heads, heads per group, query heads, head size, modalities, block size, causal)
SHAPES = [
    (2, 1, 4, 64, 1, 16, True),
    (2, 2, 4, 80, 2, 32, False),
    (4, 4, 4, 96, 1, 128, True),
    (1, 1, 8, 128, 2, 64, True),
    (1, 1, 1, 256, 1, 48, False),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("joint_kv", [False, True])
def test_kernels_match_the_reference(shape, joint_kv):
    heads, group, query_heads, dims, modalities, block_size, causal = shape
    codec = random_codec(heads, group, dims, modalities, padding=3, joint_kv=joint_kv)
    case = paged_batch(codec, query_heads, CONTEXTS, FRESH, block_size)
    stops = case.seq_lens if causal else case.context_lens
    found = attend_codes(kernels, codec, case, stops, causal)
    assert_close(found, attend_codes(reference, codec, case, stops, causal))


@pytest.mark.parametrize("block_size", [16, 128])
def test_lengths_at_the_edges_of_blocks(block_size):
    """And a block table that is part of a wider one, whose other entries name no block."""
    codec = random_codec(2, 2, 64)
    contexts = [block_size - 1, block_size, 0, block_size + 1, 1, 2 * block_size - 2]
    case = paged_batch(codec, 4, contexts, [1, 1, 1, 1, 1, 2], block_size)
    wide = torch.full((len(contexts), case.block_table.shape[1] + 5), 1 << 30, dtype=torch.int32)
    wide[:, 1:-4] = case.block_table
    case.block_table = wide[:, 1:-4]
    assert not case.block_table.is_contiguous()
    for stops, causal in ((case.seq_lens, True), (case.context_lens, False)):
        found = attend_codes(kernels, codec, case, stops, causal)
        assert_close(found, attend_codes(reference, codec, case, stops, causal))


@pytest.mark.parametrize("causal", [True, False])
def test_token_ranges(causal):
    """Ranges may be empty, inverted or end below zero, and come as int64 as well."""
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, [0, 9, 40, 40, 270, 16, 33], [5, 1, 1, 3, 20, 2, 1], 16)
    starts = torch.tensor([0, 4, 0, 16, 130, 5, 33])
    margins = torch.tensor([9, 2, 0, 5, 17, 13, 1])
    stops = (case.seq_lens if causal else case.context_lens).long() - margins
    found = attend_codes(kernels, codec, case, stops, causal, starts)
    wanted = attend_codes(reference, codec, case, stops, causal, starts)
    assert wanted[1].isneginf().any()
    assert_close(found, wanted)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (PlaneCounts(n8=4), PlaneCounts(n2=16)),
        (PlaneCounts(n4=72), PlaneCounts(n4=8, n2=48)),
        (PlaneCounts(n8=36, n4=8, n2=64), PlaneCounts(n8=68, n4=24, n2=16)),
    ],
)
def test_planes_of_odd_widths(key, value):
    """Planes that are missing, narrower than a piece, or just wider; wide values too."""
    codec = random_codec(2, 2, 64, key=key, value=value)
    case = paged_batch(codec, 6, [3, 90], [1, 2], 32)
    stops = case.seq_lens
    assert_close(
        attend_codes(kernels, codec, case, stops, True),
        attend_codes(reference, codec, case, stops, True),
    )


def test_head_groups_with_different_planes():
    """One launch serves all groups of a layer, whatever planes each has."""
    wide = random_codec(1, 1, 64, key=PlaneCounts(n8=16, n4=24), value=PlaneCounts(n2=64))
    narrow = random_codec(1, 1, 64, key=PlaneCounts(n4=8), value=PlaneCounts(n8=8, n4=16), seed=1)
    counts = [codec.layout.groups[0] for codec in (wide, narrow)]
    size = sum(group.bytes_per_token for group in counts) + 1
    layout = LayerLayout(tuple(GroupLayout(c.key, c.value) for c in counts), 1, 64, size)
    bases = [
        {"key": codec.groups[0].key.basis, "value": codec.groups[0].value.basis}
        for codec in (wide, narrow)
    ]
    codec = type(wide)(layout, bases)
    case = paged_batch(codec, 4, [70, 5], [1, 1], 16)
    stops = case.seq_lens
    assert_close(
        attend_codes(kernels, codec, case, stops, True),
        attend_codes(reference, codec, case, stops, True),
    )


@pytest.mark.parametrize("runs", [True, False])
def test_tiles_of_one_modality_are_skipped_without_loss(runs):
    """Text and visual tokens in long runs, and a context of text alone, over many tiles."""
    codec = random_codec(1, 1, 32, modalities=2)
    case = paged_batch(codec, 2, [2500, 700], [1, 1], 32)
    for row, length in enumerate([2501, 701]):
        position = torch.arange(length)
        visual = ((position // 400) % 2 == 1) if runs else torch.zeros(length, dtype=torch.bool)
        slots = case.block_table[row, position // 32].long() * 32 + position % 32
        reference.store_kv(case.key[row], case.value[row], case.kv_cache, slots, visual, codec, 32)
    stops = case.seq_lens
    assert_close(
        attend_codes(kernels, codec, case, stops, True),
        attend_codes(reference, codec, case, stops, True),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_queries_in_every_dtype_and_as_a_strided_view(dtype):
    codec = random_codec(2, 2, 64)
    case = paged_batch(codec, 4, [33], [2], 16)
    joint = torch.randn(2, 4, 3 * 64).to(dtype)
    query = joint[..., 64:128]
    found = attend_codes(kernels, codec, case, case.seq_lens, True, query=query)
    wanted = attend_codes(reference, codec, case, case.seq_lens, True, query=query.float())
    assert_close(found, wanted)


def test_nothing_depends_on_bytes_that_no_token_owns():
    """Free slots, padding and invalid table entries may hold anything."""
    codec = random_codec(2, 1, 32, padding=7)
    case = paged_batch(codec, 4, [20, 33], [1, 1], 16)
    first = attend_codes(kernels, codec, case, case.seq_lens, True)
    used = torch.zeros_like(case.kv_cache, dtype=torch.bool)
    for row, length in enumerate([21, 34]):
        for token in range(length):
            block = case.block_table[row, token // 16].long()
            for plane in codec.layout.planes(16):
                at = plane.offset + token % 16 * plane.bytes_per_token
                used[block, at : at + plane.bytes_per_token] = True
    case.kv_cache[~used] = torch.randint(0, 256, (int((~used).sum()),)).to(torch.uint8)
    case.block_table[case.block_table < 0] = 1 << 30
    second = attend_codes(kernels, codec, case, case.seq_lens, True)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_more_splits_than_context_and_a_batch_sized_for_longer_requests():
    """A captured graph is sized for the longest requests: shorter ones must come out alike."""
    codec = random_codec(1, 1, 32)
    case = paged_batch(codec, 2, [5, 40], [1, 1], 16)
    found = attend_codes(kernels, codec, case, case.seq_lens, True)
    wide = QueryBatch.build(
        case.batch.host_starts, [1 << 17] * 2, case.batch.query_start_loc.device
    )
    case.batch = wide
    larger = attend_codes(kernels, codec, case, case.seq_lens, True)
    assert_close(found, attend_codes(reference, codec, case, case.seq_lens, True))
    for a, b in zip(found, larger, strict=True):
        assert (a - b).abs().max().item() < TOLERANCE


@pytest.mark.parametrize(("generation", "modalities"), [(8, 1), (9, 2), (10, 1)])
def test_every_generation_of_tensor_cores(generation, modalities, monkeypatch):
    """Planes and launches are cut for each; values here fill eight warps."""
    monkeypatch.setattr(prepared, "chip", lambda device: Chip(4, 1 << 18, generation))
    key, value = PlaneCounts(n8=36, n4=104, n2=80), PlaneCounts(n8=40, n4=152, n2=80)
    codec = random_codec(4, 4, 80, modalities, key=key, value=value, padding=5)
    case = paged_batch(codec, 8, [0, 37, 150, 0], [4, 1, 3, 0], 16)
    found = attend_codes(kernels, codec, case, case.seq_lens, True)
    assert prepared.prepare(codec).tiles["value"].columns > 256
    assert_close(found, attend_codes(reference, codec, case, case.seq_lens, True))


def test_a_small_shared_memory_halves_the_tiles(monkeypatch):
    """As beside many columns of keys on chips with less of it."""
    monkeypatch.setattr(prepared, "chip", lambda device: Chip(4, 16 << 10, 9))
    codec = random_codec(2, 2, 64)
    case = paged_batch(codec, 4, [70, 5], [1, 1], 16)
    found = attend_codes(kernels, codec, case, case.seq_lens, True)
    assert launch.attend_shape(prepared.prepare(codec), 4, case.batch).tile == 32
    assert_close(found, attend_codes(reference, codec, case, case.seq_lens, True))


def test_blocks_beyond_two_gigabytes():
    """The same bytes in blocks whose addresses exceed 31 bits; the rest is never touched."""
    codec = random_codec(1, 1, 32)
    case = paged_batch(codec, 2, [20, 33], [1, 2], 16)
    near = attend_codes(kernels, codec, case, case.seq_lens, True)
    count, size = case.kv_cache.shape
    first = (1 << 31) // size + 1
    far = torch.empty(first + count, size, dtype=torch.uint8)
    far[first:] = case.kv_cache
    case.kv_cache, case.block_table = far, case.block_table + first
    for a, b in zip(near, attend_codes(kernels, codec, case, case.seq_lens, True), strict=True):
        assert torch.equal(a, b)


def test_warming_up_is_a_step_of_nothing(monkeypatch):
    monkeypatch.setattr(warmup, "_NEW_TOKENS", (1, 20))
    kernels.warm_up(2, torch.float16, random_codec(1, 1, 32, 2), 16, 5, (4, 4, 8))
