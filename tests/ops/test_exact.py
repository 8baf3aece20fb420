"""Exact sinks and recent tokens beside the codes, against dense attention on both."""

import pytest
import torch
from torch import Tensor

from tests.support.cases import random_codec
from tests.support.cpu import INSTRUCTION_SETS, instruction_set, threads
from tests.support.oracle import attend
from tests.support.paging import PagedBatch, attend_codes, paged_batch
from vllm_attentionpack.ops import (
    ExactTokens,
    QueryBatch,
    cpu,
    fresh_attention,
    locate_exact,
    merge_attention,
    recent_attention,
    reference,
    store_exact,
)
from vllm_attentionpack.ops.exact import NULL_BLOCK

CONTEXTS = [0, 1, 3, 15, 16, 17, 33, 70, 70, 0]
FRESH = [5, 1, 1, 1, 3, 1, 1, 20, 1, 1]
BLOCK = 4
SCALE = 0.2


def exact_pages(
    case: PagedBatch, sinks: int, window: int, missing: dict[int, set[int]]
) -> tuple[Tensor, Tensor]:
    """An exact cache of the context: pages full of NaN but for the tokens that have a place.

    As the block manager does, blocks outside sinks and window are null, and so are those in
    `missing` (blocks by request). Returns pages and block table.
    """
    heads, dims = case.key[0].shape[1:]
    blocks = [-(-n // BLOCK) for n in case.contexts]
    order = (torch.randperm(sum(blocks) + 2) + 1).tolist()
    pages = torch.full((len(order) + 1, BLOCK, 2, heads, dims), torch.nan)
    table = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
    for row, (context, count) in enumerate(zip(case.contexts, blocks, strict=True)):
        sink_blocks = -(-sinks // BLOCK)
        recent = max(context - window + 1, 0) // BLOCK if window > 1 else count
        for index in range(count):
            wanted = index < sink_blocks or index >= recent
            if wanted and index not in missing.get(row, ()):
                table[row, index] = order.pop()
        position = torch.arange(context)
        slots = table[row, position // BLOCK].long() * BLOCK + position % BLOCK
        store_exact(case.key[row][:context], case.value[row][:context], pages, slots)
    return pages, table


def expected_tokens(case: PagedBatch, table: Tensor, row: int, sinks: int, window: int) -> Tensor:
    """Which context tokens of a request must be read exactly, token by token."""
    context = case.contexts[row]
    held = [bool(table[row, p // BLOCK] != NULL_BLOCK) for p in range(context)]
    kept = [p < sinks and all(held[: p + 1]) for p in range(context)]
    for p in range(context):
        if p > context - window and all(held[p:]):
            kept[p] = True
    return torch.tensor(kept, dtype=torch.bool)


def assert_close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    scale = want[0].abs().max().item()
    assert (got[0] - want[0]).abs().max().item() < 2e-5 * scale + 1e-5
    torch.testing.assert_close(got[1], want[1].float(), atol=1e-4, rtol=0)


@pytest.fixture(params=["reference", *INSTRUCTION_SETS])
def exact_attention(request):
    if request.param == "reference":
        yield reference.exact_attention
    else:
        with instruction_set(request.param):
            yield cpu.exact_attention


MISSING = {7: {0}, 8: {15, 16}, 6: {8}}


@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (0, 5), (3, 0), (6, 1), (1, 100), (40, 40)])
@pytest.mark.parametrize("missing", [{}, MISSING])
def test_each_token_is_read_once(exact_attention, sinks, window, missing):
    """New tokens exact, of the context sinks and window: one softmax over all."""
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, CONTEXTS, FRESH, 16)
    pages, table = exact_pages(case, sinks, window, missing)
    tokens = locate_exact(table, case.context_lens, BLOCK, sinks, window)
    exact = [
        torch.cat([expected_tokens(case, table, row, sinks, window), torch.ones(n).bool()])
        for row, n in enumerate(case.fresh)
    ]
    assert tokens.present.sum(1).tolist() == [
        int(kept[:context].sum()) for kept, context in zip(exact, case.contexts, strict=True)
    ]
    got = merge_attention(
        fresh_attention(case.query, case.fresh_key(), case.fresh_value(), case.batch, SCALE),
        exact_attention(case.query, pages, tokens, case.batch, SCALE),
        attend_codes(reference, codec, case, tokens.stops, False, tokens.starts, SCALE),
    )
    assert_close(got, attend(codec, case, SCALE, lambda row, _: exact[row]))


@pytest.mark.parametrize(("sinks", "window"), [(4, 8), (0, 5), (3, 0), (2, 1), (1, 100)])
def test_new_tokens_as_later_ones_see_them(exact_attention, sinks, window):
    """Each query has its own window among the new tokens; older ones are codes already."""
    codec = random_codec(2, 2, 32)
    case = paged_batch(codec, 4, CONTEXTS, FRESH, 16)
    pages, table = exact_pages(case, sinks, window, {})
    several = torch.tensor([n > 1 for n in case.fresh])
    located = locate_exact(table, case.context_lens, BLOCK, sinks, window)
    tokens = located.without_window(several, case.context_lens)

    def exact(row: int, position: int) -> Tensor:
        index = torch.arange(case.contexts[row] + case.fresh[row])
        kept = (index < sinks) | ((index > position - window) & (index <= position))
        if several[row]:
            kept &= (index < sinks) | (index >= case.contexts[row])
        return kept

    starts = case.context_lens.clamp(min=sinks)
    got = merge_attention(
        recent_attention(
            case.query,
            case.fresh_key(),
            case.fresh_value(),
            case.batch,
            SCALE,
            case.context_lens,
            sinks,
            window,
        ),
        attend_codes(reference, codec, case, case.seq_lens - window, True, starts, SCALE),
        exact_attention(case.query, pages, tokens, case.batch, SCALE),
        attend_codes(reference, codec, case, tokens.stops, False, tokens.starts, SCALE),
    )
    assert_close(got, attend(codec, case, SCALE, exact))


def test_nothing_cached(exact_attention):
    case = paged_batch(random_codec(2, 1, 32), 4, [0, 0], [2, 1], 16)
    table = torch.zeros(2, 1, dtype=torch.int32)
    tokens = locate_exact(table, case.context_lens, BLOCK, 4, 8)
    assert isinstance(tokens, ExactTokens) and not tokens.present.any()
    assert tokens.starts.tolist() == tokens.stops.tolist() == [0, 0]
    pages = torch.full((1, BLOCK, 2, 2, 32), torch.nan)
    out, lse = exact_attention(case.query, pages, tokens, case.batch, SCALE)
    assert lse.isneginf().all() and not out.any()


def test_steps_leave_their_tokens_where_a_graph_looks_for_them():
    room = ExactTokens.empty(8, 4, 8, torch.device("cpu"))
    addresses = set()
    for contexts in ([70, 33, 3], [0, 16]):
        case = paged_batch(random_codec(2, 1, 32), 4, contexts, [1] * len(contexts), 16)
        _, table = exact_pages(case, 4, 8, {})
        located = locate_exact(table, case.context_lens, BLOCK, 4, 8)
        kept = located.kept_in(room)
        for name in ("slots", "present", "starts", "stops"):
            assert torch.equal(getattr(kept, name), getattr(located, name))
        addresses.add(
            (kept.slots.data_ptr(), kept.present.data_ptr(), kept.stops.data_ptr(), kept.sinks)
        )
    assert len(addresses) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_keeps_every_bit(dtype):
    """Into the pages of one of three layers that share padded blocks."""
    storage = torch.zeros(5, BLOCK * 3 * 2 * 3 * 8 + 7, dtype=dtype)
    layers = storage[:, : BLOCK * 3 * 2 * 3 * 8].unflatten(1, (BLOCK, 3, 2, 3, 8))
    pages = layers[:, :, 1]
    key, value = torch.randn(2, 4, 3, 8).to(dtype)
    store_exact(key, value, pages, torch.tensor([9, -1, 2, 12]))
    assert torch.equal(pages[2, 1, 0], key[0]) and torch.equal(pages[2, 1, 1], value[0])
    assert torch.equal(pages[3, 0, 0], key[3]) and torch.equal(pages[3, 0, 1], value[3])
    written = pages.flatten(2).any(-1)
    assert written[1:].sum() == 2, "padding and null slots touch the null block only"
    pages.zero_()
    assert not storage.any()


def strided_pages(blocks: int, heads: int, dims: int, dtype: torch.dtype) -> Tensor:
    """One layer's part of pages that hold three layers side by side; normal numbers."""
    pages = torch.randn(blocks, BLOCK, 3, 2, heads, dims).to(dtype)
    return pages[:, :, 1]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "repeats", "dims"), [(2, 4, 128), (1, 9, 80), (3, 1, 20), (8, 2, 64), (1, 71, 8)]
)
def test_compiled_kernels_agree_with_the_reference(isa, dtype, heads, repeats, dims):
    """Decoding and chunks together, more queries than a piece takes, absent tokens that are NaN."""
    torch.manual_seed(0)
    fresh = [1, 1, 40, 0, 1, 3]
    starts = [0, *torch.tensor(fresh).cumsum(0).tolist()]
    batch = QueryBatch.build(starts, [200] * len(fresh), torch.device("cpu"))
    pages = strided_pages(60, heads, dims, dtype)
    slots = torch.randperm(60 * BLOCK)[: len(fresh) * 37].view(len(fresh), 37)
    present = torch.rand(slots.shape) < 0.7
    present[1], present[4, 1:] = False, False
    absent = slots[~present]
    pages[absent // BLOCK, absent % BLOCK] = torch.nan
    none = torch.zeros(len(fresh), dtype=torch.int64)
    tokens = ExactTokens(slots, present, none, none, 4)
    # not contiguous: as a slice of a joint projection
    query = torch.randn(starts[-1], heads * (repeats + 2), dims).to(dtype)[:, : heads * repeats]
    want = reference.exact_attention(query, pages, tokens, batch, SCALE)
    for count in (1, 2):
        with instruction_set(isa), threads(count):
            assert_close(cpu.exact_attention(query, pages, tokens, batch, SCALE), want)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_as_it_is(isa, dtype):
    """One exact token, whose value is then the result; but for infinities and no numbers."""
    values = torch.arange(1 << 16).to(torch.uint16).view(torch.int16).view(dtype)
    values = torch.where(values.float().isfinite(), values, 0).view(-1, 256)
    pages = torch.zeros(len(values), 1, 2, 1, 256, dtype=dtype)
    pages[:, 0, 1, 0] = values
    requests = len(values)
    starts = list(range(requests + 1))
    batch = QueryBatch.build(starts, [2] * requests, torch.device("cpu"))
    none = torch.zeros(requests, dtype=torch.int64)
    slots = torch.arange(requests)[:, None]
    tokens = ExactTokens(slots, torch.ones_like(slots, dtype=torch.bool), none, none, 1)
    with instruction_set(isa):
        query = torch.zeros(requests, 1, 256, dtype=dtype)
        out, _ = cpu.exact_attention(query, pages, tokens, batch, 1.0)
    assert torch.equal(out[:, 0], values.float())


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dims", [8, 20, 128])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_compiled_merge_agrees_with_the_reference(isa, dims, count):
    """Parts of every dtype, not contiguous; some rows see nothing in some parts or in any."""
    torch.manual_seed(0)
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float32]
    parts = []
    for dtype in dtypes[:count]:
        lse = torch.randn(3, 37).mul(8).masked_fill(torch.rand(3, 37) < 0.3, float("-inf")).T
        lse[5] = float("-inf")
        parts.append((torch.randn(37, 5, dims).to(dtype)[:, 1:4], lse))
    want = reference.merge_attention(*parts)
    spoilt = [(out.masked_fill(lse.isneginf()[..., None], torch.nan), lse) for out, lse in parts]
    for number in (1, 2):
        with instruction_set(isa), threads(number):
            assert_close(cpu.merge_attention(*parts), want)
            assert_close(cpu.merge_attention(*spoilt), want)
    with instruction_set(isa):
        out, lse = cpu.merge_attention(parts[0], (parts[1][0], torch.full((37, 3), torch.nan)))
    assert out.isnan().all() and lse.isnan().all(), "a number that is none is not hidden"
