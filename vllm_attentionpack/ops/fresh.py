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
        q = query[segment.tokens].transpose(1, 2)  # [b, Hq, q, D]
        k, v = (
            x[segment.tokens].transpose(1, 2).repeat_interleave(repeats, dim=1)
            for x in (key, value)
        )
        segment_out, segment_lse = _causal_with_lse(q, k, v, scale)
        out[segment.tokens] = segment_out.transpose(1, 2)
        lse[segment.tokens] = segment_lse.transpose(1, 2)
    return out, lse


def _causal_with_lse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`[b, H, q, D]` each -> output of the same shape and log-sum-exp `[b, H, q]`."""
    if q.device.type == "cpu":
        # The public SDPA has the same kernel behind it but drops the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, True, scale=scale
        )
        return out, lse.float()
    logits = (q.float() @ k.float().mT) * scale
    length = q.shape[2]
    future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    logits = logits.masked_fill(future, float("-inf"))
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def merge_attention(first: Tensor, first_lse: Tensor, second: Tensor, second_lse: Tensor) -> Tensor:
    """Attention over two disjoint sets of keys from the attention over each.

    Args:
        first: `[T, H, D]`, normalised output over the first set.
        first_lse: float32 `[T, H]`, its log-sum-exp; `-inf` where the set is empty.
        second: `[T, H, D]`.
        second_lse: float32 `[T, H]`. At least one set is not empty.

    Returns:
        float32 `[T, H, D]`.
    """
    total = torch.logaddexp(first_lse, second_lse)
    first_share = (first_lse - total).exp()[..., None]
    second_share = (second_lse - total).exp()[..., None]
    return first.float() * first_share + second.float() * second_share
