"""Exact attention among the tokens of one step on a GPU, by the libraries that may be there.

Each provider has the contract of `ops.fresh.fresh_attention`. Where a request has one new token,
which is all of decoding, none is needed.
"""

from itertools import pairwise

import torch
from torch import Tensor

from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.fresh import fresh_attention


def single_tokens(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of every token to itself alone: a copy of its value.

    Nothing depends on how tokens belong to requests, so that it can be captured in a CUDA graph.
    """
    grouped = query.unflatten(1, (key.shape[1], -1)).float()  # [T, Hk, rep, D]
    lse = (grouped * key[:, :, None].float()).sum(-1).flatten(1) * scale
    out = value[:, :, None].expand(grouped.shape).flatten(1, 2)
    return out.to(query.dtype), lse


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """By PyTorch's flash attention, the requests of one length at a time.

    The op behind `scaled_dot_product_attention` is called by its own name, since the public one
    drops the log-sum-exp. It takes float16 and bfloat16; float32 goes through plain products.
    """
    if query.dtype == torch.float32:
        return fresh_attention(query, key, value, batch, scale)
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    repeats = query.shape[1] // key.shape[1]
    for segment in batch.segments:
        q = query[segment.tokens].transpose(1, 2)  # [b, Hq, q, D]
        k, v = (
            x[segment.tokens].transpose(1, 2).repeat_interleave(repeats, dim=1)
            for x in (key, value)
        )
        part, part_lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, scale=scale
        )
        out[segment.tokens] = part.transpose(1, 2)
        lse[segment.tokens] = part_lse[..., : q.shape[2]].transpose(1, 2)
    return out, lse


def xformers(
    query: Tensor, key: Tensor, value: Tensor, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """By xformers' memory-efficient attention with a block-diagonal causal mask.

    The mask is built from lengths on the host, so that this cannot be captured in a CUDA graph.
    """
    from xformers.ops import fmha

    lengths = [b - a for a, b in pairwise(batch.host_starts) if b > a]
    mask = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths, device=query.device)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        query[None], key[None], value[None], mask, scale=scale
    )
    if len(lse) == len(lengths):  # from CUTLASS: a padded row per request, `[b, Hq, longest]`
        lse = torch.cat([row[:, :length] for row, length in zip(lse, lengths, strict=True)], 1)
    else:  # from flash attention: `[1, Hq, T]`
        lse = lse[0, :, : query.shape[0]]
    return out[0], lse.T.float().contiguous()
