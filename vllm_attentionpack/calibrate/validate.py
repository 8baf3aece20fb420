"""Quality known before serving: packs measured on items that their statistics have not seen.

The engine that gathered the statistics goes on and reads every token of the held-out items from
codes (`evaluate.simulate`), so a pack costs one forward over them and no restart.
"""

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm_attentionpack.calibrate.assemble import Budget
from vllm_attentionpack.errors import CalibrationDataError
from vllm_attentionpack.evaluate.data import ChatItem, Dataset, Item
from vllm_attentionpack.evaluate.simulate.codec import CacheShape, ExactTokens, PackCodec
from vllm_attentionpack.evaluate.simulate.measure import Simulator
from vllm_attentionpack.packfile.schema import Pack, Validation

if TYPE_CHECKING:
    from vllm import LLM

logger = logging.getLogger("vllm.attentionpack")

#: `auto` stops when the ratios that pass and fail are this close.
_RATIO_TOLERANCE = 1.03


def split_items(
    dataset: Dataset, share: float, seed: int
) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """The items to fit and those to hold out, drawn by `seed`, both in the order of the file.

    Raises:
        CalibrationDataError: fewer than two items, or nothing to score among those held out.
    """
    count = max(1, round(len(dataset.items) * share))
    if count >= len(dataset.items):
        raise CalibrationDataError(
            f"'{dataset.path}' holds {len(dataset.items)} items, too few to hold some out for "
            "validation. Give more, or calibrate without --validate and with a fixed --ratio."
        )
    chosen = set(random.Random(seed).sample(range(len(dataset.items)), count))
    fitted = tuple(item for i, item in enumerate(dataset.items) if i not in chosen)
    held_out = tuple(item for i, item in enumerate(dataset.items) if i in chosen)
    if all(isinstance(item, ChatItem) and item.answer is None for item in held_out):
        raise CalibrationDataError(
            f"none of the {count} items of '{dataset.path}' that were held out for validation has "
            "an answer to score. Give texts, or chats with answers."
        )
    return fitted, held_out


@dataclass(frozen=True)
class Candidate:
    """A pack and the loss that the statistics foretell, None where they cannot."""

    pack: Pack
    predicted_kl: float | None


class Validator:
    """Measures packs on held-out items.

    Args:
        llm: the engine that the statistics come from.
        shape: of the cache.
        items: held out.
        max_kl: what a pack may lose.

    Raises:
        UnsupportedModelError: see `Simulator`.
    """

    def __init__(self, llm: "LLM", shape: CacheShape, items: Sequence[Item], max_kl: float) -> None:
        self._simulator = Simulator(llm, shape, items)
        self._items = items
        self._max_kl = max_kl

    def marked(self, candidate: Candidate) -> Pack:
        """The pack with its measured loss in the header, advised exact tokens being exact.

        Raises:
            CalibrationDataError: all held-out tokens are exact.
        """
        pack, simulator = candidate.pack, self._simulator
        exact = ExactTokens(pack.header.sinks, pack.header.window)
        simulator.check_codes_are_read(exact)
        scores = simulator.measure(PackCodec.of(simulator.shape, pack, simulator.device, exact))
        figures = scores.figures(self._items, range(len(self._items)))
        validation = Validation(
            kl=scores.mean_kl(),
            predicted_kl=candidate.predicted_kl,
            top1_agreement=figures.top1,
            max_kl=self._max_kl,
            tokens=figures.tokens,
        )
        logger.info(
            "%.2fx loses %.4f nats per token on %d held-out tokens (at most %g).",
            pack.header.compression_ratio,
            validation.kl,
            figures.tokens,
            self._max_kl,
        )
        return replace(pack, header=pack.header.model_copy(update={"validation": validation}))

    def smallest(self, at: Callable[[float], Candidate], budget: Budget) -> Pack:
        """The pack of the largest ratio that passes, found by bisection.

        Where none passes, that of the smallest ratio, marked as failing.
        """
        low, high = budget.ratio_range()
        best = self.marked(at(low))
        if not _passed(best):
            return best
        top = self.marked(at(high))
        if _passed(top):
            return top
        while high / low > _RATIO_TOLERANCE:
            middle = math.sqrt(low * high)
            pack = self.marked(at(middle))
            if _passed(pack):
                best, low = pack, middle
            else:
                high = middle
        return best


def _passed(pack: Pack) -> bool:
    assert pack.header.validation is not None
    return pack.header.validation.passed
