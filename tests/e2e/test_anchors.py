"""Keys that are stored relative to anchors, in the engine."""

import pytest
import torch

from tests.support.engines import compacted
from tests.support.outputs import agreement, token_ids
from tests.support.packs import identity_pack
from tests.support.reference import MODEL
from vllm_attentionpack.attention.dense_prefill import DensePrefill
from vllm_attentionpack.codec.positions import Anchors, Rotary
from vllm_attentionpack.ops.spans import StepSpans
from vllm_attentionpack.packfile import save_pack

pytestmark = pytest.mark.engine

#: Neither of whole blocks nor whole parts of one, and so short that keys are rebuilt.
SPANS = [40, 3]
#: Of tokens: several chunks to a prompt, which begin and end within spans.
CHUNK = 72


@pytest.fixture
def anchored(dense, tmp_path):
    """Makes packs that keep bfloat16 keys and values, keys turned back."""

    def make(span, pre_rope=0):
        rotary = Rotary(10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32))
        path = tmp_path / "anchored.safetensors"
        anchors = Anchors(rotary, span, pre_rope)
        save_pack(identity_pack(dense.fingerprint, dense.layer_names, anchors=anchors), path)
        return path

    return make


def answers(engine, prompts, greedy, **options):
    with engine.at_most(CHUNK):
        return engine.generate(prompts, greedy, **options)


@pytest.mark.parametrize(
    ("span", "pre_rope", "exact", "exact_prefill"),
    [
        (SPANS[0], 0, {}, False),
        (SPANS[0], 0, {"sinks": 4, "window": 24}, True),
        (SPANS[0], 9, {}, False),
        (SPANS[0], 9, {"sinks": 4, "window": 24}, True),
        (SPANS[1], 0, {"sinks": 4, "window": 24}, False),
        (SPANS[1], 0, {}, True),
    ],
)
def test_answers_are_those_of_keys_as_they_come(
    engines, dense, anchored, greedy, span, pre_rope, exact, exact_prefill, monkeypatch
):
    met = []
    attend = StepSpans.attend

    def record(self, *args):
        met.append(self.anchors.shape[1])
        return attend(self, *args)

    monkeypatch.setattr(StepSpans, "attend", record)
    section = compacted(anchored(span, pre_rope), exact_prefill=exact_prefill, **exact)
    engine = engines.get(MODEL, block_size=16, dtype="float32", **section)
    prompts, want = dense.prompts[::2], dense.outputs[::2]
    cold = answers(engine, prompts, greedy)
    assert max(met) > 5
    # Stored keys are rounded to bfloat16 after they were turned.
    found = agreement(want, cold)
    assert found.share >= 0.97
    assert all(gap <= 0.25 for gap in found.gaps)
    warm = answers(engine, prompts, greedy, keep_cache=True)
    assert sum(output.num_cached_tokens for output in warm) > 0
    assert agreement(cold, warm).share >= 0.99


@pytest.mark.parametrize("pre_rope", [0, 9])
@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="needs AVX-512")
def test_dense_prefill_turns_keys_to_where_they_stood(
    engines, dense, anchored, greedy, pre_rope, monkeypatch
):
    contexts = []
    attend = DensePrefill.attend

    def record(self, step, *args):
        contexts.extend(step.contexts)
        return attend(self, step, *args)

    monkeypatch.setattr(DensePrefill, "attend", record)
    lengths = [len(output.prompt_token_ids) for output in dense.outputs]
    prompts = [p for p, n in zip(dense.prompts, lengths, strict=True) if n > 2 * CHUNK][:12]
    stock = answers(engines.get(MODEL, dtype="bfloat16"), prompts, greedy)
    section = compacted(anchored(SPANS[0], pre_rope), prefill="dense")
    engine = engines.get(MODEL, dtype="bfloat16", block_size=16, **section)
    found = agreement(stock, answers(engine, prompts, greedy))
    assert max(contexts) > 2 * SPANS[0]
    assert found.share >= 0.9
    assert all(gap <= 0.2 for gap in found.gaps)


def test_contexts_within_a_span_are_served_as_ever(engines, dense, anchored, exact_pack, greedy):
    """The first anchor is position 0: nothing is turned."""
    short = dense.prompts[:10]
    plain, anchored = (
        engines.get(MODEL, block_size=16, dtype="float32", **compacted(pack)).generate(
            short, greedy
        )
        for pack in (exact_pack, anchored(512))
    )
    assert token_ids(plain) == token_ids(anchored)
    assert agreement(plain, anchored).noise == 0
