"""A paged batch with all that a kernel could trip over: shuffled blocks, garbage in free slots."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops import QueryBatch, latents, store_kv


@dataclass
class PagedBatch:
    """Requests of `contexts[b]` stored and `fresh[b]` new tokens.

    Attributes:
        kv_cache: uint8 `[num_blocks, block_bytes]`, all tokens stored, new ones included; every
            other byte is random.
        block_table: int32 `[B, max_blocks]`; entries beyond a request's blocks are invalid.
        seq_lens: int32 `[B]`, new tokens included.
        query: float32 `[T, Hq, D]`, the new tokens.
        key: per request float32 `[contexts + fresh, Hk, D]`.
        value: likewise.
        visual: per request bool `[contexts + fresh]`.
    """

    contexts: list[int]
    fresh: list[int]
    block_size: int
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query: Tensor
    key: list[Tensor]
    value: list[Tensor]
    visual: list[Tensor]
    batch: QueryBatch

    @property
    def context_lens(self) -> Tensor:
        return torch.tensor(self.contexts, dtype=torch.int32)

    def fresh_key(self) -> Tensor:
        return torch.cat([k[c:] for k, c in zip(self.key, self.contexts, strict=True)])

    def fresh_value(self) -> Tensor:
        return torch.cat([v[c:] for v, c in zip(self.value, self.contexts, strict=True)])


def paged_batch(
    codec: LayerCodec,
    query_heads: int,
    contexts: list[int],
    fresh: list[int],
    block_size: int,
    seed: int = 0,
) -> PagedBatch:
    """Builds a batch and stores its tokens with the reference `store_kv`, request by request."""
    generator = torch.Generator().manual_seed(seed)
    heads, dims = codec.layout.num_kv_heads, codec.layout.head_size
    lengths = [c + f for c, f in zip(contexts, fresh, strict=True)]
    blocks = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=generator).int()
    kv_cache = torch.randint(
        0, 256, (len(order), codec.layout.block_bytes(block_size)), generator=generator
    ).to(torch.uint8)
    table = torch.full((len(lengths), max([*blocks, 1]) + 2), -7, dtype=torch.int32)
    used = 0
    for row, count in enumerate(blocks):
        table[row, :count] = order[used : used + count]
        used += count

    def heads_of(tokens: int) -> Tensor:
        return torch.randn(tokens, heads, dims, generator=generator)

    key = [heads_of(n) for n in lengths]
    value = [heads_of(n) for n in lengths]
    visual = [torch.rand(n, generator=generator) < 0.5 for n in lengths]
    for row, length in enumerate(lengths):
        position = torch.arange(length)
        slots = table[row, position // block_size].long() * block_size + position % block_size
        store_kv(key[row], value[row], kv_cache, slots, visual[row], codec, block_size)
    starts = [0, *torch.tensor(fresh).cumsum(0).tolist()]
    return PagedBatch(
        contexts=contexts,
        fresh=fresh,
        block_size=block_size,
        kv_cache=kv_cache,
        block_table=table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        query=torch.randn(starts[-1], query_heads, dims, generator=generator),
        key=key,
        value=value,
        visual=visual,
        batch=QueryBatch.build(starts, lengths, torch.device("cpu")),
    )


def attend_codes(
    ops: Any,
    codec: LayerCodec,
    case: PagedBatch,
    stops: Tensor,
    causal: bool,
    starts: Tensor | None = None,
    scale: float = 0.2,
    query: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one implementation of the ops over the codes of a batch.

    `query` takes the place of the batch's own; all else is as in `ops.reference.paged_attention`.
    """
    return latents.attend_codes(
        ops,
        case.query if query is None else query,
        case.kv_cache,
        case.block_table,
        starts,
        stops,
        case.batch,
        codec,
        case.block_size,
        causal,
        scale,
    )
