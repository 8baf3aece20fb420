"""Device code of attention over codes: one program per (request, split, head group, modality)."""

import triton
import triton.language as tl

from vllm_attentionpack.ops.triton.unpack import (
    entries,
    load_plane,
    plane_addresses,
    scale_of,
    sub_plane,
    sub_planes,
    widen,
)

#: Tiles whose modality is looked up at once: one bit each of a 32-bit word, sign bit left alone.
_TILES_PER_CHUNK = tl.constexpr(16)


# Sizes of a batch change at every step; special cases of them would be compiled while serving.
@triton.jit(
    do_not_specialize=["num_tokens", "num_splits", "query_tiles", "first_span", "stop_span"]
)
def attend_kernel(
    query,  # float16 [N, groups, M, HEADS, K_COLUMNS]
    mean_logits,  # float32 [N, groups, M, HEADS]
    cache,  # uint8 [blocks, block_bytes]
    block_table,  # int32 [B, max_blocks]
    starts,  # int32 [B]; unread unless HAS_STARTS
    stops,  # int32 [B]
    query_start_loc,  # int32 [B + 1]
    planes,  # int32 [groups, 2, 7]; unread if GROUP_BYTES
    row_starts,  # int32 [B]; unread unless SPAN
    own_query,  # float16 [T, groups, HEADS, 2, PLANES]; unread unless PLANES, as are the next six
    own_basis,  # float16 [groups, M, PASSES, 2, K_COLUMNS, PASS_HEADS * PLANES]
    own_scale,  # float32 [groups, M]
    own_mean,  # float32 [groups, M, PASSES, 2, PASS_HEADS * PLANES]
    own_cos,  # float32 [positions, TABLE_PLANES]
    own_sin,  # float32 [positions, TABLE_PLANES]
    own_positions,  # int32 [B, tokens]; unread unless HAS_POSITIONS
    latent,  # float16 [splits, T, groups, M, HEADS, V_COLUMNS]
    sums,  # float32 [splits, T, groups, M, HEADS]
    block_bytes,
    table_stride,
    num_tokens,
    num_groups,
    num_splits,
    query_tiles,
    first_span,
    stop_span,
    positions_stride,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    MODALITIES: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    SPAN: tl.constexpr,
    PLANES: tl.constexpr,
    PASSES: tl.constexpr,
    PASS_HEADS: tl.constexpr,
    REPEATS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    TABLE_PLANES: tl.constexpr,
    K_BITS: tl.constexpr,
    K_START: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_WIDTH: tl.constexpr,
    K_FULL: tl.constexpr,
    K_COLUMN: tl.constexpr,
    K_OPERAND: tl.constexpr,
    K_ALIGN: tl.constexpr,
    K_AT: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_START: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_WIDTH: tl.constexpr,
    V_FULL: tl.constexpr,
    V_JOINED: tl.constexpr,
    V_COLUMN: tl.constexpr,
    V_OPERAND: tl.constexpr,
    V_ALIGN: tl.constexpr,
    V_AT: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    GROUP_BYTES: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0) % num_splits
    request = tl.program_id(0) // num_splits // query_tiles
    query_tile = tl.program_id(0) // num_splits % query_tiles
    group = tl.program_id(1) // MODALITIES
    modality = tl.program_id(1) % MODALITIES

    first_token = tl.load(query_start_loc + request)
    length = tl.load(query_start_loc + request + 1) - first_token
    if query_tile * ROWS >= length * HEADS:
        return
    row = query_tile * ROWS + tl.arange(0, ROWS)
    position = row // HEADS
    live = position < length
    # Row of the arrays [T, groups, M, HEADS], which the query, its constants and the results share.
    owner = ((first_token + position).to(tl.int64) * num_groups + group) * MODALITIES + modality
    owner = owner * HEADS + row % HEADS

    # The share of this split, in whole tiles; splits beyond the context have none.
    start = 0
    if HAS_STARTS:
        start = tl.load(starts + request).to(tl.int32)
    stop = tl.load(stops + request).to(tl.int32)
    if CAUSAL:
        row_stop = stop - length + 1 + position
        last = tl.minimum(length - 1, (query_tile * ROWS + ROWS - 1) // HEADS)
        stop = stop - length + 1 + last
    if SPAN > 0:
        start = tl.maximum(start, first_span * SPAN)
        stop = tl.minimum(stop, stop_span * SPAN)
    first_tile = start // TILE
    tiles = tl.maximum(tl.cdiv(stop, TILE) - first_tile, 0)
    share = tl.cdiv(tiles, num_splits)
    first_tile += split * share
    tiles = tl.minimum(share, tiles - split * share)

    if GROUP_BYTES > 0:
        # Constants, which take no registers.
        k_at, v_at = entries(K_AT), entries(V_AT)
        k_scales = K_SCALES + group * 2 * BLOCK_SIZE
        v_scales = V_SCALES + group * 2 * BLOCK_SIZE
    else:
        k_at, k_scales = plane_addresses(planes + group * 14, K_BITS, K_ALIGN)
        v_at, v_scales = plane_addresses(planes + group * 14 + 7, V_BITS, V_ALIGN)
    table = block_table + request.to(tl.int64) * table_stride

    own_queries = ()
    if PLANES > 0:
        own_basis += (group * MODALITIES + modality) * (
            PASSES * 2 * K_COLUMNS * PASS_HEADS * PLANES
        )
        own_mean += (group * MODALITIES + modality) * (PASSES * 2 * PASS_HEADS * PLANES)
        own_unit = tl.load(own_scale + group * MODALITIES + modality)
        own_column = tl.arange(0, PASS_HEADS * PLANES)
        own_row = (first_token + position).to(tl.int64) * num_groups + group
        own_row = own_row * HEADS + row % HEADS
        for half in tl.static_range(2 * PASSES):
            # Each row meets the keys of its own head: the others' are zero.
            head = half // 2 * PASS_HEADS + own_column // PLANES
            met = live[None, :] & (head[:, None] == (row % HEADS // REPEATS)[None, :])
            at = (own_row * 2 + half % 2)[None, :] * PLANES + (own_column % PLANES)[:, None]
            own_queries = own_queries + (tl.load(own_query + at, mask=met, other=0.0),)

    attended = ()
    for i in tl.static_range(len(V_BITS)):
        for _ in tl.static_range(8 // V_BITS[i] // V_JOINED[i]):
            attended = attended + (tl.zeros((V_SIZE[i] * V_JOINED[i], ROWS), tl.float32),)
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    token_of = tl.arange(0, TILE)

    from_span = 0
    to_span = 1
    if SPAN > 0:
        stretch_start = tl.maximum(start, first_tile * TILE)
        stretch_stop = tl.minimum(stop, (first_tile + tiles) * TILE)
        from_span = stretch_start // SPAN
        to_span = tl.cdiv(stretch_stop, SPAN)
    for span in range(from_span, to_span):
        asked = owner
        if SPAN > 0:
            start = tl.maximum(stretch_start, span * SPAN)
            stop = tl.minimum(stretch_stop, (span + 1) * SPAN)
            first_tile = start // TILE
            tiles = tl.maximum(tl.cdiv(stop, TILE) - first_tile, 0)
            asked = tl.load(row_starts + request) + (span - first_span) * length + position
            asked = (asked.to(tl.int64) * num_groups + group) * MODALITIES + modality
            asked = asked * HEADS + row % HEADS
        queries = ()
        for i in tl.static_range(len(K_BITS)):
            for sub in tl.static_range(8 // K_BITS[i]):
                dims = K_COLUMN[i] + sub * K_SIZE[i] + tl.arange(0, K_SIZE[i])
                queries = queries + (
                    tl.load(
                        query + (asked * K_COLUMNS)[None, :] + dims[:, None],
                        mask=live[None, :],
                        other=0.0,
                    ),
                )
        if SPAN > 0:
            mean_logit = tl.load(mean_logits + asked, mask=live, other=0.0)
        chunks = 1
        if MODALITIES == 2:
            chunks = tl.cdiv(tiles, _TILES_PER_CHUNK)
        for chunk in range(chunks):
            # Tiles of one modality alone are common, and only tiles that hold a token of this
            # program's modality are read: their numbers come out of a word with one bit per tile.
            count = tiles
            if MODALITIES == 2:
                from_tile = first_tile + chunk * _TILES_PER_CHUNK
                waiting, count = _tiles_with(
                    modality,
                    cache + k_scales,
                    table,
                    block_bytes,
                    from_tile * TILE,
                    start,
                    tl.minimum(stop, (first_tile + tiles) * TILE),
                    BLOCK_SIZE,
                    TILE,
                )
            for step in tl.range(0, count, num_stages=STAGES):
                tile = first_tile + step
                if MODALITIES == 2:
                    lowest = waiting & (-waiting)
                    waiting = waiting - lowest
                    tile = from_tile + _bit_number(lowest)
                token = tile * TILE + token_of
                if BLOCK_SIZE % TILE == 0:
                    block = tl.load(table + tile * TILE // BLOCK_SIZE)
                    base = cache + block.to(tl.int64) * block_bytes
                    within = (tile * TILE) % BLOCK_SIZE + token_of
                else:
                    block = tl.load(
                        table + token // BLOCK_SIZE, mask=(token >= start) & (token < stop), other=0
                    )
                    base = cache + block.to(tl.int64) * block_bytes
                    within = token % BLOCK_SIZE
                k_byte = tl.load(base + k_scales + within)

                dots = tl.zeros((TILE, ROWS), tl.float32)
                for i in tl.static_range(len(K_BITS)):
                    data = load_plane(
                        base + group * GROUP_BYTES + k_at[2 * i + 1],
                        K_WIDTH[i],
                        k_at[2 * i],
                        within,
                        K_START[i],
                        K_SIZE[i],
                        K_FULL[i],
                    )
                    wide = widen(data)
                    for sub in tl.static_range(8 // K_BITS[i]):
                        operand = sub_plane(wide, K_BITS[i], sub)
                        dots = tl.dot(operand, queries[K_OPERAND[i] + sub], dots)
                # Asked for before the softmax, which hides the wait; earlier it would take
                # registers.
                v_byte = tl.load(base + v_scales + within)
                logit = dots * scale_of(k_byte)[:, None]
                seen = (token >= start) & (token < stop)
                if SPAN > 0:
                    logit += mean_logit[None, :]
                if PLANES > 0:
                    place = token
                    if HAS_POSITIONS:
                        place = tl.load(
                            own_positions + request.to(tl.int64) * positions_stride + token,
                            mask=seen,
                            other=0,
                        )
                    place = tl.where(seen, place, 0)[:, None] * TABLE_PLANES
                    # Columns that fill up are of no plane, and may take any angle.
                    place += tl.minimum(own_column % PLANES, TABLE_PLANES - 1)[None, :]
                    cos, sin = tl.load(own_cos + place), tl.load(own_sin + place)
                    unit = (scale_of(k_byte) * own_unit)[:, None]
                    # One pass after the other, the codes read again: all at once would take more
                    # registers than there are.
                    for turn in tl.static_range(PASSES):
                        a = tl.zeros((TILE, PASS_HEADS * PLANES), tl.float32)
                        b = tl.zeros((TILE, PASS_HEADS * PLANES), tl.float32)
                        for i in tl.static_range(len(K_BITS)):
                            data = load_plane(
                                base + group * GROUP_BYTES + k_at[2 * i + 1],
                                K_WIDTH[i],
                                k_at[2 * i],
                                within,
                                K_START[i],
                                K_SIZE[i],
                                K_FULL[i],
                            )
                            wide = widen(data)
                            for sub in tl.static_range(8 // K_BITS[i]):
                                operand = sub_plane(wide, K_BITS[i], sub)
                                # A tile of addresses that all share, and a constant: addresses
                                # of their own would stay in registers from tile to tile.
                                rows = tl.arange(0, K_SIZE[i])[:, None] * (PASS_HEADS * PLANES)
                                columns = own_basis + (rows + own_column[None, :])
                                skipped = 2 * turn * K_COLUMNS + K_COLUMN[i] + sub * K_SIZE[i]
                                columns += skipped * PASS_HEADS * PLANES
                                a = tl.dot(operand, tl.load(columns), a)
                                columns += K_COLUMNS * PASS_HEADS * PLANES
                                b = tl.dot(operand, tl.load(columns), b)
                        mean = own_mean + 2 * turn * PASS_HEADS * PLANES + own_column
                        a = a * unit + tl.load(mean)[None, :]
                        b = b * unit + tl.load(mean + PASS_HEADS * PLANES)[None, :]
                        first = (a * cos - b * sin).to(tl.float16)
                        second = (b * cos + a * sin).to(tl.float16)
                        logit = tl.dot(first, own_queries[2 * turn], logit)
                        logit = tl.dot(second, own_queries[2 * turn + 1], logit)
                if MODALITIES == 2:
                    seen = seen & ((k_byte >> 7) == modality)
                if CAUSAL:
                    visible = seen[:, None] & (token[:, None] < row_stop[None, :])
                else:
                    visible = seen[:, None]
                logit = tl.where(visible, logit, float("-inf"))
                new_top = tl.maximum(top, tl.max(logit, 0))
                keep = tl.exp2(top - new_top)
                p = tl.exp2(logit - new_top[None, :])
                total = total * keep + tl.sum(p, 0)
                p = (p * scale_of(v_byte)[:, None]).to(tl.float16)
                top = new_top

                updated = ()
                for i in tl.static_range(len(V_BITS)):
                    data = load_plane(
                        base + group * GROUP_BYTES + v_at[2 * i + 1],
                        V_WIDTH[i],
                        v_at[2 * i],
                        within,
                        V_START[i],
                        V_SIZE[i],
                        V_FULL[i],
                    )
                    wide = widen(data)
                    for part in tl.static_range(8 // V_BITS[i] // V_JOINED[i]):
                        operand = sub_planes(wide, V_BITS[i], part * V_JOINED[i], V_JOINED[i])
                        before = attended[V_OPERAND[i] + part] * keep[None, :]
                        updated = updated + (tl.dot(tl.trans(operand), p, before),)
                attended = updated

    norm = tl.where(total > 0, 1.0 / total, 0.0)
    out = split.to(tl.int64) * num_tokens * num_groups * MODALITIES * HEADS + owner
    result = top + tl.log2(total)
    if SPAN == 0:
        # The same for all tokens of a modality: it counts only between modalities and outside.
        result += tl.load(mean_logits + owner, mask=live, other=0.0)
    tl.store(sums + out, result, mask=live)
    for i in tl.static_range(len(V_BITS)):
        for part in tl.static_range(8 // V_BITS[i] // V_JOINED[i]):
            result = attended[V_OPERAND[i] + part] * norm[None, :]
            dims = tl.arange(0, V_SIZE[i] * V_JOINED[i])
            dims += V_COLUMN[i] + part * V_SIZE[i] * V_JOINED[i]
            tl.store(
                latent + (out * V_COLUMNS)[None, :] + dims[:, None],
                result.to(tl.float16),
                mask=live[None, :],
            )


@triton.jit
def _tiles_with(
    modality,
    scales,
    table,
    block_bytes,
    first_token,
    start,
    stop,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A bit per tile of a chunk that holds a token of `modality` in `[start, stop)`; how many."""
    tile = tl.arange(0, _TILES_PER_CHUNK)
    token = first_token + tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    exists = (token >= start) & (token < stop)
    block = tl.load(table + token // BLOCK_SIZE, mask=exists, other=0).to(tl.int64)
    byte = tl.load(scales + block * block_bytes + token % BLOCK_SIZE, mask=exists, other=0)
    found = tl.max((exists & ((byte >> 7) == modality)).to(tl.int32), 1)
    return tl.sum(found << tile, 0), tl.sum(found, 0)


@triton.jit
def _bit_number(bit):
    """The number of the only bit that is set in `bit`, an int32."""
    return (bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
