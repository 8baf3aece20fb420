"""Held-out chats of the reference VLM for a server: images inlined."""

import base64
import json
import re
from pathlib import Path
from typing import Any

from tests.support.reference import FOLDER, HELD_OUT_DATA


def data_url(path: Path, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def inlined(message: dict[str, Any]) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return message
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(FOLDER / part["image_url"]["url"])}}
        if part["type"] == "image_url"
        else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def held_out(modality: str, count: int) -> list[tuple[list[dict[str, Any]], str]]:
    """The first `count` held-out questions of a modality with their answers."""
    items = map(json.loads, HELD_OUT_DATA.read_text().splitlines())
    chosen = [item for item in items if item["modality"] == modality and "answer" in item]
    return [([inlined(m) for m in i["messages"]], i["answer"]) for i in chosen[:count]]


def images_in(messages: list[dict[str, Any]]) -> int:
    return json.dumps(messages).count('"image_url": {')


def known_digits() -> dict[Path, str]:
    """Held-out images with the digit that they show, from the questions about digits."""
    found = {}
    for item in map(json.loads, HELD_OUT_DATA.read_text().splitlines()):
        if item["kind"] == "digit" and len(item["messages"]) == 1:
            parts = item["messages"][0]["content"]
            number = int(re.search(r"image (\d+)\?", parts[-1]["text"])[1])
            images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
            found[FOLDER / images[number - 1]] = item["answer"]
    return found


VISUAL = held_out("visual", 20)
TEXT = held_out("text", 20)
DIGITS = known_digits()
IMAGE, DIGIT = next(iter(DIGITS.items()))


def about(*parts: dict[str, Any], question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def digit_question(medium: dict[str, Any]) -> list[dict[str, Any]]:
    return about(
        {"type": "text", "text": "Image 1:"}, medium, question="\nWhat digit is in image 1?"
    )


def image_question(image: Path = IMAGE) -> list[dict[str, Any]]:
    return digit_question({"type": "image_url", "image_url": {"url": data_url(image)}})


def film_question(film: Path) -> list[dict[str, Any]]:
    return digit_question({"type": "video_url", "video_url": {"url": data_url(film, "video/mp4")}})
