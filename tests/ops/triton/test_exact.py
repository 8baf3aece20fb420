"""Attention to exact tokens and the merge of parts as GPU kernels against the reference."""

import pytest
import torch

from vllm_attentionpack.ops import QueryBatch, reference
from vllm_attentionpack.ops import triton as kernels
from vllm_attentionpack.ops.exact import ExactTokens

BLOCK = 4
SCALE = 0.2
CPU = torch.device("cpu")


def tokens_of(requests: int, most: int) -> ExactTokens:
    """Random places, some of them absent, the second request without any."""
    slots = torch.randperm(80 * BLOCK)[: requests * most].view(requests, most)
    present = torch.rand(slots.shape) < 0.7
    present[1] = False
    none = torch.zeros(requests, dtype=torch.int64)
    return ExactTokens(slots, present, none, none, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("heads", "repeats", "dims", "most"),
    [(2, 4, 128, 67), (1, 8, 80, 3), (2, 1, 96, 64), (1, 71, 64, 5), (1, 2, 256, 40)],
)
def test_exact_attention(dtype, heads, repeats, dims, most):
    """Decoding and chunks together; pages of several layers side by side; NaN where none is."""
    torch.manual_seed(0)
    fresh = [1, 1, 3, 0]
    starts = [0, *torch.tensor(fresh).cumsum(0).tolist()]
    batch = QueryBatch.build(starts, [200] * len(fresh), CPU)
    tokens = tokens_of(len(fresh), most)
    pages = torch.randn(80, BLOCK, 3, 2, heads, dims).to(dtype)[:, :, 1]
    absent = tokens.slots[~tokens.present]
    pages[absent // BLOCK, absent % BLOCK] = torch.nan
    query = torch.randn(starts[-1], heads * (repeats + 1), dims).to(dtype)[:, : heads * repeats]
    out, lse = kernels.exact_attention(query, pages, tokens, batch, SCALE)
    want, want_lse = reference.exact_attention(query, pages, tokens, batch, SCALE)
    assert want_lse.isneginf().any()
    loose = 2e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(lse, want_lse, atol=loose, rtol=0)
    torch.testing.assert_close(out, want, atol=loose * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("dims", [80, 128])
def test_merge(count, dims):
    """Parts over no key carry nothing, whatever their dtype and strides."""
    torch.manual_seed(0)
    tokens, heads = 7, 5
    parts = []
    for i in range(count):
        lse = torch.randn(heads, tokens).T
        lse[i], lse[5] = -torch.inf, -torch.inf
        out = torch.randn(tokens, heads, dims).to(torch.float16 if i else torch.float32)
        parts.append((out, lse))
    got, want = kernels.merge_attention(*parts), reference.merge_attention(*parts)
    assert want[1][5].isneginf().all() and not got[0][5].any()
    for found, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [1, 5])
def test_the_merge_refuses_what_it_would_drop(count):
    part = torch.zeros(2, 3, 64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"{count} parts"):
        kernels.merge_attention(*[part] * count)


def test_nothing_new():
    """A step of no tokens launches nothing."""
    batch = QueryBatch.build([0, 0], [1], CPU)
    pages = torch.zeros(1, BLOCK, 2, 1, 64)
    tokens = ExactTokens.empty(1, 4, 8, CPU)
    out, lse = kernels.exact_attention(torch.zeros(0, 2, 64), pages, tokens, batch, SCALE)
    assert out.shape == (0, 2, 64) and lse.shape == (0, 2)
    merged, _ = kernels.merge_attention((out, lse), (out, lse))
    assert merged.shape == (0, 2, 64)
