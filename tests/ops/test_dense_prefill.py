"""Prefill over a decompressed context against attention to codes, and what goes which way."""

import pytest
import torch
from torch import Tensor

from tests.support.cases import random_codec
from tests.support.oracle import attend
from tests.support.paging import PagedBatch, paged_batch
from vllm_attentionpack.attention import dense_prefill
from vllm_attentionpack.attention.dense_prefill import MIN_QUERIES, DensePrefill
from vllm_attentionpack.attention.metadata import AttentionPackMetadata
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops import ExactTokens, cpu, reference

SCALE = 0.2
HEADS, KV_HEADS, HEAD_SIZE = 8, 4, 32


@pytest.fixture(params=[1, 2], ids=["one modality", "two modalities"])
def codec(request):
    return random_codec(KV_HEADS, 2, HEAD_SIZE, request.param)


def step_of(case: PagedBatch) -> AttentionPackMetadata:
    return AttentionPackMetadata(
        num_actual_tokens=case.batch.num_tokens,
        batch=case.batch,
        seq_lens=case.seq_lens,
        context_lens=case.context_lens,
        has_context=True,
        block_table=case.block_table,
        slot_mapping=torch.arange(case.batch.num_tokens),
    )


def run(ops, codec: LayerCodec, case: PagedBatch, exact=None) -> tuple[Tensor, Tensor]:
    """The output of the tokens that are prefilled densely, and which they are."""
    workspace = DensePrefill(HEADS, KV_HEADS, HEAD_SIZE, ops)
    step = step_of(case)
    dense = workspace.plan(step)
    assert dense is not None
    out = torch.full(case.query.shape, float("nan")).bfloat16()
    workspace.attend(
        dense,
        case.query.bfloat16(),
        case.fresh_key().bfloat16(),
        case.fresh_value().bfloat16(),
        case.kv_cache,
        case.block_table,
        step.spans,
        codec,
        case.block_size,
        exact,
        SCALE,
        out,
    )
    assert out.isnan().any(2).any(1).nonzero()[:, 0].tolist() == dense.rest_tokens.tolist()
    return out[dense.tokens], dense.tokens


def rebuilt(codec: LayerCodec, case: PagedBatch) -> list[tuple[Tensor, Tensor]]:
    """Keys and values that each request attends to: the context as stored, new tokens as given."""
    pairs = []
    for row, context in enumerate(case.contexts):
        key, value = reference.decompress(
            case.kv_cache, case.block_table[row], context, codec, case.block_size, torch.float32
        )
        pairs.append(
            (
                torch.cat([key, case.key[row][context:]]),
                torch.cat([value, case.value[row][context:]]),
            )
        )
    return pairs


def softmax_attention(case: PagedBatch, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    out, at = [], 0
    for row, (key, value) in enumerate(pairs):
        context, fresh = case.contexts[row], case.fresh[row]
        query = case.query[at : at + fresh].double()
        at += fresh
        k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
        logits = torch.einsum("qhd,nhd->hqn", query, k) * SCALE
        future = torch.arange(context + fresh) > context + torch.arange(fresh)[:, None]
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        out.append(torch.einsum("hqn,nhd->qhd", weights, v).float())
    return torch.cat(out)


@pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])
@pytest.mark.parametrize("block_size", [32, 48, 80])
def test_chunks_see_their_context_and_themselves(codec, ops, block_size, monkeypatch):
    monkeypatch.setattr(dense_prefill, "_SLAB", 64)
    contexts, fresh = [0, 1, 200, 31, 500], [70, 64, 100, 65, 128]
    case = paged_batch(codec, HEADS, contexts, fresh, block_size)
    out, tokens = run(ops, codec, case)
    want = softmax_attention(case, rebuilt(codec, case))
    assert tokens.tolist() == list(range(sum(fresh)))
    assert (out - want).abs().max() <= 0.03 * want.abs().max()
    # Rounding to bfloat16 adds 1.3e-6 of a number's energy, and there are about ten such places:
    # latents, bases, keys, values, queries, weights, outputs.
    assert (out - want).pow(2).mean() <= 2e-5 * want.pow(2).mean()


def test_only_long_chunks_go_this_way(codec, monkeypatch):
    contexts = [100, 0, 100, 0, 7]
    fresh = [1, 1, MIN_QUERIES, 2, MIN_QUERIES - 1]
    case = paged_batch(codec, HEADS, contexts, fresh, 16)
    dense = DensePrefill(HEADS, KV_HEADS, HEAD_SIZE, cpu).plan(step_of(case))
    assert dense is not None and dense.rest is not None
    assert dense.requests == [2, 3]
    assert dense.rest_requests.tolist() == [0, 1, 4]
    assert dense.rest.context_lens.tolist() == [100, 0, 7]
    assert dense.rest.batch.host_starts == (0, 1, 2, 1 + MIN_QUERIES)
    together = torch.cat([dense.tokens, dense.rest_tokens]).sort().values
    assert together.tolist() == list(range(sum(fresh)))
    out, tokens = run(cpu, codec, case)
    want = softmax_attention(case, rebuilt(codec, case))[tokens]
    assert (out - want).abs().max() <= 0.03 * want.abs().max()

    bytes_per_token = 2 * KV_HEADS * HEAD_SIZE * 2
    monkeypatch.setattr(dense_prefill, "WORKSPACE_BYTES", 128 * bytes_per_token)
    small = DensePrefill(HEADS, KV_HEADS, HEAD_SIZE, cpu).plan(step_of(case))
    assert small is not None and small.requests == [3]
    monkeypatch.setattr(dense_prefill, "WORKSPACE_BYTES", 127 * bytes_per_token)
    assert DensePrefill(HEADS, KV_HEADS, HEAD_SIZE, cpu).plan(step_of(case)) is None


def test_exact_tokens_take_the_place_of_their_codes(codec):
    contexts, fresh, sinks, behind = [300, 0, 80], [64, 64, 64], 3, 9
    case = paged_batch(codec, HEADS, contexts, fresh, 16)
    pages = torch.full((9, 16, 2, KV_HEADS, HEAD_SIZE), float("nan")).bfloat16()
    slots = torch.randperm(9 * 16)[: 3 * (sinks + behind)].view(3, -1)
    present = torch.ones(3, sinks + behind, dtype=torch.bool)
    present[1] = False
    present[2, sinks + 4 :] = False  # blocks that a prefix-cache hit skipped
    pairs = rebuilt(codec, case)
    for row, context in enumerate(contexts):
        for i in range(sinks + behind):
            if present[row, i]:
                position = i if i < sinks else context - 1 - (i - sinks)
                token = torch.stack([case.key[row][position], case.value[row][position]])
                pages[slots[row, i] // 16, slots[row, i] % 16] = token.bfloat16()
                for x, exact in zip(pairs[row], token, strict=True):
                    x[position] = exact
    nothing = torch.zeros(3, dtype=torch.int64)
    exact = ExactTokens(slots, present, nothing, nothing, sinks)
    out, _ = run(cpu, codec, case, (pages, exact))
    want = softmax_attention(case, pairs)
    assert (out - want).abs().max() <= 0.03 * want.abs().max()
    plain, _ = run(cpu, codec, case)
    assert (plain - want).abs().max() > 0.2 * want.abs().max()


def test_what_another_request_has_left_in_the_workspace_is_not_read(codec, monkeypatch):
    case = paged_batch(codec, HEADS, [0, 37, 128], [70, 64, 128], 16)
    want, _ = run(cpu, codec, case)

    def full_of_nan(self: DensePrefill, blocks: int) -> None:
        self.pages = torch.full((blocks, *self.pages.shape[1:]), float("nan")).bfloat16()

    monkeypatch.setattr(DensePrefill, "_reserve", full_of_nan)
    out, _ = run(cpu, codec, case)
    assert torch.equal(out, want)


def test_decompressed_tokens_give_the_logits_of_their_codes(codec):
    """What is rebuilt is what attention over codes sees."""
    case = paged_batch(codec, HEADS, [50], [1], 16)
    want, _ = attend(codec, case, SCALE, ranges=[(0, 50)], causal=False)
    key, value = reference.decompress(
        case.kv_cache, case.block_table[0], 50, codec, 16, torch.float32
    )
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (key, value))
    weights = (torch.einsum("qhd,nhd->hqn", case.query, k) * SCALE).softmax(-1)
    assert torch.allclose(torch.einsum("hqn,nhd->qhd", weights, v), want.float(), atol=1e-4)
