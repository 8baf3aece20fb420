"""Attention by the compiled CPU kernels against dense attention, on the same bytes."""

import pytest
import torch

from tests.support.cases import random_codec
from tests.support.cpu import DTYPES, LAYOUTS, threads
from tests.support.oracle import attend
from tests.support.paging import PagedBatch, attend_codes, paged_batch
from vllm_attentionpack.codec.codec import LayerCodec, identity_codec
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.ops import QueryBatch, cpu, reference

CONTEXTS = [0, 1, 15, 16, 17, 70, 0, 300]
FRESH = [5, 1, 1, 3, 1, 20, 1, 2]
# (KV heads, heads per group, query heads, head size, modalities)
SHAPES = [(2, 1, 4, 64, 1), (2, 2, 4, 32, 2), (4, 2, 28, 32, 2), (1, 1, 9, 64, 2), (4, 4, 4, 16, 1)]


def check(codec: LayerCodec, case: PagedBatch, dtype, starts=None, stops=None, causal=True):
    """At most twice the error of PyTorch in the same dtype; float64 decides what is right."""
    case.query = case.query.to(dtype).float()
    stops = case.seq_lens if stops is None else stops
    out, lse = attend_codes(
        cpu, codec, case, stops, causal, starts=starts, query=case.query.to(dtype)
    )
    first = torch.zeros_like(stops) if starts is None else starts
    ranges = list(zip(first.tolist(), stops.tolist(), strict=True))
    want, want_lse = attend(codec, case, 0.2, ranges=ranges, causal=causal)
    plain, plain_lse = attend(codec, case, 0.2, ranges=ranges, causal=causal, dtype=dtype)
    empty = want_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert torch.isfinite(out).all()
    assert (out[empty] == 0).all()
    # Float32 noise of the maps in and out, which the plain run does not have.
    floor = 2e-5 * want.abs().max().item() + 1e-5
    assert (out - want).abs().max().item() <= 2 * (plain - want).abs().max().item() + floor
    error = (lse - want_lse)[~empty].abs().amax().item()
    assert error <= 2 * (plain_lse - want_lse)[~empty].abs().amax().item() + 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_attention_in_every_shape(isa, shape, dtype, causal):
    heads, group, query_heads, dims, modalities = shape
    codec = random_codec(heads, group, dims, modalities, padding=3)
    case = paged_batch(codec, query_heads, CONTEXTS, FRESH, 16)
    with threads(2):
        check(codec, case, dtype, None, case.seq_lens if causal else case.context_lens, causal)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_in_every_layout(isa, layout, dtype):
    codec = random_codec(2, 2, 32, 2, *LAYOUTS[layout])
    case = paged_batch(codec, 4, CONTEXTS, FRESH, 32)
    check(codec, case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_to_joint_keys_and_values(isa, layout, dtype):
    codec = random_codec(4, 2, 32, 2, LAYOUTS[layout][0], joint_kv=True)
    case = paged_batch(codec, 8, CONTEXTS, FRESH, 32)
    check(codec, case, dtype)


@pytest.mark.parametrize("counts", [(640, 0, 0), (0, 640, 0), (64, 192, 384)], ids=str)
def test_many_dims(isa, counts):
    """More steps than one segment or one chunk of registers holds."""
    n8, n4, n2 = counts
    planes = PlaneCounts(n8=n8, n4=n4, n2=n2)
    codec = random_codec(8, 8, 80, 1, planes, planes)
    case = paged_batch(codec, 16, [0, 33, 150], [1, 1, 2], 16)
    check(codec, case, torch.bfloat16)
    check(codec, case, torch.float32)


def test_overflow_of_the_largest_codes(isa):
    """Sums reach their bounds where every code and every query is at its largest."""
    n = 256
    for planes in (PlaneCounts(n8=n), PlaneCounts(n4=n), PlaneCounts(n2=n)):
        codec = random_codec(2, 2, 128, 1, planes, planes)
        case = paged_batch(codec, 4, [256], [1], 32)
        for plane in codec.layout.planes(32):
            stop = plane.offset + 32 * plane.bytes_per_token
            case.kv_cache[:, plane.offset : stop] = 255 if plane.bits else 64
        query = case.query.bfloat16()
        for group in codec.groups:
            group.key.basis.decode.fill_(0.01)
            group.value.basis.decode.fill_(0.01)
        query.fill_(1.0)
        stops = case.seq_lens
        out, lse = attend_codes(cpu, codec, case, stops, True, query=query)
        want, want_lse = attend_codes(reference, codec, case, stops, True, query=query)
        assert torch.allclose(out, want, rtol=1e-3)
        assert torch.allclose(lse, want_lse, rtol=1e-3)


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("count", [1, 2])
def test_long_contexts_split_over_threads(isa, block_size, count):
    if isa == "scalar" and block_size != 16:
        pytest.skip("one block size is enough for the slowest")
    lengths = [10_000, 0, 1, block_size - 1, block_size, block_size + 1, 700]
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 8, lengths, [1] * len(lengths), block_size)
    with threads(count):
        check(codec, case, torch.bfloat16, None, case.context_lens, causal=False)
        check(codec, case, torch.float32, None, case.context_lens, causal=False)


@pytest.mark.parametrize(
    "counts", [(12, 24, 48), (12, 48, 112), (32, 16, 128), (36, 72, 144)], ids=str
)
@pytest.mark.parametrize("modalities", [1, 2])
def test_tiles_of_neighbours(isa, counts, modalities):
    """Blocks of whole tiles, whose tokens lie one after the other unless modalities alternate.

    Four tokens of a plane fill a vector, two, or more.
    """
    n8, n4, n2 = counts
    planes = PlaneCounts(n8=n8, n4=n4, n2=n2)
    codec = random_codec(4, 4, 64, modalities, planes, planes)
    case = paged_batch(codec, 4, [300, 128], [1, 1], 256)
    check(codec, case, torch.bfloat16)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_token_ranges(isa, causal, count):
    codec = random_codec(2, 2, 32)
    contexts, fresh = [0, 9, 40, 40, 70, 16, 33, 900], [5, 1, 1, 3, 20, 2, 1, 2]
    case = paged_batch(codec, 4, contexts, fresh, 16)
    starts = torch.tensor([0, 4, 0, 16, 30, 5, 33, 270], dtype=torch.int32)
    margins = torch.tensor([9, 2, 0, 5, 17, 13, 1, 3], dtype=torch.int32)
    stops = (case.seq_lens if causal else case.context_lens) - margins
    with threads(count):
        check(codec, case, torch.bfloat16, starts, stops, causal)


@pytest.mark.parametrize("spread", [0.0, 40.0])
def test_flat_and_peaked_attention(isa, spread):
    """Weights of one size, and one token that takes nearly all: both ways to round weights."""
    key, value = PlaneCounts(n8=8, n4=8, n2=16), PlaneCounts(n8=4, n4=8, n2=48)
    codec = random_codec(2, 2, 32, 2, key, value)
    case = paged_batch(codec, 8, [600, 40], [1, 1], 16)
    case.query *= spread
    check(codec, case, torch.bfloat16)
    check(codec, case, torch.float16)


def test_prefill_over_a_long_context(isa):
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, [500, 30, 0], [130, 1, 40], 16)
    with threads(2):
        check(codec, case, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_identity_codec_with_nan_in_unused_slots(isa, dtype):
    """Every slot that no request uses holds NaN, in blocks of its own and in half-filled ones."""
    codec = identity_codec(2, 32, 2)
    case = paged_batch(codec, 4, [17, 40], [1, 2], 16)
    case.key, case.value = ([x.bfloat16().float() for x in xs] for xs in (case.key, case.value))
    nan = torch.full((1,), float("nan"), dtype=torch.bfloat16).view(torch.uint8)
    used = torch.zeros(case.kv_cache.shape[0] * 16, dtype=torch.bool)
    for row, length in enumerate(case.seq_lens.tolist()):
        position = torch.arange(length)
        used[case.block_table[row, position // 16].long() * 16 + position % 16] = True
    unused = ~used.view(-1, 16)
    for plane in codec.layout.planes(16):
        stop = plane.offset + 16 * plane.bytes_per_token
        rows = case.kv_cache[:, plane.offset : stop].unflatten(1, (16, -1))
        rows[unused] = nan.repeat(plane.bytes_per_token // 2) if plane.bits else 255
    assert unused.sum() > 16
    check(codec, case, dtype)


def test_views_that_are_not_contiguous(isa):
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, [40, 70], [1, 3], 16)
    query = case.query.bfloat16()
    want = attend_codes(cpu, codec, case, case.seq_lens, True, query=query)
    wide = torch.randint(0, 256, (case.kv_cache.shape[0], case.kv_cache.shape[1] + 16))
    wide = wide.to(torch.uint8)
    wide[:, : case.kv_cache.shape[1]] = case.kv_cache
    case.kv_cache = wide[:, : case.kv_cache.shape[1]]
    table = torch.full((2, 2 * case.block_table.shape[1]), -7, dtype=torch.int32)
    table[:, ::2] = case.block_table
    case.block_table = table[:, ::2]
    stops = case.seq_lens.repeat_interleave(2)[::2]
    spread = torch.zeros(query.shape[0], 4, 64, dtype=query.dtype)
    spread[..., ::2] = query
    got = attend_codes(cpu, codec, case, stops, True, query=spread[..., ::2])
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_no_request_at_all(isa):
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, [40], [1], 16)
    case.batch = QueryBatch.build([0], [], torch.device("cpu"))
    nothing = torch.zeros(0, dtype=torch.int32)
    case.block_table = case.block_table[:0]
    out, lse = attend_codes(cpu, codec, case, nothing, True, query=case.query[:0])
    assert out.shape == (0, 4, 32) and lse.shape == (0, 4)
