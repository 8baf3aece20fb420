"""Calibration and held-out items for the reference model: chats over pooled images, pairs, text.

One JSON object per line::

    {"messages": [...], "answer": "7", "kind": "digit|color|shape|list|recall", "modality": ...}
    {"text": "...", "kind": "text", "modality": "text"}

Image URLs are relative to the JSON-lines file.  No "which" questions: the model is at chance there.
"""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase

import torch

from . import images, wording

SIZES = (56, 84, 112)
POOL_SHARES = {56: 40, 84: 34, 112: 26}  # fewer of the large ones: noise compresses badly
SINGLE_KINDS = ("digit", "color", "shape")
IMAGE_COUNTS = (2, 4, 6, 8)
LIST_COUNTS = (2, 3, 4, 6)
PAIR_COUNTS = (4, 6, 8, 12)


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


SPLITS = (
    Split("calibrate", 10_007, 36, 36, 24, 32, 16, 16, "cc0-1.0.txt"),
    Split("heldout", 20_011, 72, 48, 40, 52, 26, 26, "apache-2.0.txt"),
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
    for size, share in POOL_SHARES.items():
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
    pool = make_pool(split)
    items = [
        *_attribute_items(rng, pool, split.attribute),
        *_list_items(rng, pool, split.listing),
        *(_visual_dialogue(rng, pool) for _ in range(split.visual_turns)),
        *(_recall_item(rng, n, 0) for n in _cycle(PAIR_COUNTS, split.recall)),
        *(_recall_item(rng, n, rng.randint(2, 4)) for n in _cycle(PAIR_COUNTS, split.recall_turns)),
        *({"text": t, "kind": "text", "modality": "text"} for t in cut_text(text, split.text)),
    ]
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


def _cycle(values: tuple, n: int) -> list:
    return list(itertools.islice(itertools.cycle(values), n))


def _attribute_items(rng: random.Random, pool: Pool, n: int) -> Iterator[dict]:
    for kind, count, size in _cycle(tuple(itertools.product(SINGLE_KINDS, IMAGE_COUNTS, SIZES)), n):
        chosen = rng.sample(pool[size], count)
        yield _visual_item(chosen, [_ask(rng, chosen, kind)], kind)


def _list_items(rng: random.Random, pool: Pool, n: int) -> Iterator[dict]:
    for count, size in _cycle(tuple(itertools.product(LIST_COUNTS, SIZES)), n):
        chosen = rng.sample(pool[size], count)
        yield _visual_item(chosen, [_ask(rng, chosen, "list")], "list")


def _visual_dialogue(rng: random.Random, pool: Pool) -> dict:
    """2-4 answered turns, then the item's own question, which no earlier turn has asked."""
    chosen = rng.sample(pool[rng.choice(SIZES)], rng.choice(IMAGE_COUNTS))
    kinds = SINGLE_KINDS if len(chosen) > max(LIST_COUNTS) else (*SINGLE_KINDS, "list")
    kind = rng.choice(kinds)
    last = _ask(rng, chosen, kind)
    earlier: list[tuple[str, str]] = []
    wanted = rng.randint(2, 4)
    while len(earlier) < wanted:
        asked = _ask(rng, chosen, rng.choice(kinds))
        if asked != last:
            earlier.append(asked)
    return _visual_item(chosen, [*earlier, last], kind)


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
    """`n` keys with two-digit values; the `earlier` turns leave out the last question's key."""
    last, *others = rng.sample([a + b for a in ascii_lowercase for b in ascii_lowercase], n)
    listed = rng.sample([last, *others], n)
    pairs = {key: f"{rng.randrange(100):02d}" for key in listed}
    asked = [*rng.choices(others, k=earlier), last]
    turns = [(wording.recall_question([key]), pairs[key]) for key in asked]
    return _chat(f"{wording.pair_list(pairs)}\n{turns[0][0]}", turns, "recall", "text")


def _chat(first_content, turns: list[tuple[str, str]], kind: str, modality: str) -> dict:
    messages = [{"role": "user", "content": first_content}]
    for (_, answer), (question, _) in itertools.pairwise(turns):
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": question})
    return {"messages": messages, "answer": turns[-1][1], "kind": kind, "modality": modality}
