"""Attention of one replayed step: every query reads what the codec gives back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from vllm_attentionpack.evaluate.simulate.codec import ExactTokens, SimulatedCodec, Tokens

#: Bytes of float32 logits that one block of queries may take.
_LOGIT_BYTES = 1 << 27

#: Shown (index of the layer, query, key, value) of every compared layer of a step.
Observer = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class SimulatedStep:
    """Stands in for a backend's metadata: whole requests, one after the other, no cache.

    Attributes:
        tokens: of the step.
        codec: what keys and values are stored as.
        layers: index of each compared layer by vLLM's name; others are attended exactly.
        observer: shown what the compared layers are given; None for nobody.
    """

    tokens: Tokens
    codec: SimulatedCodec
    layers: Mapping[str, int]
    observer: Observer | None = None

    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        """Fills `out` `[T, Hq, D]` for `[T, Hq, D]` queries and `[T, Hk, D]` keys and values."""
        index = self.layers.get(layer.layer_name)
        exact_key, exact_value = key.float(), value.float()
        exact, read_key, read_value = ExactTokens(), exact_key, exact_value
        coarse = None
        if index is not None:
            if self.observer is not None:
                self.observer(index, query, key, value)
            exact = self.codec.exact
            read_key, read_value = self.codec.reconstruct(
                index, exact_key, exact_value, self.tokens
            )
            if self.codec.full_share < 1:
                coarse = self.codec.coarse_value(index, exact_value, self.tokens)
        start = 0
        for length in self.tokens.lengths:
            rows = slice(start, start + length)
            start += length
            q = query[rows].float()
            if coarse is not None:
                result = _attend_partial(
                    q,
                    read_key[rows],
                    (read_value[rows], coarse[rows]),
                    self.codec.full_share,
                    layer.impl.scale,
                )
            elif exact or layer.sliding_window is not None:
                result = _attend_mixed(
                    q,
                    (read_key[rows], read_value[rows]),
                    (exact_key[rows], exact_value[rows]),
                    exact,
                    layer.impl.scale,
                    layer.sliding_window,
                )
            else:
                result = _attend(q, read_key[rows], read_value[rows], layer.impl.scale)
            out[rows] = result.to(out.dtype)
        return out


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention, `[T, H, D]` each."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _attend_mixed(
    query: Tensor,
    read: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    which: ExactTokens,
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention to exact tokens where `which` says so and to read ones elsewhere."""
    length, heads, _ = query.shape
    repeats = heads // read[0].shape[1]
    positions = torch.arange(length, device=query.device)
    rows = max(1, _LOGIT_BYTES // (4 * heads * length))
    blocks = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        own, seen = positions[start:stop], positions[:stop]
        first_recent = max(start - which.recent + 1, 0)
        kept = torch.cat([seen[: min(which.sinks, first_recent)], seen[first_recent:]])
        # all tokens as they are read, then those that some query reads exactly
        masks = []
        for of, exactly in ((seen, False), (kept, True)):
            distance = own[:, None] - of[None]
            mask = (distance >= 0) & (which.mask(own, of) == exactly)
            if sliding_window is not None:
                mask &= distance < sliding_window
            masks.append(mask)
        key, value = (
            torch.cat([x[:stop], y[kept]]).repeat_interleave(repeats, 1)
            for x, y in zip(read, exact, strict=True)
        )
        given = query[start:stop], key, value, torch.cat(masks, 1), scale
        if torch.is_grad_enabled():  # or every block's logits may be kept
            blocks.append(checkpoint(_attend_masked, *given, use_reentrant=False))
        else:
            blocks.append(_attend_masked(*given))
    return torch.cat(blocks)


def _attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """`[q, H, D]` queries to `[n, H, D]` keys where `mask` `[q, n]` says so."""
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


def _attend_partial(
    query: Tensor, key: Tensor, values: tuple[Tensor, Tensor], full_share: float, scale: float
) -> Tensor:
    """Causal attention; values of tokens with little attention so far are the second of `values`.

    The weights of a query count towards its own choice.
    """
    length, heads, size = query.shape
    kv_heads = key.shape[1]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads)) * scale
    positions = torch.arange(length, device=query.device)
    gathered = torch.zeros(length, device=query.device)
    rows = max(1, _LOGIT_BYTES // (4 * heads * length))
    out = torch.empty_like(query)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        logits = torch.einsum("qhgd,nhd->hgqn", grouped[start:stop], key[:stop])
        future = positions[start:stop, None] < positions[None, :stop]
        weights = logits.masked_fill(future, float("-inf")).softmax(-1)
        so_far = gathered[:stop] + weights.mean((0, 1)).cumsum(0)  # [q, n]
        gathered[:stop] = so_far[-1]
        rank = so_far.masked_fill(future, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
        full = rank < (positions[start:stop, None] + 1) * full_share
        result = torch.einsum("hgqn,nhd->qhgd", weights * full, values[0][:stop])
        result += torch.einsum("hgqn,nhd->qhgd", weights * ~full, values[1][:stop])
        out[start:stop] = result.reshape(stop - start, heads, size)
    return out
