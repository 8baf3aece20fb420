"""The only wording the reference model has seen; training and the data sets both use it.

A training sample is a list of segments ``(text, supervised)``: the loss covers supervised segments.
"""

from collections.abc import Mapping, Sequence
from random import Random

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
VISION_START, VISION_END, IMAGE_PAD = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"
IMAGE = VISION_START + IMAGE_PAD + VISION_END

COLOR_NAMES = ("red", "green", "blue", "yellow", "purple", "white")
SHAPE_NAMES = ("circle", "square", "triangle")

Segment = tuple[str, bool]


def user_open() -> str:
    return f"{IM_START}user\n"


def image_list(n: int, labelled: bool = True) -> str:
    """``Image 1:<image>\\nImage 2:<image>...``, or the bare images one after another."""
    if not labelled:
        return IMAGE * n
    return "\n".join(f"Image {i + 1}:{IMAGE}" for i in range(n))


def pair_list(pairs: Mapping[str, str]) -> str:
    """``ax: 41; bq: 07``"""
    return "; ".join(f"{key}: {value}" for key, value in pairs.items())


def passage(text: str, pairs: Mapping[str, str], rng: Random) -> str:
    """`text` with every pair on a line of its own after a random line of it.

    Empty lines go: the chat's own empty line would be ambiguous otherwise.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    for key, value in pairs.items():
        lines.insert(rng.randint(0, len(lines)), pair_list({key: value}))
    return "\n".join(lines)


def plain(text: str) -> str:
    """`text` without special tokens: documentation of chat formats must not make any."""
    return text.replace("<|", "< |")


def recall_question(keys: Sequence[str]) -> str:
    return " ".join(keys) + "?"


def turn(question: str, answer: str, first: bool = False) -> list[Segment]:
    """One user question with the assistant's answer; the first one continues an open user turn."""
    opening = "" if first else user_open()
    prompt = f"{opening}{question}{IM_END}\n{IM_START}assistant\n"
    return [(prompt, False), (answer + IM_END, True), ("\n", False)]


def image_questions(
    digits: Sequence[int], colors: Sequence[int], shapes: Sequence[int]
) -> list[tuple[str, str, str]]:
    """Every ``(kind, question, answer)`` that these images allow.

    The "which" questions exist only where the answer is unique.
    """
    looks = list(zip(colors, shapes, strict=True))
    found = []
    for i, digit in enumerate(digits):
        color, shape = COLOR_NAMES[colors[i]], SHAPE_NAMES[shapes[i]]
        found.append(("digit", f"What digit is in image {i + 1}?", f"{digit}"))
        found.append(("color", f"What color is image {i + 1}?", color))
        found.append(("shape", f"What shape is in image {i + 1}?", shape))
        if list(digits).count(digit) == 1:
            found.append(("which-digit", f"Which image has the digit {digit}?", f"{i + 1}"))
        if looks.count(looks[i]) == 1:
            found.append(("which-cs", f"Which image has a {color} {shape}?", f"{i + 1}"))
    found.append(("list", "List the digits.", " ".join(map(str, digits))))
    found.append(("list", "List the colors.", " ".join(COLOR_NAMES[c] for c in colors)))
    found.append(("list", "List the shapes.", " ".join(SHAPE_NAMES[s] for s in shapes)))
    return found
