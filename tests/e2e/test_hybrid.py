"""Models that mix full with sliding-window attention: only the layers with the former compact."""

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.support.cases import random_codec
from tests.support.engines import TOKEN_IDS_ONLY, Engine, compacted
from tests.support.models import TOKENIZER, forced, random_prompts, save_text_model
from tests.support.outputs import agreement, prompt_logprobs
from tests.support.packs import identity_pack, pack_of
from vllm_attentionpack import plugin
from vllm_attentionpack.attention.fingerprint import fingerprint
from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.codec.layout import PlaneCounts
from vllm_attentionpack.compat.selection import PER_KIND_OPTION
from vllm_attentionpack.errors import UnsupportedModelError
from vllm_attentionpack.evaluate.run import evaluate
from vllm_attentionpack.packfile import save_pack

pytestmark = pytest.mark.engine

WINDOW = 32
BLOCK = 32
HEADS, HEAD_SIZE = 2, 64
MIXED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_SIZE,
    "query_pre_attn_scalar": HEAD_SIZE,
}
#: Every dim at 4 bits, both heads joint: 130 bytes per token instead of 512.
FOUR_BITS = PlaneCounts(n4=HEADS * HEAD_SIZE)
NEW_TOKENS = 16
ARGUMENTS = {"dtype": "float32", "block_size": BLOCK, **TOKEN_IDS_ONLY}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_text_model(tmp_path_factory.mktemp("gemma3"), "gemma3_text", **MIXED)


@pytest.fixture(scope="module")
def prompts():
    """Most of them longer than the window, the last than several blocks."""
    return random_prompts((5, 33, 70, 250))


@pytest.fixture(scope="module")
def dense(engines, model, prompts):
    """Outputs, fingerprint, layer names and capacity of stock vLLM."""
    engine = engines.get(model, **ARGUMENTS)
    outputs = engine.generate(prompts, forced(NEW_TOKENS))
    capacity = engine.cache_config.kv_cache_size_tokens
    return outputs, fingerprint(engine.llm.model_config), list(engine.kv_caches), capacity


@pytest.fixture(scope="module")
def packs(dense, tmp_path_factory):
    """Both cover the full-attention layers only, as calibration makes them."""
    _, found, names, _ = dense
    found = found.model_copy(update={"num_layers": 2})
    folder = tmp_path_factory.mktemp("packs")
    codec = random_codec(HEADS, HEADS, HEAD_SIZE, modalities=1, key=FOUR_BITS, value=FOUR_BITS)
    save_pack(identity_pack(found, names[1::2]), folder / "exact")
    save_pack(pack_of(lambda _: codec, found, names[1::2]), folder / "four_bits")
    return folder


def serve(engines, model, pack) -> Engine:
    """As `PER_KIND_OPTION` says it; every token is read from its code."""
    arguments = {**ARGUMENTS, **compacted(pack, exact_prefill=False)}
    backend = arguments.pop("attention_backend")
    per_kind = {"backend_per_kind": {"full_attention": backend}}
    return engines.get(model, attention_config=per_kind, **arguments)


def test_selected_for_all_layers_it_is_refused(engines, model, tmp_path):
    engines.close()
    with pytest.raises(UnsupportedModelError) as refusal:
        engines.get(model, **ARGUMENTS, **compacted(tmp_path / "any"))

    assert PER_KIND_OPTION in str(refusal.value)
    assert "full_attention" in PER_KIND_OPTION and plugin.BACKEND in PER_KIND_OPTION


def test_exact_pages_in_full_layers_give_the_dense_distribution(
    engines, model, dense, packs, prompts
):
    outputs, _, names, _ = dense
    engine = serve(engines, model, packs / "exact")
    assert list(engine.codecs) == names[1::2]
    dtypes = [engine.kv_caches[name].dtype for name in names]
    assert dtypes == [torch.float32, torch.uint8] * 2

    with engine.at_most(24):
        served = engine.generate(prompts, forced(NEW_TOKENS))
        with engine.forgetting():
            wrong = engine.generate(prompts, forced(NEW_TOKENS))

    expected = prompt_logprobs(outputs)
    effect = np.abs(prompt_logprobs(wrong) - expected).mean()
    error = np.abs(prompt_logprobs(served) - expected)
    assert effect > 0.3
    assert error.mean() < effect / 40
    found = agreement(outputs, served)
    assert found.agreed >= NEW_TOKENS
    assert all(gap < effect / 8 for gap in found.gaps)


def test_compaction_makes_room(engines, model, dense, packs):
    """Pages of one pool have one size: compacted blocks must hold more tokens, not padding."""
    _, _, names, capacity = dense
    engine = serve(engines, model, packs / "four_bits")
    sliding, full = (engine.kv_caches[name] for name in names[:2])
    page = full.stride(0) * full.element_size()

    # 2 heads x 64 dims x K and V in float32 are 1024 bytes: 7.9 times 130.
    assert page == sliding.stride(0) * sliding.element_size() == BLOCK * 1024
    assert tuple(full.shape[1:]) == (1, 7 * BLOCK, 130)
    # The sliding window's blocks are as many as ever.
    assert engine.cache_config.kv_cache_size_tokens > 1.5 * capacity
    (line,) = (text for text in engine.messages if "compacted KV cache" in text)
    assert "blocks shared with dense layers" in line and f"blocks of {7 * BLOCK})" in line


def test_compacted_blocks_of_more_tokens(engines, model, dense, packs, prompts):
    outputs, _, _, _ = dense
    engine = serve(engines, model, packs / "four_bits")
    whole = engine.generate(prompts, forced(NEW_TOKENS))
    with engine.at_most(24):
        chunked = engine.generate(prompts, forced(NEW_TOKENS))
    with engine.forgetting():
        wrong = engine.generate(prompts, forced(NEW_TOKENS))

    expected, given = prompt_logprobs(outputs), prompt_logprobs(whole)
    effect = np.abs(prompt_logprobs(wrong) - expected).mean()
    # A basis that knows nothing of the model, at 4 bits: far from exact, farther from useless.
    assert np.abs(given - expected).mean() < effect / 2
    assert np.abs(given - prompt_logprobs(chunked)).max() < 1e-3
    found = agreement(whole, chunked)
    assert found.agreed == found.tokens == len(prompts) * NEW_TOKENS


def test_prefix_hits_end_where_both_kinds_have_a_block(engines, model, packs, prompts):
    from vllm import SamplingParams

    engine = serve(engines, model, packs / "four_bits")
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, detokenize=False, ignore_eos=True
    )
    first = engine.generate(prompts, sampling)
    second = engine.generate(prompts, sampling, keep_cache=True)

    assert [output.num_cached_tokens for output in second] == [0, 0, 0, 7 * BLOCK]
    found = agreement(first, second)
    assert found.agreed == found.tokens and found.noise < 1e-3


def test_calibration_and_evaluation_take_its_full_layers(engines, tmp_path):
    """From the model to the figures, by the package's own tools."""
    engines.close()
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    model = save_text_model(tmp_path / "model", "gemma3_text", vocab_size=len(tokenizer), **MIXED)
    tokenizer.save_pretrained(model)
    data = tmp_path / "texts.txt"
    data.write_text("\n\n".join(f"{i} is a number, {i * i} is its square." * 12 for i in range(9)))
    target = tmp_path / "pack.safetensors"
    options = {"dtype": "float32", "max_model_len": 1024}
    pack = calibrate(str(model), data, 4.0, target, window=16, sinks=0, **options)
    assert [layer.name.split(".")[2] for layer in pack.header.layers] == ["1", "3"]
    found = evaluate(str(model), target, data, options)
    # two of four layers are stored at a quarter of their bytes; vLLM counts tokens of all layers
    assert found.kv_tokens["packed"] > found.kv_tokens["dense"] / 2
    assert 0 < found.overall.kl < 0.1
