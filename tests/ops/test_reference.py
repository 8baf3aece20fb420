"""The reference ops against dense attention on what the codes stand for."""

import itertools

import pytest
import torch

from tests.support.cases import random_codec
from tests.support.oracle import attend, fresh_tokens
from tests.support.paging import attend_codes, paged_batch
from vllm_attentionpack.codec.codec import identity_codec
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.ops import (
    QueryBatch,
    absorb_query,
    fresh_attention,
    merge_attention,
    paged_attention,
    reference,
    store_kv,
    up_project,
)

CONTEXTS = [0, 1, 15, 16, 17, 70, 0]
FRESH = [5, 1, 1, 3, 1, 20, 1]

# (KV heads, heads per group, query heads, head size, modalities)
SHAPES = [(2, 1, 4, 32, 1), (2, 2, 4, 32, 2), (4, 2, 4, 64, 2), (1, 1, 8, 64, 2), (3, 3, 6, 16, 1)]


def small_codec(heads, group, dims, modalities, joint_kv=False):
    key = PlaneCounts(n8=4, n4=8, n2=0) if group * dims < 32 else None
    value = PlaneCounts(n8=8, n4=0, n2=0) if group * dims < 32 else None
    return random_codec(heads, group, dims, modalities, key, value, padding=3, joint_kv=joint_kv)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("exact_fresh", [True, False])
@pytest.mark.parametrize("joint_kv", [False, True])
def test_ops_match_the_oracle(shape, block_size, exact_fresh, joint_kv):
    heads, group, query_heads, dims, modalities = shape
    codec = small_codec(heads, group, dims, modalities, joint_kv)
    case = paged_batch(codec, query_heads, CONTEXTS, FRESH, block_size)
    scale = dims**-0.5
    absorbed = absorb_query(case.query, codec, scale)
    attended = paged_attention(
        absorbed,
        case.kv_cache,
        case.block_table,
        None,
        case.context_lens if exact_fresh else case.seq_lens,
        case.batch,
        codec,
        block_size,
        causal=not exact_fresh,
    )
    out, lse = up_project(attended, codec), attended.lse
    if exact_fresh:
        fresh, fresh_lse = fresh_attention(
            case.query, case.fresh_key(), case.fresh_value(), case.batch, scale
        )
        out, lse = merge_attention((fresh, fresh_lse), (out, lse))
    want, want_lse = attend(codec, case, scale, fresh_tokens(case) if exact_fresh else None)
    assert (out - want).abs().max().item() < 2e-5 * want.abs().max().item() + 1e-5
    assert (lse - want_lse).abs().max().item() < 1e-4


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block_size", [16, 32])
def test_token_ranges(causal, block_size):
    """Each request sees a range of its own; ranges may be empty, inverted or end below zero."""
    codec = random_codec(2, 2, 32)
    contexts, fresh = [0, 9, 40, 40, 70, 16, 33], [5, 1, 1, 3, 20, 2, 1]
    case = paged_batch(codec, 4, contexts, fresh, block_size)
    starts = torch.tensor([0, 4, 0, 16, 30, 5, 33], dtype=torch.int32)
    margins = torch.tensor([9, 2, 0, 5, 17, 13, 1], dtype=torch.int32)
    stops = (case.seq_lens if causal else case.context_lens) - margins
    out, lse = attend_codes(reference, codec, case, stops, causal, starts)
    want, want_lse = attend(
        codec,
        case,
        0.2,
        ranges=list(zip(starts.tolist(), stops.tolist(), strict=True)),
        causal=causal,
    )
    assert torch.equal(lse.isneginf(), want_lse.isneginf())
    assert want_lse.isneginf().any() and not want_lse.isneginf().all()
    seen = ~want_lse.isneginf()
    assert (out - want).abs().max().item() < 2e-5 * want.abs().max().item() + 1e-5
    assert (lse - want_lse)[seen].abs().max().item() < 1e-4


def test_no_context_leaves_no_weight():
    codec = random_codec(2, 1, 32)
    case = paged_batch(codec, 4, [0, 0], [3, 1], 16)
    attended = paged_attention(
        absorb_query(case.query, codec, 1.0),
        case.kv_cache,
        case.block_table,
        None,
        torch.zeros(2, dtype=torch.int32),
        case.batch,
        codec,
        16,
        causal=False,
    )
    assert attended.lse.isneginf().all()
    assert up_project(attended, codec).abs().max().item() == 0.0


def test_garbage_in_float_planes_of_unused_slots_does_not_leak():
    codec = identity_codec(2, 32)
    case = paged_batch(codec, 4, [17], [1], 16)
    used = case.block_table[0, 1].item()
    nan = torch.full((1,), float("nan"), dtype=torch.bfloat16).view(torch.uint8)
    for plane in codec.layout.planes(16):
        if plane.bits == 16:  # slots 2.. of the last block are unused
            stop = plane.offset + 16 * plane.bytes_per_token
            rows = case.kv_cache[used, plane.offset : stop].view(16, -1)
            rows[2:] = nan.repeat(plane.bytes_per_token // 2)
    attended = paged_attention(
        absorb_query(case.query, codec, 0.2),
        case.kv_cache,
        case.block_table,
        None,
        case.seq_lens,
        case.batch,
        codec,
        16,
        causal=True,
    )
    assert torch.isfinite(up_project(attended, codec)).all()


@pytest.mark.parametrize("constant", [0.5, -30.0])
def test_a_constant_added_to_every_key_changes_no_output(constant):
    """The mean is not stored: shifted keys with a shifted basis mean give the same bytes."""
    codec = random_codec(2, 2, 32, modalities=1)
    shifted = random_codec(2, 2, 32, modalities=1)
    basis = shifted.groups[0].key.basis
    basis.mean.add_(constant)
    case = paged_batch(codec, 4, [40], [2], 16)
    outputs, caches = [], []
    for current, offset in ((codec, 0.0), (shifted, constant)):
        cache = torch.zeros_like(case.kv_cache)
        position = torch.arange(42)
        slots = case.block_table[0, position // 16].long() * 16 + position % 16
        store_kv(case.key[0] + offset, case.value[0], cache, slots, None, current, 16)
        attended = paged_attention(
            absorb_query(case.query, current, 0.2),
            cache,
            case.block_table,
            None,
            case.seq_lens,
            case.batch,
            current,
            16,
            causal=True,
        )
        outputs.append(up_project(attended, current))
        caches.append(cache)
    assert (caches[0] != caches[1]).float().mean().item() < 1e-3  # rounding of the addition only
    assert torch.allclose(outputs[0], outputs[1], atol=2e-3)


def test_store_skips_padding_and_leaves_other_bytes_alone():
    codec = random_codec(2, 1, 32, padding=5)
    cache = torch.full((3, codec.layout.block_bytes(16)), 77, dtype=torch.uint8)
    before = cache.clone()
    key = torch.randn(4, 2, 32)
    store_kv(key, key, cache, torch.tensor([-1, 18, -1, 20]), None, codec, 16)
    changed = (cache != before).any(1)
    assert changed.tolist() == [False, True, False]
    for plane in codec.layout.planes(16):
        stop = plane.offset + 16 * plane.bytes_per_token
        rows = cache[1, plane.offset : stop].view(16, -1)
        untouched = [i for i in range(16) if i not in (2, 4)]
        assert (rows[untouched] == 77).all()
    padding = cache[1, codec.layout.content_bytes_per_token * 16 :]
    assert (padding == 77).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fresh_attention_in_every_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    starts = [0, 1, 1, 8, 20]  # one empty request
    batch = QueryBatch.build(starts, [1, 0, 7, 12], torch.device("cpu"))
    assert sum(s.tokens.numel() for s in batch.segments) == batch.num_tokens == 20
    query, key, value = (torch.randn(20, h, 32, generator=generator).to(dtype) for h in (6, 2, 2))
    out, lse = fresh_attention(query, key, value, batch, 0.3)
    for start, stop in itertools.pairwise(starts):
        q, k, v = (x[start:stop].double() for x in (query, key, value))
        k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
        logits = torch.einsum("qhd,khd->hqk", q, k) * 0.3
        length = stop - start
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        want = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        if length:
            assert (out[start:stop].double() - want).abs().max().item() < tolerance
            assert torch.allclose(lse[start:stop].double(), logits.logsumexp(-1).T, atol=tolerance)
