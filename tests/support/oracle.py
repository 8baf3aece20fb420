"""Dense attention, one query at a time in float64: slow and plainly right."""

from collections.abc import Callable

import torch
from torch import Tensor

from tests.support.paging import PagedBatch
from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import Kind


def reconstruct(
    codec: LayerCodec, key: Tensor, value: Tensor, visual: Tensor
) -> tuple[Tensor, Tensor]:
    """What the codes of keys and values `[T, Hk, D]` stand for."""
    parts: dict[Kind, list[Tensor]] = {"key": [], "value": []}
    for group, heads in codec.group_heads():
        of_group = {"key": key[:, heads].flatten(1), "value": value[:, heads].flatten(1)}
        for kind, (codes, scale) in group.encode(of_group, visual).items():
            rebuilt = getattr(group, kind).reconstruct(codes, scale, visual)
            parts[kind].append(rebuilt.unflatten(1, (-1, key.shape[-1])))
    return torch.cat(parts["key"], dim=1), torch.cat(parts["value"], dim=1)


def attend(
    codec: LayerCodec,
    batch: PagedBatch,
    scale: float,
    exact: Callable[[int, int], Tensor] | None = None,
    ranges: list[tuple[int, int]] | None = None,
    causal: bool = True,
    dtype: torch.dtype = torch.float64,
    turn: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output `[T, Hq, D]` and log-sum-exp `[T, Hq]` in `dtype`; zero and `-inf` over no token.

    Args:
        exact: for the query at a position of a request (row, position) which of the request's
            tokens are taken as they are, bool `[contexts + fresh]`; the others, by default all,
            are taken as their codes.
        ranges: the (start, stop) of `paged_attention` per request, by default the whole request.
        causal: as there.
        dtype: float64 for what is right; that of a model for what plain PyTorch makes of it, the
            measure for the error of a kernel.
        turn: for the keys of a request (row, keys) where they stand, if they are coded elsewhere.
    """
    outputs, lses = [], []
    token = 0
    for row, (context, fresh) in enumerate(zip(batch.contexts, batch.fresh, strict=True)):
        own = batch.key[row], batch.value[row]
        pairs = list(zip(own, reconstruct(codec, *own, batch.visual[row]), strict=True))
        if turn is not None:
            pairs[0] = tuple(turn(row, key) for key in pairs[0])
        repeats = batch.query.shape[1] // batch.key[row].shape[1]
        start, stop = ranges[row] if ranges else (0, context + fresh)
        for i in range(fresh):
            kept = (
                torch.zeros(context + fresh, dtype=torch.bool)
                if exact is None
                else exact(row, context + i)
            )
            key, value = (
                torch.where(kept[:, None, None], own, coded).to(dtype).repeat_interleave(repeats, 1)
                for own, coded in pairs
            )
            end = max(stop - (fresh - 1 - i if causal else 0), start)
            query = batch.query[token].to(dtype)
            logits = torch.einsum("hd,nhd->hn", query, key[start:end]) * scale
            outputs.append(torch.einsum("hn,nhd->hd", logits.softmax(-1), value[start:end]))
            lses.append(logits.logsumexp(-1))
            token += 1
    return torch.stack(outputs), torch.stack(lses)


def fresh_tokens(batch: PagedBatch) -> Callable[[int, int], Tensor]:
    """For `attend`: the new tokens of each request are exact."""

    def exact(row: int, position: int) -> Tensor:
        return torch.arange(batch.contexts[row] + batch.fresh[row]) >= batch.contexts[row]

    return exact
