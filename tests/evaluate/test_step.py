"""Simulated attention against plain softmax, with every part that a codec can change."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_attentionpack.evaluate.simulate.codec import (
    CacheShape,
    DenseCodec,
    ExactTokens,
    TokenCodec,
    Tokens,
)
from vllm_attentionpack.evaluate.simulate.step import SimulatedStep

HEADS, KV_HEADS, D, SCALE = 4, 2, 8, 0.3
SHAPE = CacheShape(("attn",), HEADS, KV_HEADS, D)
LENGTHS = [1, 7, 20]


class Shifted(TokenCodec):
    """Keys and values off by a known amount, so that what was read shows in the output."""

    def __init__(self, exact: ExactTokens | None = None, full_share: float = 1.0) -> None:
        super().__init__(SHAPE, 10, exact)
        self.full_share = full_share

    def reconstruct(
        self, layer: int, key: Tensor, value: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Tensor]:
        return key * 0.5, value + 3

    def coarse_value(self, layer: int, value: Tensor, tokens: Tokens) -> Tensor:
        return value - 100


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    shapes = ((total, HEADS, D), (total, KV_HEADS, D), (total, KV_HEADS, D))
    query, key, value = (torch.randn(s, generator=generator) for s in shapes)
    return query, key, value


def attend(codec, inputs, window: int | None = None, name: str = "attn") -> Tensor:
    query, key, value = inputs
    total = len(query)
    tokens = Tokens(LENGTHS, torch.zeros(total, dtype=torch.bool), torch.arange(total))
    layer = SimpleNamespace(
        layer_name=name, sliding_window=window, impl=SimpleNamespace(scale=SCALE)
    )
    step = SimulatedStep(tokens, codec, {"attn": 0})
    return step.attend(layer, query, key, value, torch.full_like(query, float("nan")))


def expected(inputs, read, exact: ExactTokens, window: int | None = None) -> Tensor:
    """One query at a time in float64."""
    query, key, value = (x.double() for x in inputs)
    read_key, read_value = (x.double() for x in read)
    out, start = torch.empty_like(query), 0
    for length in LENGTHS:
        for i in range(length):
            for h in range(HEADS):
                kv = h // (HEADS // KV_HEADS)
                first = max(0, i - window + 1) if window else 0
                logits, values = [], []
                for j in range(first, i + 1):
                    is_exact = i - j < exact.recent or j < exact.sinks
                    k, v = (key, value) if is_exact else (read_key, read_value)
                    logits.append(query[start + i, h] @ k[start + j, kv] * SCALE)
                    values.append(v[start + j, kv])
                weights = torch.stack(logits).softmax(0)
                out[start + i, h] = weights @ torch.stack(values)
        start += length
    return out


@pytest.mark.parametrize("exact", [ExactTokens(), ExactTokens(2, 3), ExactTokens(0, 5)])
def test_each_query_reads_codes_but_for_its_exact_tokens(inputs, exact: ExactTokens) -> None:
    read = inputs[1] * 0.5, inputs[2] + 3
    got = attend(Shifted(exact), inputs)
    torch.testing.assert_close(got.double(), expected(inputs, read, exact), rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_compared_stay_exact(inputs) -> None:
    got = attend(Shifted(), inputs, name="another")
    torch.testing.assert_close(got, attend(DenseCodec(SHAPE), inputs))


def test_sliding_windows_of_other_layers_hold(inputs) -> None:
    got = attend(Shifted(), inputs, window=4, name="another")
    wanted = expected(inputs, inputs[1:], ExactTokens(), window=4)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def test_partial_decompression_reads_the_attended_half_in_full(inputs) -> None:
    query, key, value = inputs
    got = attend(Shifted(full_share=0.5), inputs)
    # the first request has one token: always in full
    torch.testing.assert_close(got[0], (value[0] + 3).repeat_interleave(2, 0))
    start, i = LENGTHS[0], LENGTHS[1] - 1
    rows = slice(start, start + i + 1)
    k = (key[rows] * 0.5).repeat_interleave(2, 1)
    logits = torch.einsum("qhd,nhd->hqn", query[rows], k) * SCALE
    weights = logits.masked_fill(torch.ones(i + 1, i + 1).triu(1).bool(), -torch.inf).softmax(-1)
    gathered = weights.mean(0).sum(0)
    chosen = gathered.argsort(descending=True)[: (i + 2) // 2]  # ranks below (i + 1) / 2
    v = value[rows] - 100
    v[chosen] = value[rows][chosen] + 3
    wanted = torch.einsum("hn,nhd->hd", weights[:, i], v.repeat_interleave(2, 1))
    torch.testing.assert_close(got[start + i], wanted, rtol=1e-4, atol=1e-4)


def test_bytes_count_the_exact_tokens() -> None:
    beside, instead = ExactTokens(4, 6), ExactTokens(4, 6, beside_codes=False)
    dense = SHAPE.dense_bytes
    assert dense == 2 * KV_HEADS * D * 2
    assert Shifted(beside).request_bytes(100, 0) == 100 * 10 + 10 * dense
    assert Shifted(instead).request_bytes(100, 0) == 90 * 10 + 10 * dense
    assert Shifted(instead).request_bytes(7, 0) == 7 * dense
