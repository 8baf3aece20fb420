"""Start-up checks: every refusal names what was received, what is allowed and what to do."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.configurations import NAMES, PRINT, engine, model, refusal
from tests.support.packs import identity_pack, pack_of
from vllm_attentionpack.attention.fingerprint import check_fingerprint, fingerprint, rope_json
from vllm_attentionpack.attention.preflight import check
from vllm_attentionpack.codec.codec import identity_codec
from vllm_attentionpack.errors import (
    ConfigError,
    PackFileError,
    PackMismatchError,
    UnsupportedModelError,
    UnsupportedVersionError,
)
from vllm_attentionpack.packfile import Fingerprint, Pack, save_pack

REFERENCE = Path(__file__).parents[2] / "examples" / "reference-vlm" / "model"


def test_a_fitting_configuration_passes_without_a_word(pack, caplog):
    check(engine(pack))
    check(engine(pack, parallel_config={"tensor_parallel_size": 2, "pipeline_parallel_size": 2}))
    check(engine(pack, cache_config={"block_size": None}))
    assert not caplog.records


# The pack


def test_no_pack_is_configured(monkeypatch):
    monkeypatch.delenv("ATTENTIONPACK_PACK", raising=False)
    message = refusal(ConfigError, engine(None))
    assert "needs a pack and none is configured" in message and "--additional-config" in message


def test_the_pack_is_missing(tmp_path):
    message = refusal(PackFileError, engine(tmp_path / "absent"))
    assert "no pack file at" in message and "attentionpack calibrate" in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architecture", "Qwen2ForCausalLM"),
        ("num_query_heads", 16),
        ("num_kv_heads", 2),
        ("head_size", 64),
        ("num_layers", 1),
        ("rope", '{"rope_parameters": {"rope_theta": 500000}}'),
    ],
)
def test_the_pack_belongs_to_another_model(pack, field, value):
    arch = {
        "num_query_heads": "total_num_attention_heads",
        "num_kv_heads": "total_num_kv_heads",
        "head_size": "head_size",
        "num_layers": "total_num_hidden_layers",
    }
    other = model()
    if field == "architecture":
        other.architecture = value
    elif field == "rope":
        other.hf_text_config.rope_parameters = json.loads(value)["rope_parameters"]
    else:
        setattr(other.model_arch_config, arch[field], value)
    message = refusal(PackMismatchError, engine(pack, model=other))
    assert f"{field} is {getattr(PRINT, field)} in the pack and {value} in the model" in message
    assert str(pack) in message and "attentionpack calibrate" in message


def test_the_head_groups_do_not_divide_over_the_devices(pack):
    message = refusal(PackMismatchError, engine(pack, parallel_config={"tensor_parallel_size": 4}))
    assert "tensor_parallel_size is 4" in message and "allowed degrees are [1, 2]" in message


def test_contexts_beyond_the_calibrated_ones_get_a_warning(tmp_path, caplog):
    codec = identity_codec(4, 32, 2)
    path = tmp_path / "short.pack.safetensors"
    save_pack(pack_of(lambda _: codec, PRINT, NAMES, max_context=1024), path)
    with caplog.at_level(logging.WARNING, logger="vllm.attentionpack"):
        check(engine(path))
    assert "max_model_len is 2048" in caplog.text and "up to 1024 tokens" in caplog.text
    assert "not calibrated" in caplog.text and "--max-model-len 1024" in caplog.text


def test_connectors_do_not_know_the_pack(pack, caplog):
    transfer = SimpleNamespace(kv_connector="OffloadingConnector")
    with caplog.at_level(logging.WARNING, logger="vllm.attentionpack"):
        check(engine(pack, kv_transfer_config=transfer))
    assert "'OffloadingConnector' moves blocks of codes that only this pack can read" in caplog.text


# The model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_mla": True}, "multi-head latent attention (MLA)"),
        ({"is_encoder_decoder": True}, "an encoder and a decoder"),
        ({"attn_type": "encoder_only"}, "encoder-only attention"),
        ({"attn_type": "attention_free"}, "no attention"),
        ({"is_hybrid": True}, "state-space or linear-attention layers"),
        ({"uses_alibi": True}, "ALiBi"),
        ({"is_mm_prefix_lm": True}, "attention in both directions"),
        ({"text": {"layer_types": ["chunked_attention", "full_attention"]}}, "chunked local"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_model_attends_in_another_way(pack, changes, words):
    message = refusal(UnsupportedModelError, engine(pack, model=model(**changes)))
    assert f"'models/tiny' (LlamaForCausalLM) has {words}" in message
    assert "causal full attention" in message and "another --attention-backend" in message


def test_every_layer_has_a_sliding_window(pack):
    message = refusal(UnsupportedModelError, engine(pack, cache_config={"sliding_window": 512}))
    assert "a sliding window in every layer" in message


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}


def test_some_layers_have_a_sliding_window(pack):
    message = refusal(UnsupportedModelError, engine(pack, model=model(text=MIXED)))
    assert """--attention-config '{"backend_per_kind": {"full_attention": "ATTENTIONPACK"}}'""" in (
        message
    )


def test_the_full_attention_layers_of_a_mixed_model_may_be_selected(pack):
    chosen = {"full_attention": SimpleNamespace(name="ATTENTIONPACK")}
    attention = {"backend": None, "backend_per_kind": chosen}
    check(engine(pack, model=model(text=MIXED), attention_config=attention))
    check(engine(pack, model=model(text={**MIXED, "sliding_window": None})))


# Options


def test_another_cache_dtype(pack):
    message = refusal(ConfigError, engine(pack, cache_config={"cache_dtype": "fp8"}))
    assert "KV cache dtype is 'fp8'" in message and "must be 'auto'" in message
    assert "Drop --kv-cache-dtype" in message


def test_a_block_size_that_no_plane_fits(pack):
    message = refusal(ConfigError, engine(pack, cache_config={"block_size": 40}))
    assert "--block-size is 40" in message and "multiple of 16, such as 48" in message


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_context_parallelism(pack, kind):
    parallel = {f"{kind}_context_parallel_size": 2}
    message = refusal(ConfigError, engine(pack, parallel_config=parallel))
    assert f"--{kind}-context-parallel-size is 2" in message and "supports only 1" in message


def with_window(config: SimpleNamespace, **section: int) -> SimpleNamespace:
    config.additional_config["attentionpack"].update(section)
    return config


def test_exact_tokens_need_the_hybrid_manager(pack):
    scheduler = {"disable_hybrid_kv_cache_manager": True}
    check(engine(pack, scheduler_config=scheduler))  # the pack advises none
    for section in ({"window": 2}, {"sinks": 1}):
        config = with_window(engine(pack, scheduler_config=scheduler), **section)
        message = refusal(ConfigError, config)
        assert "hybrid KV cache manager is off" in message and "Leave it on" in message
        assert '"window": 0 and "sinks": 0' in message
        check(with_window(engine(pack), **section))
    check(with_window(engine(pack, scheduler_config=scheduler), window=1, sinks=0))


def test_exact_tokens_and_micro_batches(pack):
    config = with_window(engine(pack, parallel_config={"use_ubatching": True}), window=32)
    message = refusal(ConfigError, config)
    assert "micro-batching" in message and "exact tokens are looked up once per step" in message


def test_exact_tokens_and_pipeline_stages(pack):
    """A stage without a layer in some KV-cache group would end in an assertion of vLLM."""
    two, three = ({"pipeline_parallel_size": stages} for stages in (2, 3))
    check(with_window(engine(pack, parallel_config=two), window=32))
    check(engine(pack, parallel_config=three))  # the pack advises none
    message = refusal(ConfigError, with_window(engine(pack, parallel_config=three), window=32))
    assert "--pipeline-parallel-size is 3" in message and "1, 1, 0 layers" in message
    assert '"window": 0 and "sinks": 0' in message


def test_advice_of_the_pack_can_be_overruled(pack, tmp_path):
    header = identity_pack(PRINT, NAMES, heads_per_group=2).header
    advised = tmp_path / "advised.pack.safetensors"
    loaded = identity_pack(PRINT, NAMES, heads_per_group=2)
    save_pack(Pack(header.model_copy(update={"sinks": 4, "window": 32}), loaded.layers), advised)
    scheduler = {"disable_hybrid_kv_cache_manager": True}
    refusal(ConfigError, engine(advised, scheduler_config=scheduler))
    check(with_window(engine(advised, scheduler_config=scheduler), window=0, sinks=0))


NOTHING_FULL = [
    {
        "backend": None,
        "backend_per_kind": {"sliding_window": SimpleNamespace(name="ATTENTIONPACK")},
    },
    {
        "backend": SimpleNamespace(name="ATTENTIONPACK"),
        "backend_per_kind": {"full_attention": SimpleNamespace(name="FLASH_ATTN")},
    },
]


@pytest.mark.parametrize("attention", NOTHING_FULL)
def test_a_selection_that_compacts_nothing(pack, attention):
    """vLLM would serve every layer densely and say nothing."""
    message = refusal(ConfigError, engine(pack, attention_config=attention))
    assert "not for those with full attention, whose cache would stay dense" in message
    assert "--attention-backend ATTENTIONPACK" in message


def drafter(method: str, backend: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        method=method,
        uses_draft_kv_cache=lambda: method != "ngram",
        attention_backend=backend and SimpleNamespace(name=backend),
    )


def test_exact_tokens_and_layers_that_draft(pack):
    """vLLM's own words come once the drafter is loaded, and name neither."""
    check(engine(pack, speculative_config=drafter("draft_model")))  # the pack advises none
    check(with_window(engine(pack, speculative_config=drafter("ngram")), window=32))
    config = with_window(engine(pack, speculative_config=drafter("eagle3")), window=32)
    message = refusal(ConfigError, config)
    assert "'eagle3' drafts with layers of its own" in message and "'ngram'" in message
    assert '"window": 0 and "sinks": 0' in message


def test_layers_that_draft_are_not_in_the_pack(pack):
    chosen = {"full_attention": SimpleNamespace(name="ATTENTIONPACK")}
    inherited = {"backend": None, "backend_per_kind": chosen}
    for config in (
        engine(pack, speculative_config=drafter("eagle"), attention_config=inherited),
        engine(pack, speculative_config=drafter("draft_model", "ATTENTIONPACK")),
    ):
        message = refusal(ConfigError, config)
        assert "selected for the layers that draft" in message and "no codecs" in message
    check(engine(pack, speculative_config=drafter("ngram"), attention_config=inherited))
    check(engine(pack, speculative_config=drafter("eagle", "FLASH_ATTN")))


# The fingerprint


@pytest.mark.parametrize(
    "text",
    [
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "type": "mrope"}},
        {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e4, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 10000, "factor": None}},
    ],
)
def test_rope_is_canonical(text):
    assert rope_json(SimpleNamespace(**text)) == PRINT.rope


def test_rope_keeps_what_turns_heads_differently():
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    nested = {"full_attention": yarn, "sliding_attention": {"rope_theta": 1e4}}
    stated = [
        {},
        {"rope_theta": 1e4},
        {"rope_theta": 1e4, "rope_scaling": yarn},
        {"rope_parameters": yarn},
        {"rope_parameters": {**yarn, "factor": 2.0}},
        {"rope_parameters": nested},
        {"rope_parameters": yarn, "original_max_position_embeddings": 4096},
    ]
    texts = [rope_json(SimpleNamespace(**text)) for text in stated]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"rope_parameters": {"rope_theta": 8000}}),
        (
            {"rope_parameters": {"full_attention": {"factor": 2}}},
            {"rope_parameters": {"full_attention": {"factor": 2, "rope_theta": 8000}}},
        ),
    ],
)
def test_a_rotary_default_that_the_model_fills_in_is_no_difference(before, after):
    def with_rope(rope):
        return PRINT.model_copy(update={"rope": json.dumps(rope)})

    check_fingerprint(with_rope(before), with_rope(after), "p")
    check_fingerprint(with_rope(after), with_rope(before), "p")
    different = with_rope({"rope_parameters": {"rope_theta": 9000}})
    with pytest.raises(PackMismatchError):
        check_fingerprint(different, with_rope({"rope_parameters": {"rope_theta": 8000}}), "p")


def test_a_pack_may_cover_some_of_the_layers():
    check_fingerprint(PRINT, PRINT.model_copy(update={"num_layers": 6}), "p")


# In vLLM


@pytest.fixture
def engine_config(monkeypatch):
    """`EngineArgs.create_engine_config` for the reference model; vLLM's own configuration."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_attentionpack.plugin import register

    monkeypatch.delenv("ATTENTIONPACK_PACK", raising=False)
    register()
    return lambda **options: EngineArgs(
        str(REFERENCE), max_model_len=256, enforce_eager=True, **options
    ).create_engine_config()


@pytest.mark.slow
def test_the_reference_model_is_checked_at_start_up(engine_config, tmp_path):
    config = engine_config()
    found = fingerprint(config.model_config)
    assert found == Fingerprint(
        architecture="Qwen2VLForConditionalGeneration",
        num_layers=4,
        num_query_heads=4,
        num_kv_heads=2,
        head_size=64,
        rope='{"rope_parameters": {"mrope_section": [8, 12, 12], "rope_theta": 10000}}',
    )
    good, bad = tmp_path / "good", tmp_path / "bad"
    names = [f"language_model.model.layers.{i}.self_attn.attn" for i in range(4)]
    save_pack(identity_pack(found, names), good)
    save_pack(identity_pack(PRINT, NAMES), bad)

    def serve(pack: Path, **options: Any) -> Any:
        section = {"attentionpack": {"pack": str(pack)}}
        return engine_config(additional_config=section, **options)

    config = serve(good, attention_backend="ATTENTIONPACK")
    assert config.attention_config.backend.name == "ATTENTIONPACK"
    with pytest.raises(PackMismatchError, match="architecture is LlamaForCausalLM in the pack"):
        serve(bad, attention_backend="ATTENTIONPACK")
    with pytest.raises(ConfigError, match="KV cache dtype is 'fp8'"):
        serve(good, attention_backend="ATTENTIONPACK", kv_cache_dtype="fp8")
    with pytest.raises(PackMismatchError):
        serve(bad, attention_config={"backend_per_kind": {"full_attention": "ATTENTIONPACK"}})


@pytest.mark.slow
def test_a_section_without_the_backend_gets_a_warning(engine_config, caplog):
    """Nothing else would say that the cache is dense."""
    section = {"attentionpack": {"pack": "absent"}}
    with caplog.at_level(logging.WARNING, logger="vllm.attentionpack"):
        assert engine_config(additional_config=section).attention_config.backend is None
        assert "the KV cache is dense" in caplog.text
        assert "--attention-backend ATTENTIONPACK" in caplog.text
        caplog.clear()
        engine_config()
        engine_config(additional_config=section, attention_backend="ATTENTIONPACK_STATS")
    assert "dense" not in caplog.text


@pytest.mark.slow
def test_a_missing_feature_is_loud_at_start_up(engine_config, monkeypatch):
    from vllm_attentionpack.compat import features

    monkeypatch.setitem(features._TO_SERVE, "Engine.flux", features._exists("vllm:Engine.flux"))
    assert engine_config().attention_config.backend is None
    with pytest.raises(UnsupportedVersionError, match=r"lacks Engine\.flux"):
        engine_config(attention_backend="ATTENTIONPACK")
