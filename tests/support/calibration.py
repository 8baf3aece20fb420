"""Packs of several ratios from one gathering of statistics, which is what takes the time."""

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from vllm_attentionpack.calibrate import assemble as assembling
from vllm_attentionpack.calibrate.assemble import Budget
from vllm_attentionpack.calibrate.run import calibrate
from vllm_attentionpack.packfile import Pack, PackHeader


@dataclass(frozen=True)
class Wanted:
    """A pack: its ratio, and the tokens that it advises to keep exact."""

    ratio: float
    sinks: int = 0
    window: int = 0


def calibrate_at(model: str, data: Any, wanted: Sequence[Wanted], **options: Any) -> list[Pack]:
    """The packs that `calibrate` would make with `options`."""
    made: list[tuple[assembling.Assembler, dict[str, Any]]] = []
    at = assembling.Assembler.at
    signature = inspect.signature(at)

    def keep(self: Any, ratio: float, *arguments: Any, **named: Any) -> Any:
        made.append((self, signature.bind(self, ratio, *arguments, **named).arguments))
        return at(self, ratio, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembling.Assembler, "at", keep)
        packs = [calibrate(model, data, **asdict(wanted[0]), **options)]
    assembler, arguments = made[-1]
    for other in wanted[1:]:
        changed = {**arguments, "ratio": other.ratio}
        del changed["self"]
        assembled = assembler.at(**changed)
        header = packs[0].header.model_copy(update={**asdict(other), "layers": assembled.headers})
        packs.append(Pack(PackHeader.model_validate(header.model_dump()), assembled.packs))
    return packs


def smallest_ratio(num_kv_heads: int, head_size: int, heads_per_group: int) -> float:
    """The ratio at which every dim keeps 8 bits."""
    return Budget(1, num_kv_heads, head_size, heads_per_group).ratio_range()[0]
