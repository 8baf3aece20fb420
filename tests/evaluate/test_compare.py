"""The figures of an evaluation from hand-made answers."""

import math

import numpy as np
import pytest

from vllm_attentionpack.evaluate.answers import Answers, Scored
from vllm_attentionpack.evaluate.compare import compare, kl_divergence
from vllm_attentionpack.evaluate.data import ChatItem, TextItem
from vllm_attentionpack.evaluate.run import Evaluation


def scored(probabilities, target=0):
    """One position; all tokens, or only the likeliest of them."""
    p = np.asarray(probabilities)
    order = np.argsort(-p)
    return Scored(np.log(p[[target]]), order[None], np.log(p[order])[None])


def top(full, k):
    return Scored(full.target, full.token_ids[:, :k], full.logprobs[:, :k])


P = [0.5, 0.2, 0.15, 0.1, 0.05]
Q = [0.3, 0.4, 0.1, 0.15, 0.05]
EXACT = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))


def test_divergence_of_whole_distributions_is_exact():
    assert kl_divergence(scored(P), scored(Q))[0] == pytest.approx(EXACT)
    assert kl_divergence(scored(P), scored(P))[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_divergence_of_the_likeliest_tokens_never_overstates(k):
    found = kl_divergence(top(scored(P), k), top(scored(Q), k))[0]
    assert 0 <= found <= EXACT + 1e-12
    if k == 4:
        assert found == pytest.approx(EXACT)  # one token left: it is the rest


def test_divergence_without_a_common_token_is_zero_information_not_a_crash():
    a = Scored(np.log([0.5]), np.array([[0]]), np.log([[0.5]]))
    b = Scored(np.log([0.5]), np.array([[1]]), np.log([[0.5]]))
    assert kl_divergence(a, b)[0] == 0.0


def chat(answer):
    return ChatItem((("user", "?"),), answer, {}, 1)


ITEMS = [chat("7"), chat("red"), TextItem("abc", {}, 3), ChatItem((("user", "?"),), None, {}, 4)]
DENSE = Answers(["7", "blue", None, None], [scored(P), scored(P), scored(P), None], 100)
PACKED = Answers([" 7", "red", None, None], [scored(P), scored(Q), scored(Q, 1), None], 800)


def test_comparison_counts_what_it_says():
    found = compare(ITEMS, DENSE, PACKED, range(4))
    assert found.n == 4 and found.tokens == 3
    assert found.accuracy_dense == 0.5 and found.accuracy == 1.0
    assert found.answer_agreement == 0.0  # ' 7' is not the same text as '7', though both are right
    assert found.kl == pytest.approx(2 * EXACT / 3)
    assert found.top1_agreement == pytest.approx(1 / 3)
    assert found.ppl_dense == pytest.approx(2.0)
    assert found.ppl == pytest.approx((1 / (0.5 * 0.3 * 0.4)) ** (1 / 3))


def test_groups_without_the_kind_have_no_figure():
    text = compare(ITEMS, DENSE, PACKED, [2])
    assert text.accuracy is None and text.answer_agreement is None and text.kl is not None
    empty = compare(ITEMS, DENSE, PACKED, [3])
    assert empty.kl is None and empty.ppl is None and empty.n == 1 and empty.tokens == 0


def test_evaluation_round_trips_through_json():
    import json

    overall = compare(ITEMS, DENSE, PACKED, range(4))
    before = Evaluation(
        overall=overall,
        groups={"kind=x": overall},
        ratio=8.0,
        bytes_per_token={"dense": 8, "packed": 1},
        kv_tokens={"dense": 100, "packed": 800},
    )
    fields = json.loads(before.to_json())
    assert fields["kl"] == overall.kl and fields["n"] == 4
    assert Evaluation.from_json(fields) == before
