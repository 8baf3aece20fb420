"""Bytes per token that differ between layers.

Symptom: a backend can declare its page size only alike for all layers.
Cause: `AttentionBackend.customize_spec(spec)` does not know the layer.
Remove when: vLLM offers a hook with the layer (`per-layer-cache-spec.patch` under `patches/`).
"""

from collections.abc import Callable
from typing import Any

from vllm_attentionpack.compat.wrap import wrap_method

#: `customize_layer_spec(layer, spec, vllm_config) -> spec`, a class method of a backend.
HOOK = "customize_layer_spec"


def install() -> None:
    """Lets `Attention.get_kv_cache_spec` ask the layer's backend. Idempotent.

    Imports vLLM's attention layer: call it where a model is about to be built.
    """
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backend import AttentionBackend

    if hasattr(AttentionBackend, HOOK):
        return
    wrap_method(Attention, "get_kv_cache_spec", _make)


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_kv_cache_spec(self: Any, vllm_config: Any) -> Any:
        spec = original(self, vllm_config)
        hook = getattr(self.attn_backend, HOOK, None)
        if spec is None or hook is None:
            return spec
        return hook(self, spec, vllm_config)

    return get_kv_cache_spec
