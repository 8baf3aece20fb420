"""Exact attention among the tokens of one step, and the merge with attention over their context."""

import torch
from torch import Tensor

from vllm_attentionpack.ops.batch import QueryBatch


def fresh_attention(
    query: Tensor, key: Tensor, value: Tensor, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention of each request's new tokens to its own new tokens.

    Args:
        query: `[T, Hq, D]`, float.
        key: `[T, Hk, D]`.
        value: `[T, Hk, D]`.
        batch: how the tokens belong to requests.
        scale: softmax scale.

    Returns:
        The output `[T, Hq, D]` in the query's dtype and the natural log-sum-exp of the scaled
        logits, float32 `[T, Hq]`.
    """
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    repeats = query.shape[1] // key.shape[1]
    for segment in batch.segments:
        if segment.tokens.shape[1] == 1:
            rows = segment.tokens[:, 0]
            out[rows], lse[rows] = _alone(query[rows], key[rows], value[rows], scale)
            continue
        q = query[segment.tokens].transpose(1, 2)  # [b, Hq, q, D]
        k, v = (
            x[segment.tokens].transpose(1, 2).repeat_interleave(repeats, dim=1)
            for x in (key, value)
        )
        segment_out, segment_lse = _causal_with_lse(q, k, v, scale)
        out[segment.tokens] = segment_out.transpose(1, 2)
        lse[segment.tokens] = segment_lse.transpose(1, 2)
    return out, lse


def _alone(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A token that sees only itself, as all do that decode: its value, and its one logit."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    return v, (q.float() * k.float()).sum(-1) * scale


def _causal_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[b, H, q, D]` each -> output of the same shape and log-sum-exp `[b, H, q]`."""
    if q.device.type == "cpu":
        # The public SDPA has the same kernel behind it but drops the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
        return out, lse.float()
    return _by_products(q, k, v, scale)


def _by_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, most_logits: int = 1 << 26
) -> tuple[Tensor, Tensor]:
    """As `_causal_with_lse`, by plain products, of so many queries at a time as are affordable."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    key, value = k.float().mT, v.float()
    length = q.shape[2]
    index = torch.arange(length, device=q.device)
    step = max(1, most_logits // (q.shape[0] * q.shape[1] * length))
    for first in range(0, length, step):
        rows = slice(first, first + step)
        logits = (q[:, :, rows].float() @ key).mul_(scale)
        logits.masked_fill_(index > index[rows, None], float("-inf"))
        part_lse = logits.logsumexp(-1)
        out[:, :, rows] = (logits - part_lse[..., None]).exp_() @ value
        lse[:, :, rows] = part_lse
    return out, lse


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys from the attention over each.

    Args:
        parts: of each set the normalised output `[T, H, D]` and the natural log-sum-exp of its
            logits, float32 `[T, H]`; `-inf` where the set is empty.

    Returns:
        The same of all sets together, float32; zero where all are empty.
    """
    lse = torch.stack([part_lse for _, part_lse in parts])
    total = lse.logsumexp(0)
    shares = (lse - torch.where(total.isinf(), 0.0, total)).exp()
    out = sum(
        share[..., None] * part_out for share, (part_out, _) in zip(shares, parts, strict=True)
    )
    return out, total
