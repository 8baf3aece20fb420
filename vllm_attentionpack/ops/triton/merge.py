"""Device code of the second stage: one result per query head from its splits and modalities."""

import triton
import triton.language as tl


# What changes with the batch is not specialised: see `attend_kernel`.
@triton.jit(do_not_specialize=["split_rows", "num_splits"])
def merge_kernel(
    parts,  # float16 [splits, T, groups, M, HEADS, COLUMNS], each normalised
    part_sums,  # float32 [splits, T, groups, M, HEADS], base-2 log-sum-exp
    latent,  # float16 [T, groups, M, HEADS, COLUMNS]
    weight,  # float32 [T, groups, M, HEADS]
    lse,  # float32 [T, groups * HEADS], natural
    split_rows,  # T * groups * M * HEADS
    num_splits,
    HEADS: tl.constexpr,
    MODALITIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One (token, head group, query head) and some columns; `SPLITS` is a power of two."""
    row = tl.program_id(0).to(tl.int64)
    first = row // HEADS * MODALITIES * HEADS + row % HEADS
    split = tl.arange(0, SPLITS)
    exists = split < num_splits
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    stride = split_rows.to(tl.int64)

    top = -float("inf")
    for modality in tl.static_range(MODALITIES):
        sums = tl.load(
            part_sums + split * stride + first + modality * HEADS,
            mask=exists,
            other=-float("inf"),
        )
        top = tl.maximum(top, tl.max(sums, 0))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    for modality in tl.static_range(MODALITIES):
        sums = tl.load(
            part_sums + split * stride + first + modality * HEADS,
            mask=exists,
            other=-float("inf"),
        )
        total += tl.sum(tl.exp2(sums - base), 0)
    norm = tl.where(total > 0, 1.0 / total, 0.0)

    for modality in tl.static_range(MODALITIES):
        owner = first + modality * HEADS
        mixed = tl.zeros((BLOCK_COLUMNS,), tl.float32)
        weight_sum = 0.0
        # Names of its own: a loop may not see one name with tiles of two sizes.
        for start in range(0, num_splits, BLOCK_SPLITS):
            some = start + tl.arange(0, BLOCK_SPLITS)
            at = some * stride + owner
            some_sums = tl.load(part_sums + at, mask=some < num_splits, other=-float("inf"))
            share = tl.exp2(some_sums - base) * norm
            # Splits beyond a request's context carry nothing: not even their bytes are read.
            part = tl.load(
                parts + (at * COLUMNS)[:, None] + column[None, :],
                mask=(column < COLUMNS)[None, :] & (share > 0)[:, None],
                other=0.0,
            )
            mixed += tl.sum(share[:, None] * part.to(tl.float32), 0)
            weight_sum += tl.sum(share, 0)
        tl.store(latent + owner * COLUMNS + column, mixed.to(tl.float16), mask=column < COLUMNS)
        if tl.program_id(1) == 0:
            tl.store(weight + owner, weight_sum)
    if tl.program_id(1) == 0:
        tl.store(lse + row, (top + tl.log2(total)) * 0.6931471805599453)
