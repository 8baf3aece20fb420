"""Encoding as a GPU kernel against the reference."""

import pytest
import torch

from tests.support.cases import latent_errors, random_codec
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.codec.quantize import decode_scale, unpack_codes
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops import reference
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.triton import prepared
from vllm_attentionpack.ops.triton.chip import Chip

BLOCK_SIZE = 16


def stored(ops, codec, key, value, slots, visual, fill=77):
    cache = torch.full((6, codec.layout.block_bytes(BLOCK_SIZE)), fill, dtype=torch.uint8)
    ops.store_kv(key, value, cache, slots, visual, codec, BLOCK_SIZE)
    return cache


def planes(codec, cache):
    for plane in codec.layout.planes(BLOCK_SIZE):
        stop = plane.offset + BLOCK_SIZE * plane.bytes_per_token
        yield plane, cache[:, plane.offset : stop].unflatten(1, (BLOCK_SIZE, -1)).flatten(0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("joint_kv", [False, True])
@pytest.mark.parametrize(
    ("shape", "visual"),
    [((2, 1, 32, 1), True), ((2, 2, 80, 2), True), ((2, 1, 64, 2), False), ((1, 1, 96, 1), False)],
)
def test_codes_match_the_reference(shape, visual, joint_kv, dtype):
    """Products are rounded elsewhere, so that a code in a hundred may fall to its neighbour."""
    heads, group, dims, modalities = shape
    codec = random_codec(heads, group, dims, modalities, padding=3, joint_kv=joint_kv)
    generator = torch.Generator().manual_seed(1)
    tokens = 70
    key, value = (torch.randn(tokens, heads, dims, generator=generator).to(dtype) for _ in range(2))
    key[5] *= 40  # an outlier token
    mask = torch.rand(tokens, generator=generator) < 0.5 if visual else None
    slots = torch.randperm(5 * BLOCK_SIZE, generator=generator)[:tokens]
    slots[[3, 9]] = -1
    wanted = stored(reference, codec, key, value, slots, mask)
    found = stored(kernels, codec, key, value, slots, mask)
    for (plane, want), (_, got) in zip(planes(codec, wanted), planes(codec, found), strict=True):
        if plane.bits == 0:
            (scale, seen), (want_scale, want_seen) = decode_scale(got), decode_scale(want)
            assert torch.equal(seen, want_seen)
            assert (scale != want_scale).float().mean().item() < 0.03
            alike = (scale == want_scale)[:, 0]
            continue
        code, want_code = unpack_codes(got, plane.bits), unpack_codes(want, plane.bits)
        assert (code != want_code).float().mean().item() < 0.03
    for (plane, want), (_, got) in zip(planes(codec, wanted), planes(codec, found), strict=True):
        if plane.bits:
            code, want_code = unpack_codes(got, plane.bits), unpack_codes(want, plane.bits)
            assert (code - want_code)[alike].abs().max().item() <= 1 or plane.kind == "key"
    end = codec.layout.content_bytes_per_token * BLOCK_SIZE
    assert (found[:, end:] == 77).all(), "padding was written to"


@pytest.mark.parametrize("joint_kv", [False, True])
def test_pairs_match_the_reference(joint_kv):
    """Both parts of a code are of one number: were they not, errors would be of 16 steps."""
    counts = PlaneCounts(n8=28, n4=16, n2=32, n12=8, n10=16)
    value = PlaneCounts(n8=8, n4=8, n12=8)
    codec = random_codec(2, 1, 64, 2, key=counts, value=value, joint_kv=joint_kv)
    generator = torch.Generator().manual_seed(1)
    key, value = (torch.randn(60, 2, 64, generator=generator) for _ in range(2))
    tokens = {"key": key, "value": value}
    visual = torch.rand(60, generator=generator) < 0.5
    slots = torch.randperm(5 * BLOCK_SIZE, generator=generator)[:60]
    caches = [stored(ops, codec, key, value, slots, visual) for ops in (reference, kernels)]
    for kinds in codec.layout.groups[0].units:
        want, got = (
            latent_errors(codec, kinds, tokens, slots, visual, cache, BLOCK_SIZE)
            for cache in caches
        )
        assert set(want) == set(getattr(codec.layout.groups[0], kinds[0]).dims_by_bits)
        for bits in want:
            assert got[bits] < (1.6 if bits == 12 else 1.04) * want[bits]


def test_padding_tokens_and_neighbours_are_left_alone():
    codec = random_codec(2, 1, 32, padding=5)
    key = torch.randn(4, 2, 32)
    cache = stored(kernels, codec, key, key, torch.tensor([-1, 18, -1, 20]), None)
    assert (cache != 77).any(1).tolist() == [False, True, False, False, False, False]
    for _, rows in planes(codec, cache):
        others = [i for i in range(BLOCK_SIZE) if i not in (2, 4)]
        assert (rows[16:32][others] == 77).all()


def test_strided_keys_and_values_as_vllm_hands_them():
    """Keys and values are views of one projection's output."""
    codec = random_codec(2, 1, 32)
    joint = torch.randn(5, 2 * 2 * 32)
    key, value = (x.unflatten(1, (2, 32)) for x in joint.chunk(2, 1))
    assert not key.is_contiguous()
    slots = torch.arange(5)
    found = stored(kernels, codec, key, value, slots, None)
    assert torch.equal(
        found, stored(kernels, codec, key.contiguous(), value.contiguous(), slots, None)
    )


def test_16_bit_planes_are_refused():
    codec = random_codec(1, 1, 32)
    identity = random_codec(1, 1, 32, key=PlaneCounts(n16=32), value=PlaneCounts(n16=32))
    assert codec.layout != identity.layout
    key = torch.randn(1, 1, 32)
    with pytest.raises(ConfigError, match="reference"):
        stored(kernels, identity, key, key, torch.zeros(1, dtype=torch.int64), None)


def test_slots_beyond_two_gigabytes():
    """Blocks whose addresses exceed 31 bits take the same bytes as the first ones."""
    codec = random_codec(1, 1, 32)
    key, value = (torch.randn(20, 1, 32) for _ in range(2))
    size = codec.layout.block_bytes(BLOCK_SIZE)
    first = (1 << 31) // size + 1
    slots = torch.arange(20)
    near, far = (torch.empty(blocks, size, dtype=torch.uint8) for blocks in (2, first + 2))
    near[:], far[first:] = 77, 77
    kernels.store_kv(key, value, near, slots, None, codec, BLOCK_SIZE)
    kernels.store_kv(key, value, far, slots + first * BLOCK_SIZE, None, codec, BLOCK_SIZE)
    assert torch.equal(far[first:], near)
    assert (near != 77).any()


@pytest.mark.parametrize("generation", [8, 9, 10])
@pytest.mark.parametrize("wide", [False, True])
def test_many_tokens_at_a_time(generation, wide, monkeypatch):
    """Programs of 16, 32 or 64 tokens by the columns of a group, the last one not full."""
    monkeypatch.setattr(prepared, "chip", lambda device: Chip(4, 1 << 18, generation))
    planes_of = {"key": PlaneCounts(n8=36, n4=56, n2=16)} if wide else {}
    codec = random_codec(1, 1, 128, 2, **planes_of)
    key, value = (torch.randn(75, 1, 128) for _ in range(2))
    visual = torch.rand(75) < 0.5
    slots = torch.randperm(6 * BLOCK_SIZE)[:75]
    wanted = stored(reference, codec, key, value, slots, visual)
    found = stored(kernels, codec, key, value, slots, visual)
    assert (found != wanted).float().mean().item() < 0.03
