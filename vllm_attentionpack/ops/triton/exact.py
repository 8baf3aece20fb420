"""Device code beside the codes: attention to exact cached tokens, and the merge of all parts."""

import triton
import triton.language as tl


# What changes with the batch is not specialised: see `attend_kernel`.
@triton.jit(do_not_specialize=["query_tiles"])
def exact_kernel(
    query,  # [T, Hq, D]
    pages,  # [num_blocks, S, 2, Hk, D], of the same dtype
    slots,  # int64 [B, MOST]
    present,  # uint8 [B, MOST]
    query_start_loc,  # int32 [B + 1]
    out,  # float32 [T, Hq, D]
    lse,  # float32 [T, Hq]
    token_stride,
    head_stride,
    block_stride,
    slot_stride,
    side_stride,
    kv_head_stride,
    factor,  # softmax scale, for logits to base 2
    query_tiles,
    MOST: tl.constexpr,
    REPEATS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One request and KV head, `ROWS` of its (new token, query head) pairs; `DIMS` >= head size."""
    request = (tl.program_id(0) // query_tiles).to(tl.int64)
    head = tl.program_id(1)
    first = tl.load(query_start_loc + request)
    row = tl.program_id(0) % query_tiles * ROWS + tl.arange(0, ROWS)
    token = (first + row // REPEATS).to(tl.int64)
    live = token < tl.load(query_start_loc + request + 1)
    dim = tl.arange(0, DIMS)
    inside = dim < HEAD_SIZE
    query_head = head * REPEATS + row % REPEATS
    q = tl.load(
        query + (token * token_stride + query_head * head_stride)[:, None] + dim[None, :],
        mask=live[:, None] & inside[None, :],
        other=0.0,
    )
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, DIMS), tl.float32)
    for start in range(0, MOST, TILE):
        index = start + tl.arange(0, TILE)
        at = request * MOST + index
        exists = tl.load(present + at, mask=index < MOST, other=0) != 0
        slot = tl.load(slots + at, mask=exists, other=0)
        place = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
        source = pages + place[:, None] + head * kv_head_stride + dim[None, :]
        # What lies in free slots may be no number: it is not read.
        read = exists[:, None] & inside[None, :]
        key = tl.load(source, mask=read, other=0.0)
        logits = tl.dot(q, tl.trans(key)) * factor
        logits = tl.where(exists[None, :], logits, -float("inf"))
        higher = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)
        weights = tl.exp2(logits - base[:, None])
        keep = tl.exp2(top - base)
        total = total * keep + tl.sum(weights, 1)
        value = tl.load(source + side_stride, mask=read, other=0.0)
        mixed = mixed * keep[:, None] + tl.dot(weights.to(value.dtype), value)
        top = higher
    owner = token * (KV_HEADS * REPEATS) + query_head
    norm = tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(
        out + owner[:, None] * HEAD_SIZE + dim[None, :],
        mixed * norm[:, None],
        mask=live[:, None] & inside[None, :],
    )
    tl.store(lse + owner, (top + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit(do_not_specialize=["rows"])
def join_kernel(
    out0,  # [rows, D] each, any float
    lse0,  # float32 [rows] each, natural
    out1,
    lse1,
    out2,
    lse2,
    out3,
    lse3,
    out,  # float32 [rows, D]
    lse,  # float32 [rows]
    rows,  # T * Hq
    PARTS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`ROWS` results from `PARTS` (2 to 4) disjoint sets of keys; what lies beyond is not read."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    dim = tl.arange(0, DIMS)
    mask = live[:, None] & (dim < HEAD_SIZE)[None, :]
    place = row[:, None] * HEAD_SIZE + dim[None, :]

    a = tl.load(lse0 + row, mask=live, other=0.0)
    b = tl.load(lse1 + row, mask=live, other=0.0)
    c = b
    d = b
    top = tl.maximum(a, b)
    if PARTS > 2:
        c = tl.load(lse2 + row, mask=live, other=0.0)
        top = tl.maximum(top, c)
    if PARTS > 3:
        d = tl.load(lse3 + row, mask=live, other=0.0)
        top = tl.maximum(top, d)
    base = tl.where(top == -float("inf"), 0.0, top)
    a, b, c, d = tl.exp(a - base), tl.exp(b - base), tl.exp(c - base), tl.exp(d - base)
    mixed = tl.load(out0 + place, mask=mask, other=0.0).to(tl.float32) * a[:, None]
    mixed += tl.load(out1 + place, mask=mask, other=0.0).to(tl.float32) * b[:, None]
    total = a + b
    if PARTS > 2:
        mixed += tl.load(out2 + place, mask=mask, other=0.0).to(tl.float32) * c[:, None]
        total += c
    if PARTS > 3:
        mixed += tl.load(out3 + place, mask=mask, other=0.0).to(tl.float32) * d[:, None]
        total += d
    norm = tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(out + place, mixed * norm[:, None], mask=mask)
    tl.store(lse + row, base + tl.log(total), mask=live)
