"""Byte-level tokenizer: 256 bytes, Qwen's special tokens, and whole words of the tasks or more."""

from collections.abc import Sequence

from . import wording

SPECIAL_TOKENS = (
    wording.END_OF_TEXT,
    wording.IM_START,
    wording.IM_END,
    wording.VISION_START,
    wording.VISION_END,
    "<|vision_pad|>",
    wording.IMAGE_PAD,
    "<|video_pad|>",
)
# Whole words shorten the chat scaffolding and the indices, so that contexts stay short on a CPU.
WORDS = (
    *("user", "assistant", "What", "Which", "List", "Image"),
    *(" digit", " digits", " color", " colors", " shape", " shapes", " image"),
    *(" is", " in", " the", " has", " a", "; "),
    *wording.COLOR_NAMES,
    *(f" {name}" for name in wording.COLOR_NAMES),
    *wording.SHAPE_NAMES,
    *(f" {name}" for name in wording.SHAPE_NAMES),
    *(f" {digit}" for digit in range(10)),
)
VOCAB_MULTIPLE = 128  # sizes that kernels like

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n"
    "{% if m.content is string %}{{m.content}}{% else %}{% for c in m.content %}"
    "{% if c.type in ['image','image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type in ['video','video_url'] %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{c.text}}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(words: Sequence[str] = ()):
    """The `PreTrainedTokenizerFast` with its chat template.

    Every one of `words`, with or without the space before it, is a token of its own; letters that
    are no such word stay bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(word.replace(" ", "\u0120") for word in words)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=bool(words)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    core.add_tokens([AddedToken(w, normalized=False, special=False) for w in WORDS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=wording.IM_END,
        pad_token=wording.END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def vocab_size(tokenizer) -> int:
    """Rows of the embedding: the tokens, rounded up."""
    return -(-len(tokenizer) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
