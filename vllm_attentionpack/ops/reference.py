"""The ops in plain PyTorch on the packed bytes: the oracle that every faster version must match.

Keys and values are never rebuilt. With `q' = decode · q` a logit is `s (q' · (code - zero)) +
q · mean`, and with softmax weights `p` the output is `decodeᵀ Σ p s (code - zero) + mean Σ p`; both
once per modality, chosen per token by the sign bit of its key scale.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec, PlaneCodec
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.codec.quantize import encode_scale, pack_codes
from vllm_attentionpack.ops.batch import QueryBatch, Segment
from vllm_attentionpack.ops.exact import exact_attention as exact_attention
from vllm_attentionpack.ops.fresh import merge_attention as merge_attention
from vllm_attentionpack.ops.pages import CodecPlanes, Pages, plane_view, planes_by_owner
from vllm_attentionpack.ops.turns import SpanRows, Turns

#: Bytes of float32 latents that one tile of context may unpack to.
_TILE_BYTES = 1 << 25


@dataclass(frozen=True)
class AbsorbedQuery:
    """Queries in the latent space of the keys; one entry per head group, softmax scale included.

    Attributes:
        latent: float32 `[N, Hg, M, R]` each, `Hg` query heads of the group; `N` is `T` where one
            query of a token meets all keys.
        mean_logit: float32 `[N, Hg, M]` each, the query against the mean key of each modality.
        turns: what rows are where they are not tokens.
        plain: float32 `[T, Hk, rep, D]`, scale included, what planes coded pre-RoPE meet.
    """

    latent: list[Tensor]
    mean_logit: list[Tensor]
    turns: Turns | None = None
    plain: Tensor | None = None


@dataclass(frozen=True)
class AttendedLatent:
    """What attention over codes yields; one entry per head group, normalised.

    Attributes:
        latent: float32 `[T, Hg, M, R]` each, weighted sums of value latents per modality.
        weight: float32 `[T, Hg, M]` each, softmax weight of each modality.
        lse: float32 `[T, Hq]`, natural log-sum-exp of the logits; `-inf` over no token.
    """

    latent: list[Tensor]
    weight: list[Tensor]
    lse: Tensor


def unavailable(device: torch.device) -> str | None:
    """Why these ops cannot run on `device`; None, since they run wherever PyTorch does."""
    return None


def reserve(tokens: int, turned: int, query_heads: int, codec: LayerCodec) -> None:
    """Makes what is made once per layer, and takes and frees the memory of a step.

    vLLM measures on a run without metadata what a model takes beside its caches.

    Args:
        tokens: new tokens of the step.
        turned: queries that are absorbed in one call, at most.
        query_heads: of the layer, on this rank.
        codec: of the layer.
    """


def warm_up(
    query_heads: int,
    dtype: torch.dtype,
    codec: LayerCodec,
    block_size: int,
    max_seq_len: int,
    exact: tuple[int, int, int] | None,
) -> None:
    """Compiles what would otherwise be compiled while the first requests wait.

    Args:
        query_heads: of the layer, on this rank.
        dtype: of the model.
        codec: of the layer.
        block_size: `S`.
        max_seq_len: the longest request.
        exact: sinks, window and block size of the exact cache; None without one.
    """


def store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    visual: Tensor | None,
    codec: LayerCodec,
    block_size: int,
) -> None:
    """Encodes new tokens into their slots of the paged cache.

    Args:
        key: `[T, Hk, D]`, any float dtype.
        value: `[T, Hk, D]`.
        kv_cache: uint8 `[num_blocks, block_bytes]`; mutated.
        slot_mapping: int `[T]`, `block * block_size + offset`; negative for no slot.
        visual: bool `[T]`, True for visual tokens; None when all are text.
        codec: the layer's codec.
        block_size: `S`.
    """
    slots = slot_mapping.long()
    stored = slots >= 0
    slots = slots[stored]
    block, offset = slots // block_size, slots % block_size
    chosen = None if visual is None else visual[stored]
    inputs: dict[Kind, Tensor] = {"key": key[stored], "value": value[stored]}
    planes = planes_by_owner(codec.layout, block_size)
    for g, (group, heads) in enumerate(codec.group_heads()):
        of_group = {kind: x[:, heads].flatten(1) for kind, x in inputs.items()}
        for kind, (codes, scale) in group.encode(of_group, chosen).items():
            start = 0
            for plane in planes[g, kind]:
                if plane.bits:
                    packed = pack_codes(codes[:, start : start + plane.dims], plane.bits)
                    start += plane.dims
                else:
                    packed = encode_scale(scale, chosen)[:, None]
                plane_view(kv_cache, plane, block_size)[block, offset] = packed


def decompress(
    kv_cache: Tensor,
    blocks: Tensor,
    tokens: int,
    codec: LayerCodec,
    block_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Keys and values of a request's first tokens, rebuilt: for prefill, where many queries read
    them.

    Args:
        kv_cache: uint8 `[num_blocks, block_bytes]`.
        blocks: int, the request's blocks in the order of its tokens.
        tokens: how many to rebuild.
        codec: the layer's codec.
        block_size: `S`.
        dtype: of the results.

    Returns:
        Keys and values, `[tokens, Hk, D]` each.
    """
    planes = planes_by_owner(codec.layout, block_size)
    ids = blocks[None, : -(-tokens // block_size)].long()
    pages = Pages(kv_cache, ids, block_size)
    shape = (2, tokens, codec.layout.num_kv_heads, codec.layout.head_size)
    out = torch.empty(shape, dtype=dtype, device=kv_cache.device)
    for g, (group, heads) in enumerate(codec.group_heads()):
        for side, kind in enumerate(KINDS):
            part: PlaneCodec = getattr(group, kind)
            latent, visual = pages.read(ids, (part, planes[g, kind]))
            rebuilt = part.rebuild(latent[0, :tokens], visual[0, :tokens])
            out[side, :, heads] = rebuilt.unflatten(1, (-1, codec.layout.head_size)).to(dtype)
    key, value = out
    return key, value


def absorb_query(
    query: Tensor, codec: LayerCodec, scale: float, turns: Turns | None = None
) -> AbsorbedQuery:
    """Maps queries into the latent space of the keys.

    Args:
        query: `[T, Hq, D]`, any float dtype.
        codec: the layer's codec.
        scale: softmax scale.
        turns: of the queries, where keys are coded relative to anchors.
    """
    plain = query
    if turns is not None:
        query = turns.back(query.float())
    latent, mean_logit = [], []
    repeats = query.shape[1] // codec.layout.num_kv_heads
    grouped = query.float().unflatten(1, (-1, repeats)) * scale  # [T, Hk, rep, D]
    for group, heads in codec.group_heads():
        basis, head_size = group.key.basis, codec.layout.head_size
        decode = basis.decode.unflatten(-1, (-1, head_size))  # [M, R, G, D]
        mean = basis.mean.unflatten(-1, (-1, head_size))  # [M, G, D]
        q = grouped[:, heads]
        latent.append(torch.einsum("tgpd,mrgd->tgpmr", q, decode).flatten(1, 2))
        mean_logit.append(torch.einsum("tgpd,mgd->tgpm", q, mean).flatten(1, 2))
    if turns is None or turns.pre_rope is None:
        return AbsorbedQuery(latent, mean_logit, turns)
    return AbsorbedQuery(
        latent, mean_logit, turns, plain.float().unflatten(1, (-1, repeats)) * scale
    )


def paged_attention(
    query: AbsorbedQuery,
    kv_cache: Tensor,
    block_table: Tensor,
    starts: Tensor | None,
    stops: Tensor,
    batch: QueryBatch,
    codec: LayerCodec,
    block_size: int,
    causal: bool,
) -> AttendedLatent:
    """Attends to the codes of each request's tokens `starts` to `stops`.

    Args:
        query: absorbed queries of `T` tokens; with `turns`, they see the tokens of their spans.
        kv_cache: uint8 `[num_blocks, block_bytes]`.
        block_table: int `[B, max_blocks]`; entries beyond a request's blocks may be anything.
        starts: int `[B]`, the first token that each request sees, 0 or more; None for 0.
        stops: int `[B]`, one past the last token that the last query of each request sees; no
            token is seen where it is not above the start, negative values included. Bounded by
            the segments' `max_seq_len`, less the queries themselves unless `causal`.
        batch: how the tokens belong to requests.
        codec: the layer's codec.
        block_size: `S`.
        causal: True if each query sees one token less at the end than the query after it; False
            if all queries of a request see the same tokens.

    Returns:
        Normalised latents, modality weights and log-sum-exp of all `T` tokens.
    """
    tokens, rows = batch.num_tokens, query.turns.rows if query.turns else None
    device = kv_cache.device
    first = torch.zeros_like(stops).long() if starts is None else starts.long()
    if rows is not None:
        first = first.clamp(min=rows.start_token)
    latents, weights, lses = [], [], []
    planes = planes_by_owner(codec.layout, block_size)
    for g, (group, of_group) in enumerate(codec.group_heads()):
        heads = query.latent[g].shape[1]
        plain = None if query.plain is None else query.plain[:, of_group]
        shape = (tokens, heads, codec.num_modalities)
        latent = torch.zeros(*shape, group.value.counts.num_columns, device=device)
        weight = torch.zeros(shape, device=device)
        lse = torch.full(shape[:2], float("-inf"), device=device)
        for segment in batch.segments:
            result = _attend_segment(
                _Stretches(query.latent[g], query.mean_logit[g], segment, query.turns, plain),
                Pages(kv_cache, block_table[segment.requests].long(), block_size),
                first[segment.requests],
                stops[segment.requests].long(),
                segment,
                (group.key, planes[g, "key"]),
                (group.value, planes[g, "value"]),
                causal,
            )
            latent[segment.tokens], weight[segment.tokens], lse[segment.tokens] = result
        latents.append(latent)
        weights.append(weight)
        lses.append(lse)
    return AttendedLatent(latents, weights, torch.cat(lses, dim=1))


def up_project(attended: AttendedLatent, codec: LayerCodec) -> Tensor:
    """Maps attended value latents back to heads, float32 `[T, Hq, D]`."""
    outputs = []
    for g, (group, _) in enumerate(codec.group_heads()):
        basis, layout = group.value.basis, codec.layout
        decode = basis.decode.unflatten(-1, (-1, layout.head_size))
        mean = basis.mean.unflatten(-1, (-1, layout.head_size))
        size = (layout.heads_per_group, -1)
        latent, weight = (x.unflatten(1, size) for x in (attended.latent[g], attended.weight[g]))
        out = torch.einsum("tgpmr,mrgd->tgpd", latent, decode)
        out += torch.einsum("tgpm,mgd->tgpd", weight, mean)
        outputs.append(out.flatten(1, 2))
    return torch.cat(outputs, dim=1)


@dataclass(frozen=True)
class _Stretches:
    """The queries of one segment, by what they meet; see `AbsorbedQuery`."""

    latent: Tensor
    mean_logit: Tensor
    segment: Segment
    turns: Turns | None
    plain: Tensor | None

    @property
    def rows(self) -> SpanRows | None:
        return self.turns.rows if self.turns else None

    def pre_rope_logits(self, start: int, keys: Tensor) -> Tensor:
        """`[b, q, h, n]` of rebuilt keys `[b, n, G, D]` of the tokens from `start` on."""
        assert self.plain is not None and self.turns is not None
        assert self.turns.pre_rope is not None
        own, requests = self.turns.pre_rope, self.segment.requests
        positions = start + torch.arange(keys.shape[1], device=keys.device).expand(keys.shape[:2])
        if own.positions is not None:
            last = own.positions.shape[1] - 1
            positions = own.positions[requests[:, None], positions.clamp(max=last)]
        positions = positions.clamp(max=len(own.cos) - 1)  # of slots behind the last token
        cos, sin = own.cos[positions][:, :, None], own.sin[positions][:, :, None]
        a, b = own.anchors.pre_rope_planes(keys)
        query = own.anchors.pre_rope_planes(self.plain[self.segment.tokens])
        turned = a * cos - b * sin, b * cos + a * sin  # [b, n, G, F]
        both = [torch.einsum("bqgpf,bngf->bqgpn", q, k) for q, k in zip(query, turned, strict=True)]
        return (both[0] + both[1]).flatten(2, 3)

    def logits(self, start: int, keys: Tensor) -> Tensor:
        """`[b, q, h, M, n]` of latent keys `[b, n, R]` of the tokens from `start` on."""
        if self.rows is None:
            return self._logits(self.segment.tokens, keys)
        cuts = range(start - start % self.rows.size, start + keys.shape[1], self.rows.size)
        parts = keys.split(
            [min(cut + self.rows.size, start + keys.shape[1]) - max(cut, start) for cut in cuts], 1
        )
        return torch.cat(
            [self._logits(self._span(cut), part) for cut, part in zip(cuts, parts, strict=True)], -1
        )

    def _span(self, first_token: int) -> Tensor:
        """int64 `[b, q]`, rows; of a span that a request lacks, any."""
        assert self.rows is not None
        span = first_token // self.rows.size - self.rows.first
        length = self.segment.tokens.shape[1]
        first = self.rows.row_starts[self.segment.requests].long() + span * length
        queries = torch.arange(length, device=first.device)
        return (first[:, None] + queries).clamp(0, len(self.latent) - 1)

    def _logits(self, rows: Tensor, keys: Tensor) -> Tensor:
        products = torch.einsum("bqhmr,bnr->bqhmn", self.latent[rows], keys)
        return products + self.mean_logit[rows][..., None]


def _attend_segment(
    query: _Stretches,
    pages: Pages,
    starts: Tensor,
    stops: Tensor,
    segment: Segment,
    key: CodecPlanes,
    value: CodecPlanes,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Online softmax over tiles of context.

    Returns latent `[b, q, h, M, Rv]`, weight `[b, q, h, M]` and log-sum-exp `[b, q, h]`.
    """
    b, length = segment.tokens.shape
    _, heads, modalities, _ = query.latent.shape
    device = query.latent.device
    top = torch.full((b, length, heads), float("-inf"), device=device)
    total = torch.zeros(b, length, heads, device=device)
    weight = torch.zeros(b, length, heads, modalities, device=device)
    latent = torch.zeros(b, length, heads, modalities, value[0].counts.num_columns, device=device)
    end = stops[:, None].expand(b, length)
    if causal:
        end = end - length + 1 + torch.arange(length, device=device)
    if query.rows is not None:
        end = end.clamp(max=query.rows.stop_token)

    widest = max(key[0].counts.num_columns, value[0].counts.num_columns, length * heads)
    tile_tokens = max(1, _TILE_BYTES // (4 * b * widest))
    longest = segment.max_seq_len - (0 if causal else length)
    for start, ids in pages.tiles(longest, tile_tokens):
        k, visual = pages.read(ids, key)
        v, _ = pages.read(ids, value)
        position = start + torch.arange(k.shape[1], device=device)
        started = position >= starts[:, None]  # [b, n]
        seen = (started[:, None] & (position < end[..., None]))[:, :, None]  # [b, q, 1, n]
        v = torch.where((started & (position < stops[:, None]))[..., None], v, 0.0)
        logits = query.logits(start, k)
        if modalities == 2:
            chosen = torch.stack([~visual, visual], 1)[:, None, None]  # [b, 1, 1, M, n]
            logit = torch.where(visual[:, None, None], logits[..., 1, :], logits[..., 0, :])
        else:
            chosen = torch.ones(1, device=device, dtype=torch.bool)
            logit = logits[..., 0, :]
        if query.plain is not None:
            rebuilt = key[0].rebuild(k.flatten(0, 1), visual.flatten())
            rebuilt = rebuilt.view(*k.shape[:2], query.plain.shape[1], -1)
            logit = logit + query.pre_rope_logits(start, rebuilt)
        logit = torch.where(seen, logit, float("-inf"))
        new_top = torch.maximum(top, logit.amax(-1))
        base = torch.where(new_top.isinf(), 0.0, new_top)
        p = (logit - base[..., None]).exp()
        keep = (top - base).exp()
        split = p[..., None, :] * chosen  # [b, q, h, M, n]
        total = total * keep + p.sum(-1)
        weight = weight * keep[..., None] + split.sum(-1)
        latent = latent * keep[..., None, None] + torch.einsum("bqhmn,bnr->bqhmr", split, v)
        top = new_top
    norm = torch.where(total > 0, total, 1.0)
    return latent / norm[..., None, None], weight / norm[..., None], top + total.log()
