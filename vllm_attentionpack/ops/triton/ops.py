"""Host side of the kernels; `ops.reference` documents arguments, results and meaning."""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vllm_attentionpack.codec.codec import LayerCodec
from vllm_attentionpack.ops.batch import QueryBatch
from vllm_attentionpack.ops.exact import ExactTokens
from vllm_attentionpack.ops.triton.launch import (
    attend_shape,
    encode_shape,
    exact_shape,
    power_of_two,
)
from vllm_attentionpack.ops.triton.prepared import Prepared, prepare
from vllm_attentionpack.ops.turns import PreRope, Turns


@dataclass(frozen=True)
class PackedQuery:
    """Queries in latent space, softmax scale included, for logits to base 2.

    Attributes:
        latent: float16 `[N, groups, M, H, C]`, `H` query heads of a group, `C` padded columns.
        mean_logit: float32 `[N, groups, M, H]`, the query against the mean key of each modality.
        turns: what the `N` rows are where they are not tokens.
        own: float16 `[T, groups, H, 2, F]`, what planes coded pre-RoPE meet, `F` padded.
    """

    latent: Tensor
    mean_logit: Tensor
    turns: Turns | None = None
    own: Tensor | None = None


@dataclass(frozen=True)
class PackedLatent:
    """What attention over codes yields, normalised.

    Attributes:
        latent: float16 `[T, groups, M, H, C]`.
        weight: float32 `[T, groups, M, H]`, softmax weight of each modality.
        lse: float32 `[T, Hq]`, natural log-sum-exp of the logits; `-inf` over no token.
    """

    latent: Tensor
    weight: Tensor
    lse: Tensor


def unavailable(device: torch.device) -> str | None:
    """Why these ops cannot run on `device`; None if they can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton is not installed"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch finds no CUDA device"
        major, minor = torch.cuda.get_device_capability(device)
        return None if major >= 8 else f"compute capability {major}.{minor} is below 8.0"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"they need a CUDA device, not {device.type}"


def reserve(tokens: int, turned: int, query_heads: int, codec: LayerCodec) -> None:
    prepared = prepare(codec)
    prepared.make()
    # Queries in latent space, and as many attended latents of splits (one, where tokens are many)
    # as merged ones, beside what new tokens and exact ones gave; then the merge of three parts.
    column = torch.float16.itemsize * codec.num_modalities
    queries = turned * column * prepared.tiles["key"].columns
    if prepared.own is not None:  # what its planes meet: stacked, padded, as float16
        queries += 3 * tokens * torch.float16.itemsize * 2 * prepared.own.planes
    latents = tokens * column * 2 * prepared.tiles["value"].columns
    fresh = tokens * torch.float16.itemsize * codec.layout.head_size
    part = tokens * torch.float32.itemsize * codec.layout.head_size
    most = max(queries + latents + fresh + part, fresh + 3 * part)
    torch.empty((query_heads, most), dtype=torch.uint8, device=prepared.device)


def store_kv(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    visual: Tensor | None,
    codec: LayerCodec,
    block_size: int,
) -> None:
    from vllm_attentionpack.ops.triton.store import store_kernel

    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    prepared = prepare(codec)
    key, value = _heads_contiguous(key), _heads_contiguous(value)
    k, v = (prepared.encoders[kind] for kind in ("key", "value"))
    layout = codec.layout
    groups, dims, joint_kv = len(layout.groups), layout.group_dims, layout.joint_kv
    tiles = prepared.encoding_tiles
    shape = encode_shape(prepared, tokens)
    constants = tiles["key"].constants("K") | tiles["value"].constants("V")
    for unread in ("WIDTH", "FULL", "JOINED"):
        del constants[f"K_{unread}"], constants[f"V_{unread}"]
    store_kernel[(-(-tokens // shape.tokens), groups, 1 if joint_kv else 2)](
        key,
        value,
        kv_cache,
        slot_mapping,
        slot_mapping if visual is None else visual.view(torch.uint8),
        prepared.planes(block_size),
        k.basis.values,
        k.basis.scale,
        k.mean,
        k.weight,
        k.codes,
        v.basis.values,
        v.basis.scale,
        v.mean,
        v.weight,
        v.codes,
        kv_cache.stride(0),
        key.stride(0),
        value.stride(0),
        tokens,
        BLOCK_SIZE=block_size,
        GROUP_DIMS=dims,
        BLOCK_DIMS=_divisor(dims, shape.dims),
        TOKENS=shape.tokens,
        MODALITIES=codec.num_modalities,
        HAS_VISUAL=visual is not None,
        K_STEPS=k.steps,
        V_STEPS=v.steps,
        K_PAIRS=k.pairs,
        V_PAIRS=v.pairs,
        JOINT_KV=joint_kv,
        **constants,
        num_warps=shape.warps,
        num_stages=2,
    )


def absorb_query(
    query: Tensor, codec: LayerCodec, scale: float, turns: Turns | None = None
) -> PackedQuery:
    from vllm_attentionpack.ops.triton.project import absorb_kernel

    prepared = prepare(codec)
    layout, basis = codec.layout, prepared.query_basis
    tokens, query_heads, head_size = query.shape
    if query.stride(2) != 1:
        query = query.contiguous()
    repeats = query_heads // layout.num_kv_heads
    count = tokens if turns is None else len(turns.cos)
    shape = (count, len(layout.groups), codec.num_modalities, repeats * layout.heads_per_group)
    columns = prepared.tiles["key"].columns
    latent = torch.empty(*shape, columns, dtype=torch.float16, device=query.device)
    mean_logit = torch.empty(shape, dtype=torch.float32, device=query.device)
    rows = count * repeats
    block_rows = 16 if rows <= 64 else 64
    block_columns = 64
    # Read where there are turns only.
    sources, cos, sin = (
        (latent, mean_logit, mean_logit)
        if turns is None
        else (turns.rows.tokens, turns.cos, turns.sin)
    )
    grid = (
        -(-rows // block_rows),
        layout.num_kv_heads * codec.num_modalities,
        -(-columns // block_columns),
    )
    if count:
        absorb_kernel[grid](
            query,
            basis.values,
            basis.scale,
            prepared.key_mean,
            latent,
            mean_logit,
            sources,
            cos,
            sin,
            query.stride(0),
            query.stride(1),
            rows,
            len(layout.groups),
            scale,
            REPEATS=repeats,
            GROUP_HEADS=layout.heads_per_group,
            MODALITIES=codec.num_modalities,
            HEAD_SIZE=head_size,
            COLUMNS=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=block_columns,
            BLOCK_DIMS=_divisor(head_size, 64),
            PLANES=0 if turns is None else cos.shape[1],
            INTERLEAVED=turns is not None and turns.rotary.interleaved,
            num_warps=4,
            # Turning reads four tensors: more of them in flight fill the shared memory.
            **({"num_stages": 1} if turns else {}),
        )
    own = None
    if turns is not None and turns.pre_rope is not None:
        own = _own_query(query, prepared, turns.pre_rope, scale)
    return PackedQuery(latent, mean_logit, turns, own)


def _own_query(query: Tensor, prepared: Prepared, pre_rope: PreRope, scale: float) -> Tensor:
    own = prepared.own
    assert own is not None
    plain = torch.stack(pre_rope.anchors.pre_rope_planes(query), 2) * (scale * math.log2(math.e))
    plain = pad(plain, (0, own.planes - plain.shape[3])).half()
    return plain.unflatten(1, (len(prepared.codec.layout.groups), -1))


def paged_attention(
    query: PackedQuery,
    kv_cache: Tensor,
    block_table: Tensor,
    starts: Tensor | None,
    stops: Tensor,
    batch: QueryBatch,
    codec: LayerCodec,
    block_size: int,
    causal: bool,
) -> PackedLatent:
    from vllm_attentionpack.ops.triton.attend import attend_kernel
    from vllm_attentionpack.ops.triton.merge import merge_kernel

    prepared = prepare(codec)
    tiles = prepared.tiles
    _, groups, modalities, heads, _ = query.latent.shape
    tokens = batch.num_tokens
    requests = batch.query_start_loc.shape[0] - 1
    columns = tiles["value"].columns
    shape = attend_shape(prepared, heads, batch, query.own is not None)
    rows = (tokens, groups, modalities, heads)
    # A request of no new tokens is no program's; its rows do not exist.
    parts = query.latent.new_empty(shape.splits, *rows, columns)
    sums = query.mean_logit.new_empty(shape.splits, *rows)
    latent, weight = query.latent.new_empty(*rows, columns), query.mean_logit.new_empty(rows)
    lse = query.mean_logit.new_empty(tokens, groups * heads)
    if not tokens:
        return PackedLatent(latent, weight, lse)
    constants = tiles["key"].constants("K") | tiles["value"].constants("V")
    constants |= prepared.plane_constants(block_size)
    rows_of, own, spans = _span_arguments(query, prepared)
    constants |= spans
    del constants["K_JOINED"]
    attend_kernel[(requests * shape.query_tiles * shape.splits, groups * modalities)](
        query.latent,
        query.mean_logit,
        kv_cache,
        block_table,
        stops if starts is None else starts,
        stops,
        batch.query_start_loc,
        prepared.planes(block_size),
        *own,
        parts,
        sums,
        kv_cache.stride(0),
        block_table.stride(0),
        tokens,
        groups,
        shape.splits,
        shape.query_tiles,
        *rows_of,
        HEADS=heads,
        ROWS=shape.rows,
        BLOCK_SIZE=block_size,
        TILE=shape.tile,
        MODALITIES=modalities,
        CAUSAL=causal,
        HAS_STARTS=starts is not None,
        STAGES=shape.stages,
        **constants,
        num_warps=shape.warps,
    )
    block_columns = min(128, 1 << (columns - 1).bit_length())
    merge_kernel[(tokens * groups * heads, -(-columns // block_columns))](
        parts,
        sums,
        latent,
        weight,
        lse,
        sums[0].numel(),
        shape.splits,
        HEADS=heads,
        MODALITIES=modalities,
        COLUMNS=columns,
        SPLITS=1 << (shape.splits - 1).bit_length(),
        BLOCK_SPLITS=min(16, 1 << (shape.splits - 1).bit_length()),
        BLOCK_COLUMNS=block_columns,
        num_warps=4,
    )
    return PackedLatent(latent, weight, lse)


def _span_arguments(
    query: PackedQuery, prepared: Prepared
) -> tuple[tuple[int, ...], tuple[Tensor, ...], dict[str, object]]:
    """What `attend_kernel` is told of spans and planes coded pre-RoPE: numbers, tensors, constants.

    Tensors that it does not read are any.
    """
    turns, nothing = query.turns, query.mean_logit
    layout = prepared.codec.layout
    constants: dict[str, object] = {
        "SPAN": 0,
        "PLANES": 0,
        "PASSES": 0,
        "PASS_HEADS": 0,
        "REPEATS": query.latent.shape[3] // layout.heads_per_group,
        "HAS_POSITIONS": False,
        "TABLE_PLANES": 0,
    }
    if turns is None:
        return (0, 0, 0), (nothing,) * 8, constants
    rows = turns.rows
    constants["SPAN"] = rows.size
    if turns.pre_rope is None:
        return (rows.first, rows.stop, 0), (rows.row_starts, *[nothing] * 7), constants
    own, found = prepared.own, turns.pre_rope
    assert own is not None and query.own is not None
    constants |= {"PLANES": own.planes, "PASSES": own.passes, "PASS_HEADS": own.heads}
    constants["HAS_POSITIONS"] = found.positions is not None
    positions = nothing if found.positions is None else found.positions
    bases = own.basis, own.scale, own.mean
    tensors = (rows.row_starts, query.own, *bases, found.cos, found.sin, positions)
    constants["TABLE_PLANES"] = found.cos.shape[1]
    return (rows.first, rows.stop, positions.stride(0)), tensors, constants


def up_project(attended: PackedLatent, codec: LayerCodec) -> Tensor:
    from vllm_attentionpack.ops.triton.project import up_project_kernel

    prepared = prepare(codec)
    layout, basis = codec.layout, prepared.value_basis
    tokens, groups, modalities, heads, columns = attended.latent.shape
    repeats = heads // layout.heads_per_group
    out = torch.empty(
        tokens, groups * heads, layout.head_size, dtype=torch.float32, device=attended.lse.device
    )
    rows = tokens * repeats
    block_rows = 16 if rows <= 64 else 64
    block_dims = _divisor(layout.head_size, 64)
    if tokens:
        up_project_kernel[
            -(-rows // block_rows), layout.num_kv_heads, layout.head_size // block_dims
        ](
            attended.latent,
            attended.weight,
            basis.values,
            basis.scale,
            prepared.value_mean,
            out,
            rows,
            groups,
            groups * heads,
            REPEATS=repeats,
            GROUP_HEADS=layout.heads_per_group,
            MODALITIES=modalities,
            HEAD_SIZE=layout.head_size,
            COLUMNS=columns,
            BLOCK_ROWS=block_rows,
            BLOCK_COLUMNS=64,
            BLOCK_DIMS=block_dims,
            num_warps=4,
        )
    return out


def exact_attention(
    query: Tensor, pages: Tensor, tokens: ExactTokens, batch: QueryBatch, scale: float
) -> tuple[Tensor, Tensor]:
    from vllm_attentionpack.ops.triton.exact import exact_kernel

    new, query_heads, head_size = query.shape
    _, block_size, _, kv_heads, _ = pages.shape
    most = tokens.slots.shape[1]
    out = torch.empty(query.shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
    if not new:
        return out, lse
    if query.stride(2) != 1:
        query = query.contiguous()
    repeats = query_heads // kv_heads
    shape = exact_shape(head_size, query.element_size(), batch.max_query_len * repeats)
    query_tiles = -(-batch.max_query_len * repeats // shape.rows)
    requests = batch.query_start_loc.shape[0] - 1
    exact_kernel[(requests * query_tiles, kv_heads)](
        query,
        pages,
        tokens.slots,
        tokens.present.view(torch.uint8),
        batch.query_start_loc,
        out,
        lse,
        *query.stride()[:2],
        *pages.stride()[:4],
        scale * math.log2(math.e),
        query_tiles,
        MOST=most,
        REPEATS=repeats,
        KV_HEADS=kv_heads,
        HEAD_SIZE=head_size,
        DIMS=shape.dims,
        BLOCK_SIZE=block_size,
        ROWS=shape.rows,
        TILE=shape.tile,
        num_warps=4,
    )
    return out, lse


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    from vllm_attentionpack.ops.triton.exact import join_kernel

    if not 2 <= len(parts) <= 4:
        raise ValueError(f"{len(parts)} parts of attention to merge; the kernel takes 2 to 4")
    first = parts[0][1]
    out = torch.empty(parts[0][0].shape, dtype=torch.float32, device=first.device)
    lse = torch.empty(first.shape, dtype=torch.float32, device=first.device)
    rows, head_size = lse.numel(), out.shape[2]
    if not rows:
        return out, lse
    # The kernel has room for four; it reads as many as there are.
    filled = [tensor.contiguous() for part in (*parts, *[parts[0]] * 4)[:4] for tensor in part]
    dims = power_of_two(head_size)
    block_rows = max(1, 2048 // dims)
    join_kernel[(-(-rows // block_rows),)](
        *filled,
        out,
        lse,
        rows,
        PARTS=len(parts),
        HEAD_SIZE=head_size,
        DIMS=dims,
        ROWS=block_rows,
        num_warps=4,
    )
    return out, lse


def _heads_contiguous(x: Tensor) -> Tensor:
    """`x` `[T, H, D]` with the heads of a token side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _divisor(n: int, largest: int) -> int:
    """The largest power of two up to `largest` that divides `n`."""
    return min(largest, n & -n)
