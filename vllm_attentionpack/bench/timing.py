"""Timing of two things that are to be compared on a machine that does other things too."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Pair:
    """Medians in milliseconds."""

    dense_ms: float
    ours_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.ours_ms


def alternate(dense: Callable[[], object], ours: Callable[[], object], repeats: int) -> Pair:
    """Runs both in turn, so that whatever else the machine does meets both alike.

    Each turn runs twice and counts the second run: the first one pays for the caches that the
    other side has filled.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, taken in zip((dense, ours), times, strict=True):
            run()
            taken.append(milliseconds(run))
    return Pair(median(times[0]), median(times[1]))


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def copy_rate() -> float:
    """GB/s that copying memory reads and writes."""
    source = torch.zeros(1 << 28, dtype=torch.uint8)
    target = torch.zeros_like(source)
    target.copy_(source)
    taken = median(milliseconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.numel() / taken / 1e6
