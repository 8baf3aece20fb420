"""The reference VLM: its questions, and how often a run answers them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vllm_attentionpack.evaluate.data import ChatItem, read_dataset
from vllm_attentionpack.evaluate.prompts import PromptRenderer

FOLDER = Path(__file__).parents[2] / "examples" / "reference-vlm"
MODEL = FOLDER / "model"
CALIBRATION_DATA = FOLDER / "calibrate.jsonl"
HELD_OUT_DATA = FOLDER / "heldout.jsonl"
#: The token that vLLM repeats in the place of an image.
IMAGE_TOKEN = 262


@dataclass(frozen=True)
class Question:
    """One held-out question.

    Attributes:
        prompt: what `LLM.generate` takes.
        answer: the right one.
        visual: it is about images.
    """

    prompt: dict[str, Any]
    answer: str
    visual: bool


def questions(llm: Any) -> list[Question]:
    """All held-out questions in the order of the file; prompts fit every engine of the model."""
    renderer = PromptRenderer(llm)
    return [
        Question(
            renderer.render(item, with_answer=False)[0].prompt,
            item.answer,
            item.extra["modality"] == "visual",
        )
        for item in read_dataset(HELD_OUT_DATA).items
        if isinstance(item, ChatItem) and item.answer is not None
    ]


def dialogues(llm: Any, visual: bool) -> list[list[dict[str, Any]]]:
    """Held-out dialogues of several turns: the prompt of each turn, right answers in between."""
    renderer = PromptRenderer(llm)
    return [
        [
            renderer.render(replace(item, messages=item.messages[: turn + 1], answer=None))[
                0
            ].prompt
            for turn in range(0, len(item.messages), 2)
        ]
        for item in read_dataset(HELD_OUT_DATA).items
        if isinstance(item, ChatItem)
        and len(item.messages) > 1
        and visual == (item.extra["modality"] == "visual")
    ]


def accuracy(asked: Sequence[Question], outputs: Sequence[Any]) -> float:
    """Share of the outputs that are the right answer, word for word."""
    pairs = zip(asked, outputs, strict=True)
    return sum(q.answer == output.outputs[0].text.strip() for q, output in pairs) / len(asked)
