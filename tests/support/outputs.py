"""Comparing what two engines make of the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """How far the greedy outputs of two engines go together.

    Attributes:
        tokens: that the first engine generated.
        agreed: of these, those before the first difference of each output.
        gaps: at each first difference, by how many nats the first engine preferred its own token;
            infinite where it did not report the other's token, or one output ended early.
        noise: largest difference of log-probabilities of agreed tokens.
    """

    tokens: int
    agreed: int
    gaps: list[float]
    noise: float

    @property
    def share(self) -> float:
        return self.agreed / self.tokens


def agreement(first: Sequence[Any], second: Sequence[Any]) -> Agreement:
    """Compares the first completion of each request; log-probabilities must have been asked for."""
    tokens = agreed = 0
    gaps, noise = [], 0.0
    for a, b in zip(first, second, strict=True):
        a, b = a.outputs[0], b.outputs[0]
        tokens += len(a.token_ids)
        for i, token in enumerate(a.token_ids):
            other = b.token_ids[i] if i < len(b.token_ids) else None
            if token != other:
                seen = a.logprobs[i]
                known = other in seen
                gaps.append(seen[token].logprob - seen[other].logprob if known else float("inf"))
                break
            agreed += 1
            noise = max(noise, abs(a.logprobs[i][token].logprob - b.logprobs[i][token].logprob))
        else:
            if len(b.token_ids) > len(a.token_ids):
                gaps.append(float("inf"))
    return Agreement(tokens, agreed, gaps, noise)


def token_ids(outputs: Sequence[Any]) -> list[list[int]]:
    """The generated ids of the first completion of each request."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def prompt_logprobs(outputs: Sequence[Any]) -> np.ndarray:
    """Log-probabilities of all prompt tokens but the first of each request, float64 `[n]`."""
    return np.array(
        [
            given[token].logprob
            for output in outputs
            for token, given in zip(
                output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
            )
        ]
    )
