"""Adaptive difficulty: the next level opens once the current one is answered well."""

from random import Random

PROMOTE_AT = 0.85
MIN_UPDATES = 10


class Level:
    """A position in a list of difficulties, with a running accuracy at that position."""

    def __init__(self, values: tuple[int, ...], rng: Random):
        self.values, self.rng = values, rng
        self.index, self.accuracy, self.updates = 0, 0.0, 0
        self.flat = False

    @property
    def value(self) -> int:
        return self.values[self.index]

    def pick(self) -> int:
        """Index to train next: mostly the current one, some easier ones, a few of the next."""
        if self.flat:
            return self.rng.randrange(self.index + 1)
        u = self.rng.random()
        if u < 0.55 or self.index == 0:
            return self.index
        if u < 0.9:
            return self.rng.randrange(self.index + 1)
        return min(self.index + 1, len(self.values) - 1)

    def update(self, index: int, accuracy: float) -> bool:
        """Count a result; True when it opened the next level."""
        if index != self.index:
            return False
        self.accuracy = 0.9 * self.accuracy + 0.1 * accuracy
        self.updates += 1
        settled = self.updates > MIN_UPDATES and self.accuracy > PROMOTE_AT
        if not settled or self.index == len(self.values) - 1:
            return False
        self.index, self.accuracy, self.updates = self.index + 1, 0.5 * self.accuracy, 0
        return True

    def unlock(self, index: int) -> None:
        """From now on draw uniformly from all levels up to `index` at least."""
        self.index, self.flat = max(self.index, index), True

    def __str__(self) -> str:
        return f"{self.value} (accuracy {self.accuracy:.2f})"
