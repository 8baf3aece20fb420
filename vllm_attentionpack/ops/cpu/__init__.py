"""The ops on CPUs, by compiled kernels.

The functions are those of `ops.reference`, which documents them; what `absorb_query` hands to
`paged_attention`, and that to `up_project`, is in the kernels' own order (see `plan.py`).
"""

import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import KINDS, Kind
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.cpu import calls, library
from vllm_attentionpack.ops.cpu.plan import CpuPlan, EncodeTables, plan_of
from vllm_attentionpack.ops.exact import ExactTokens
from vllm_attentionpack.ops.reference import reserve as reserve
from vllm_attentionpack.ops.reference import warm_up as warm_up
from vllm_attentionpack.ops.turns import PreRope, SpanRows, Turns

#: Of the numbers that codes are multiplied with, so that the error stays near that of the model's
#: own dtype: floats, 16-bit integers, or 8-bit ones for the codes of 2 bits and 16-bit ones else.
BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 8}

#: Of models: the maps in and out may go by integers (see `maps.py`), whose error is well below that
#: of these dtypes.
PACKED = (torch.bfloat16,)


@dataclass(frozen=True)
class CpuQuery:
    """Absorbed queries.

    Attributes:
        latent: float32 `[G, N, repeats, M * (Rk + 1) or more]` per head group: latent queries of
            each modality, then the logits of the mean keys.
        dtype: of the model; decides how exact the arithmetic is.
        rows: what the `N` rows are where they are not tokens.
        own: of planes that are coded pre-RoPE, see `calls.attend`; empty if there are none.
    """

    latent: list[Tensor]
    dtype: torch.dtype
    rows: SpanRows | None = None
    own: Sequence[Tensor] = ()


@dataclass(frozen=True)
class CpuAttended:
    """What attention over codes yields, normalised.

    Attributes:
        latent: float32 `[G, T, repeats, M * (lanes of V + 1) or more]` per head group: sums of
            value latents of each modality, then the softmax weight of each.
        lse: float32 `[T, Hq]`, natural log-sum-exp of the logits; `-inf` over no token.
        dtype: of the model.
    """

    latent: list[Tensor]
    lse: Tensor
    dtype: torch.dtype


def unavailable(device: torch.device) -> str | None:
    """Why these ops cannot run on `device`; None if they can."""
    if device.type != "cpu":
        return "they run on CPUs."
    found = library.find_kernels(os.environ.get(library.ISA_VARIABLE, ""))
    return found if isinstance(found, str) else None


def store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    visual: Tensor | None,
    codec: LayerCodec,
    block_size: int,
) -> None:
    """See `ops.reference.store_kv`."""
    plan = _plan(codec, key.dtype)
    table = plan.table(block_size)
    slots = slot_mapping.long()
    split = slots.shape[0]
    if codec.num_modalities == 1 or visual is None:
        chosen = visual
    else:
        # Each basis takes a run of tokens.
        order = torch.argsort(visual.to(torch.uint8), stable=True)
        chosen, slots = visual[order], slots[order]
        key, value = key[order], value[order]
        split -= int(chosen.sum())
    tokens: dict[Kind, Tensor] = {"key": key.flatten(1), "value": value.flatten(1)}
    dims = codec.layout.group_dims
    for g, (group, encode) in enumerate(zip(codec.layout.groups, plan.encode, strict=True)):
        of_group = slice(g * dims, (g + 1) * dims)
        for first, *joint in group.units:
            latent = _encode(tokens[first][:, of_group], encode[first], split)
            for kind in joint:
                latent += _encode(tokens[kind][:, of_group], encode[kind], split)
            calls.store(
                latent,
                encode[first].step,
                encode[first].weight,
                slots,
                chosen,
                table[g, KINDS.index(first)],
                kv_cache,
                block_size,
            )


def _encode(x: Tensor, tables: EncodeTables, split: int) -> Tensor:
    """`[T, GD]` to float32 `[T, R]`, the tokens from `split` on by the basis of visual tokens."""
    latent = x.new_empty(len(x), tables.step.shape[0], dtype=torch.float32)
    for m, (first, stop) in enumerate([(0, split), (split, len(x))]):
        if stop > first:
            rows = x[None, first:stop, None]
            tables.maps[m].into(latent[None, first:stop, None], rows, shift=tables.mean[m])
    return latent


def decompress(
    kv_cache: Tensor,
    blocks: Tensor,
    tokens: int,
    codec: LayerCodec,
    block_size: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `ops.reference.decompress`."""
    plan = _plan(codec, dtype)
    layout = codec.layout
    dims = layout.group_dims
    bfloat16 = dtype == torch.bfloat16
    out = torch.empty(2, tokens, layout.num_kv_heads * layout.head_size, dtype=dtype)
    for g, bases in enumerate(plan.decode(dtype if bfloat16 else torch.float32)):
        for kinds in layout.groups[g].units:
            latent, visual = calls.unpack(
                kv_cache,
                blocks.int(),
                plan.table(block_size)[g, KINDS.index(kinds[0])],
                bases[kinds[0]][0].shape[1],
                tokens,
                block_size,
                bfloat16,
            )
            for kind in kinds:
                part = out[KINDS.index(kind), :, g * dims : (g + 1) * dims]
                _rebuild(part, latent, visual, *bases[kind])
    key, value = out.unflatten(2, (layout.num_kv_heads, layout.head_size))
    return key, value


def _rebuild(part: Tensor, latent: Tensor, visual: Tensor, decode: Tensor, mean: Tensor) -> None:
    """Writes keys or values `[T, GD]` of latents `[T, R]`, each by its modality's basis."""
    if len(decode) == 1:
        part.copy_(torch.addmm(mean[0], latent, decode[0]))
        return
    for m, chosen in enumerate([~visual, visual]):
        rows = chosen.nonzero()[:, 0]
        part[rows] = torch.addmm(mean[m], latent[rows], decode[m]).to(part.dtype)


def absorb_query(
    query: Tensor, codec: LayerCodec, scale: float, turns: Turns | None = None
) -> CpuQuery:
    """See `ops.reference.absorb_query`."""
    plan, rows = _plan(codec, query.dtype), turns.rows if turns else None
    own = _own_queries(query, turns.pre_rope, scale) if turns and turns.pre_rope else ()
    if turns is not None and not plan.absorb.packed:
        query, turns = turns.back(query), None
    if query.stride(2) != 1:
        query = query.contiguous()
    by_head = query.unflatten(1, (codec.layout.num_kv_heads, -1)).transpose(0, 1)
    groups = by_head.split(codec.layout.heads_per_group)  # [G, T, repeats, D] each
    shapes = [
        (x.shape[0], len(turns.cos) if turns else len(query), x.shape[2], width)
        for x, width in zip(groups, plan.query_widths, strict=True)
    ]
    latent = _room.of(shapes) if turns else [torch.empty(shape) for shape in shapes]
    plan.absorb.into(latent, groups, scale, turns)
    return CpuQuery(latent, query.dtype, rows, own)


class _Room(threading.local):
    """Memory of this thread's turned queries, which are read before the next ones come.

    Tens of megabytes that come anew from the system for every layer take longer than to fill them.
    """

    floats = torch.empty(0)

    def of(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """float32 of these shapes, side by side."""
        sizes = [math.prod(shape) for shape in shapes]
        if len(self.floats) < sum(sizes):
            self.floats = torch.empty(sum(sizes))
        parts = self.floats[: sum(sizes)].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


_room = _Room()


def _own_queries(query: Tensor, pre_rope: PreRope, scale: float) -> list[Tensor]:
    plain = torch.stack(pre_rope.anchors.pre_rope_planes(query), 2).float() * scale
    positions = [] if pre_rope.positions is None else [pre_rope.positions]
    return [plain, pre_rope.cos, pre_rope.sin, *positions]


def paged_attention(
    query: CpuQuery,
    kv_cache: Tensor,
    block_table: Tensor,
    starts: Tensor | None,
    stops: Tensor,
    batch: QueryBatch,
    codec: LayerCodec,
    block_size: int,
    causal: bool,
) -> CpuAttended:
    """See `ops.reference.paged_attention`."""
    plan, rows = _plan(codec, query.dtype), query.rows
    *latent, lse = calls.attend(
        query.latent,
        plan.table(block_size),
        plan.widths,
        kv_cache,
        block_table.int(),
        None if starts is None else starts.int(),
        stops.int(),
        batch.query_start_loc,
        block_size,
        codec.num_modalities,
        causal,
        BITS[query.dtype],
        batch.num_tokens,
        rows.row_starts if rows else None,
        [rows.size, rows.first, rows.stop] if rows else [],
        plan.own_basis if query.own else [],
        plan.own_mean if query.own else [],
        query.own,
    )
    return CpuAttended(latent, lse, query.dtype)


def up_project(attended: CpuAttended, codec: LayerCodec) -> Tensor:
    """See `ops.reference.up_project`."""
    plan = _plan(codec, attended.dtype)
    _, tokens, repeats, _ = attended.latent[0].shape
    layout = codec.layout
    out = attended.lse.new_empty(tokens, layout.num_kv_heads, repeats, layout.head_size)
    groups = out.transpose(0, 1).split(layout.heads_per_group)  # [G, T, repeats, D] each
    plan.up.into(groups, attended.latent)
    return out.flatten(1, 2)


def exact_attention(
    query: Tensor, pages: Tensor, tokens: ExactTokens, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    """See `ops.exact.exact_attention`."""
    if query.stride(2) != 1:
        query = query.contiguous()
    out, lse = calls.exact(query, pages, tokens.slots, tokens.present, batch.query_start_loc, scale)
    return out, lse


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """See `ops.fresh.merge_attention`."""
    outs = [out if out.stride(2) == 1 else out.contiguous() for out, _ in parts]
    out, lse = calls.join(outs, [lse for _, lse in parts])
    return out, lse


def _plan(codec: LayerCodec, dtype: torch.dtype) -> CpuPlan:
    return plan_of(codec, library.kernels(), dtype in PACKED)
