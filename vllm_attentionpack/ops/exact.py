"""The exact cache: a request's first tokens (sinks) and its last (the window), as they are.

Its pages hold tokens one after the other, `[S, 2, Hk, D]` in the model's dtype, keys before values.
Block 0 is vLLM's null block: it stands for tokens that have no exact copy, and what is written to
it is never read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.ops.batch import QueryBatch

NULL_BLOCK = 0


@dataclass(frozen=True)
class ExactTokens:
    """Which cached tokens of each request are read from the exact cache in one step.

    Attributes:
        slots: int64 `[B, n]`, where they lie, `block * S + offset`; anything where not `present`.
        present: bool `[B, n]`.
        starts: int64 `[B]`; sinks end and codes begin here.
        stops: int64 `[B]`; codes end and the window begins here.
        sinks: the first that many of the `n` are sinks.
    """

    slots: Tensor
    present: Tensor
    starts: Tensor
    stops: Tensor
    sinks: int

    @classmethod
    def empty(cls, requests: int, sinks: int, window: int, device: torch.device) -> "ExactTokens":
        """Room for up to `requests` of them (see `kept_in`)."""
        shape = (requests, sinks + max(window - 1, 0))
        return cls(
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(requests, dtype=torch.int64, device=device),
            torch.zeros(requests, dtype=torch.int64, device=device),
            sinks,
        )

    def kept_in(self, room: "ExactTokens") -> "ExactTokens":
        """The same at addresses that do not change: a CUDA graph reads those of its capture."""
        rows = len(self.slots)
        return ExactTokens(
            room.slots[:rows].copy_(self.slots),
            room.present[:rows].copy_(self.present),
            room.starts[:rows].copy_(self.starts),
            room.stops[:rows].copy_(self.stops),
            self.sinks,
        )

    def of(self, requests: Tensor) -> "ExactTokens":
        """Those of some requests, int64 `[b]`."""
        return ExactTokens(
            self.slots[requests],
            self.present[requests],
            self.starts[requests],
            self.stops[requests],
            self.sinks,
        )

    def positions(self, context: int) -> Tensor:
        """int64 `[n]`: the positions of a request's tokens, of which `context` are cached."""
        behind = torch.arange(self.slots.shape[1] - self.sinks)
        return torch.cat([torch.arange(self.sinks), context - 1 - behind])

    def without_window(self, of: Tensor, context_lens: Tensor) -> "ExactTokens":
        """The same, but for requests `of` (bool `[B]`) sinks only; `context_lens` int `[B]`."""
        sink = self.slots.new_zeros(self.slots.shape[1], dtype=torch.bool)
        sink[: self.sinks] = True
        return ExactTokens(
            self.slots,
            self.present & (sink | ~of[:, None]),
            self.starts,
            torch.where(of, context_lens.long(), self.stops),
            self.sinks,
        )


def locate_exact(
    block_table: Tensor,
    context_lens: Tensor,
    block_size: int,
    sinks: int,
    window: int,
) -> ExactTokens:
    """Finds the exact copies of each request's cached tokens.

    A sink counts if no block before its own is missing, a token of the window if none behind it is:
    the codes then cover one range. Missing are the blocks that a prefix-cache hit skipped.

    Args:
        block_table: int32 `[B, max_blocks]` of the exact cache, `NULL_BLOCK` for missing ones.
        context_lens: int `[B]`, cached tokens of each request.
        block_size: tokens of a block of the exact cache, `S`.
        sinks: exact tokens at the start of a request.
        window: exact tokens at its end, the token that attends included.

    Returns:
        `n = sinks + window - 1` tokens per request, sinks first.
    """
    device = block_table.device
    context = context_lens.long()[:, None]
    table = block_table.long()

    position = torch.arange(sinks, device=device).expand(len(table), sinks)
    block = table.gather(1, (position // block_size).clamp(max=table.shape[1] - 1))
    sink_present = ((block != NULL_BLOCK).cumprod(1) > 0) & (position < context)
    sink_slots = block * block_size + position % block_size
    starts = sink_present.sum(1)

    behind = torch.arange(max(window - 1, 0), device=device)
    position = context - 1 - behind  # [B, W - 1], the last token first
    inside = position >= starts[:, None]
    position = position.clamp(min=0)
    block = table.gather(1, position // block_size)
    window_present = inside & ((block != NULL_BLOCK).cumprod(1) > 0)
    window_slots = block * block_size + position % block_size
    return ExactTokens(
        torch.cat([sink_slots, window_slots], 1),
        torch.cat([sink_present, window_present], 1),
        starts,
        context[:, 0] - window_present.sum(1),
        sinks,
    )


def store_exact(key: Tensor, value: Tensor, pages: Tensor, slot_mapping: Tensor) -> None:
    """Copies new tokens into their slots of the exact cache.

    Args:
        key: `[T, Hk, D]` in the model's dtype.
        value: `[T, Hk, D]`.
        pages: `[num_blocks, S, 2, Hk, D]`; mutated.
        slot_mapping: int `[T]`; negative, or in the null block, for tokens without an exact copy.
    """
    slots = slot_mapping.long().clamp(min=0)
    block_size = pages.shape[1]
    pages[slots // block_size, slots % block_size] = torch.stack([key, value], 1)


def exact_attention(
    query: Tensor, pages: Tensor, tokens: ExactTokens, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of each request's new tokens to its exact cached tokens.

    Args:
        query: `[T, Hq, D]`.
        pages: `[num_blocks, S, 2, Hk, D]`.
        tokens: which ones; all queries of a request see the same.
        batch: how the queries belong to requests.
        scale: softmax scale.

    Returns:
        The output float32 `[T, Hq, D]`, zero over no token, and the natural log-sum-exp of the
        scaled logits, float32 `[T, Hq]`, `-inf` over no token.
    """
    block_size = pages.shape[1]
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    for segment in batch.segments:
        present = tokens.present[segment.requests]  # [b, n]
        slots = torch.where(present, tokens.slots[segment.requests], 0)
        cached = pages[slots // block_size, slots % block_size].float()
        # Not by weight: what lies in free slots may be no number.
        cached = torch.where(present[:, :, None, None, None], cached, 0.0)
        key, value = cached.permute(2, 0, 3, 1, 4)  # [b, Hk, n, D]
        q = query[segment.tokens].float().transpose(1, 2)  # [b, Hq, q, D]
        out_part, lse_part = masked_attention(q, key, value, present[:, None, None], scale)
        out[segment.tokens] = out_part.transpose(1, 2)
        lse[segment.tokens] = lse_part.transpose(1, 2)
    return out, lse


def recent_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: QueryBatch,
    scale: float,
    context_lens: Tensor,
    sinks: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Attention of each request's new tokens to those new tokens that are exact for them.

    Those are the `window` last ones up to and with the query's own, and the sinks. Used where new
    tokens shall see older new tokens as codes, as they will later (to measure the codec).

    Args:
        query: `[T, Hq, D]`.
        key: `[T, Hk, D]`.
        value: `[T, Hk, D]`.
        batch: how the tokens belong to requests.
        scale: softmax scale.
        context_lens: int `[B]`, cached tokens of each request.
        sinks: see `locate_exact`.
        window: see `locate_exact`.

    Returns:
        As `exact_attention`.
    """
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    for segment in batch.segments:
        q, k, v = (x[segment.tokens].float().transpose(1, 2) for x in (query, key, value))
        index = torch.arange(q.shape[2], device=query.device)
        behind = index[:, None] - index  # [q, q]
        first = context_lens[segment.requests].long()[:, None, None] + index < sinks  # [b, 1, q]
        seen = (behind >= 0) & ((behind < window) | first)
        out_part, lse_part = masked_attention(q, k, v, seen[:, None], scale)
        out[segment.tokens] = out_part.transpose(1, 2)
        lse[segment.tokens] = lse_part.transpose(1, 2)
    return out, lse


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention `[b, Hq, q, D]` to `[b, Hk, n, D]` where `seen` `[b, 1, q or 1, n]`, in float32.

    Returns the output, zero over no token, and the log-sum-exp `[b, Hq, q]`, `-inf` over none.
    """
    repeats = query.shape[1] // key.shape[1]
    grouped = query.unflatten(1, (key.shape[1], repeats))  # [b, Hk, rep, q, D]
    logits = torch.einsum("bhrqd,bhnd->bhrqn", grouped, key) * scale
    logits = logits.masked_fill(~seen[:, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp()
    out = torch.einsum("bhrqn,bhnd->bhrqd", weights, value)
    return out.flatten(1, 2), lse.flatten(1, 2)
