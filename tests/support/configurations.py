"""Configurations of vLLM that select the compacting backend, and packs that fit them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config.compilation import CompilationConfig, CUDAGraphMode

from vllm_attentionpack.attention.preflight import check
from vllm_attentionpack.packfile import Fingerprint

ROPE = {"rope_parameters": {"rope_theta": 10000}}
PRINT = Fingerprint(
    architecture="LlamaForCausalLM",
    num_layers=2,
    num_query_heads=8,
    num_kv_heads=4,
    head_size=32,
    rope=json.dumps(ROPE),
)
NAMES = ["model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"]


def model(**changes: Any) -> SimpleNamespace:
    """vLLM's configuration of a model that `PRINT` fits."""
    text = {"layer_types": ["full_attention"] * 2, **ROPE, **changes.pop("text", {})}
    sliding_window = text.pop("sliding_window", None)
    return SimpleNamespace(
        **{
            "model": "models/tiny",
            "architecture": "LlamaForCausalLM",
            "model_arch_config": SimpleNamespace(
                total_num_hidden_layers=2,
                total_num_attention_heads=8,
                total_num_kv_heads=4,
                head_size=32,
            ),
            "hf_text_config": SimpleNamespace(**text),
            "max_model_len": 2048,
            "use_mla": False,
            "is_encoder_decoder": False,
            "attn_type": "decoder",
            "is_hybrid": False,
            "uses_alibi": False,
            "is_mm_prefix_lm": False,
            "uses_mrope": False,
            "get_sliding_window": lambda: sliding_window,
            **changes,
        }
    )


def engine(pack: Path | None, **sections: Any) -> SimpleNamespace:
    """A configuration that selects the backend; `sections` change its parts."""
    chosen = SimpleNamespace(name="ATTENTIONPACK")
    parts: dict[str, dict[str, Any]] = {
        "cache_config": {"cache_dtype": "auto", "block_size": 128, "sliding_window": None},
        "parallel_config": {
            "tensor_parallel_size": 1,
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "use_ubatching": False,
        },
        "scheduler_config": {"disable_hybrid_kv_cache_manager": False},
        "attention_config": {"backend": chosen, "backend_per_kind": {}},
        "compilation_config": {
            "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
            "splitting_ops": [*CompilationConfig._attention_ops, "vllm::unified_kv_cache_update"],
        },
    }
    return SimpleNamespace(
        additional_config={"attentionpack": {"pack": str(pack)}} if pack else {},
        model_config=sections.pop("model", model()),
        speculative_config=sections.pop("speculative_config", None),
        kv_transfer_config=sections.pop("kv_transfer_config", None),
        **{
            name: SimpleNamespace(**{**values, **sections.get(name, {})})
            for name, values in parts.items()
        },
    )


def refusal(kind: type[Exception], config: SimpleNamespace) -> str:
    with pytest.raises(kind) as raised:
        check(config)
    assert type(raised.value) is kind
    return str(raised.value)
