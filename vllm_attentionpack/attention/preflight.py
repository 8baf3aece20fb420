"""Checks of the whole configuration before vLLM starts its processes.

Only what a configuration can tell; what needs the model (layer names, a logits soft cap) is checked
where its layers are built.
"""

import logging
from typing import Any

from vllm import envs

from vllm_attentionpack.attention.fingerprint import check_fingerprint, fingerprint
from vllm_attentionpack.codec.layout import BLOCK_SIZE_MULTIPLE
from vllm_attentionpack.compat import rope_positions
from vllm_attentionpack.compat.selection import PER_KIND_OPTION
from vllm_attentionpack.config import serve_config
from vllm_attentionpack.errors import ConfigError, UnsupportedModelError
from vllm_attentionpack.packfile import PackHeader, read_header
from vllm_attentionpack.packfile.shard import check_shardable
from vllm_attentionpack.plugin import BACKEND, FULL_ATTENTION

logger = logging.getLogger("vllm.attentionpack")

_SLIDING, _CHUNKED = "sliding_attention", "chunked_attention"
_SLIDING_KIND = "sliding_window"
#: The op that calls `AttentionPackImpl.do_kv_cache_update`.
_CACHE_UPDATE = "vllm::unified_kv_cache_update"
_CAPTURED = (
    "piecewise CUDA graphs would capture how new tokens are stored "
    "(VLLM_USE_BREAKABLE_CUDAGRAPH, use_inductor_graph_partition or splitting_ops)"
)


def check(vllm_config: Any) -> None:
    """Checks a configuration that selects the compacting backend. Reads the pack's header only.

    Raises:
        ConfigError: an option of vLLM or of this package that cannot be combined with it.
        PackFileError: no readable pack.
        PackMismatchError: the pack belongs to another model or parallel degree.
        UnsupportedModelError: attention that cannot be served from a compacted cache.
    """
    config = serve_config(vllm_config.additional_config)
    check_model(vllm_config)
    check_options(vllm_config)
    check_selection(vllm_config)
    header = read_header(config.pack)
    check_fingerprint(header.fingerprint, fingerprint(vllm_config.model_config), str(config.pack))
    check_shardable(header, vllm_config.parallel_config.tensor_parallel_size)
    if config.keeps_exact(header):
        check_exact_cache_options(vllm_config)
    if header.num_modalities == 2:
        check_modality_options(vllm_config)
    if 0 < header.anchor_span < vllm_config.model_config.max_model_len:
        check_anchor_options(vllm_config)
    _warn_about_context(vllm_config.model_config.max_model_len, header)
    _warn_about_connector(vllm_config.kv_transfer_config)


def check_model(vllm_config: Any) -> None:
    """Raises `UnsupportedModelError` for attention that is not causal full attention."""
    model = vllm_config.model_config
    reasons = {
        "multi-head latent attention (MLA), which already stores a compacted latent": model.use_mla,
        "an encoder and a decoder": model.is_encoder_decoder,
        "encoder-only attention, which keeps no KV cache": model.attn_type == "encoder_only",
        "no attention": model.attn_type == "attention_free",
        "state-space or linear-attention layers beside attention": model.is_hybrid,
        "ALiBi": model.uses_alibi,
        "attention in both directions between visual tokens": model.is_mm_prefix_lm,
        "chunked local attention": _CHUNKED in _layer_types(model),
        "a sliding window in every layer": vllm_config.cache_config.sliding_window is not None,
    }
    if found := [reason for reason, present in reasons.items() if present]:
        raise UnsupportedModelError(
            f"the model '{model.model}' ({model.architecture}) has {'; '.join(found)}. "
            f"{BACKEND} serves decoders with causal full attention; serve this model with another "
            "--attention-backend."
        )
    if _has_sliding_layers(model) and _selected_for_sliding(vllm_config.attention_config):
        raise UnsupportedModelError(
            f"the model '{model.model}' ({model.architecture}) mixes full attention with sliding "
            f"windows, and {BACKEND} is selected for both. Sliding-window layers keep their dense "
            f"cache; select it for the others only: {PER_KIND_OPTION} instead of "
            "--attention-backend."
        )


def check_options(vllm_config: Any) -> None:
    """Raises `ConfigError` for options that no pack can be combined with."""
    cache = vllm_config.cache_config
    parallel = vllm_config.parallel_config
    if cache.cache_dtype != "auto":
        raise ConfigError(
            f"the KV cache dtype is '{cache.cache_dtype}' (--kv-cache-dtype or the checkpoint's "
            f"quantization); with {BACKEND} it must be 'auto', because the pack decides how keys "
            "and values are stored. Drop --kv-cache-dtype; a checkpoint that prescribes a dtype "
            "cannot be served compacted."
        )
    if cache.block_size is not None and cache.block_size % BLOCK_SIZE_MULTIPLE:
        raise ConfigError(
            f"--block-size is {cache.block_size}; {BACKEND} needs a multiple of "
            f"{BLOCK_SIZE_MULTIPLE}, such as {_next_multiple(cache.block_size)}."
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, option)) > 1:
            raise ConfigError(
                f"--{option.replace('_', '-')} is {size}; {BACKEND} supports only 1. "
                "Use --tensor-parallel-size to spread a model over devices."
            )


def check_selection(vllm_config: Any) -> None:
    """Raises `ConfigError` where the backend is selected for none or for the wrong layers."""
    attention = vllm_config.attention_config
    kinds = attention.backend_per_kind
    if not _is_ours(kinds.get(FULL_ATTENTION, attention.backend)):
        chosen = ", ".join(f"{kind}: {backend.name}" for kind, backend in kinds.items())
        raise ConfigError(
            f"backend_per_kind ({chosen}) selects {BACKEND} for layers that it cannot serve and "
            "not for those with full attention, whose cache would stay dense. Select it with "
            f"--attention-backend {BACKEND} or {PER_KIND_OPTION}."
        )
    drafter = vllm_config.speculative_config
    if drafter is None or not drafter.uses_draft_kv_cache():
        return
    # vLLM hands backend_per_kind on to the drafter, but not --attention-backend.
    if _is_ours(kinds.get(FULL_ATTENTION, drafter.attention_backend)):
        raise ConfigError(
            f"{BACKEND} is selected for the layers that draft, too (speculative method "
            f"'{drafter.method}'), for which the pack has no codecs; they need a dense cache. "
            f"Select it with --attention-backend {BACKEND}, which they do not inherit, instead of "
            "backend_per_kind or the speculative config's attention_backend; or draft with 'ngram'."
        )


def check_exact_cache_options(vllm_config: Any) -> None:
    """Raises `ConfigError` where vLLM cannot give a layer two caches."""
    advice = 'Or keep no token exact: "window": 0 and "sinks": 0 in the attentionpack section.'
    drafter = vllm_config.speculative_config
    if drafter is not None and drafter.uses_draft_kv_cache():
        raise ConfigError(
            f"the speculative method '{drafter.method}' drafts with layers of its own, whose dense "
            "cache cannot lie beside both the compacted one and that of exact tokens. Draft with "
            f"'ngram'. {advice}"
        )
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ConfigError(
            "the hybrid KV cache manager is off (--disable-hybrid-kv-cache-manager, or a KV "
            "connector that does not support it), but exact tokens have a cache of their own "
            f"beside the compacted one. Leave it on. {advice}"
        )
    parallel = vllm_config.parallel_config
    layers = _layers_per_stage(vllm_config.model_config, parallel.pipeline_parallel_size)
    if len(set(layers)) > 1 and not _has_sliding_layers(vllm_config.model_config):
        raise ConfigError(
            f"--pipeline-parallel-size is {parallel.pipeline_parallel_size} and the stages have "
            f"{', '.join(map(str, layers))} layers, but the exact tokens of all stages share one "
            "kind of block, which holds those of equally many layers. Use a size that divides the "
            f"number of layers, {sum(layers)}. {advice}"
        )
    if parallel.use_ubatching:
        raise ConfigError(
            "micro-batching (--enable-dbo, --ubatch-size) is on, but exact tokens are looked up "
            f"once per step, not per micro-batch. Turn micro-batching off. {advice}"
        )


def check_modality_options(vllm_config: Any) -> None:
    """Raises `ConfigError` where vLLM cannot tell each layer which tokens are visual."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    advice = "Or calibrate with one basis for all tokens (modalities: 1)."
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(
            f"--pipeline-parallel-size is {parallel.pipeline_parallel_size} and the pack separates "
            "visual from text tokens, but only the first stage knows which are which. Use "
            f"--pipeline-parallel-size 1, and --tensor-parallel-size instead. {advice}"
        )
    if parallel.use_ubatching:
        raise ConfigError(
            "micro-batching (--enable-dbo, --ubatch-size) is on and the pack separates visual from "
            "text tokens, but micro-batches do not carry which are which. Turn micro-batching "
            f"off. {advice}"
        )
    if _captures_cache_update(compilation):
        raise ConfigError(
            f"{_CAPTURED}, and the pack separates visual from text tokens, which differ from step "
            "to step: a graph would store all as text. Leave these options out, or set "
            f"cudagraph_mode to FULL_DECODE_ONLY. {advice}"
        )


def check_anchor_options(vllm_config: Any) -> None:
    """Raises `ConfigError` where the anchors of a step's keys cannot be told."""
    advice = (
        "Or keep --max-model-len within the pack's anchor span, or calibrate with --anchor-span 0."
    )
    if reason := rope_positions.unsupported(vllm_config):
        raise ConfigError(f"the pack codes keys relative to anchors, but {reason}. {advice}")
    if vllm_config.parallel_config.use_ubatching:
        raise ConfigError(
            "micro-batching (--enable-dbo, --ubatch-size) is on and the pack codes keys relative "
            "to anchors, which are looked up once per step, not per micro-batch. Turn "
            f"micro-batching off. {advice}"
        )
    if _captures_cache_update(vllm_config.compilation_config):
        raise ConfigError(
            f"{_CAPTURED}, and the pack codes keys relative to anchors, which differ from step to "
            "step. Leave these options out, or set cudagraph_mode to FULL_DECODE_ONLY. "
            f"{advice}"
        )


def _captures_cache_update(compilation: Any) -> bool:
    return compilation.cudagraph_mode.has_piecewise_cudagraphs() and (
        envs.VLLM_USE_BREAKABLE_CUDAGRAPH or _CACHE_UPDATE not in (compilation.splitting_ops or ())
    )


def _layers_per_stage(model: Any, stages: int) -> list[int]:
    from vllm.distributed.utils import get_pp_indices

    layers = model.model_arch_config.total_num_hidden_layers
    bounds = [get_pp_indices(layers, stage, stages) for stage in range(stages)]
    return [stop - start for start, stop in bounds]


def _layer_types(model: Any) -> list[str]:
    return list(getattr(model.hf_text_config, "layer_types", None) or ())


def _has_sliding_layers(model: Any) -> bool:
    return model.get_sliding_window() is not None and _SLIDING in _layer_types(model)


def _selected_for_sliding(attention: Any) -> bool:
    return _is_ours(attention.backend_per_kind.get(_SLIDING_KIND, attention.backend))


def _is_ours(backend: Any) -> bool:
    return backend is not None and backend.name == BACKEND


def _next_multiple(size: int) -> int:
    return -(-size // BLOCK_SIZE_MULTIPLE) * BLOCK_SIZE_MULTIPLE


def _warn_about_context(max_model_len: int, header: PackHeader) -> None:
    if max_model_len > header.max_context:
        logger.warning(
            "max_model_len is %d, but the pack was calibrated for contexts up to %d tokens: "
            "quality beyond that is not calibrated. Pass --max-model-len %d, or calibrate with a "
            "larger max_context.",
            max_model_len,
            header.max_context,
            header.max_context,
        )


def _warn_about_connector(transfer: Any) -> None:
    if transfer is not None and transfer.kv_connector is not None:
        logger.warning(
            "the KV connector '%s' moves blocks of codes that only this pack can read, and does "
            "not know the pack: blocks that were stored with another one, or come from an engine "
            "with another one, are read as if they were of this one. Give each pack a store and "
            "peers of its own.",
            transfer.kv_connector,
        )
