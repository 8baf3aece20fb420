"""Codecs and packs without calibration, for figures that depend on shapes and not on a model.

Variances of the latent dims fall as `1 / (i + 1) ** DECAY`. At 8x the allocator then retains 0.65
of the dims of a group of eight heads of 128; the share is what decides speed.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vllm_attentionpack.calibrate.settings import PRE_ROPE_TURN
from vllm_attentionpack.codec.allocate import allocate, unit_curve
from vllm_attentionpack.codec.codec import LayerCodec, bases_by_kind
from vllm_attentionpack.codec.layout import (
    DENSE_BYTES,
    KINDS,
    SCALE_BYTES,
    GroupLayout,
    LayerLayout,
    units_of,
)
from vllm_attentionpack.codec.positions import Anchors, Rotary, pre_rope_planes
from vllm_attentionpack.codec.transform import PrincipalBasis
from vllm_attentionpack.packfile import Fingerprint, Pack
from vllm_attentionpack.packfile.uncalibrated import uncalibrated_pack

DECAY = 2.0


def synthetic_layout(
    num_kv_heads: int,
    heads_per_group: int,
    head_size: int,
    ratio: float,
    joint_kv: bool = False,
) -> LayerLayout:
    """What the allocator makes of the spectrum at a compression of `ratio`."""
    kinds = len(units_of(joint_kv)[0])
    curve = unit_curve(_variance(kinds * heads_per_group * head_size))
    groups = num_kv_heads // heads_per_group
    budget = num_kv_heads * len(KINDS) * head_size * DENSE_BYTES / ratio
    units = [curve] * (groups * len(units_of(joint_kv)))
    ((counts, size),) = allocate([units], [1.0], budget, [SCALE_BYTES * len(units)])
    per_group = len(units) // groups
    of_groups = (counts[i : i + per_group] for i in range(0, len(units), per_group))
    return LayerLayout(
        tuple(GroupLayout.of(of_group) for of_group in of_groups),
        heads_per_group,
        head_size,
        size,
    )


def synthetic_codec(
    num_kv_heads: int,
    heads_per_group: int,
    head_size: int,
    ratio: float,
    seed: int = 0,
    joint_kv: bool = False,
) -> LayerCodec:
    """A codec of one modality with random orthogonal bases.

    It suits `synthetic_heads` of the same seed; the groups share their basis.
    """
    layout = synthetic_layout(num_kv_heads, heads_per_group, head_size, ratio, joint_kv)
    turn = _turn(layout.coded_dims, seed)
    variance = torch.from_numpy(_variance(len(turn)))
    metric = torch.eye(head_size, dtype=torch.float64).repeat(len(turn) // head_size, 1, 1)
    basis = PrincipalBasis(
        mean=torch.zeros(1, len(turn), dtype=torch.float64),
        vectors=turn.T.float()[None],
        root=metric[None],
        variance=variance[None],
        share=torch.ones(1, dtype=torch.float64),
    )
    return LayerCodec(
        layout,
        [
            bases_by_kind([basis.truncate(getattr(group, kinds[0])) for kinds in group.units])
            for group in layout.groups
        ],
    )


def synthetic_heads(
    tokens: int, num_kv_heads: int, heads_per_group: int, head_size: int, seed: int = 0
) -> Tensor:
    """Keys or values with the spectrum, bfloat16 `[tokens, Hk, D]`, unit variance on average."""
    dims = heads_per_group * head_size
    generator = torch.Generator().manual_seed(seed + 1)
    spread = torch.from_numpy(_variance(dims)).sqrt().float()
    latent = torch.randn(tokens, num_kv_heads // heads_per_group, dims, generator=generator)
    heads = (latent * spread) @ _turn(dims, seed).float()
    return heads.unflatten(-1, (heads_per_group, head_size)).flatten(1, 2).bfloat16()


def synthetic_pack(
    fingerprint: Fingerprint,
    layer_names: Sequence[str],
    heads_per_group: int,
    ratio: float,
    max_context: int,
    anchor_span: int = 0,
    pre_rope: bool = False,
    joint_kv: bool = False,
) -> Pack:
    """A pack for a model with random weights: right in every byte, and good for nothing."""
    codec = synthetic_codec(
        fingerprint.num_kv_heads,
        heads_per_group,
        fingerprint.head_size,
        ratio,
        joint_kv=joint_kv,
    )
    if anchor_span:
        planes = torch.arange(fingerprint.head_size // 2, dtype=torch.float64)
        rotary = Rotary(10000.0 ** -(planes / len(planes)))
        own = pre_rope_planes(rotary, anchor_span, PRE_ROPE_TURN) if pre_rope else 0
        codec.anchors = Anchors(rotary, anchor_span, own)
    codecs = [codec] * len(layer_names)
    return uncalibrated_pack(codecs, fingerprint, layer_names, ratio, max_context)


def save_dummy_model(
    folder: Path,
    *,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    hidden_size: int,
    max_position: int,
) -> None:
    """Writes the configuration of a Llama for `load_format="dummy"`: no weights, no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 1024,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_size,
        "max_position_embeddings": max_position,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _variance(dims: int) -> np.ndarray:
    """float64 `[dims]`, falling, one on average."""
    variance = (np.arange(dims) + 1.0) ** -DECAY
    return variance * dims / variance.sum()


def _turn(dims: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 `[dims, dims]`."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))
    return turn
