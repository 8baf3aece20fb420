"""Items to vLLM prompts, through the model's own chat template, for teacher forcing.

A prompt holds token ids with one placeholder per image, which vLLM expands. The answer comes last,
so that the last `num_scored_tokens` ids of the expanded prompt are exactly what is to be scored.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_attentionpack.errors import CalibrationDataError
from vllm_attentionpack.evaluate.data import ChatItem, ImageSource, Item, TextItem

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class RenderedPrompt:
    """One prompt.

    Attributes:
        prompt: what `LLM.generate` takes: `prompt_token_ids` and, with images,
            `multi_modal_data`.
        num_scored_tokens: how many of the last token ids are the answer (with the token that ends
            the turn); of a text all but its first; 0 for a prompt without an answer.
        item: where it comes from.
    """

    prompt: dict[str, Any]
    num_scored_tokens: int
    item: Item

    @property
    def token_ids(self) -> list[int]:
        """The ids, images not expanded."""
        return self.prompt["prompt_token_ids"]


def enqueue(llm: "LLM", rendered: RenderedPrompt, sampling: Any) -> None:
    """Hands a prompt to the engine.

    Raises:
        CalibrationDataError: the engine refuses it (too long, say), with the line of its item.
    """
    from vllm.exceptions import VLLMClientError  # what refusals are is no ValueError

    try:
        llm.enqueue(rendered.prompt, sampling, use_tqdm=False)
    except (ValueError, VLLMClientError) as error:
        raise CalibrationDataError(
            f"the item of line {rendered.item.line} cannot be used with this model ({error}). "
            "Shorten or remove it, or raise --max-model-len."
        ) from error


class PromptRenderer:
    """Renders items for one model.

    Args:
        llm: the engine whose tokenizer and chat template are used.
    """

    def __init__(self, llm: "LLM") -> None:
        self._llm = llm
        self._tokenizer: Any = llm.get_tokenizer()

    def render(self, item: Item, with_answer: bool = True) -> list[RenderedPrompt]:
        """The prompts of one item: one for a chat, one per window of the context for a text.

        Args:
            item: a chat or a text.
            with_answer: append the answer of a chat, and the token that ends its turn.

        Raises:
            CalibrationDataError: the model has no chat template or no images, or its template
                fails on the messages.
        """
        if isinstance(item, TextItem):
            return self._text(item)
        prefix, media = self._render_messages(item, item.messages, True)
        ids = self._encode(prefix)
        answer = self._answer(item, prefix) if with_answer and item.answer is not None else []
        prompt: dict[str, Any] = {"prompt_token_ids": ids + answer}
        if media:
            prompt["multi_modal_data"] = media
        return [RenderedPrompt(prompt, len(answer), item)]

    def _text(self, item: TextItem) -> list[RenderedPrompt]:
        ids = self._tokenizer.encode(item.text)
        # one token of the context is left for the one that vLLM always generates
        window = self._llm.model_config.max_model_len - 1
        windows = (ids[i : i + window] for i in range(0, len(ids), window))
        return [
            RenderedPrompt({"prompt_token_ids": part}, len(part) - 1, item)
            for part in windows
            if len(part) > 1
        ]

    def _answer(self, item: ChatItem, prefix: str | list[int]) -> list[int]:
        """The ids of the answer and of what ends the turn in the model's chat template."""
        assert item.answer is not None
        ids = self._encode(item.answer)
        if isinstance(prefix, str):
            whole, _ = self._render_messages(
                item, (*item.messages, ("assistant", item.answer)), False
            )
            opening = prefix + item.answer
            if isinstance(whole, str) and whole.startswith(opening):
                return ids + self._end_of_turn(whole[len(opening) :])
        # The template rewrites answers (for example around thoughts): end as generation would.
        end = self._tokenizer.eos_token_id
        return ids if end is None else [*ids, end]

    def _end_of_turn(self, closing: str) -> list[int]:
        """Of what follows an answer, the ids up to the first special token.

        What comes after it (a newline, say) opens the next turn: the model never generates it.
        """
        ids = self._encode(closing)
        special = set(self._tokenizer.all_special_ids)
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        special |= {token for token, entry in added.items() if getattr(entry, "special", False)}
        for i, token in enumerate(ids):
            if token in special:
                return ids[: i + 1]
        return []

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):  # chat templates write out the special tokens themselves
            return self._tokenizer.encode(prompt, add_special_tokens=False)
        return list(prompt)

    def _render_messages(
        self, item: ChatItem, messages: Any, add_generation_prompt: bool
    ) -> tuple[str | list[int], dict[str, Any]]:
        """The chat template's text (or ids, where the renderer only gives ids) and the images."""
        from vllm.renderers import ChatParams

        parameters = ChatParams(
            chat_template_kwargs={"add_generation_prompt": add_generation_prompt, "tokenize": False}
        )
        try:
            _, prompt = self._llm.renderer.render_messages(
                [{"role": role, "content": _openai(content)} for role, content in messages],
                parameters,
            )
        except Exception as error:  # jinja, template and multi-modal errors have no common type
            raise CalibrationDataError(
                f"the chat of line {item.line} cannot be rendered for this model ({error}). "
                "Check the roles, the number of images and that the model has a chat template."
            ) from error
        ids = prompt.get("prompt_token_ids")
        return prompt["prompt"] if ids is None else list(ids), prompt.get("multi_modal_data") or {}


def _openai(content: "str | tuple[str | ImageSource, ...]") -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_pil", "image_pil": part.load()}
        for part in content
    ]
