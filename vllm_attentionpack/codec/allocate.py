"""Ranks and bits under a byte budget: reverse water-filling over dims, heads, K and V, layers.

A *unit* is one (layer, head group, K|V). Spending `n` quanta of `PLANE_QUANTUM` bytes per token on
a unit leaves the distortion `D(n) = min sum_i variance_i * d(bits_i)` over all splits of the quanta
into codes of 12, 10, 8, 4 and 2 bits; dims come in falling variance, so a split is five numbers,
and `D` is tabulated once per unit by dynamic programming. Quanta then go, one convex segment at a
time, to the unit whose weighted distortion falls most per quantum, which is what equal slopes
(reverse water-filling, Cover & Thomas, ch. 10.3) mean for discrete choices.
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vllm_attentionpack.codec.layout import PLANE_QUANTUM, PlaneCounts
from vllm_attentionpack.codec.quantize import step_and_distortion
from vllm_attentionpack.errors import BudgetError

#: At most this many different page sizes over the layers of a model: each costs vLLM a metadata
#: build per step.
MAX_PAGE_SIZE_CLASSES = 4


#: Dims get their bits in runs of so many: a quantum of 8-bit columns, of which those of 12 and 10
#: bits have one, too.
_RUN = 8 * PLANE_QUANTUM // 8


class _Width(NamedTuple):
    """A number of bits that a dim's code can have, and the narrow plane with a column of it."""

    bits: int
    plane: int | None

    @property
    def run_bytes(self) -> int:
        return self.bits * _RUN // 8

    def after_run(self, state: tuple[int, ...]) -> tuple[int, ...]:
        """How many runs the narrow planes hold beyond whole quanta when there is one more."""
        return tuple(
            (n + (bits == self.plane)) % runs
            for n, (bits, runs) in zip(state, _RUNS_OF_QUANTUM.items(), strict=True)
        )


#: Bits of the planes whose quanta hold several runs, and how many.
_RUNS_OF_QUANTUM = {bits: 8 * PLANE_QUANTUM // bits // _RUN for bits in (4, 2)}
_WIDTHS = (_Width(12, 4), _Width(10, 2), _Width(8, None), _Width(4, 4), _Width(2, 2))
#: Of `_Width.after_run`; columns end at whole quanta where all are zero.
_STATES = tuple(itertools.product(*map(range, _RUNS_OF_QUANTUM.values())))


@dataclass(frozen=True)
class UnitCurve:
    """The best distortion of one unit for every number of quanta.

    Attributes:
        distortion: float64 `[n_max + 1]`, non-increasing.
        choices: plane counts of each entry.
    """

    distortion: np.ndarray
    choices: tuple[PlaneCounts, ...]

    @property
    def max_quanta(self) -> int:
        return len(self.choices) - 1

    def at(self, counts: PlaneCounts) -> float:
        """The distortion of one of the choices."""
        return float(self.distortion[self.choices.index(counts)])

    def priced(self, price: float) -> "UnitCurve":
        """The curve in units of which one is worth `price`."""
        return UnitCurve(self.distortion * price, self.choices)


def unit_curve(variance: np.ndarray) -> UnitCurve:
    """Tabulates the best use of every number of quanta.

    Args:
        variance: float64 `[GD]`, falling: what dropping each latent dim costs.
    """
    if not variance.any():  # nothing to lose, and no rank is zero all the same
        return unit_curve(np.ones_like(variance)).priced(0.0)
    dims = len(variance) // _RUN * _RUN
    tail = np.append(np.cumsum(variance[::-1])[::-1], 0.0)[: dims + 1 : _RUN]  # from each run on
    # best[state][run, bytes]: of the dims from a run on, with at most so many bytes, by the widths
    # seen so far, where the runs before have left the narrow planes in that state
    best = {
        state: np.full((len(tail), PLANE_QUANTUM * (len(tail) - 1) + 1), np.inf)
        for state in _STATES
    }
    best[0, 0][:] = tail[:, None]
    taken = []
    for width in reversed(_WIDTHS):  # narrow ones lie behind wide ones
        coded = step_and_distortion(width.bits)[1] * -np.diff(tail)
        best = {state: table.copy() for state, table in best.items()}
        better = {state: np.zeros(table.shape, dtype=bool) for state, table in best.items()}
        size = width.run_bytes
        for run, state in itertools.product(reversed(range(len(coded))), _STATES):
            spent = coded[run] + best[width.after_run(state)][run + 1, :-size]
            unspent = best[state][run, size:]
            better[state][run, size:] = spent < unspent
            np.minimum(spent, unspent, out=unspent)
        taken.append(better)
    choices = tuple(_traced(taken[::-1], PLANE_QUANTUM * n) for n in range(len(tail)))
    return UnitCurve(best[0, 0][0, ::PLANE_QUANTUM], choices)


def _traced(taken: Sequence[dict[tuple[int, ...], np.ndarray]], left: int) -> PlaneCounts:
    """The plane counts that `unit_curve` found for so many bytes."""
    state, run, dims = _STATES[0], 0, {}
    for width, chosen in zip(_WIDTHS, taken, strict=True):
        first = run
        while chosen[state][run, left]:
            state, run, left = width.after_run(state), run + 1, left - width.run_bytes
        dims[width.bits] = (run - first) * _RUN
    n12, n10 = dims[12], dims[10]
    return PlaneCounts(n8=dims[8] + n12 + n10, n4=dims[4] + n12, n2=dims[2] + n10, n12=n12, n10=n10)


def fill(curves: Sequence[UnitCurve], weights: Sequence[float], quanta: int) -> list[int]:
    """Spends `quanta` over units; returns the quanta of each, at least one: no rank is zero.

    Args:
        curves: one per unit.
        weights: what a unit of each unit's distortion costs.
        quanta: total to spend, at least one per unit; what exceeds the sum of `max_quanta` is left.
    """
    spent = [1] * len(curves)
    heap: list[tuple[float, int, int]] = []

    def push(unit: int, room: int) -> None:
        step = _best_step(curves[unit].distortion, spent[unit], room)
        if step:
            gain = (
                curves[unit].distortion[spent[unit]] - curves[unit].distortion[spent[unit] + step]
            )
            heapq.heappush(heap, (-weights[unit] * gain / step, unit, step))

    left = quanta - len(curves)
    for unit in range(len(curves)):
        push(unit, left)
    while heap and left > 0:
        _, unit, step = heapq.heappop(heap)
        if step > left:  # the segment no longer fits: offer the best one that does
            push(unit, left)
            continue
        spent[unit] += step
        left -= step
        push(unit, left)
    return spent


def _best_step(distortion: np.ndarray, start: int, room: int) -> int:
    """The number of quanta from `start` on with the steepest mean fall, 0 when nothing is left."""
    ahead = distortion[start + 1 : start + 1 + room]
    if len(ahead) == 0:
        return 0
    slope = (distortion[start] - ahead) / np.arange(1, len(ahead) + 1)
    return int(np.argmax(slope)) + 1


def allocate(
    layers: Sequence[Sequence[UnitCurve]],
    layer_weights: Sequence[float],
    bytes_per_token: float,
    fixed_bytes: Sequence[int],
    max_page_sizes: int = MAX_PAGE_SIZE_CLASSES,
) -> list[tuple[list[PlaneCounts], int]]:
    """Chooses plane counts for every unit of every layer.

    First the whole budget is filled over all layers at once, which gives each layer its ideal
    size; then sizes are merged into at most `max_page_sizes` classes, rounded so that their sum
    keeps to the budget, and each layer is filled again to the size of its class.

    Args:
        layers: the unit curves of each layer.
        layer_weights: per-layer price of distortion.
        bytes_per_token: budget of the whole model in bytes per token, scales and padding included.
        fixed_bytes: bytes per token of each layer that are not codes (scales).
        max_page_sizes: 1 where layers share a pool with dense ones, whose pages are all alike.

    Returns:
        For each layer the plane counts of its units and its bytes per token (of its class).

    Raises:
        BudgetError: the budget does not cover the scales and one quantum per unit.
    """
    smallest = sum(
        fixed + PLANE_QUANTUM * len(units) for units, fixed in zip(layers, fixed_bytes, strict=True)
    )
    if bytes_per_token < smallest:
        raise BudgetError(
            f"a budget of {bytes_per_token:.1f} bytes per token is below the {smallest} that "
            "one plane per head group and its scales take; lower --ratio or raise --group-size"
        )
    curves = [curve for units in layers for curve in units]
    weights = [w for w, units in zip(layer_weights, layers, strict=True) for _ in units]
    total_quanta = int((bytes_per_token - sum(fixed_bytes)) // PLANE_QUANTUM)
    spent = iter(fill(curves, weights, total_quanta))
    ideal = [
        PLANE_QUANTUM * sum(next(spent) for _ in units) + fixed
        for units, fixed in zip(layers, fixed_bytes, strict=True)
    ]
    sizes = _page_size_classes(
        ideal, layers, fixed_bytes, int(bytes_per_token), min(max_page_sizes, len(layers))
    )
    result = []
    for units, fixed, size in zip(layers, fixed_bytes, sizes, strict=True):
        quanta = fill(units, [1.0] * len(units), (size - fixed) // PLANE_QUANTUM)
        result.append(([u.choices[n] for u, n in zip(units, quanta, strict=True)], size))
    return result


def _page_size_classes(
    ideal: Sequence[int],
    layers: Sequence[Sequence[UnitCurve]],
    fixed_bytes: Sequence[int],
    budget: int,
    classes: int,
) -> list[int]:
    """Merges the ideal bytes per token of each layer into few sizes whose sum is <= `budget`."""
    order = np.argsort(ideal, kind="stable")
    sizes = np.asarray(ideal)[order]
    bounds = _segments(sizes, classes)
    result = [0] * len(ideal)
    members = []
    for start, stop in bounds:
        group = [int(i) for i in order[start:stop]]
        members.append(group)
        mean = int(sizes[start:stop].mean())
        floor = max(fixed_bytes[i] + PLANE_QUANTUM * len(layers[i]) for i in group)
        fixed = fixed_bytes[group[0]]
        value = max(fixed + (mean - fixed) // PLANE_QUANTUM * PLANE_QUANTUM, floor)
        for i in group:
            result[i] = value
    # What rounding left over goes to whole classes, the neediest (smallest per ideal) first.
    useful = [
        max(fixed_bytes[i] + PLANE_QUANTUM * sum(u.max_quanta for u in layers[i]) for i in group)
        for group in members
    ]
    while True:
        room = budget - sum(result)
        open_classes = [
            (result[g[0]] - np.mean([ideal[i] for i in g]), n)
            for n, g in enumerate(members)
            if PLANE_QUANTUM * len(g) <= room and result[g[0]] + PLANE_QUANTUM <= useful[n]
        ]
        if not open_classes:
            break
        for i in members[min(open_classes)[1]]:
            result[i] += PLANE_QUANTUM
    while sum(result) > budget:  # floors may have lifted a class over the budget
        group = max(members, key=lambda g: result[g[0]])
        for i in group:
            result[i] -= PLANE_QUANTUM
    return result


def _segments(sizes: np.ndarray, classes: int) -> list[tuple[int, int]]:
    """Splits sorted sizes into `classes` runs of least squared deviation from their means."""
    n = len(sizes)
    prefix = np.concatenate([[0.0], np.cumsum(sizes)])
    square = np.concatenate([[0.0], np.cumsum(sizes.astype(float) ** 2)])

    def cost(i: int, j: int) -> float:
        return square[j] - square[i] - (prefix[j] - prefix[i]) ** 2 / (j - i)

    best = {(0, 0): (0.0, 0)}
    for k in range(1, classes + 1):
        for j in range(k, n + 1):
            best[k, j] = min(
                (best[k - 1, i][0] + cost(i, j), i) for i in range(k - 1, j) if (k - 1, i) in best
            )
    bounds, stop = [], n
    for k in range(classes, 0, -1):
        start = best[k, stop][1]
        bounds.append((start, stop))
        stop = start
    return bounds[::-1]
