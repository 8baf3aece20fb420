"""Which attention backend a layer gets.

Symptom: with `--attention-backend ATTENTIONPACK` on CPU the model is served dense.
Cause: `CpuPlatform.get_attn_backend_cls` logs that it cannot use the backend and returns its own;
    platforms that do honour it report refusals as a list of terse reasons.
Remove when: CPU honours an out-of-tree backend (`cpu-honour-selected-backend.patch` under
    `patches/`); what then remains here are the messages and the statistics backend.
"""

from collections.abc import Callable
from typing import Any

from vllm_attentionpack.codec.layout import BLOCK_SIZE_MULTIPLE
from vllm_attentionpack.compat import layer_spec, modality, rope_positions
from vllm_attentionpack.compat.features import check_features
from vllm_attentionpack.compat.wrap import wrap_method
from vllm_attentionpack.errors import UnsupportedModelError

#: How to compact only the full-attention layers of a model that mixes them with others.
PER_KIND_OPTION = (
    """--attention-config '{"backend_per_kind": {"full_attention": "ATTENTIONPACK"}}'"""
)

_SLIDING_WINDOW = "sliding window"
_EXPLANATIONS = {
    "MLA": "multi-head latent attention already stores a compacted latent",
    "sinks": "attention sinks add a logit that the compacted kernel does not have",
    "multimodal token full attention": "visual tokens of this model attend in both directions",
    "encoder_decoder": "cross-attention keys are not decoder keys",
    "kv_cache_dtype": "the pack decides how keys and values are stored; drop --kv-cache-dtype",
    "adaptive verification": "the length of each draft must be known on the host; switch "
    "enable_adaptive_verification off in --speculative-config",
    "block_size": f"--block-size must be a multiple of {BLOCK_SIZE_MULTIPLE}",
}


def install() -> None:
    """Wraps the platform's choice of attention backends. Idempotent."""
    from vllm.platforms import current_platform

    wrap_method(type(current_platform), "get_attn_backend_cls", _make)


def _make(original: Callable[..., str]) -> Callable[..., str]:
    def get_attn_backend_cls(
        cls: type,
        selected_backend: Any,
        attn_selector_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> str:
        from vllm_attentionpack.plugin import BACKEND, STATISTICS_BACKEND

        def default() -> str:
            return original(cls, None, attn_selector_config, *args, **kwargs)

        name = getattr(selected_backend, "name", None)
        if name not in (BACKEND, STATISTICS_BACKEND):
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        check_features()
        if _is_encoder(attn_selector_config):
            return default()
        layer_spec.install()
        modality.install()
        rope_positions.install()
        if name == STATISTICS_BACKEND:
            from vllm_attentionpack.calibrate.backend import statistics_backend_path

            return statistics_backend_path(default())
        _validate(cls, selected_backend, attn_selector_config)
        if _honours_selection(original):
            return original(cls, selected_backend, attn_selector_config, *args, **kwargs)
        return selected_backend.get_path()

    return get_attn_backend_cls


def _honours_selection(original: Callable[..., str]) -> bool:
    """Whether a platform's method looks at all at what an unknown backend can do."""
    code = getattr(original, "__code__", None)
    return code is not None and "validate_configuration" in code.co_names


def _is_encoder(config: Any) -> bool:
    """Encoder layers keep no KV cache; those of a multimodal model keep the platform's default.

    Models that are nothing but an encoder are refused by `attention.preflight`.
    """
    from vllm.v1.attention.backend import AttentionType

    return config.attn_type in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)


def _validate(platform: Any, selected_backend: Any, config: Any) -> None:
    """Asks the backend as the CUDA platform does; raises `UnsupportedModelError`."""
    reasons = selected_backend.get_class().validate_configuration(
        device_capability=platform.get_device_capability(), **config._asdict()
    )
    if reasons:
        raise UnsupportedModelError(refusal(reasons))


def refusal(reasons: list[str]) -> str:
    """One message from vLLM's reasons, with what each means and what to do."""
    told = []
    for reason in reasons:
        meaning = next((text for key, text in _EXPLANATIONS.items() if key in reason), None)
        told.append(f"{reason} ({meaning})" if meaning else reason)
    message = (
        "the attention backend ATTENTIONPACK cannot serve a layer of this model: "
        f"{'; '.join(told)}. "
    )
    if any(_SLIDING_WINDOW in reason for reason in reasons):
        return message + (
            "Sliding-window layers keep their dense cache; select the backend for the "
            f"full-attention layers only: {PER_KIND_OPTION} instead of --attention-backend."
        )
    return message + "Change what is named, or serve with another --attention-backend."
