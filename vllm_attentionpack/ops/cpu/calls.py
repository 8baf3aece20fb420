"""The compiled kernels as PyTorch ops: `attentionpack::cpu_attend` and its siblings."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from vllm_attentionpack.ops.cpu import structures
from vllm_attentionpack.ops.cpu.library import kernels

_LIBRARY = torch.library.Library("attentionpack", "FRAGMENT")
_LIBRARY.define(
    "cpu_attend(Tensor[] queries, Tensor layout, int[] widths, Tensor kv_cache, "
    "Tensor block_table, Tensor? starts, Tensor stops, Tensor query_start_loc, int block_size, "
    "int modalities, bool causal, int bits, int tokens, Tensor? row_starts, int[] spans, "
    "Tensor[] basis, Tensor[] mean, Tensor[] own) -> Tensor[]"
)
_LIBRARY.define(
    "cpu_store(Tensor latent, Tensor step, Tensor weight, Tensor slots, "
    "Tensor? visual, Tensor layout, Tensor(a!) kv_cache, int block_size) -> ()"
)
_LIBRARY.define(
    "cpu_project(Tensor[] x, Tensor? shift, Tensor[] matrix, Tensor[] scale, Tensor[] bounds, "
    "float factor, Tensor? sources, Tensor? cos, Tensor? sin, bool interleaved, "
    "Tensor(a!)[] out) -> ()"
)
_LIBRARY.define(
    "cpu_unpack(Tensor kv_cache, Tensor blocks, Tensor layout, int rank, int tokens, "
    "int block_size, bool bfloat16) -> Tensor[]"
)
_LIBRARY.define(
    "cpu_exact(Tensor query, Tensor pages, Tensor slots, Tensor present, Tensor query_start_loc, "
    "float scale) -> Tensor[]"
)
_LIBRARY.define("cpu_join(Tensor[] outs, Tensor[] lses) -> Tensor[]")


def _attend(
    queries: list[Tensor],
    layout: Tensor,
    widths: list[int],
    kv_cache: Tensor,
    block_table: Tensor,
    starts: Tensor | None,
    stops: Tensor,
    query_start_loc: Tensor,
    block_size: int,
    modalities: int,
    causal: bool,
    bits: int,
    tokens: int,
    row_starts: Tensor | None,
    spans: list[int],
    basis: list[Tensor],
    mean: list[Tensor],
    own: list[Tensor],
) -> list[Tensor]:
    """See `plan.py` for layouts and orders.

    Args:
        queries: float32 `[G, N, repeats, width of K]` per head group.
        layout: int64 `[groups, 2, SIDE_FIELDS]`.
        widths: per head group, floats of one row of the result.
        kv_cache: uint8 `[num_blocks, block_bytes]`, rows contiguous.
        block_table: int32 `[B, max_blocks]`.
        starts: int32 `[B]`, or None for zeros.
        stops: int32 `[B]`.
        query_start_loc: int32 `[B + 1]`.
        bits: of the numbers that codes are multiplied with: 32 for floats, 16, or 8, which goes
            for codes of 2 bits.
        tokens: `T`, of the step; `N` where one query of a token meets all keys.
        row_starts: int32 `[B]`, see `SpanRows`; None where one query meets all.
        spans: its size, first and stop; empty without.
        basis: per head group float32 `[M, G, 2, F, Rk]`, of the planes that are coded pre-RoPE;
            empty if there are none.
        mean: per head group float32 `[M, G, 2, F]`.
        own: float32 queries `[T, Hq, 2, F]`, cosines and sines `[positions, F]`, and int32
            `[B, L]`, the positions of tokens, where they are not the tokens' indices.

    Returns:
        float32 `[G, T, repeats, width]` per head group, and last the log-sum-exp `[T, Hq]`.
    """
    chosen = kernels()
    results = _empty_results(queries, widths, tokens)
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    heads_per_group, rows, repeats, _ = queries[0].shape
    groups = len(queries)
    pointers = structures.POINTER * groups
    stops, query_start_loc = stops.contiguous(), query_start_loc.contiguous()
    rebuilt = structures.PreRope()
    if own:
        plain, cos, sin, *positions = own
        rebuilt = structures.PreRope(
            plain.shape[3],
            positions[0].stride(0) if positions else 0,
            ctypes.cast(pointers(*(x.data_ptr() for x in basis)), structures.POINTER),
            ctypes.cast(pointers(*(x.data_ptr() for x in mean)), structures.POINTER),
            plain.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions[0].data_ptr() if positions else None,
        )
    starts = None if starts is None else starts.contiguous()
    args = structures.Attend(
        torch.get_num_threads(),
        stops.shape[0],
        groups,
        modalities,
        heads_per_group,
        repeats,
        tokens,
        rows,
        *(spans or (0, 0, 0)),
        block_size,
        kv_cache.stride(0),
        table.stride(0),
        causal,
        bits,
        layout.data_ptr(),
        kv_cache.data_ptr(),
        table.data_ptr(),
        None if starts is None else starts.data_ptr(),
        stops.data_ptr(),
        query_start_loc.data_ptr(),
        None if row_starts is None else row_starts.data_ptr(),
        rebuilt,
        ctypes.cast(pointers(*(x.data_ptr() for x in queries)), structures.POINTER),
        ctypes.cast(pointers(*(x.data_ptr() for x in results[:-1])), structures.POINTER),
        results[-1].data_ptr(),
    )
    chosen.library.ap_attend(chosen.handle, ctypes.addressof(args))
    return results


def _empty_results(queries: list[Tensor], widths: list[int], tokens: int) -> list[Tensor]:
    heads_per_group, _, repeats, _ = queries[0].shape
    results = [
        query.new_empty(heads_per_group, tokens, repeats, width)
        for query, width in zip(queries, widths, strict=True)
    ]
    return [*results, queries[0].new_empty(tokens, len(queries) * heads_per_group * repeats)]


def _attend_fake(
    queries: list[Tensor], layout: Tensor, widths: list[int], *others: Any
) -> list[Tensor]:
    return _empty_results(queries, widths, tokens=others[-6])


def _store(
    latent: Tensor,
    step: Tensor,
    weight: Tensor,
    slots: Tensor,
    visual: Tensor | None,
    layout: Tensor,
    kv_cache: Tensor,
    block_size: int,
) -> None:
    """Quantises latents and writes them into their slots.

    Args:
        latent: float32 `[T, R]`, `(x - mean) @ encode`.
        step: float32 `[R]`, as in `PlaneCodec`.
        weight: float32 `[M, R]`, as in `Basis`.
        slots: int64 `[T]`; negative for no slot.
        visual: bool `[T]`, or None for all text.
        layout: int64 `[SIDE_FIELDS]`.
        kv_cache: uint8 `[num_blocks, block_bytes]`, rows contiguous; mutated.
    """
    chosen = kernels()
    slots = slots.contiguous()
    visual = None if visual is None else visual.contiguous()
    args = structures.Store(
        torch.get_num_threads(),
        latent.shape[0],
        latent.stride(0),
        block_size,
        kv_cache.stride(0),
        weight.shape[0],
        (structures.INT * structures.SIDE_FIELDS)(*layout.tolist()),
        latent.data_ptr(),
        step.data_ptr(),
        weight.data_ptr(),
        slots.data_ptr(),
        None if visual is None else visual.data_ptr(),
        kv_cache.data_ptr(),
    )
    chosen.library.ap_store(chosen.handle, ctypes.addressof(args))


def _project(
    x: list[Tensor],
    shift: Tensor | None,
    matrix: list[Tensor],
    scale: list[Tensor],
    bounds: list[Tensor],
    factor: float,
    sources: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    out: list[Tensor],
) -> None:
    """`out[i][b] = factor * (x[i][b] - shift) @ matrix[i][b]`.

    Args:
        x: bfloat16 or float32 `[B, T, repeats, depth or more]` each, contiguous along a row.
        shift: float32 `[depth]`, contiguous; None for zero.
        matrix: int16, with `scale` and `bounds`; see `maps.PackedMap`.
        scale: float32.
        bounds: int64.
        factor: of the result.
        sources: int32 `[N]`, the token of `x` that each row comes from, turned back on the way;
            None if rows are the tokens, as they are.
        cos: float32 `[N, P]`, with `sin` the angles of each row.
        sin: float32 `[N, P]`.
        interleaved: see `codec.positions.Rotary`.
        out: float32 `[B, N, repeats, width]` each, contiguous along a row; mutated.
    """
    chosen = kernels()
    turns = [None if t is None else t.contiguous() for t in (sources, cos, sin)]
    threads, mean = torch.get_num_threads(), None if shift is None else shift.data_ptr()
    args = (structures.Project * len(x))(
        *(
            structures.Project(
                threads,
                *to.shape[:4],
                ends.shape[0] - 1,
                *rows.stride()[:3],
                *to.stride()[:3],
                rows.dtype == torch.bfloat16,
                factor,
                *(None if t is None else t.data_ptr() for t in turns),
                0 if cos is None else cos.shape[1],
                interleaved,
                mean,
                ends.data_ptr(),
                rows.data_ptr(),
                steps.data_ptr(),
                units.data_ptr(),
                to.data_ptr(),
            )
            for rows, steps, units, ends, to in zip(x, matrix, scale, bounds, out, strict=True)
        )
    )
    chosen.library.ap_project(chosen.handle, ctypes.addressof(args), len(x))


def _unpack(
    kv_cache: Tensor,
    blocks: Tensor,
    layout: Tensor,
    rank: int,
    tokens: int,
    block_size: int,
    bfloat16: bool,
) -> list[Tensor]:
    """Latents of a request's first tokens, less the mean.

    Args:
        kv_cache: uint8 `[num_blocks, block_bytes]`, rows contiguous.
        blocks: int32, those of the request.
        layout: int64 `[SIDE_FIELDS]`.
        rank: `R`.
        tokens: how many.
        bfloat16: the latents' dtype; else float32.

    Returns:
        Latents `[tokens, R]` in the order of the codec, and bool `[tokens]`, True for visual ones.
    """
    chosen = kernels()
    results = _unpack_fake(kv_cache, blocks, layout, rank, tokens, block_size, bfloat16)
    latent, visual = results
    blocks = blocks.contiguous()
    args = structures.Unpack(
        torch.get_num_threads(),
        tokens,
        block_size,
        kv_cache.stride(0),
        bfloat16,
        (structures.INT * structures.SIDE_FIELDS)(*layout.tolist()),
        kv_cache.data_ptr(),
        blocks.data_ptr(),
        latent.data_ptr(),
        visual.data_ptr(),
    )
    chosen.library.ap_unpack(chosen.handle, ctypes.addressof(args))
    return results


def _unpack_fake(
    kv_cache: Tensor,
    blocks: Tensor,
    layout: Tensor,
    rank: int,
    tokens: int,
    block_size: int,
    bfloat16: bool,
) -> list[Tensor]:
    latent = kv_cache.new_empty(tokens, rank, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    return [latent, kv_cache.new_empty(tokens, dtype=torch.bool)]


def _exact(
    query: Tensor,
    pages: Tensor,
    slots: Tensor,
    present: Tensor,
    query_start_loc: Tensor,
    scale: float,
) -> list[Tensor]:
    """Attention to exact cached tokens.

    Args:
        query: `[T, Hq, D]`, heads contiguous.
        pages: `[num_blocks, S, 2, Hk, D]` of the same dtype, heads contiguous.
        slots: int64 `[B, n]`.
        present: bool `[B, n]`.
        query_start_loc: int32 `[B + 1]`.

    Returns:
        float32 `[T, Hq, D]` and the log-sum-exp `[T, Hq]`.
    """
    chosen = kernels()
    results = _exact_fake(query)
    slots, present = slots.contiguous(), present.contiguous()
    query_start_loc = query_start_loc.contiguous()
    _, block_size, _, kv_heads, head_size = pages.shape
    args = structures.Exact(
        torch.get_num_threads(),
        slots.shape[0],
        slots.shape[1],
        kv_heads,
        query.shape[1] // kv_heads,
        head_size,
        structures.TYPES[query.dtype],
        block_size,
        *pages.stride()[:4],
        *query.stride()[:2],
        scale,
        query.data_ptr(),
        pages.data_ptr(),
        slots.data_ptr(),
        present.data_ptr(),
        query_start_loc.data_ptr(),
        *(result.data_ptr() for result in results),
    )
    chosen.library.ap_exact(chosen.handle, ctypes.addressof(args))
    return results


def _exact_fake(query: Tensor, *_: object) -> list[Tensor]:
    return [
        query.new_empty(query.shape, dtype=torch.float32),
        query.new_empty(query.shape[:2], dtype=torch.float32),
    ]


def _join(outs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    """Attention to disjoint sets of keys from that to each.

    Args:
        outs: up to `MAX_PARTS` of `[T, H, D]`, heads contiguous; any float.
        lses: float32 `[T, H]` each.

    Returns:
        float32 `[T, H, D]` and `[T, H]`.
    """
    if len(outs) > structures.MAX_PARTS:
        raise ValueError(
            f"{len(outs)} parts to merge; the kernel takes up to {structures.MAX_PARTS}"
        )
    chosen = kernels()
    results = _join_fake(outs, lses)
    lses = [lse.contiguous() for lse in lses]
    parts = (structures.Part * len(outs))(
        *(
            structures.Part(
                out.data_ptr(), structures.TYPES[out.dtype], *out.stride()[:2], lse.data_ptr()
            )
            for out, lse in zip(outs, lses, strict=True)
        )
    )
    args = structures.Join(
        torch.get_num_threads(),
        *outs[0].shape,
        len(outs),
        ctypes.addressof(parts),
        *(result.data_ptr() for result in results),
    )
    chosen.library.ap_join(chosen.handle, ctypes.addressof(args))
    return results


def _join_fake(outs: list[Tensor], lses: list[Tensor]) -> list[Tensor]:
    return [outs[0].new_empty(outs[0].shape, dtype=torch.float32), lses[0].new_empty(lses[0].shape)]


def _mutates_only(*_: object) -> None:
    return None


_LIBRARY.impl("cpu_attend", _attend, "CPU")
_LIBRARY.impl("cpu_store", _store, "CPU")
_LIBRARY.impl("cpu_project", _project, "CPU")
_LIBRARY.impl("cpu_unpack", _unpack, "CPU")
_LIBRARY.impl("cpu_exact", _exact, "CPU")
_LIBRARY.impl("cpu_join", _join, "CPU")
torch.library.register_fake("attentionpack::cpu_attend", _attend_fake, lib=_LIBRARY)
torch.library.register_fake("attentionpack::cpu_store", _mutates_only, lib=_LIBRARY)
torch.library.register_fake("attentionpack::cpu_project", _mutates_only, lib=_LIBRARY)
torch.library.register_fake("attentionpack::cpu_unpack", _unpack_fake, lib=_LIBRARY)
torch.library.register_fake("attentionpack::cpu_exact", _exact_fake, lib=_LIBRARY)
torch.library.register_fake("attentionpack::cpu_join", _join_fake, lib=_LIBRARY)

attend = torch.ops.attentionpack.cpu_attend.default
store = torch.ops.attentionpack.cpu_store.default
project = torch.ops.attentionpack.cpu_project.default
unpack = torch.ops.attentionpack.cpu_unpack.default
exact = torch.ops.attentionpack.cpu_exact.default
join = torch.ops.attentionpack.cpu_join.default
