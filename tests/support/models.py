"""Tiny checkpoints with random weights, made so that attention decides what comes out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.reference import MODEL as TOKENIZER

VOCABULARY = 384
#: Wide enough that logits differ by more than rounding; transformers' default of 0.02 gives
#: models whose residual stream hardly hears the attention layers.
_SPREAD = 0.15


def random_prompts(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Prompts of random token ids, none of them special."""
    rng = np.random.default_rng(0)
    return [{"prompt_token_ids": rng.integers(3, 256, n).tolist()} for n in lengths]


def forced(max_tokens: int) -> Any:
    """Sampling parameters: log-probabilities of the prompt, then greedy tokens with theirs."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        logprobs=5,
        prompt_logprobs=0,
        detokenize=False,
        ignore_eos=True,
    )


def save_text_model(folder: Path, kind: str, **settings: Any) -> Path:
    """Writes a decoder for `AutoModelForCausalLM`; no tokenizer.

    Args:
        folder: where to.
        kind: transformers' `model_type`.
        **settings: fields of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **_text(**settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def save_llava(folder: Path, **settings: Any) -> Path:
    """Writes a LLaVA with a CLIP tower, its processor and the reference VLM's tokenizer.

    Images of any size become 16 tokens.
    """
    from safetensors.torch import save_file
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size, patch = 56, 14
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=size,
            patch_size=patch,
        ),
        text_config=LlamaConfig(**_text(**settings)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    # transformers 5 dropped a level of names that vLLM's loader, and most checkpoints, have.
    tower, long_tower = "model.vision_tower.", "model.vision_tower.vision_model."
    weights = {
        name.replace(tower, long_tower)
        if name.startswith(tower) and not name.startswith(long_tower)
        else name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def _text(**settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "initializer_range": _SPREAD,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
        **settings,
    }
