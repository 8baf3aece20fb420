"""Check that items rendered by the chat template read exactly like the training prompts."""

import re

from . import wording

_QUESTION = (
    r"What digit is in image \d+\?|What color is image \d+\?|What shape is in image \d+\?"
    r"|List the (?:digits|colors|shapes)\.|[a-z]{2}\?"
)
_ANSWER = re.compile(r"(?:[a-z]+|\d{1,2})(?: (?:[a-z]+|\d))*")


def training_prompt(item: dict) -> str:
    """The prompt that training would build for this chat, put together without the template."""
    first, *rest = item["messages"]
    content = first["content"]
    if isinstance(content, str):
        context, question = content.rsplit("\n", 1)
    else:
        context = wording.image_list(sum(part["type"] == "image_url" for part in content))
        question = content[-1]["text"].removeprefix("\n")
    questions = [question, *(m["content"] for m in rest if m["role"] == "user")]
    answers = [m["content"] for m in rest if m["role"] == "assistant"] + [item["answer"]]
    segments = [(f"{wording.user_open()}{context}\n", False)]
    for i, (asked, answer) in enumerate(zip(questions, answers, strict=True)):
        if not re.fullmatch(_QUESTION, asked) or not _ANSWER.fullmatch(answer):
            raise ValueError(f"not in the training wording: {asked!r} -> {answer!r}")
        segments += wording.turn(asked, answer, first=i == 0)
    return "".join(text for text, _ in segments[:-2])


def check_item(item: dict, tokenizer) -> None:
    """Raise ValueError unless the template renders `item` to its training prompt, byte for byte."""
    if item["kind"] == "text":
        return
    rendered = tokenizer.apply_chat_template(
        item["messages"], tokenize=False, add_generation_prompt=True
    )
    expected = training_prompt(item)
    if rendered != expected:
        raise ValueError(f"template gives {rendered!r}, training had {expected!r}")
