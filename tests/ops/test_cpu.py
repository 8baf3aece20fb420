"""The compiled CPU kernels against dense attention and the reference ops, on the same bytes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.cases import random_codec
from tests.support.cpu import INSTRUCTION_SETS, instruction_set, threads
from tests.support.oracle import attend
from tests.support.paging import PagedBatch, attend_codes, paged_batch
from vllm_attentionpack.codec.codec import LayerCodec, identity_codec
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.ops import QueryBatch, cpu, reference
from vllm_attentionpack.ops.cpu import library
from vllm_attentionpack.ops.cpu.maps import PackedMap
from vllm_attentionpack.ops.cpu.plan import key_order, value_lanes, value_order
from vllm_attentionpack.ops.select import select_ops

ROOT = Path(__file__).parents[2]

CONTEXTS = [0, 1, 15, 16, 17, 70, 0, 300]
FRESH = [5, 1, 1, 3, 1, 20, 1, 2]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Plane counts (8, 4, 2 bits) of K and of V; every mix that the allocator can emit, and odd sizes.
LAYOUTS = {
    "mixed": ((8, 8, 16), (4, 16, 16)),
    "no 8": ((0, 24, 16), (0, 8, 48)),
    "8 alone": ((36, 0, 0), (4, 0, 0)),
    "4 alone": ((0, 8, 0), (0, 40, 0)),
    "2 alone": ((0, 0, 64), (0, 0, 16)),
    "all dims": ((32, 16, 16), (4, 8, 48)),
}

# (KV heads, heads per group, query heads, head size, modalities)
SHAPES = [(2, 1, 4, 64, 1), (2, 2, 4, 32, 2), (4, 2, 28, 32, 2), (1, 1, 9, 64, 2), (4, 4, 4, 16, 1)]


def planes_of(name: str) -> tuple[PlaneCounts, PlaneCounts]:
    key, value = (PlaneCounts(n8=n8, n4=n4, n2=n2) for n8, n4, n2 in LAYOUTS[name])
    return key, value


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    with instruction_set(request.param):
        assert cpu.unavailable(torch.device("cpu")) is None
        assert library.kernels().name == request.param
        yield request.param


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
    codec = random_codec(2, 2, 32, 2, *planes_of(layout))
    case = paged_batch(codec, 4, CONTEXTS, FRESH, 32)
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_writes_the_bytes_of_the_reference(isa, layout, modalities, dtype):
    codec = random_codec(4, 2, 32, modalities, *planes_of(layout), padding=5)
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
        # lose what they did, in planes of every width, but for a little in those of 8 bits.
        for kind, tokens in (("key", key), ("value", value)):
            want, got = (latent_error(codec, kind, tokens, slots, visual, c) for c in caches)
            assert (got < 1.03 * want).all()


def latent_error(codec, kind, tokens, slots, visual, cache):
    """Energy of what the codes of the first head group are off, by width of the codes."""
    planes = reference._planes_by_owner(codec.layout, 16)[0, kind]
    plane_codec = getattr(codec.groups[0], kind)
    pages = reference._Pages(cache, torch.arange(len(cache))[None], 16)
    read, _ = pages.read(torch.arange(len(cache))[None], (plane_codec, planes))
    kept = slots >= 0
    head_dims = plane_codec.basis.mean.shape[1]
    x = tokens.flatten(1)[kept, :head_dims].float()
    basis, which = plane_codec.basis, torch.zeros(len(x), dtype=torch.long)
    if visual is not None and codec.num_modalities == 2:
        which = visual[kept].long()
    exact = torch.einsum("td,tdr->tr", x - basis.mean[which], basis.encode[which])
    off = (read[0, slots[kept]] - exact).square().sum(0)
    bits = torch.tensor(plane_codec.counts.bits_per_dim)
    return torch.stack([off[bits == b].sum() for b in bits.unique()])


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


def test_orders_hold_every_dim_once():
    for n8, n4, n2 in ((4, 8, 16), (36, 24, 48), (0, 0, 16), (20, 0, 0)):
        counts = PlaneCounts(n8=n8, n4=n4, n2=n2)
        assert sorted(key_order(counts).tolist()) == list(range(counts.rank))
        for lanes in (8, 16):
            order = value_order(counts, lanes)
            assert len(order) % lanes == 0
            assert len(order) == sum(value_lanes(counts, lanes))
            assert sorted(order[order >= 0].tolist()) == list(range(counts.rank))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("repeats", [1, 7])
@pytest.mark.parametrize("count", [1, 2])
def test_products_of_packed_matrices(isa, dtype, repeats, count):
    """Views, odd sizes, more rows than one turn takes, and runs of very different magnitude."""
    runs, width, tokens, heads = [64, 200, 48, 1], 83, 33, 3
    spread = torch.cat([torch.full((n,), 10.0**-i) for i, n in enumerate(runs)])
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(heads, sum(runs), width, generator=generator)
    packed = PackedMap(matrix, library.kernels(), runs)
    x = torch.randn(tokens, heads, repeats, 2 * sum(runs), generator=generator)
    x = (x[..., : sum(runs)] * spread).to(dtype).transpose(0, 1)
    shift = torch.randn(sum(runs), generator=generator) * spread
    for taken in (None, shift):
        out = torch.full((tokens, heads, repeats, width + 5), 7.0)
        with threads(count):
            part = out[..., :width].transpose(0, 1)
            packed.into(part, x, 0.5, taken)
        centred = x.double() - (0 if taken is None else taken.double())
        want = 0.5 * centred @ matrix.double()[:, None]
        assert (part - want).abs().max() < 1e-3 * want.abs().max()
        assert (out[..., width:] == 7).all()


@pytest.mark.parametrize("name", [*LAYOUTS, "identity"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decompression(isa, name, dtype):
    """Blocks in any order, garbage in unused slots, and a last block that is not full."""
    if name == "identity":
        codec = identity_codec(2, 32)
    else:
        codec = random_codec(2, 2, 32, 2, *planes_of(name))
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


@pytest.mark.parametrize("name", ["cpu_attend", "cpu_store", "cpu_project", "cpu_unpack"])
def test_custom_ops_have_fakes(name):
    """PyTorch's own check: schema, mutation, fake tensors."""
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, [40], [1], 16)
    plan = cpu._plan(codec, torch.bfloat16)
    table = plan.table(16)
    if name == "cpu_attend":
        absorbed = cpu.absorb_query(case.query, codec, 0.2)
        args = (absorbed.latent, table, plan.widths, case.kv_cache, case.block_table, None)
        args += (case.seq_lens, case.batch.query_start_loc, 16, 2, True, 8)
    elif name == "cpu_project":
        packed = plan.absorb.maps[0]
        x, out = torch.randn(2, 3, 1, 32), torch.empty(2, 3, 1, packed.width)
        args = ([x], torch.randn(32), [packed.matrix], [packed.scale], [packed.bounds], 0.5, [out])
    elif name == "cpu_unpack":
        rank = codec.groups[0].key.rank
        args = (case.kv_cache, case.block_table[0], table[0, 0], rank, 40, 16, True)
    else:
        encode = plan.encode[0]["key"]
        latent = torch.randn(3, len(encode.step))
        args = (latent, encode.step, encode.weight, torch.arange(3), None)
        args += (table[0, 0], case.kv_cache, 16)
    op = getattr(torch.ops.attentionpack, name).default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


def test_chosen_by_default_on_a_cpu():
    name, ops, passed_over = select_ops("auto", torch.device("cpu"))
    assert (name, ops) == ("cpu", cpu)
    assert set(passed_over) == {"triton"}


def test_passed_over_on_other_devices():
    assert "CPU" in cpu.unavailable(torch.device("cuda"))


def test_says_so_where_the_kernels_are_missing(monkeypatch):
    """A package that was installed without a compiler runs on the reference ops and says why."""
    monkeypatch.setattr(library, "_MODULE", "vllm_attentionpack.ops.cpu._no_kernels")
    monkeypatch.delenv(library.LIBRARY_VARIABLE, raising=False)
    library._load.cache_clear()
    library.find_kernels.cache_clear()
    try:
        name, _, passed_over = select_ops("auto", torch.device("cpu"))
    finally:
        library._load.cache_clear()
        library.find_kernels.cache_clear()
    assert name == "reference"
    assert "compiler" in passed_over["cpu"]


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, "quantum")
    assert "quantum" in cpu.unavailable(torch.device("cpu"))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_built_where_there_is_a_compiler():
    assert not isinstance(library.find_kernels(), str)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc")
def test_one_openmp_runtime():
    """The kernels run on PyTorch's threads: a second runtime would have threads of its own."""
    script = """
from tests.support.cases import random_codec
from tests.support.paging import attend_codes, paged_batch
from vllm_attentionpack.ops import cpu

codec = random_codec(2, 2, 32)
case = paged_batch(codec, 4, [40], [1], 16)
attend_codes(cpu, codec, case, case.seq_lens, True)
print(open("/proc/self/maps").read())
"""
    # In a process of its own: other tests load libraries that bring a runtime along.
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    files = {line.split()[-1] for line in done.stdout.splitlines() if "/" in line}
    runtimes = [f for f in files if any(x in f.rsplit("/")[-1] for x in ("gomp", "iomp", "libomp"))]
    assert len(runtimes) == 1, runtimes
