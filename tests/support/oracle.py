"""Dense attention, one query at a time in float64: slow and plainly right."""

import torch
from torch import Tensor

from tests.support.paging import PagedBatch
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import Kind


def reconstruct(codec: LayerCodec, kind: Kind, x: Tensor, visual: Tensor) -> Tensor:
    """What the codes of `x` `[T, Hk, D]` stand for."""
    parts = []
    for group, heads in codec.group_heads():
        part = getattr(group, kind)
        codes, scale = part.encode(x[:, heads].flatten(1), visual)
        parts.append(part.reconstruct(codes, scale, visual).unflatten(1, (-1, x.shape[-1])))
    return torch.cat(parts, dim=1)


def attend(
    codec: LayerCodec,
    batch: PagedBatch,
    scale: float,
    exact_fresh: bool = False,
    ranges: list[tuple[int, int]] | None = None,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and log-sum-exp `[T, Hq]` in float64; zero and `-inf` over no token.

    With `exact_fresh` the new tokens of a request are taken as they are, otherwise as their codes.
    With another `dtype` it is what plain PyTorch makes of the same tokens in that dtype: the measure
    for the error of a kernel. `ranges` holds the (start, stop) of `paged_attention` per request, by
    default the whole request.
    """
    outputs, lses = [], []
    token = 0
    for row, (context, fresh) in enumerate(zip(batch.contexts, batch.fresh, strict=True)):
        key, value = (
            reconstruct(codec, kind, x[row], batch.visual[row])
            for kind, x in (("key", batch.key), ("value", batch.value))
        )
        if exact_fresh:
            key = torch.cat([key[:context], batch.key[row][context:]])
            value = torch.cat([value[:context], batch.value[row][context:]])
        repeats = batch.query.shape[1] // key.shape[1]
        key, value = (x.to(dtype).repeat_interleave(repeats, 1) for x in (key, value))
        start, stop = ranges[row] if ranges else (0, context + fresh)
        for i in range(fresh):
            end = max(stop - (fresh - 1 - i if causal else 0), start)
            query = batch.query[token].to(dtype)
            logits = torch.einsum("hd,nhd->hn", query, key[start:end]) * scale
            outputs.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), value[start:end]))
            lses.append(logits.logsumexp(-1))
            token += 1
    return torch.stack(outputs), torch.stack(lses)
