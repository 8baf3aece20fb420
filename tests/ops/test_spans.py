"""Attention to anchored keys against dense attention to keys where they stand."""

import pytest
import torch

from tests.support.cases import random_codec
from tests.support.cpu import DTYPES, threads
from tests.support.oracle import attend, reconstruct
from tests.support.paging import PagedBatch, paged_batch
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.ops import QueryBatch, cpu, rebuilt, reference, spans, store_kv, turns
from vllm_attentionpack.ops.spans import StepSpans
from vllm_attentionpack.ops.turns import span_rows

CONTEXTS = [0, 1, 47, 48, 49, 200, 0, 96]
FRESH = [5, 1, 1, 3, 1, 60, 100, 2]
SIZE, BLOCK = 48, 16
#: Spans of whole blocks, blocks of whole spans, and neither.
SIZES = [(48, 16), (16, 48), (48, 32), (32, 48)]
SCALE = 0.2


def case_of(
    ops=reference,
    interleaved: bool = False,
    size: int = SIZE,
    block: int = BLOCK,
    pre_rope: int = 0,
    joint_kv: bool = False,
) -> tuple[LayerCodec, PagedBatch, StepSpans]:
    """The batch's keys are those that are stored, that is, turned back already."""
    codec = random_codec(2, 2, 32, 2, padding=3, joint_kv=joint_kv)
    rotary = Rotary(0.7 ** torch.arange(12, dtype=torch.float64), interleaved)
    codec.anchors = Anchors(rotary, size, pre_rope)
    case = paged_batch(codec, 4, CONTEXTS, FRESH, block)
    count = -(-int(case.seq_lens.max()) // size)
    # Not the tokens' indices: images take up fewer positions.
    anchors = torch.arange(count) * 31 + torch.arange(len(CONTEXTS))[:, None] * 3
    own = None
    if interleaved:  # as where there are images
        longest = int(case.seq_lens.max())
        own = torch.arange(longest).div(2, rounding_mode="floor").expand(len(CONTEXTS), -1).int()
    rest = (case.batch, case.context_lens, case.block_table, block)
    return codec, case, StepSpans(ops, size, anchors, own, *rest)


def anchors_of(steps: StepSpans, row: int, tokens: int) -> torch.Tensor:
    return steps.anchors[row, torch.arange(tokens) // steps.size]


def turned(codec, steps, row, keys, back=False):
    """All keys of a request, from where they are coded to where they stand, or `back`."""
    own = torch.arange(len(keys)) if steps.positions is None else steps.positions[row, : len(keys)]
    cos, sin = codec.anchors.tables(anchors_of(steps, row, len(keys)), own)
    return codec.anchors.rotary.turn_by(keys, cos, -sin if back else sin)


def check(codec, case, steps, starts, stops, causal, tolerance):
    def turn(row, keys):
        return turned(codec, steps, row, keys)

    first = torch.zeros_like(stops) if starts is None else starts
    ranges = list(zip(first.tolist(), stops.tolist(), strict=True))
    want, want_lse = attend(codec, case, SCALE, ranges=ranges, causal=causal, turn=turn)
    out, lse = steps.attend(case.query, case.kv_cache, starts, stops, codec, causal, SCALE)
    seen = ~want_lse.isneginf()
    assert torch.equal(~lse.isneginf(), seen)
    assert (lse - want_lse)[seen].abs().max().item() < tolerance
    assert (out - want).abs().max().item() < tolerance * want.abs().max().item()


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("rebuilt", [False, True])
@pytest.mark.parametrize("pre_rope", [0, 5, 12])
def test_spans_match_the_oracle(ops, sizes, causal, ranged, rebuilt, pre_rope, monkeypatch):
    monkeypatch.setattr(spans, "MAX_REBUILT", 64 if rebuilt else 0)
    codec, case, steps = case_of(ops, causal, *sizes, pre_rope)
    starts, stops = None, case.seq_lens if causal else case.context_lens
    if ranged:
        starts, stops = torch.tensor([0, 1, 4, 50, 49, 60, 3, 100]), stops - 20
    check(codec, case, steps, starts, stops, causal, 1e-4)


def test_rebuilt_in_many_slabs(monkeypatch):
    """Some of a request's tokens at a time, free slots holding what is no number."""
    monkeypatch.setattr(spans, "MAX_REBUILT", 64)
    codec, case, steps = case_of()
    whole = steps.attend(case.query, case.kv_cache, None, case.seq_lens, codec, True, SCALE)
    monkeypatch.setattr(rebuilt, "_SLAB_BYTES", 1 << 14)
    parts = steps.attend(case.query, case.kv_cache, None, case.seq_lens, codec, True, SCALE)
    for some, all_at_once in zip(parts, whole, strict=True):
        torch.testing.assert_close(some, all_at_once, atol=1e-5, rtol=1e-5)
    # The host may take requests to be longer than they are.
    longest = [n + BLOCK for n in case.batch.max_seq_lens]
    batch = QueryBatch.build(case.batch.host_starts, longest, torch.device("cpu"))
    rest = (SIZE, steps.anchors, None, batch, case.context_lens, case.block_table, BLOCK)
    for ops in (reference, cpu):
        wide = StepSpans(ops, *rest)
        again = wide.attend(case.query, case.kv_cache, None, case.seq_lens, codec, True, SCALE)
        torch.testing.assert_close(again[0], whole[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "pre_rope"), [(64, 0), (64, 5), (600, 0), (600, 12)])
def test_compiled_kernels_match_the_reference(isa, dtype, size, pre_rope, workers):
    """In every number type, with spans that are cut into pieces, and ranges of no token."""
    codec, _, _ = case_of(size=size, pre_rope=pre_rope)
    contexts, fresh = [0, 1300, 600, 1200], [3, 1, 2, 1]
    case = paged_batch(codec, 4, contexts, fresh, BLOCK)
    anchors = torch.arange(1400 // size + 1).expand(4, -1) * 31
    query = case.query.to(dtype)
    starts = torch.tensor([0, 30, 600, 1200], dtype=torch.int32)
    found = []
    with threads(workers):
        for ops in (cpu, reference):
            rest = (anchors, None, case.batch, case.context_lens, case.block_table, BLOCK)
            steps = StepSpans(ops, size, *rest)
            arguments = (case.kv_cache, starts, case.context_lens, codec, False, SCALE)
            found.append(steps.attend(query, *arguments))
    (out, lse), (want, want_lse) = found
    assert torch.equal(lse.isneginf(), want_lse.isneginf()) and lse.isneginf().any()
    seen = ~lse.isneginf()
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (lse - want_lse)[seen].abs().max() < tolerance
    assert (out - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
def test_in_many_calls(ops, monkeypatch):
    monkeypatch.setattr(turns, "MAX_TURNED", 300)
    codec, case, steps = case_of(ops)
    assert len(span_rows(case.batch, SIZE, causal=False)) > 1
    assert len(span_rows(case.batch, SIZE, causal=True)) > 2
    check(codec, case, steps, None, case.context_lens, False, 1e-4)
    check(codec, case, steps, None, case.seq_lens, True, 1e-4)


def test_each_query_has_a_row_for_each_span(monkeypatch):
    """In one call and in many, whatever the lengths."""
    generator = torch.Generator().manual_seed(0)
    size = 8
    for round_ in range(50):
        monkeypatch.setattr(turns, "MAX_TURNED", 5 + 10 * (round_ % 7))
        fresh = torch.randint(0, 9, (4,), generator=generator).tolist()
        contexts = torch.randint(0, 40, (4,), generator=generator).tolist()
        starts = [0, *torch.tensor(fresh).cumsum(0).tolist()]
        lengths = [c + f for c, f in zip(contexts, fresh, strict=True)]
        batch = QueryBatch.build(starts, lengths, torch.device("cpu"))
        for causal, tokens in ((False, contexts), (True, lengths)):
            calls = span_rows(batch, size, causal)
            assert [call.first for call in calls] == [0, *(call.stop for call in calls[:-1])]
            pairs = []
            for call in calls:
                rows = zip(call.requests.tolist(), call.spans.tolist(), strict=True)
                pairs += zip(rows, call.tokens.tolist(), strict=True)
                for request, count in enumerate(fresh):
                    own = call.requests == request
                    row = torch.arange(len(own))[own] - call.row_starts[request]
                    assert torch.equal(call.spans[own], call.first + row // max(count, 1))
                    assert torch.equal(call.tokens[own], starts[request] + row % max(count, 1))
            wanted = [
                ((request, span), token)
                for request in range(4)
                for span in range(-(-tokens[request] // size))
                for token in range(starts[request], starts[request + 1])
            ]
            assert sorted(pairs) == wanted


def test_a_part_of_a_step():
    codec, case, steps = case_of()
    chosen = torch.tensor([3, 5])
    starts = case.batch.host_starts
    tokens = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in chosen.tolist()])
    lengths = [FRESH[r] for r in chosen.tolist()]
    longest = [case.batch.max_seq_lens[r] for r in chosen.tolist()]
    batch = QueryBatch.build([0, lengths[0], sum(lengths)], longest, torch.device("cpu"))
    arguments = (case.kv_cache, None)
    whole, _ = steps.attend(case.query, *arguments, case.context_lens, codec, False, SCALE)
    part, _ = steps.of(chosen, batch).attend(
        case.query[tokens], *arguments, case.context_lens[chosen], codec, False, SCALE
    )
    torch.testing.assert_close(part, whole[tokens])


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("pre_rope", [0, 5])
def test_new_keys_are_turned_back_and_cached_ones_forward(pre_rope, images):
    codec, case, steps = case_of(interleaved=images, pre_rope=pre_rope)
    new = steps.turn_new_keys(case.fresh_key(), codec.anchors)
    starts = case.batch.host_starts
    for row, context in enumerate(CONTEXTS):
        key = case.key[row]
        back = turned(codec, steps, row, key, back=True)[context:]
        torch.testing.assert_close(new[starts[row] : starts[row + 1]], back)
        again = steps.turn_cached_keys(back, codec.anchors, row, context)
        torch.testing.assert_close(again, key[context:])


@pytest.mark.parametrize("pre_rope", [0, 5])
def test_logits_are_those_of_keys_as_they_come(pre_rope):
    """What is stored turned back and met by queries turned back is what would be met anyway."""
    codec, case, steps = case_of(pre_rope=pre_rope)
    row = 5
    keys = case.key[row]
    back = turned(codec, steps, row, keys, back=True)
    slots = torch.arange(len(keys)) + BLOCK
    cache = torch.zeros(40, codec.layout.block_bytes(BLOCK), dtype=torch.uint8)
    store_kv(back, case.value[row], cache, slots, case.visual[row], codec, BLOCK)
    table = torch.arange(1, 20)[None].int()
    batch = QueryBatch.build([0, 1], [len(keys) + 1], torch.device("cpu"))
    stops = torch.tensor([len(keys)])
    anchors = steps.anchors[row : row + 1]
    one = StepSpans(reference, SIZE, anchors, None, batch, stops, table, BLOCK)
    query = case.query[:1]
    out, lse = one.attend(query, cache, None, stops, codec, False, SCALE)
    read, value = reconstruct(codec, back, case.value[row], case.visual[row])
    read = turned(codec, steps, row, read).repeat_interleave(2, 1)
    value = value.repeat_interleave(2, 1)
    logits = torch.einsum("qhd,nhd->qhn", query, read) * SCALE
    torch.testing.assert_close(lse, logits.logsumexp(-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        out, torch.einsum("qhn,nhd->qhd", logits.softmax(-1), value), atol=1e-4, rtol=0
    )
