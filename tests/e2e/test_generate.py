"""Answers from compacted pages against those of stock vLLM, on held-out questions."""

import pytest

from tests.support.engines import compacted
from tests.support.outputs import agreement
from tests.support.reference import MODEL, accuracy
from vllm_attentionpack.packfile import read_header

pytestmark = pytest.mark.engine

#: Logits of 16 to 32 in bfloat16 are an eighth apart: a smaller preference is a tie.
ONE_STEP = 0.125


def test_there_are_enough_questions_of_both_kinds(dense):
    assert len(dense.questions) >= 100
    assert min(sum(q.visual == kind for q in dense.questions) for kind in (True, False)) >= 30
    assert accuracy(dense.questions, dense.outputs) > 0.9


@pytest.mark.parametrize("exact_prefill", [True, False])
def test_exact_pages_give_the_dense_answers(engines, dense, exact_pack, greedy, exact_prefill):
    engine = engines.get(MODEL, **compacted(exact_pack, exact_prefill=exact_prefill))
    outputs = engine.generate(dense.prompts, greedy)

    found = agreement(dense.outputs, outputs)
    assert all(gap <= ONE_STEP for gap in found.gaps)
    assert found.share >= 0.99
    assert found.noise <= ONE_STEP


def test_pages_that_are_not_read_would_show(engines, dense, exact_pack, greedy):
    """The comparison above can fail."""
    engine = engines.get(MODEL, **compacted(exact_pack, exact_prefill=False))
    some = slice(0, 10)
    with engine.forgetting():
        outputs = engine.generate(dense.prompts[some], greedy)

    assert agreement(dense.outputs[some], outputs).share < 0.5


def test_a_byte_for_every_dim_gives_the_dense_answers(engines, dense, calibrated, greedy):
    header = read_header(calibrated.largest)
    groups = [group for layout in header.layouts() for group in layout.groups]
    for group in groups:  # both heads of 64 dims
        assert (group.key.bytes_per_token, group.value.bytes_per_token) == (128, 128)
    assert any(group.key.n12 for group in groups)

    engine = engines.get(MODEL, **compacted(calibrated.largest))
    outputs = engine.generate(dense.prompts, greedy)

    assert agreement(dense.outputs, outputs).share >= 0.99


@pytest.mark.parametrize("exact", [{}, {"sinks": 4, "window": 24}], ids=str)
def test_joint_keys_and_values_give_the_dense_answers_at_8x(
    engines, dense, joint_kv_pack, greedy, exact
):
    header = read_header(joint_kv_pack)
    assert all(layout.joint_kv for layout in header.layouts())
    assert header.compression_ratio >= 8
    section = compacted(joint_kv_pack, exact_prefill=False, **exact)
    engine = engines.get(MODEL, block_size=16, **section)
    outputs = engine.generate(dense.prompts, greedy)

    found = agreement(dense.outputs, outputs)
    assert found.share >= 0.98
    assert found.noise > 0.01  # zero would mean that pages were not compacted
    warm = engine.generate(dense.prompts[::4], greedy, keep_cache=True)
    assert sum(output.num_cached_tokens for output in warm) > 0
    assert agreement(outputs[::4], warm).share >= 0.98


@pytest.mark.parametrize("exact_prefill", [True, False])
def test_eightfold_compaction_costs_at_most_three_points(
    engines, dense, calibrated, greedy, exact_prefill
):
    engine = engines.get(MODEL, **compacted(calibrated.eightfold, exact_prefill=exact_prefill))
    outputs = engine.generate(dense.prompts, greedy)

    lost = accuracy(dense.questions, dense.outputs) - accuracy(dense.questions, outputs)
    assert lost <= 0.03
    # Bit-equal log-probabilities would mean that pages were not compacted.
    assert agreement(dense.outputs, outputs).noise > ONE_STEP
    assert read_header(calibrated.eightfold).compression_ratio >= 8
