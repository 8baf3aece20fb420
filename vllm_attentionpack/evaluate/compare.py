"""Dense against compacted: divergence, agreement, perplexity, accuracy."""

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from vllm_attentionpack.evaluate.answers import Answers, Scored
from vllm_attentionpack.evaluate.data import ChatItem, Item


class Comparison(BaseModel):
    """Figures of one set of items; None where the set has nothing of the kind.

    Attributes:
        kl: mean KL divergence of the compacted from the dense next-token distribution, in nats
            per scored token.
        top1_agreement: share of scored tokens with the same likeliest token.
        ppl_dense: perplexity of the given tokens under the dense model.
        ppl: the same under the compacted one.
        accuracy_dense: share of generated answers that equal the given one, dense.
        accuracy: the same, compacted.
        answer_agreement: share of items with the same generated answer.
        n: items.
        tokens: scored tokens.
    """

    model_config = ConfigDict(frozen=True)

    kl: float | None
    top1_agreement: float | None
    ppl_dense: float | None
    ppl: float | None
    accuracy_dense: float | None
    accuracy: float | None
    answer_agreement: float | None
    n: int
    tokens: int


def kl_divergence(dense: Scored, compacted: Scored) -> np.ndarray:
    """KL(dense || compacted) at every scored position, in nats, float64 `[n]`.

    Exact where both engines report the whole vocabulary. Otherwise tokens that both report are
    taken one by one and all others as one outcome, which by the data-processing inequality never
    overstates the divergence.
    """
    n = len(dense.target)
    result = np.empty(n)
    for i in range(n):
        _, left, right = np.intersect1d(
            dense.token_ids[i], compacted.token_ids[i], assume_unique=True, return_indices=True
        )
        p, q = dense.logprobs[i][left], compacted.logprobs[i][right]
        divergence = float((np.exp(p) * (p - q)).sum())
        rest = [1.0 - float(np.exp(x).sum()) for x in (p, q)]
        if min(rest) > 1e-9:  # below that the rest is rounding
            divergence += rest[0] * math.log(rest[0] / rest[1])
        result[i] = max(divergence, 0.0)
    return result


def compare(
    items: Sequence[Item], dense: Answers, compacted: Answers, chosen: Sequence[int]
) -> Comparison:
    """The figures of the items whose indices are `chosen`."""
    pairs = [
        (a, b)
        for a, b in ((dense.scored[i], compacted.scored[i]) for i in chosen)
        if a is not None and b is not None
    ]
    asked = [i for i in chosen if dense.generated[i] is not None]
    kl = [kl_divergence(a, b) for a, b in pairs]
    same = [a.token_ids[:, 0] == b.token_ids[:, 0] for a, b in pairs]
    return Comparison(
        kl=_mean(kl),
        top1_agreement=_mean(same),
        ppl_dense=_perplexity([a.target for a, _ in pairs]),
        ppl=_perplexity([b.target for _, b in pairs]),
        accuracy_dense=_share([_correct(items[i], dense.generated[i]) for i in asked]),
        accuracy=_share([_correct(items[i], compacted.generated[i]) for i in asked]),
        answer_agreement=_share([dense.generated[i] == compacted.generated[i] for i in asked]),
        n=len(chosen),
        tokens=sum(len(values) for values in kl),
    )


def _correct(item: Item, generated: str | None) -> bool:
    assert isinstance(item, ChatItem) and item.answer is not None and generated is not None
    return generated.strip() == item.answer.strip()


def _mean(parts: Sequence[np.ndarray]) -> float | None:
    return float(np.concatenate(parts).mean()) if parts else None


def _share(hits: Sequence[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


def _perplexity(parts: Sequence[np.ndarray]) -> float | None:
    mean = _mean(parts)
    return None if mean is None else math.exp(-mean)
