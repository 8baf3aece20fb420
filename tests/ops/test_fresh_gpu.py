"""Attention among new tokens by providers, as far as they run without a GPU."""

import pytest
import torch

from vllm_attentionpack.attention.prefill import select_prefill
from vllm_attentionpack.errors import ConfigError
from vllm_attentionpack.ops import QueryBatch, fresh_attention
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
