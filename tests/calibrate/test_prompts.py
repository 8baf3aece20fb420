"""Prompts for teacher forcing: what is scored is the answer and the end of its turn, no more."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vllm_attentionpack.errors import CalibrationDataError
from vllm_attentionpack.evaluate.data import ChatItem, ImageSource, TextItem
from vllm_attentionpack.evaluate.prompts import PromptRenderer

MODEL = Path(__file__).parents[2] / "examples/reference-vlm/model"

PLAIN = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{% if m.content is string %}{{m.content}}"
    "{% else %}{% for c in m.content %}{% if c.type == 'text' %}{{c.text}}{% else %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
#: Shows past answers otherwise than it prompts for them, as templates with thoughts do.
REWRITING = PLAIN.replace("{{m.role}}\n", "{{m.role}}!\n")
BROKEN = "{{ raise_exception('roles must alternate') }}"


class Renderer:
    """Stands for vLLM's: the template as it is, images handed through."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer, self.template = tokenizer, template

    def render_messages(self, messages: Any, parameters: Any) -> tuple[Any, dict[str, Any]]:
        text = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, **parameters.chat_template_kwargs
        )
        contents = (m["content"] for m in messages if not isinstance(m["content"], str))
        images = [part["image_pil"] for parts in contents for part in parts if "image_pil" in part]
        return messages, {"prompt": text} | (
            {"multi_modal_data": {"image": images}} if images else {}
        )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def renderer(tokenizer: Any, template: str = PLAIN, max_model_len: int = 100) -> PromptRenderer:
    llm: Any = SimpleNamespace(
        get_tokenizer=lambda: tokenizer,
        renderer=Renderer(tokenizer, template),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )
    return PromptRenderer(llm)


def chat(answer: str | None, *content: Any) -> ChatItem:
    return ChatItem((("user", content or "Which?"),), answer, {}, 7)


@pytest.mark.parametrize("template", [PLAIN, REWRITING], ids=["plain", "rewriting"])
def test_scored_tokens_are_answer_and_end_of_turn(tokenizer: Any, template: str) -> None:
    (prompt,) = renderer(tokenizer, template).render(chat("blue square"))
    scored = prompt.token_ids[-prompt.num_scored_tokens :]
    assert tokenizer.decode(scored) == "blue square<|im_end|>"
    before = tokenizer.decode(prompt.token_ids[: -prompt.num_scored_tokens])
    assert before.endswith("<|im_start|>assistant\n")


def test_without_answer_nothing_is_scored(tokenizer: Any) -> None:
    of = renderer(tokenizer)
    for (prompt,) in (of.render(chat("blue"), with_answer=False), of.render(chat(None))):
        assert prompt.num_scored_tokens == 0
        assert tokenizer.decode(prompt.token_ids).endswith("<|im_start|>assistant\n")


def test_images_come_in_order_with_one_placeholder_each(tokenizer: Any, tmp_path: Path) -> None:
    sources = []
    for color in ("red", "blue"):
        path = tmp_path / f"{color}.png"
        Image.new("RGB", (2, 2), color).save(path)
        sources.append(ImageSource(path, ""))
    (prompt,) = renderer(tokenizer).render(chat("yes", "a ", sources[0], " b ", sources[1], "?"))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert prompt.token_ids.count(pad) == 2
    images = prompt.prompt["multi_modal_data"]["image"]
    assert [image.getpixel((0, 0)) for image in images] == [(255, 0, 0), (0, 0, 255)]


def test_long_texts_are_cut_into_windows_that_leave_room_to_generate(tokenizer: Any) -> None:
    text = "abcdefghij" * 25
    prompts = renderer(tokenizer, max_model_len=100).render(TextItem(text, {}, 1))
    ids = tokenizer.encode(text)
    assert [token for prompt in prompts for token in prompt.token_ids] == ids
    assert max(len(prompt.token_ids) for prompt in prompts) == 99
    assert [p.num_scored_tokens for p in prompts] == [len(p.token_ids) - 1 for p in prompts]


def test_failing_template_names_the_line(tokenizer: Any) -> None:
    with pytest.raises(CalibrationDataError, match=r"line 7 cannot be rendered .* alternate"):
        renderer(tokenizer, BROKEN).render(chat("x"))
