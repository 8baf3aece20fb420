"""Byte-level tokenizer: 256 bytes, Qwen's special tokens, and whole words of the tasks."""

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
VOCAB_SIZE = 384  # the tokens above, rounded up to a multiple of 128

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n"
    "{% if m.content is string %}{{m.content}}{% else %}{% for c in m.content %}"
    "{% if c.type in ['image','image_url'] %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type in ['video','video_url'] %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{c.text}}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer():
    """The `PreTrainedTokenizerFast` with its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    core.add_tokens([AddedToken(w, normalized=False, special=False) for w in WORDS])
    assert core.get_vocab_size() <= VOCAB_SIZE, core.get_vocab_size()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=wording.IM_END,
        pad_token=wording.END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
