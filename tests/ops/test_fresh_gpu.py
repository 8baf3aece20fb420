"""Attention among new tokens by providers, as far as they run without a GPU."""

import ast
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.v1.attention.backends import fa_utils

from vllm_attentionpack.attention import prefill
from vllm_attentionpack.attention.prefill import select_prefill
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops import QueryBatch, fresh, fresh_attention, fresh_gpu
from vllm_attentionpack.ops.fresh_gpu import single_tokens

CPU = torch.device("cpu")


def test_single_tokens_see_themselves():
    query, key, value = (torch.randn(5, heads, 16) for heads in (6, 2, 2))
    batch = QueryBatch.build(list(range(6)), [9] * 5, CPU)
    out, lse = single_tokens(query, key, value, 0.3)
    want, want_lse = fresh_attention(query, key, value, batch, 0.3)
    assert torch.allclose(out, want, atol=1e-6)
    assert torch.allclose(lse, want_lse, atol=1e-5)


def test_the_choice_is_checked_when_the_engine_starts():
    half, full = torch.bfloat16, torch.float32
    fastest = "dense" if torch.cpu._is_avx512_supported() else "sdpa"
    assert select_prefill("auto", CPU, half, 64) == (fastest, fresh_attention)
    assert select_prefill("sdpa", CPU, half, 64) == ("sdpa", fresh_attention)
    assert select_prefill("auto", CPU, full, 64) == ("sdpa", fresh_attention)
    with pytest.raises(ConfigError, match="allowed: auto, flash_attn, xformers, sdpa, dense"):
        select_prefill("fastest", CPU, half, 64)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        select_prefill("xformers", CPU, half, 64)
    with pytest.raises(ConfigError, match="it is for bfloat16"):
        select_prefill("dense", CPU, full, 64)
    with pytest.raises(ConfigError, match="is for CPUs"):
        select_prefill("dense", torch.device("cuda"), half, 64)
    with pytest.raises(ConfigError, match="cannot be used"):
        select_prefill("xformers", torch.device("cuda"), full, 64)


class TestProviders:
    """Libraries of a GPU, each stood for by something that runs here and has its contract."""

    def check(self, provider):
        query, key, value = (
            torch.randn(12, heads, 16, dtype=torch.bfloat16) for heads in (6, 2, 2)
        )
        batch = QueryBatch.build([0, 4, 4, 5, 12], [9] * 4, CPU)
        out, lse = provider(query, key, value, batch, 0.3)
        want, want_lse = fresh_attention(query, key, value, batch, 0.3)
        assert out.shape == want.shape and lse.shape == want_lse.shape
        assert (out.float() - want).abs().max().item() < 0.02
        assert (lse - want_lse).abs().max().item() < 0.01

    def test_pytorch(self, monkeypatch):
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
        self.check(fresh_gpu.sdpa)

    @pytest.mark.parametrize("packed", [True, False])
    def test_xformers(self, packed, monkeypatch):
        """Its flash attention returns the log-sum-exp packed, its CUTLASS kernel padded rows."""

        def mask(lengths, *, device):
            assert device == CPU and 0 not in lengths
            return lengths

        def attend(query, key, value, attn_bias, scale):
            assert query.shape == key.shape == value.shape == (1, 12, 6, 16)
            starts = [0, *itertools.accumulate(attn_bias)]
            batch = QueryBatch.build(starts, attn_bias, CPU)
            out, lse = fresh_attention(query[0], key[0], value[0], batch, scale)
            if packed:
                return out[None].to(query.dtype), lse.T[None]
            rows = torch.full((len(attn_bias), 6, 32), float("nan"))
            for row, start, length in zip(rows, starts, attn_bias, strict=False):
                row[:, :length] = lse[start : start + length].T
            return out[None].to(query.dtype), rows

        fmha = SimpleNamespace(
            attn_bias=SimpleNamespace(BlockDiagonalCausalMask=SimpleNamespace(from_seqlens=mask)),
            memory_efficient_attention_forward_requires_grad=attend,
        )
        library = SimpleNamespace(fmha=fmha)
        monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=library))
        monkeypatch.setitem(sys.modules, "xformers.ops", library)
        self.check(fresh_gpu.xformers)

    def test_flash_attention_of_vllm(self, monkeypatch):
        """Called as the function of the installed vLLM wants it, which cannot be imported here."""
        source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
        (names,) = (
            [argument.arg for argument in node.args.args]
            for node in ast.parse(source.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == "flash_attn_varlen_func"
        )

        def attend(*args, **kwargs):
            given = dict(zip(names, args, strict=False)) | kwargs
            assert set(given) <= set(names)
            assert given["causal"] and given["return_softmax_lse"] and given["fa_version"] == 3
            assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (7, 7)
            starts = given["cu_seqlens_q"].tolist()
            batch = QueryBatch.build(starts, starts[1:], CPU)
            out, lse = fresh_attention(
                given["q"], given["k"], given["v"], batch, given["softmax_scale"]
            )
            return out.to(given["q"].dtype), lse.T

        library = SimpleNamespace(flash_attn_varlen_func=attend)
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", library)
        monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda head_size: 3)
        self.check(prefill.PROVIDERS["flash_attn"][0])


def test_the_first_library_that_is_there_is_taken(monkeypatch):
    """On a GPU: flash attention, then xformers, then PyTorch; single tokens need none of them."""
    there = {"flash_attn": "no", "xformers": "no", "sdpa": None}
    for name, (function, _) in dict(prefill.PROVIDERS).items():
        monkeypatch.setitem(prefill.PROVIDERS, name, (function, lambda name=name: there[name]))
    cuda = torch.device("cuda")
    found = []
    for name in ("sdpa", "xformers", "flash_attn"):
        there[name] = None
        chosen, attend = select_prefill("auto", cuda, torch.bfloat16, 64)
        found.append(chosen)
    assert found == ["sdpa", "xformers", "flash_attn"]
    assert select_prefill("sdpa", cuda, torch.bfloat16, 64)[0] == "sdpa"
    assert select_prefill("auto", cuda, torch.float32, 64)[0] == "sdpa"
    query, key, value = (torch.randn(5, heads, 16) for heads in (6, 2, 2))
    batch = QueryBatch.build(list(range(6)), [9] * 5, CPU)
    out, _ = attend(query, key, value, batch, 0.3)
    assert torch.equal(out, single_tokens(query, key, value, 0.3)[0])


@pytest.mark.parametrize(("version", "chosen"), [(2, "flash_attn"), (None, "sdpa")])
def test_flash_attention_without_its_libraries_is_none(version, chosen, monkeypatch):
    """vLLM's Python part is there in every build and says what it can call."""
    library = SimpleNamespace(flash_attn_varlen_func=None)
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", library)
    monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda: version)
    monkeypatch.setattr(prefill, "find_spec", lambda name: None)
    assert select_prefill("auto", torch.device("cuda"), torch.bfloat16, 64)[0] == chosen


@pytest.mark.parametrize("most_logits", [1, 2 * 3 * 10 * 4, 1 << 26])
def test_plain_products_a_few_queries_at_a_time(most_logits):
    q, k, v = (torch.randn(2, 3, 10, 16) for _ in range(3))
    out, lse = fresh._by_products(q, k, v, 0.3, most_logits)
    want, want_lse = fresh._causal_with_lse(q, k, v, 0.3)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=0)


def test_plain_products_of_a_long_chunk_take_bounded_memory():
    """A float32 model on a GPU; on the meta device, which has the shapes only."""

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.seen = max(self.seen, out.numel())
            return out

    query, key = (torch.empty(8192, heads, 128, device="meta") for heads in (32, 8))
    loc = torch.empty(2, dtype=torch.int32, device="meta")
    batch = QueryBatch.build([0, 8192], [9000], torch.device("meta"), loc)
    with Largest() as largest:
        out, _ = fresh_gpu.sdpa(query, key, key, batch, 0.1)
    assert out.shape == query.shape
    assert largest.seen <= 1 << 26
