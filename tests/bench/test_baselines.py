"""The attention of others, called as the installed vLLM wants it, on tensors that hold no data."""

import inspect

import pytest
import torch

from vllm_attentionpack.bench import baselines
from vllm_attentionpack.bench.shapes import LayerShape

pytest.importorskip("triton")
META = torch.device("meta")
LAYER = LayerShape(8, 2, 64, 2, 8)


@pytest.fixture
def calls(monkeypatch):
    """Arguments by name of what was called in vLLM, whose functions do nothing."""
    from vllm.v1.attention.ops import triton_turboquant_decode, triton_unified_attention

    found = []

    def stand_in(module, name):
        signature = inspect.signature(getattr(module, name))

        def note(*args, **kwargs):
            found.append((name, signature.bind(*args, **kwargs).arguments))

        monkeypatch.setattr(module, name, note)

    stand_in(triton_unified_attention, "unified_attention")
    stand_in(triton_turboquant_decode, "triton_turboquant_decode_attention")
    return found


def once(step):
    step()
    return 1.0


def test_decode_by_what_is_there(calls):
    found = baselines.decode(LAYER, 3, 100, META, torch.bfloat16, once)
    ran = [name for name, seconds in found["dense"].items() if seconds == 1.0]
    assert ran == [
        "torch sdpa",
        "torch sdpa, heads packed",
        "vllm triton",
        "vllm triton, 16 splits",
    ]
    assert found["turboquant"] == {"vllm turboquant": 1.0}
    # What is not installed here is told by name.
    assert "ModuleNotFoundError" in found["dense"]["xformers split-k"]
    assert set(found["fp8"]) == {"vllm flash-attention 3", "flashinfer"}
    plain, split, turboquant = (given for _, given in calls)
    assert plain["k"].shape == (21, 16, 2, 64) and plain["block_table"].shape == (3, 7)
    assert "seq_threshold_3D" not in plain
    assert split["softmax_segm_output"].shape == (3, 8, 16, 64)
    # 4 bits for a key or value dim, a norm, a scale and a zero point of 16 bits each.
    assert turboquant["kv_cache"].shape == (21, 16, 2, 64 + 6)


def test_prefill_with_and_without_a_context():
    for context in (0, 50):
        found = baselines.prefill(LAYER, context, 20, META, torch.bfloat16, once)
        assert found["torch sdpa"] == 1.0
        assert isinstance(found["vllm flash-attention"], str)
