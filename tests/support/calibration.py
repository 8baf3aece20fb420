"""Packs of several ratios from one gathering of statistics, which is what takes the time."""

from collections.abc import Sequence
from typing import Any

import pytest

from vllm_attentionpack.calibrate import assemble as assembling
from vllm_attentionpack.calibrate.assemble import Budget
from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.packfile import Pack, PackHeader


def calibrate_at(model: str, data: Any, ratios: Sequence[float], **options: Any) -> list[Pack]:
    """One pack per ratio, as `calibrate` would make it; `options` as there."""
    made: list[tuple[assembling.Assembler, dict[str, Any]]] = []
    at = assembling.Assembler.at

    def keep(self: Any, ratio: float, layer_weights: Any = None, sensitivity: Any = None) -> Any:
        made.append((self, {"layer_weights": layer_weights, "sensitivity": sensitivity}))
        return at(self, ratio, **made[-1][1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembling.Assembler, "at", keep)
        packs = [calibrate(model, data, ratios[0], **options)]
    assembler, arguments = made[-1]
    for ratio in ratios[1:]:
        assembled = assembler.at(ratio, **arguments)
        header = packs[0].header.model_copy(update={"ratio": ratio, "layers": assembled.headers})
        packs.append(Pack(PackHeader.model_validate(header.model_dump()), assembled.packs))
    return packs


def smallest_ratio(num_kv_heads: int, head_size: int, heads_per_group: int) -> float:
    """The ratio at which every dim keeps 8 bits."""
    return Budget(1, num_kv_heads, head_size, heads_per_group).ratio_range()[0]
