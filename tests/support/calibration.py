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
    call: dict[str, Any] = {}
    assemble = assembling.assemble

    def keep(layers: Any, **arguments: Any) -> Any:
        call.update(arguments, layers=layers)
        return assemble(layers, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembling, "assemble", keep)
        packs = [calibrate(model, data, ratios[0], **options)]
    for ratio in ratios[1:]:
        headers, layers = assemble(**{**call, "ratio": ratio})
        header = packs[0].header.model_copy(update={"ratio": ratio, "layers": headers})
        packs.append(Pack(PackHeader.model_validate(header.model_dump()), layers))
    return packs


def smallest_ratio(num_kv_heads: int, head_size: int, heads_per_group: int) -> float:
    """The ratio at which every dim keeps 8 bits."""
    return Budget(1, num_kv_heads, head_size, heads_per_group).ratio_range()[0]
