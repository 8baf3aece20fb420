"""Calibration and held-out items: chats over pooled images, pairs, pairs within text, plain text.

One JSON object per line::

    {"messages": [...], "answer": "7", "kind": "digit|color|shape|list|recall|passage",
     "modality": "visual|text"}
    {"text": "...", "kind": "text", "modality": "text"}

Image URLs are relative to the JSON-lines file.  No "which" questions: the model is at chance there.
"""

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import torch

from . import images, wording

SINGLE_KINDS = ("digit", "color", "shape")


@dataclass(frozen=True)
class Shape:
    """How long items are; both files of a model share it."""

    pool: Mapping[int, int]  # image size in px -> number of images
    image_counts: tuple[int, ...]
    list_counts: tuple[int, ...]
    pair_counts: tuple[int, ...]
    context: int = 0  # most tokens of an item; images that do not fit are left out (0: no limit)
    passages: tuple[int, ...] = ()  # characters of real text around the pairs of a "passage" item
    texts: tuple[int, ...] = ()  # characters of the plain texts; none: the source is cut evenly


SHORT = Shape(
    pool={56: 40, 84: 34, 112: 26},  # fewer of the large ones: noise compresses badly
    image_counts=(2, 4, 6, 8),
    list_counts=(2, 3, 4, 6),
    pair_counts=(4, 6, 8, 12),
)


@dataclass(frozen=True)
class Split:
    """Size and seed of one file.  Both pools have their own seed, so no image is in both."""

    name: str
    seed: int
    attribute: int  # one question about one image
    listing: int  # "List the digits."
    visual_turns: int  # dialogues over images
    recall: int
    recall_turns: int
    text: int
    text_source: str
    shape: Shape = SHORT
    passage: int = 0  # recall of one pair from within real text
    passage_turns: int = 0


SPLITS = (
    Split("calibrate", 10_007, 36, 36, 24, 32, 16, 16, "cc0-1.0.txt"),
    Split("heldout", 20_011, 72, 48, 40, 52, 26, 26, "apache-2.0.txt"),
)

LONG = Shape(
    pool={56: 24, 112: 24, 224: 24, 336: 20, 392: 16},
    image_counts=(2, 4, 8, 12, 16),
    list_counts=(2, 3, 4, 6),
    pair_counts=(2, 4, 8, 12),
    context=3584,
    passages=(600, 1200, 2400, 3600),
    texts=(800, 1600, 3200),
)
LONG_SPLITS = (
    Split("calibrate", 30_013, 75, 20, 20, 16, 8, 18, "calibrate.txt", LONG, 32, 16),
    Split("heldout", 40_009, 150, 40, 40, 32, 16, 24, "heldout.txt", LONG, 48, 24),
)


@dataclass(frozen=True)
class PoolImage:
    url: str
    digit: int
    color: int
    shape: int


Pool = dict[int, list[PoolImage]]  # image size in px -> images


def make_pool(split: Split) -> Pool:
    """Draw the attributes of the split's images; pixels come from `render_pool`."""
    rng = random.Random(split.seed)
    pool: Pool = {}
    number = itertools.count()
    for size, share in split.shape.pool.items():
        pool[size] = [
            PoolImage(
                f"images/{split.name}/{next(number):03d}.png",
                rng.randrange(10),
                rng.randrange(len(wording.COLOR_NAMES)),
                rng.randrange(len(wording.SHAPE_NAMES)),
            )
            for _ in range(share)
        ]
    return pool


def render_pool(split: Split, pool: Pool) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (url, uint8 [S, S, 3]) for every image of the pool."""
    for size, members in pool.items():
        generator = torch.Generator().manual_seed(split.seed + size)
        attributes = torch.tensor([(m.digit, m.color, m.shape) for m in members])
        pixels = images.render(*attributes.unbind(1), size, generator)
        yield from zip((m.url for m in members), pixels, strict=True)


def make_items(split: Split, text: str) -> list[dict]:
    """All items of the split in their final, shuffled order; `text` is cut into the text items."""
    rng = random.Random(split.seed + 1)
    pool, shape = make_pool(split), split.shape
    pairs = shape.pair_counts
    items = [
        *_attribute_items(rng, pool, shape, split.attribute),
        *_list_items(rng, pool, shape, split.listing),
        *(_visual_dialogue(rng, pool, shape) for _ in range(split.visual_turns)),
        *(_recall_item(rng, n, 0) for n in _cycle(pairs, split.recall)),
        *(_recall_item(rng, n, rng.randint(2, 4)) for n in _cycle(pairs, split.recall_turns)),
    ]
    if shape.texts:
        windows = _Windows(text)
        items += _passage_items(rng, windows, shape, split.passage, (0, 0))
        items += _passage_items(rng, windows, shape, split.passage_turns, (2, 4))
        texts = [windows.next(size) for size in _cycle(shape.texts, split.text)]
    else:
        texts = cut_text(text, split.text)
    items += [{"text": t, "kind": "text", "modality": "text"} for t in texts]
    rng.shuffle(items)  # any prefix of the file is a usable mix
    return items


def write_split(split: Split, folder: Path) -> list[dict]:
    """Write images and the JSON-lines file below `folder`, which holds the text source."""
    from PIL import Image

    (folder / "images" / split.name).mkdir(parents=True, exist_ok=True)
    for url, pixels in render_pool(split, make_pool(split)):
        Image.fromarray(pixels.numpy()).save(folder / url, optimize=True)
    items = make_items(split, (folder / "text" / split.text_source).read_text())
    lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (folder / f"{split.name}.jsonl").write_text("".join(lines))
    return items


def cut_text(text: str, n: int) -> list[str]:
    """Cut `text` at spaces and line ends into `n` consecutive pieces of about equal length."""
    target = len(text) // n
    pieces, start = [], 0
    for i in range(1, n + 1):
        end = len(text) if i == n else max(text.rfind(c, 0, i * target) for c in " \n")
        pieces.append(text[start:end])
        start = end
    return pieces


class _Windows:
    """Consecutive pieces of one text: no two items share a piece."""

    def __init__(self, text: str):
        self._text, self._start = wording.plain(text), 0

    def next(self, size: int) -> str:
        """About `size` characters that end with a line, or the next `size` if none does."""
        window = self._text[self._start : self._start + size]
        if len(window) < size:
            raise ValueError(f"the text source ends after {len(self._text)} characters; get more")
        window = window[: window.rfind("\n") + 1] or window
        self._start += len(window)
        return window


def _cycle(values: tuple, n: int) -> list:
    return list(itertools.islice(itertools.cycle(values), n))


def _attribute_items(rng: random.Random, pool: Pool, shape: Shape, n: int) -> Iterator[dict]:
    cells = itertools.product(SINGLE_KINDS, _fitting(shape, shape.image_counts))
    for kind, (count, size) in _cycle(tuple(cells), n):
        chosen = rng.sample(pool[size], count)
        yield _visual_item(chosen, [_ask(rng, chosen, kind)], kind)


def _list_items(rng: random.Random, pool: Pool, shape: Shape, n: int) -> Iterator[dict]:
    for count, size in _cycle(_fitting(shape, shape.list_counts), n):
        chosen = rng.sample(pool[size], count)
        yield _visual_item(chosen, [_ask(rng, chosen, "list")], "list")


def _fitting(shape: Shape, counts: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The (number of images, size in px) that the context holds."""
    cells = itertools.product(counts, shape.pool)
    return tuple(
        (count, size)
        for count, size in cells
        if not shape.context or images.prompt_tokens(count, size) <= shape.context
    )


def _visual_dialogue(rng: random.Random, pool: Pool, shape: Shape) -> dict:
    """2-4 answered turns, then the item's own question, which no earlier turn has asked."""
    count, size = 0, 0
    while (count, size) not in _fitting(shape, shape.image_counts):
        size, count = rng.choice(tuple(shape.pool)), rng.choice(shape.image_counts)
    chosen = rng.sample(pool[size], count)
    kinds = SINGLE_KINDS if len(chosen) > max(shape.list_counts) else (*SINGLE_KINDS, "list")
    kind = rng.choice(kinds)
    last = _ask(rng, chosen, kind)
    earlier: list[tuple[str, str]] = []
    wanted = rng.randint(2, 4)
    while len(earlier) < wanted:
        asked = _ask(rng, chosen, rng.choice(kinds))
        if asked != last:
            earlier.append(asked)
    return _visual_item(chosen, [*earlier, last], kind)


def _passage_items(
    rng: random.Random, windows: _Windows, shape: Shape, n: int, earlier: tuple[int, int]
) -> Iterator[dict]:
    """Pairs within real text; `earlier` bounds the number of answered turns."""
    for size, count in _cycle(tuple(itertools.product(shape.passages, shape.pair_counts)), n):
        pairs, turns = _recall_turns(rng, count, rng.randint(*earlier))
        passage = wording.passage(windows.next(size), pairs, rng)
        yield _chat(f"{passage}\n{turns[0][0]}", turns, "passage", "text")


def _ask(rng: random.Random, chosen: list[PoolImage], kind: str) -> tuple[str, str]:
    questions = wording.image_questions(
        [m.digit for m in chosen], [m.color for m in chosen], [m.shape for m in chosen]
    )
    return rng.choice([(q, a) for k, q, a in questions if k == kind])


def _visual_item(chosen: list[PoolImage], turns: list[tuple[str, str]], kind: str) -> dict:
    content = []
    for i, member in enumerate(chosen):
        content.append({"type": "text", "text": ("\n" if i else "") + f"Image {i + 1}:"})
        content.append({"type": "image_url", "image_url": {"url": member.url}})
    content.append({"type": "text", "text": "\n" + turns[0][0]})
    return _chat(content, turns, kind, "visual")


def _recall_item(rng: random.Random, n: int, earlier: int) -> dict:
    pairs, turns = _recall_turns(rng, n, earlier)
    return _chat(f"{wording.pair_list(pairs)}\n{turns[0][0]}", turns, "recall", "text")


def _recall_turns(
    rng: random.Random, n: int, earlier: int
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """`n` keys with two-digit values, and questions with answers.

    The `earlier` turns leave out the last question's key.
    """
    last, *others = rng.sample([a + b for a in ascii_lowercase for b in ascii_lowercase], n)
    listed = rng.sample([last, *others], n)
    pairs = {key: f"{rng.randrange(100):02d}" for key in listed}
    asked = [*rng.choices(others, k=earlier), last]
    return pairs, [(wording.recall_question([key]), pairs[key]) for key in asked]


def _chat(first_content, turns: list[tuple[str, str]], kind: str, modality: str) -> dict:
    messages = [{"role": "user", "content": first_content}]
    for (_, answer), (question, _) in itertools.pairwise(turns):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
    return {"messages": messages, "answer": turns[-1][1], "kind": kind, "modality": modality}
