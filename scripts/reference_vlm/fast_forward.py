"""Batched forward pass over the modules of the transformers model.

Training calls this instead of the model: all images of a batch have one size, attention is plain
causal SDPA, and logits are computed only where there is a loss.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch import Batch


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


class FastForward:
    """
    Args:
        silent_heads: share of rows in which every KV head of every layer is silent with probability
            one half (DropHead, Zhou et al. 2020, without its rescaling): other heads must learn
            what it does.
        seed: of that draw.
    """

    def __init__(self, model: nn.Module, silent_heads: float = 0.0, seed: int = 0):
        self.model = model
        self.silent_heads = silent_heads
        self.generator = torch.Generator().manual_seed(seed)
        self.text, self.visual = model.model.language_model, model.model.visual
        config = model.config.text_config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.hidden_size // self.heads, config.rms_norm_eps
        self.sections = list(config.rope_parameters["mrope_section"])
        self.vision_heads = model.config.vision_config.num_heads
        self.vision_head_dim = model.config.vision_config.embed_dim // self.vision_heads
        self.image_pad = model.config.image_token_id
        self._vision_rope_cache: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def logits_at(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [n, vocab] and targets [n] at the supervised positions."""
        hidden = self.hidden(
            batch.ids[:, :-1], batch.positions[..., :-1], batch.patches, batch.grid
        )
        targets = batch.labels[:, 1:]
        supervised = targets >= 0
        return self.model.lm_head(hidden[supervised]), targets[supervised]

    def hidden(
        self, ids: Tensor, positions: Tensor, patches: Tensor | None = None, grid: int = 0
    ) -> Tensor:
        """Final hidden states [B, T, hidden] of ids [B, T] at M-RoPE positions [3, B, T]."""
        x = self.text.embed_tokens(ids)
        if patches is not None:
            visual = self.vision(patches, grid)
            image = (ids == self.image_pad).nonzero(as_tuple=True)
            x = torch.index_put(x, image, visual.to(x.dtype))
        cos, sin = self._rope(positions)
        for layer in self.text.layers:
            h = F.rms_norm(x, x.shape[-1:], layer.input_layernorm.weight, self.eps)
            x = x + self._attention(layer.self_attn, h, cos, sin)
            h = F.rms_norm(x, x.shape[-1:], layer.post_attention_layernorm.weight, self.eps)
            mlp = layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))
        return F.rms_norm(x, x.shape[-1:], self.text.norm.weight, self.eps)

    def _attention(self, attention: nn.Module, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = h.shape

        def split(x: Tensor, heads: int) -> Tensor:
            return x.view(B, T, heads, self.head_dim).transpose(1, 2)

        def repeat(x: Tensor) -> Tensor:
            group = self.heads // self.kv_heads
            shape = (B, self.kv_heads, group, x.shape[2], self.head_dim)
            return x[:, :, None].expand(shape).reshape(B, self.heads, -1, self.head_dim)

        q = split(attention.q_proj(h), self.heads)
        k = split(attention.k_proj(h), self.kv_heads)
        v = split(attention.v_proj(h), self.kv_heads)
        q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
        out = F.scaled_dot_product_attention(q, repeat(k), repeat(v).to(q.dtype), is_causal=True)
        if self.silent_heads:
            out = out * repeat(self._heard(B).to(out))
        return attention.o_proj(out.transpose(1, 2).reshape(B, T, -1))

    def _heard(self, rows: int) -> Tensor:
        """1 or 0 [rows, KV heads, 1, head_dim]: whether a head is heard in a row."""
        chosen = torch.rand(rows, 1, generator=self.generator) < self.silent_heads
        silent = torch.rand(rows, self.kv_heads, generator=self.generator) < 0.5
        heard = ~(chosen & silent)
        return heard[:, :, None, None].expand(-1, -1, 1, self.head_dim)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [B, 1, T, head_dim]; section i of the frequencies takes position axis i."""
        inverse = self.text.rotary_emb.inv_freq.to(positions.device).float()
        parts = (positions[..., None].float() * inverse).split(self.sections, -1)
        angle = torch.cat([part[i] for i, part in enumerate(parts)], -1)
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos(), angle.sin()

    def vision(self, patches: Tensor, grid: int) -> Tensor:
        """Patches [n, 4 grid^2, 588] -> visual tokens [n * grid^2, hidden]."""
        n, P, _ = patches.shape
        # Both temporal copies of a still image are equal, so their weights may be added.
        x = F.linear(patches, self.visual.patch_embed.proj.weight.sum(2).flatten(1))
        cos, sin = self._vision_rope(grid, patches.device)
        for block in self.visual.blocks:
            h = _layer_norm(x, block.norm1)
            qkv = block.attn.qkv(h).view(n, P, 3, self.vision_heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin
            out = F.scaled_dot_product_attention(q, k, v.to(q.dtype))
            x = x + block.attn.proj(out.transpose(1, 2).reshape(n, P, -1))
            x = x + block.mlp(_layer_norm(x, block.norm2))
        merger = self.visual.merger
        return merger.mlp(_layer_norm(x, merger.ln_q).reshape(n * grid * grid, -1))

    def _vision_rope(self, grid: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [4 grid^2, head_dim] of the patches in merge order."""
        if (grid, device) not in self._vision_rope_cache:
            rows = torch.arange(2 * grid).view(2 * grid, 1).expand(2 * grid, 2 * grid)
            row, column = (
                x.reshape(grid, 2, grid, 2).permute(0, 2, 1, 3).flatten() for x in (rows, rows.T)
            )
            half = self.vision_head_dim // 2
            exponent = torch.arange(0, half, 2, device=device).float() / half
            inverse = 1.0 / (10000.0**exponent)
            positions = torch.stack([row, column], -1).to(device)
            angle = (positions[..., None].float() * inverse).flatten(1)
            angle = torch.cat([angle, angle], -1)
            self._vision_rope_cache[grid, device] = (angle.cos(), angle.sin())
        return self._vision_rope_cache[grid, device]
