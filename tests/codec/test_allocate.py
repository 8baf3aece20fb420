"""Water-filling: optimal per unit, within budget, few page sizes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_attentionpack.codec.allocate import (
    MAX_PAGE_SIZE_CLASSES,
    allocate,
    fill,
    unit_curve,
)
from vllm_attentionpack.codec.layout import PLANE_QUANTUM, PlaneCounts
from vllm_attentionpack.codec.quantize import step_and_distortion
from vllm_attentionpack.errors import BudgetError


def spectrum(dims, decay, scale=1.0):
    return scale * np.exp(-decay * np.arange(dims))


def distortion(variance, counts):
    d = [step_and_distortion(b)[1] for b, n in counts.dims_by_bits.items() for _ in range(n)]
    d += [1.0] * (len(variance) - counts.rank)
    return float((variance * np.asarray(d)).sum())


def splits(dims, quanta):
    """All plane counts that take at most so many bytes, pairs in fours."""
    for a, b, c in itertools.product(range(quanta + 1), repeat=3):
        for n12, n10 in itertools.product(range(0, 8 * b + 1, 4), range(0, 16 * c + 1, 4)):
            if a + b + c <= quanta and n12 + n10 <= 4 * a:
                counts = PlaneCounts(4 * a, 8 * b, 16 * c, 0, n12, n10)
                if counts.rank <= dims:
                    yield counts


@pytest.mark.parametrize("decay", [0.2, 0.5, 1.5])
def test_curve_is_the_best_split_of_every_number_of_quanta(decay):
    variance = spectrum(32, decay)
    curve = unit_curve(variance)
    assert curve.max_quanta == 8
    assert curve.distortion[0] == pytest.approx(variance.sum())
    for quanta, counts in enumerate(curve.choices):
        assert counts.bytes_per_token <= quanta * PLANE_QUANTUM
        assert curve.distortion[quanta] == pytest.approx(distortion(variance, counts))
        best = min(distortion(variance, split) for split in splits(32, quanta))
        assert curve.distortion[quanta] == pytest.approx(best)
    assert (np.diff(curve.distortion) <= 1e-12).all()


def test_steep_spectra_get_pairs():
    assert unit_curve(spectrum(64, 0.5)).choices[10].n12 == 12
    assert not unit_curve(spectrum(64, 0.05)).choices[10].pairs


def test_fill_spends_where_it_pays():
    rich, poor = unit_curve(spectrum(64, 0.02)), unit_curve(spectrum(64, 0.02, 1e-3))
    spent = fill([rich, poor], [1.0, 1.0], 12)
    assert sum(spent) <= 12
    assert spent[0] > spent[1]
    weighted = fill([rich, poor], [1.0, 1e6], 12)
    assert weighted[1] > weighted[0]


def test_fill_is_near_the_best_of_all_splits():
    curves = [unit_curve(spectrum(32, decay)) for decay in (0.05, 0.3, 0.8)]
    for quanta in range(3, 20):
        spent = fill(curves, [1.0] * 3, quanta)
        total = sum(c.distortion[n] for c, n in zip(curves, spent, strict=True))
        best = min(
            sum(c.distortion[n] for c, n in zip(curves, split, strict=True))
            for split in itertools.product(range(1, 9), repeat=3)
            if sum(split) <= quanta
        )
        assert total <= 1.15 * best


layer = st.lists(st.tuples(st.floats(0.005, 0.5), st.floats(1e-3, 1e3)), min_size=4, max_size=4)


@settings(max_examples=30, deadline=None)
@given(st.lists(layer, min_size=1, max_size=9), st.floats(1.5, 20.0), st.integers(0, 10_000))
def test_budget_is_never_exceeded_and_classes_are_few(layers, ratio, seed):
    """Each layer: two head groups of K and V, 64 dims, so 512 dense bytes."""
    curves = [[unit_curve(spectrum(64, *unit)) for unit in units] for units in layers]
    weights = np.random.default_rng(seed).uniform(0.1, 10, len(layers))
    budget = 512 * len(layers) / ratio
    smallest = sum(4 * PLANE_QUANTUM + 4 for _ in layers)
    if budget < smallest:
        with pytest.raises(BudgetError, match=str(smallest)):
            allocate(curves, weights, budget, [4] * len(layers))
        return
    result = allocate(curves, weights, budget, [4] * len(layers))
    sizes = [size for _, size in result]
    assert sum(sizes) <= budget
    assert len(set(sizes)) <= MAX_PAGE_SIZE_CLASSES
    for counts, size in result:
        assert sum(c.bytes_per_token for c in counts) + 4 <= size
    if ratio > 4:  # all dims at 8 bits fit otherwise: nothing left to spend on
        assert sum(sizes) > budget - PLANE_QUANTUM * len(layers)


def test_every_unit_keeps_a_rank():
    nothing = unit_curve(np.full(64, 1e-30))
    assert fill([unit_curve(spectrum(64, 0.01)), nothing], [1.0, 1.0], 6)[1] == 1


def test_more_important_layers_get_more_bytes():
    curves = [[unit_curve(spectrum(64, 0.03)) for _ in range(2)] for _ in range(3)]
    result = allocate(curves, [1.0, 1.0, 1000.0], 3 * 40, [2] * 3)
    sizes = [size for _, size in result]
    assert sizes[2] > sizes[0]
