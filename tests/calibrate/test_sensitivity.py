"""What measured divergences become, at the edges where nothing is lost."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_attentionpack.calibrate.sensitivity import PartCodec, measure_sensitivity
from vllm_attentionpack.codec.layout import KINDS
from vllm_attentionpack.errors import CalibrationDataError
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, TokenCodec
from vllm_attentionpack.evaluate.simulate.measure import Scores, Simulator

SHAPE = CacheShape(("a", "b"), 2, 1, 8)


class Losing:
    """A simulator under which a part loses so many nats."""

    def __init__(self, loss: dict[Any, float]) -> None:
        self.loss = loss

    def measure(self, codec: PartCodec) -> Scores:
        (part,) = codec._parts
        ones = np.ones(1)
        return Scores(ones * self.loss[part], ones, ones, ones)


def test_a_part_without_distortion_has_no_price() -> None:
    """Keys that never vary in calibration, or a layer without output."""
    loss = {(layer, kind): 0.01 for layer in range(2) for kind in KINDS}
    distortion = dict.fromkeys(loss, 0.1)
    loss[1, "key"] = distortion[1, "key"] = 0.0
    simulator: Any = Losing(loss)
    found = measure_sensitivity(simulator, TokenCodec(SHAPE, 8), distortion, lambda done: None)
    assert found[1, "key"] == 0
    assert found[0, "key"] == found[1, "value"] == pytest.approx((0.01 + 0.03 * 0.0075) / 0.1)


@pytest.mark.parametrize(("longest", "reads"), [(69, False), (70, True)])
def test_prompts_that_stay_exact_throughout_measure_nothing(longest: int, reads: bool) -> None:
    """The last query of 70 tokens is the 69th, which is 64 behind the fifth: the first code."""
    tokens = torch.arange(longest)
    which = ExactTokens(4, 64).mask(tokens[:-1], tokens[:-1])
    assert bool((~which & (tokens[:-1, None] >= tokens[:-1])).any()) == reads

    simulator: Any = SimpleNamespace(recorded=[SimpleNamespace(length=n) for n in (5, longest)])
    if reads:
        Simulator.check_codes_are_read(simulator, ExactTokens(4, 64))
        return
    with pytest.raises(CalibrationDataError, match=r"the longest of 2 prompts .* has 69 tokens"):
        Simulator.check_codes_are_read(simulator, ExactTokens(4, 64))
