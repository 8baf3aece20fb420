"""Training samples of the three tasks: questions over images, key/value recall, plain text.

`*_chat` samples are the chats the model is for.  The others ("captions", "echo", "induction") carry
far more supervised tokens per sample; next to the chats they made retrieval emerge early.
"""

from random import Random
from string import ascii_lowercase

import torch

from . import images, wording
from .batch import Batch, Batcher
from .wording import Segment

Attributes = list[list[int]]  # digits, colors, shapes of a sample's images
INDUCTION_REPEATS = 5
COUNTED_CHARACTERS = 200_000
PASSAGE_TURNS = 8  # answers per passage: long texts must not carry one supervised token each


class Sampler:
    def __init__(self, batcher: Batcher, device: str, seed: int, corpus: str):
        self.batcher, self.device, self.corpus = batcher, device, corpus
        self.rng = Random(seed)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def reseed(self, seed: int) -> None:
        self.rng.seed(seed)
        self.generator.manual_seed(seed)

    # Images

    def image_chat(self, B: int, n: int, size: int, jitter: int = 4) -> Batch:
        """`B` chats of several mixed questions over `n` images each."""
        turns = 2 + min(3, n // 2) + self.rng.randrange(2)
        samples = [self._image_chat_sample(n, turns) for _ in range(B)]
        return self._with_images(samples, size, jitter)

    def image_captions(self, B: int, n: int, size: int, jitter: int) -> Batch:
        """Every image followed by its caption: dense labels for the vision tower."""
        samples = []
        for _ in range(B):
            attributes = self._independent_attributes(n)
            segments: list[Segment] = []
            for looks in zip(*attributes, strict=True):
                segments += [(wording.IMAGE, False), (_caption(*looks), True), ("\n", False)]
            samples.append((segments, attributes))
        return self._with_images(samples, size, jitter)

    def image_echo(self, B: int, n: int, size: int, jitter: int) -> Batch:
        """`n` labelled images, then the labels in another order, each with its caption."""
        samples = []
        for _ in range(B):
            attributes = self._independent_attributes(n)
            looks = list(zip(*attributes, strict=True))
            segments = [(f"{wording.user_open()}{wording.image_list(n)}\n", False)]
            for i in self.rng.sample(range(n), n):
                label = (f"Image {i + 1}:", False)
                segments += [label, (_caption(*looks[i]), True), ("\n", False)]
            samples.append((segments, attributes))
        return self._with_images(samples, size, jitter)

    def _independent_attributes(self, n: int) -> Attributes:
        return [[self.rng.randrange(k) for _ in range(n)] for k in (10, 6, 3)]

    def _image_chat_sample(self, n: int, turns: int) -> tuple[list[Segment], Attributes]:
        labelled = self.rng.random() < 0.7
        attributes = self._independent_attributes(n)
        questions = wording.image_questions(*attributes)
        opening = f"{wording.user_open()}{wording.image_list(n, labelled)}\n"
        segments: list[Segment] = [(opening, False)]
        for t in range(turns):
            kind = self._question_kind()
            fitting = [q for q in questions if q[0] == kind]
            fitting = fitting or [q for q in questions if q[0] == "digit"]
            _, question, answer = self.rng.choice(fitting)
            segments += wording.turn(question, answer, first=t == 0)
        return segments, attributes

    def _question_kind(self) -> str:
        u = self.rng.random()
        shares = (("list", 0.3), ("digit", 0.6), ("color", 0.7), ("shape", 0.8))
        for kind, upper in (*shares, ("which-digit", 0.9)):
            if u < upper:
                return kind
        return "which-cs"

    def _with_images(
        self, samples: list[tuple[list[Segment], Attributes]], size: int, jitter: int
    ) -> Batch:
        looks = torch.tensor([attributes for _, attributes in samples], device=self.device)
        digit, color, shape = (looks[:, i].flatten() for i in range(3))  # looks: [B, 3, n]
        pixels = images.render(digit, color, shape, size, self.generator, jitter)
        grid = size // images.TOKEN_PX
        rows = self.batcher.encode([segments for segments, _ in samples], grid * grid)
        return self.batcher.collate(rows, grid, images.to_patches(pixels), pixels)

    # Recall

    def recall_chat(self, B: int, n: int) -> Batch:
        """`B` chats that ask for one to four keys at a time among `n` pairs."""
        turns = 2 + min(4, n // 4)
        samples = [self._recall_sample(n, turns, self.rng.random() < 0.3) for _ in range(B)]
        return self.batcher.collate(self.batcher.encode(samples))

    def recall_echo(self, B: int, n: int, confusable: bool) -> Batch:
        """The pairs, then the same pairs in another order with supervised values."""
        samples = []
        for _ in range(B):
            pairs = self._pairs(n, confusable)
            segments = [(f"{wording.user_open()}{wording.pair_list(pairs)}\n", False)]
            shuffled = list(pairs.items())
            self.rng.shuffle(shuffled)
            for key, value in shuffled:
                segments += [(key + ":", False), (" " + value, True), ("; ", False)]
            samples.append(segments)
        return self.batcher.collate(self.batcher.encode(samples))

    def induction(self, B: int, n: int) -> Batch:
        """Letter-digit pairs "a4k7c1", repeated in shuffled order."""
        samples = []
        for _ in range(B):
            pairs = [
                (key, str(self.rng.randrange(10))) for key in self.rng.sample(ascii_lowercase, n)
            ]
            segments: list[Segment] = []
            for repeat in range(INDUCTION_REPEATS):
                self.rng.shuffle(pairs)
                for key, value in pairs:
                    segments += [(key, False), (value, repeat > 0)]
            samples.append(segments)
        return self.batcher.collate(self.batcher.encode(samples))

    def _pairs(self, n: int, confusable: bool) -> dict[str, str]:
        """`n` two-letter keys; confusable ones share their letters with others."""
        rng = self.rng
        letters = ascii_lowercase
        if confusable:
            letters = rng.sample(letters, min(26, max(3, int(n**0.5) + 2)))
        # A dict keeps the order of insertion; the order of a set would differ between processes.
        found: dict[str, None] = {}
        while len(found) < n:
            found[rng.choice(letters) + rng.choice(letters)] = None
        keys = list(found)
        rng.shuffle(keys)
        return {key: f"{rng.randrange(100):02d}" for key in keys}

    def _recall_sample(self, n: int, turns: int, confusable: bool) -> list[Segment]:
        pairs = self._pairs(n, confusable)
        segments = [(f"{wording.user_open()}{wording.pair_list(pairs)}\n", False)]
        for t in range(turns):
            asked = self.rng.sample(list(pairs), min(n, 1 + self.rng.randrange(4)))
            answer = " ".join(pairs[key] for key in asked)
            segments += wording.turn(wording.recall_question(asked), answer, first=t == 0)
        return segments

    def passage_recall(self, B: int, n: int, size: int) -> Batch:
        """Chats about `n` pairs that lie between the lines of `size` characters of real text."""
        samples = [self._passage_sample(n, size) for _ in range(B)]
        return self.batcher.collate(self.batcher.encode(samples))

    def _passage_sample(self, n: int, size: int) -> list[Segment]:
        pairs = self._pairs(n, confusable=False)
        passage = wording.passage(self._window(size), pairs, self.rng)
        segments = [(f"{wording.user_open()}{passage}\n", False)]
        for t, key in enumerate(self.rng.sample(list(pairs), min(n, PASSAGE_TURNS))):
            segments += wording.turn(wording.recall_question([key]), pairs[key], first=t == 0)
        return segments

    # Text

    def characters_per_token(self) -> float:
        """Of the corpus, by its beginning."""
        text = wording.plain(self.corpus[:COUNTED_CHARACTERS])
        return len(text) / (len(self.batcher.encode_text(text)[0]) - 1)

    def _window(self, size: int) -> str:
        start = self.rng.randrange(len(self.corpus) - size)
        return wording.plain(self.corpus[start : start + size])

    def text(self, B: int, size: int) -> Batch:
        """`B` random windows of `size` characters, loss on every position."""
        return self.batcher.collate(
            [self.batcher.encode_text(self._window(size)) for _ in range(B)]
        )


def _caption(digit: int, color: int, shape: int) -> str:
    return f"{digit} {wording.COLOR_NAMES[color]} {wording.SHAPE_NAMES[shape]}"
