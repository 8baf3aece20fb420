"""The ops on CPUs: compiled kernels for what touches codes, BLAS for the maps in and out.

The functions are those of `ops.reference`, which documents them; what `absorb_query` hands to
`paged_attention`, and that to `up_project`, is in the kernels' own order (see `plan.py`).
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.codec.layout import KINDS
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.cpu import library
from vllm_attentionpack.ops.cpu.plan import CpuPlan, EncodeTables, PackedMatrix, plan_of

#: Of the numbers that codes are multiplied with, so that the error stays near that of the model's
#: own dtype: floats, 16-bit integers, or 8-bit ones for the codes of 2 bits and 16-bit ones else.
BITS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 8}

#: Of models: the maps in and out go by matrices of 16-bit integers, whose error (13 bits) is well
#: below that of these dtypes; others go by BLAS in float32.
PACKED = (torch.bfloat16,)


@dataclass(frozen=True)
class CpuQuery:
    """Absorbed queries.

    Attributes:
        latent: float32 `[G, T, repeats, M * (Rk + 1)]` per head group: latent queries of each
            modality, then the logits of the mean keys.
        dtype: of the model; decides how exact the arithmetic is.
    """

    latent: list[Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class CpuAttended:
    """What attention over codes yields, normalised.

    Attributes:
        latent: float32 `[G, T, repeats, M * (lanes of V + 1)]` per head group: sums of value
            latents of each modality, then the softmax weight of each.
        lse: float32 `[T, Hq]`, natural log-sum-exp of the logits; `-inf` over no token.
        packed: whether `up_project` goes by matrices of 16-bit integers.
    """

    latent: list[Tensor]
    lse: Tensor
    packed: bool


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
    plan = _plan(codec)
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
    for kind, tokens in zip(KINDS, (key, value), strict=True):
        flat = tokens.flatten(1).float()
        dims = codec.layout.heads_per_group * codec.layout.head_size
        for g, encode in enumerate(plan.encode):
            latent = _encode(flat[:, g * dims : (g + 1) * dims], encode[kind], split)
            library.store(
                latent,
                encode[kind].bias,
                encode[kind].step,
                encode[kind].weight,
                slots,
                chosen,
                table[g, KINDS.index(kind)],
                kv_cache,
                block_size,
            )


def _encode(x: Tensor, tables: EncodeTables, split: int) -> Tensor:
    """`[T, GD]` -> `[T, R]`, the tokens from `split` on by the basis of visual tokens."""
    if split == len(x):
        return x @ tables.encode[0]
    latent = x.new_empty(len(x), tables.step.shape[0])
    torch.mm(x[:split], tables.encode[0], out=latent[:split])
    torch.mm(x[split:], tables.encode[1], out=latent[split:])
    return latent


def absorb_query(query: Tensor, codec: LayerCodec, scale: float) -> CpuQuery:
    """See `ops.reference.absorb_query`."""
    plan = _plan(codec)
    size = codec.layout.heads_per_group
    if query.stride(2) != 1:
        query = query.contiguous()
    by_head = query.unflatten(1, (codec.layout.num_kv_heads, -1)).transpose(0, 1)
    groups = by_head.split(size)  # [G, T, repeats, D] each
    if query.dtype in PACKED:
        latent = [
            query.new_empty(*x.shape[:3], packed.width, dtype=torch.float32)
            for x, packed in zip(groups, plan.packed_absorb, strict=True)
        ]
        for x, packed, out in zip(groups, plan.packed_absorb, latent, strict=True):
            _project(x, packed, scale, out)
    else:
        latent = [
            torch.bmm(x.float().mul(scale).flatten(1, 2), matrix).unflatten(1, x.shape[1:3])
            for x, matrix in zip(groups, plan.absorb, strict=True)
        ]
    return CpuQuery(latent, query.dtype)


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
    plan = _plan(codec)
    *latent, lse = library.attend(
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
    )
    return CpuAttended(latent, lse, query.dtype in PACKED)


def up_project(attended: CpuAttended, codec: LayerCodec) -> Tensor:
    """See `ops.reference.up_project`."""
    plan = _plan(codec)
    if not attended.packed:
        outputs = [
            torch.bmm(latent.flatten(1, 2), matrix).unflatten(1, latent.shape[1:3])
            for latent, matrix in zip(attended.latent, plan.up, strict=True)
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [Hk, T, repeats, D]
        return joined.transpose(0, 1).flatten(1, 2)
    _, tokens, repeats, _ = attended.latent[0].shape
    layout = codec.layout
    out = attended.lse.new_empty(tokens, layout.num_kv_heads, repeats, layout.head_size)
    groups = out.transpose(0, 1).split(layout.heads_per_group)
    for latent, packed, part in zip(attended.latent, plan.packed_up, groups, strict=True):
        _project(latent, packed, 1.0, part)
    return out.flatten(1, 2)


def _project(x: Tensor, packed: PackedMatrix, factor: float, out: Tensor) -> None:
    """`[G, T, repeats, depth]` -> float32 `[G, T, repeats, width]`."""
    library.project(x, packed.matrix, packed.scale, packed.bounds, factor, out)


def _plan(codec: LayerCodec) -> CpuPlan:
    return plan_of(codec, library.kernels().lanes)
