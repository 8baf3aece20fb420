"""The model: transformers' `Qwen2VLForConditionalGeneration`, its initialisation and its export."""

import copy
import math
import os

import torch
from torch import nn

from . import wording
from .options import MAX_POSITIONS, Options
from .tokenizer import vocab_size
from .widen import widen

VISION_HEAD_DIM = 32


def build_model(options: Options, tokenizer) -> nn.Module:
    """A freshly initialised fp32 model on the CPU."""
    from transformers import Qwen2VLForConditionalGeneration

    torch.manual_seed(options.seed)
    model = Qwen2VLForConditionalGeneration(_config(options, tokenizer)).float()
    _init_weights(model, options)
    positional_init(model, options.positional_score, options.positional_spread)
    if options.widen:
        widen(model, options.widen, tokenizer, options.seed)
    return model


def _config(options: Options, tokenizer):
    from transformers import Qwen2VLConfig

    token = tokenizer.convert_tokens_to_ids
    half = options.head_dim // 2
    temporal, height = half // 4, 3 * half // 8  # head_dim 64 -> sections [8, 12, 12]
    return Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size(tokenizer),
            "hidden_size": options.hidden,
            "intermediate_size": options.inter,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "type": "mrope",
                "mrope_section": [temporal, height, half - temporal - height],
                "rope_theta": options.theta,
            },
            "tie_word_embeddings": False,
            "bos_token_id": token(wording.END_OF_TEXT),
            "eos_token_id": token(wording.IM_END),
        },
        vision_config={
            "depth": options.vis_depth,
            "embed_dim": options.vis_dim,
            "hidden_size": options.hidden,
            "num_heads": options.vis_dim // VISION_HEAD_DIM,
            "mlp_ratio": options.vis_mlp,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token(wording.IMAGE_PAD),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token(wording.VISION_START),
        vision_end_token_id=token(wording.VISION_END),
    )


def _init_weights(model: nn.Module, options: Options) -> None:
    """Fan-in initialisation (transformers' fixed 0.02 is too small at this width)."""
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            continue
        fan_in = weight[0].numel()
        std = 0.7 / math.sqrt(fan_in)
        if "embed_tokens" in name:
            std = 0.2
        elif "lm_head" in name:
            std = 0.3 / math.sqrt(fan_in)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std /= math.sqrt(2 * options.layers)
        elif "visual" in name and name.endswith(("attn.proj.weight", "fc2.weight")):
            std /= math.sqrt(2 * options.vis_depth)
        nn.init.normal_(weight, std=std)


def positional_init(model: nn.Module, score: float, spread: bool = False) -> None:
    """Start layer-0 heads 0, 1, 2 as heads that attend 1, 2, 3 positions back.

    With `spread`, the first query head of every further KV head too, at 1, 2, 3 positions in turn.

    With q/k biases on the temporal M-RoPE frequencies theta_i, the score at distance delta is
    proportional to sum_i cos(theta_i (delta - back)), and `score` at its largest.  Retrieval heads
    build on such heads; without this start they did not form within a few million tokens.  Every
    weight stays trainable.
    """
    attention = model.model.language_model.layers[0].self_attn
    dim, group = attention.head_dim, attention.num_key_value_groups
    n = model.config.text_config.rope_parameters["mrope_section"][0]
    frequency = model.model.language_model.rotary_emb.inv_freq[:n].float()
    frequency = frequency.to(attention.q_proj.bias.device)
    amplitude = math.sqrt(score * 8 / n * dim / 64)
    heads = list(range(min(3, model.config.text_config.num_attention_heads)))
    if spread:
        heads += range(-(-len(heads) // group) * group, attention.q_proj.out_features // dim, group)
    with torch.no_grad():
        for i, head in enumerate(heads):
            back = i % 3 + 1
            q_rows = slice(head * dim, (head + 1) * dim)
            k_rows = slice(head // group * dim, (head // group + 1) * dim)
            q, k = attention.q_proj.bias[q_rows].zero_(), attention.k_proj.bias[k_rows].zero_()
            q[:n] = amplitude * torch.cos(-frequency * back)
            q[dim // 2 : dim // 2 + n] = amplitude * torch.sin(-frequency * back)
            k[:n] = amplitude
            attention.q_proj.weight[q_rows] *= 0.3
        for kv_head in {head // group for head in heads}:
            attention.k_proj.weight[kv_head * dim : (kv_head + 1) * dim] *= 0.4


def image_processor():
    """The processor of the checkpoint; its pixel bounds leave images of 28..448 px as they are."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 256)


def save_model(model: nn.Module, tokenizer, path: str) -> None:
    """Write a bf16 checkpoint for transformers and vLLM; `model` stays as it is.

    Files are replaced one by one from a folder beside it: a reader never sees half a file.
    """
    fresh = path + ".tmp"
    os.makedirs(fresh, exist_ok=True)
    exported = copy.deepcopy(model).to("cpu", torch.bfloat16)
    exported.config.dtype = torch.bfloat16
    exported.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    image_processor().save_pretrained(fresh)
    os.makedirs(path, exist_ok=True)
    for name in os.listdir(fresh):
        os.replace(os.path.join(fresh, name), os.path.join(path, name))
    os.rmdir(fresh)
