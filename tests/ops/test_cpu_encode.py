"""Encoding and decoding by the compiled CPU kernels against the reference ops."""

import pytest
import torch

from tests.support.cases import latent_errors, random_codec
from tests.support.cpu import DTYPES, LAYOUTS
from tests.support.paging import paged_batch
from vllm_attentionpack.codec.codec import identity_codec
from vllm_attentionpack.ops import cpu, reference


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joint_kv", [False, True])
def test_store_writes_the_bytes_of_the_reference(isa, layout, modalities, dtype, joint_kv):
    padding = 0 if joint_kv else 5
    codec = random_codec(4, 2, 32, modalities, *LAYOUTS[layout], padding=padding, joint_kv=joint_kv)
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 70, 4, 32, generator=generator).to(dtype)
    slots = torch.randperm(6 * 16, generator=generator)[:70]
    slots[::9] = -1
    for visual in (None, torch.rand(70, generator=generator) < 0.5):
        caches = [torch.full((6, codec.layout.block_bytes(16)), 77).to(torch.uint8)] * 2
        caches = [cache.clone() for cache in caches]
        for ops, cache in zip((reference, cpu), caches, strict=True):
            ops.store_kv(key, value, cache, slots, visual, codec, 16)
        assert (caches[1] == 77).float().mean().item() < 0.5
        if dtype != torch.bfloat16:
            # A latent at the edge between two codes may fall on either side.
            assert (caches[0] != caches[1]).float().mean().item() < 1e-3
            continue
        # Products of 13 bits move more latents over an edge, where both sides are as good: codes
        # lose what they did at every width, but for a little; those of 12 bits half as much again.
        tokens = {"key": key, "value": value}
        for kinds in codec.layout.groups[0].units:
            want, got = (latent_errors(codec, kinds, tokens, slots, visual, c, 16) for c in caches)
            close = 1.04 if getattr(codec.layout.groups[0], kinds[0]).pairs else 1.03
            for bits in want:
                assert got[bits] < (1.6 if bits == 12 else close) * want[bits]


def test_store_of_views_and_of_16_bit_planes(isa):
    codec = identity_codec(2, 32, 2)
    key, value = torch.randn(2, 20, 4, 32)
    key, value = key[:, ::2], value[:, ::2]
    slots = torch.arange(40)[::2]
    caches = [torch.zeros(3, codec.layout.block_bytes(16), dtype=torch.uint8) for _ in range(2)]
    for ops, cache in zip((reference, cpu), caches, strict=True):
        ops.store_kv(key, value, cache, slots, None, codec, 16)
    assert torch.equal(*caches)


def test_scales_at_both_ends(isa):
    """Tokens far too small and far too large for a scale byte, and zeros."""
    codec = random_codec(2, 2, 32)
    key = torch.randn(6, 2, 32) * torch.tensor([0, 1e-30, 1e-6, 1, 1e6, 1e30])[:, None, None]
    caches = [torch.zeros(1, codec.layout.block_bytes(16), dtype=torch.uint8) for _ in range(2)]
    for ops, cache in zip((reference, cpu), caches, strict=True):
        ops.store_kv(key, key, cache, torch.arange(6), None, codec, 16)
    assert (caches[0] != caches[1]).float().mean().item() < 1e-3


@pytest.mark.parametrize("name", [*LAYOUTS, "identity", "joint"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decompression(isa, name, dtype):
    """Blocks in any order, garbage in unused slots, and a last block that is not full."""
    if name == "identity":
        codec = identity_codec(2, 32)
    elif name == "joint":
        codec = random_codec(2, 2, 32, 2, joint_kv=True)
    else:
        codec = random_codec(2, 2, 32, 2, *LAYOUTS[name])
    case = paged_batch(codec, 4, [0, 1, 15, 16, 17, 70], [1] * 6, 16)
    for row, tokens in enumerate(case.contexts):
        args = (case.kv_cache, case.block_table[row], tokens, codec, 16)
        want = reference.decompress(*args, torch.float32)
        found = cpu.decompress(*args, dtype)
        for x, y in zip(found, want, strict=True):
            assert x.dtype == dtype and x.shape == y.shape == (tokens, 2, 32)
            if tokens:
                # bfloat16: latents, the basis and the result are rounded.
                tolerance = {torch.bfloat16: 0.02, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
                exact = name == "identity" and dtype == torch.bfloat16
                assert (x - y).abs().max() <= (0 if exact else tolerance * y.abs().max())
