"""Which micro-batches an optimizer step trains on, and how results move the curriculum."""

import math
from dataclasses import dataclass
from random import Random

from . import images
from .batch import Batch
from .curriculum import Level
from .options import Options
from .tasks import Sampler

IMAGE_COUNTS = (1, 2, 3, 4, 6, 8, 10, 12)
PAIR_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
JITTERS = (0, 1, 2, 3, 4)
FLAT_IMAGES = IMAGE_COUNTS.index(12)  # what the flat phase unlocks
FLAT_PAIRS = PAIR_COUNTS.index(32)
CAPTIONED_IMAGES = 8
SHORTEST_LONG = 256  # tokens
GROWN = 0.6  # progress from which samples are as long as the context
LONG_IMAGE_COUNTS = (2, 3, 4, 6, 8, 12, 16)
PASSAGE_PAIR_COUNTS = (1, 2, 4, 8, 12)
LONG_CHAT_TOKENS = 100  # the questions and answers
IMAGE_WEIGHT, RECALL_WEIGHT, TEXT_WEIGHT = 1.0, 1.0, 0.4


@dataclass(frozen=True)
class MicroBatch:
    task: str
    batch: Batch
    weight: float
    level: int = 0  # curriculum index that the sample was drawn at
    size_level: int = 0


class TaskMix:
    def __init__(self, options: Options, sampler: Sampler):
        self.options, self.sampler = options, sampler
        self.characters_per_token = sampler.characters_per_token()
        self.rng = Random(options.seed + 7)  # apart from the sampler's stream
        self.images = Level(IMAGE_COUNTS, self.rng)
        self.pairs = Level(PAIR_COUNTS, self.rng)
        self.sizes = Level(options.sizes, self.rng)
        self.jitter = Level(JITTERS, self.rng)
        self.induction_accuracy = 0.0
        self.booted = options.boot <= 0

    def levels(self) -> list[int]:
        return [level.index for level in (self.images, self.pairs, self.sizes, self.jitter)]

    def restore(self, levels: list[int]) -> None:
        self.images.index, self.pairs.index, self.sizes.index, self.jitter.index = levels

    def draw(self, progress: float) -> list[MicroBatch]:
        """The micro-batches of one optimizer step at `progress` 0..1 of the run."""
        if progress >= self.options.flat and not self.images.flat:
            self.images.unlock(FLAT_IMAGES)
            self.pairs.unlock(FLAT_PAIRS)
            self.sizes.unlock(len(self.options.sizes) - 1)
            self.jitter.unlock(len(JITTERS) - 1)
        self.booted = self.booted or self.induction_accuracy >= self.options.boot
        if not self.booted:
            n = self.rng.choice([4, 6, 8, 12])
            rows = self._rows(2 * self.options.tokens[0], 10 * n)
            return [MicroBatch("induction", self.sampler.induction(rows, n), 1.0)]
        short = (self._draw_images, self._draw_recall, lambda: self._draw_text(progress))
        long = (self._draw_long_images, self._draw_passage, self._draw_long_text)
        return [
            draw_long(self._long_length(progress)) if self._wants_long(progress) else draw()
            for draw, draw_long in zip(short, long, strict=True)
        ]

    def learn(self, micro: MicroBatch, accuracy: float, digit_accuracy: float) -> bool:
        """Feed back the answer-token accuracy; True when a level opened."""
        if micro.task == "induction":
            self.induction_accuracy = 0.9 * self.induction_accuracy + 0.1 * accuracy
        elif micro.task == "image captions":
            return self.jitter.update(micro.level, digit_accuracy)
        elif micro.task == "recall chat":
            return self.pairs.update(micro.level, accuracy)
        elif micro.task == "image chat":
            opened = self.images.update(micro.level, accuracy)
            # Larger images come after several small ones, and only count at about full difficulty.
            if self.images.index > 2 and micro.level >= self.images.index - 1:
                opened = self.sizes.update(micro.size_level, accuracy) or opened
            return opened
        return False

    def __str__(self) -> str:
        return (
            f"images {self.images} size {self.sizes} pairs {self.pairs} jitter {self.jitter} "
            f"induction {self.induction_accuracy:.2f}"
        )

    def _rows(self, tokens: int, tokens_per_row: float) -> int:
        return max(1, round(tokens * self.options.batch / tokens_per_row))

    def _wants_long(self, progress: float) -> bool:
        options = self.options
        return (
            options.context > 0
            and progress >= options.flat
            and self.rng.random() < options.long_share
        )

    def _long_length(self, progress: float) -> int:
        """Tokens of a long sample, log-uniform: short ones are cheap and keep what was learned.

        The longest grows from SHORTEST_LONG to the whole context at progress GROWN.
        """
        growth = math.log(self.options.context / SHORTEST_LONG) * min(1.0, progress / GROWN)
        return round(SHORTEST_LONG * math.exp(self.rng.uniform(0, growth)))

    def _draw_long_images(self, length: int) -> MicroBatch:
        """Few to many images, as large as the length allows."""
        n = self.rng.choice(LONG_IMAGE_COUNTS)
        size = images.largest_size((length - LONG_CHAT_TOKENS) / n - images.LABEL_TOKENS)
        rows = self._rows(self.options.tokens[0], length)
        batch = self.sampler.image_chat(rows, n, size)
        return MicroBatch("long images", batch, IMAGE_WEIGHT)

    def _draw_passage(self, length: int) -> MicroBatch:
        n = self.rng.choice(PASSAGE_PAIR_COUNTS)
        rows = self._rows(self.options.tokens[1], length)
        batch = self.sampler.passage_recall(rows, n, round(self.characters_per_token * length))
        return MicroBatch("passage recall", batch, RECALL_WEIGHT)

    def _draw_long_text(self, length: int) -> MicroBatch:
        size = round(self.characters_per_token * length)
        rows = self._rows(self.options.tokens[2], length)
        return MicroBatch("long text", self.sampler.text(rows, size), TEXT_WEIGHT)

    def _draw_images(self) -> MicroBatch:
        level = self.images.pick()
        size_level = self.sizes.pick() if self.images.index > 2 else 0
        jitter_level = self.jitter.pick()
        n, size = IMAGE_COUNTS[level], self.options.sizes[size_level]
        jitter, tokens = JITTERS[jitter_level], self.options.tokens[0]
        per_image = (size // 28) ** 2
        u = self.rng.random()
        if u > (0.6 if self.images.index < 3 else 0.85):
            rows = self._rows(tokens, n * (per_image + 12))
            batch = self.sampler.image_echo(rows, n, size, jitter)
            return MicroBatch("image echo", batch, IMAGE_WEIGHT)
        if u < (0.4 if self.jitter.index < 3 else 0.1):
            rows = self._rows(tokens, CAPTIONED_IMAGES * (per_image + 6))
            batch = self.sampler.image_captions(rows, CAPTIONED_IMAGES, size, jitter)
            return MicroBatch("image captions", batch, IMAGE_WEIGHT, jitter_level)
        expected = n * (per_image + 5.5) + (2.5 + min(3, n // 2)) * (18 + 0.4 * n)
        batch = self.sampler.image_chat(self._rows(tokens, expected), n, size, jitter)
        return MicroBatch("image chat", batch, IMAGE_WEIGHT, level, size_level)

    def _draw_recall(self) -> MicroBatch:
        level, tokens = self.pairs.pick(), self.options.tokens[1]
        n, u = PAIR_COUNTS[level], self.rng.random()
        early = self.pairs.index < 4
        if u < (0.15 if early else 0.04):
            n = self.rng.choice([4, 6, 8, 12, 20])
            batch = self.sampler.induction(self._rows(tokens, 10 * n), n)
            return MicroBatch("induction", batch, RECALL_WEIGHT)
        if u < (0.5 if early else 0.15):
            confusable = self.rng.random() < 0.3
            batch = self.sampler.recall_echo(self._rows(tokens, 12 * n + 3), n, confusable)
            return MicroBatch("recall echo", batch, RECALL_WEIGHT)
        expected = 6 * n + (2 + min(4, n // 4)) * 24
        batch = self.sampler.recall_chat(self._rows(tokens, expected), n)
        return MicroBatch("recall chat", batch, RECALL_WEIGHT, level)

    def _draw_text(self, progress: float) -> MicroBatch:
        size = 512 if progress > 0.5 and self.rng.random() < 0.5 else 256
        rows = self._rows(self.options.tokens[2], size / self.characters_per_token)
        return MicroBatch("text", self.sampler.text(rows, size), TEXT_WEIGHT)
