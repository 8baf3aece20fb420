"""Layers and statistics that no pack can be made of."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_attentionpack.calibrate.collector import Collector
from vllm_attentionpack.calibrate.layers import _check_servable
from vllm_attentionpack.calibrate.moments import MomentAccumulator
from vllm_attentionpack.calibrate.run import _check_tokens
from vllm_attentionpack.errors import CalibrationDataError, UnsupportedModelError

HEADS = {"queries": 2, "keys": 1, "values": 1}


@pytest.mark.parametrize("broken", ["queries", "keys", "values"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_refused(broken: str, number: float) -> None:
    """A pack made of them would be written, and refused when it is loaded."""
    moments = MomentAccumulator(2, 1, 8, 1, None)
    given = {name: torch.randn(20, heads, 8) for name, heads in HEADS.items()}
    given[broken][3, 0, 5] = number
    moments.add(given["queries"], given["keys"], given["values"], None, None)
    layer = SimpleNamespace(layer_name="layers.7.attn")
    recorder: Any = SimpleNamespace(layer=layer, moments=moments)
    with pytest.raises(CalibrationDataError, match=rf"'layers.7.attn' was given {broken} that"):
        collector = Collector([recorder], [], 1)
        next(collector.statistics(collector.turned(64), 1, torch.float32))


@pytest.mark.parametrize(
    ("feature", "value", "name"),
    [
        ("alibi_slopes", [0.5, 0.25], "ALiBi"),
        ("logits_soft_cap", 50.0, "logits soft capping"),
        ("sinks", torch.zeros(2), "attention sinks"),
    ],
)
def test_attention_that_could_not_be_served_is_not_calibrated(
    feature: str, value: Any, name: str
) -> None:
    def layer(**given: Any) -> Any:
        impl = SimpleNamespace(
            **{"alibi_slopes": None, "logits_soft_cap": 0, "sinks": None} | given
        )
        return SimpleNamespace(
            layer_name="layers.7.attn",
            impl=impl,
            num_heads=2,
            num_kv_heads=1,
            head_size=8,
            head_size_v=8,
            kv_sharing_target_layer_name=None,
        )

    _check_servable([layer(), layer()])
    with pytest.raises(UnsupportedModelError, match=f"'layers.7.attn' .* it uses {name}, "):
        _check_servable([layer(), layer(**{feature: value})])


def test_fewer_tokens_than_dims_are_refused() -> None:
    _check_tokens(Path("data.txt"), 128, 128)
    with pytest.raises(CalibrationDataError, match="saw 127 tokens, fewer than the 128 dims"):
        _check_tokens(Path("data.txt"), 127, 128)
