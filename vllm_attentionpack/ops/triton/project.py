"""Device code of the small matrix products around attention: queries in, attended latents out."""

import triton
import triton.language as tl


# What changes with the batch is not specialised: see `attend_kernel`.
@triton.jit(do_not_specialize=["rows"])
def absorb_kernel(
    query,  # [T, Hq, D], any float
    basis,  # float16 [Hk, M, D, COLUMNS]
    basis_scale,  # float32 [Hk, M]
    means,  # float32 [Hk, M, D]
    absorbed,  # float16 [N, groups, M, GROUP_HEADS * REPEATS, COLUMNS]
    mean_logits,  # float32 [N, groups, M, GROUP_HEADS * REPEATS]
    sources,  # int32 [N]; unread unless PLANES, as are the next two
    cosines,  # float32 [N, PLANES]
    sines,  # float32 [N, PLANES]
    token_stride,
    head_stride,
    rows,
    num_groups,
    factor,
    REPEATS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    PLANES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One KV head and modality, `BLOCK_ROWS` of its (row, query head) pairs, some columns.

    Rows are tokens, or with `PLANES` the tokens `sources`, turned back.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    token = (row // REPEATS).to(tl.int64)
    repeat = row % REPEATS
    head = tl.program_id(1) // MODALITIES
    modality = tl.program_id(1) % MODALITIES
    column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    dim = tl.arange(0, BLOCK_DIMS)

    source_token = token
    if PLANES > 0:
        source_token = tl.load(sources + token, mask=live, other=0).to(tl.int64)
    source = query + source_token * token_stride + (head * REPEATS + repeat) * head_stride
    basis += (head * MODALITIES + modality) * HEAD_SIZE * COLUMNS
    means += (head * MODALITIES + modality) * HEAD_SIZE
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    mean_logit = tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, HEAD_SIZE, BLOCK_DIMS):
        d = start + dim
        q = tl.load(source[:, None] + d[None, :], mask=live[:, None], other=0.0).to(tl.float32)
        if PLANES > 0:
            # The other dim of the plane comes in with the sine, positive for a first dim.
            if INTERLEAVED:
                plane, sign = d // 2, 1 - 2 * (d % 2)
                other = d + sign
            else:
                plane, sign = d % PLANES, 1 - 2 * (d // PLANES)
                other = d + sign * PLANES
            turns = d < 2 * PLANES
            q_other = tl.load(
                source[:, None] + other[None, :], mask=live[:, None] & turns[None, :], other=0.0
            ).to(tl.float32)
            angle = token[:, None] * PLANES + plane[None, :]
            turning = live[:, None] & turns[None, :]
            cos = tl.load(cosines + angle, mask=turning, other=1.0)
            sin = tl.load(sines + angle, mask=turning, other=0.0)
            q = q * cos + q_other * sin * sign[None, :]
        b = tl.load(
            basis + d[:, None] * COLUMNS + column[None, :],
            mask=(column < COLUMNS)[None, :],
            other=0.0,
        )
        total = tl.dot(q.to(tl.float16), b, total)
        mean_logit += tl.sum(q * tl.load(means + d)[None, :], 1)

    total *= factor * tl.load(basis_scale + head * MODALITIES + modality)
    total = tl.minimum(tl.maximum(total, -65504.0), 65504.0)
    owner = (token * num_groups + head // GROUP_HEADS) * MODALITIES + modality
    owner = (owner * GROUP_HEADS + head % GROUP_HEADS) * REPEATS + repeat
    tl.store(
        absorbed + owner[:, None] * COLUMNS + column[None, :],
        total.to(tl.float16),
        mask=live[:, None] & (column < COLUMNS)[None, :],
    )
    if tl.program_id(2) == 0:
        tl.store(mean_logits + owner, mean_logit * factor, mask=live)


@triton.jit(do_not_specialize=["rows"])
def up_project_kernel(
    latent,  # float16 [T, groups, M, GROUP_HEADS * REPEATS, COLUMNS]
    weight,  # float32 [T, groups, M, GROUP_HEADS * REPEATS]
    basis,  # float16 [Hk, M, COLUMNS, D]
    basis_scale,  # float32 [Hk, M]
    means,  # float32 [Hk, M, D]
    out,  # float32 [T, Hq, D]
    rows,
    num_groups,
    num_heads,
    REPEATS: tl.constexpr,
    GROUP_HEADS: tl.constexpr,
    MODALITIES: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
):
    """One KV head, `BLOCK_ROWS` of its (token, query head) pairs, some dims of the head."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    live = row < rows
    token = (row // REPEATS).to(tl.int64)
    repeat = row % REPEATS
    head = tl.program_id(1)
    dim = tl.program_id(2) * BLOCK_DIMS + tl.arange(0, BLOCK_DIMS)
    result = tl.zeros((BLOCK_ROWS, BLOCK_DIMS), tl.float32)
    for modality in tl.static_range(MODALITIES):
        owner = (token * num_groups + head // GROUP_HEADS) * MODALITIES + modality
        owner = (owner * GROUP_HEADS + head % GROUP_HEADS) * REPEATS + repeat
        total = tl.zeros((BLOCK_ROWS, BLOCK_DIMS), tl.float32)
        at = head * MODALITIES + modality
        for start in range(0, COLUMNS, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            held = column < COLUMNS
            x = tl.load(
                latent + owner[:, None] * COLUMNS + column[None, :],
                mask=live[:, None] & held[None, :],
                other=0.0,
            )
            b = tl.load(
                basis + (at * COLUMNS + column)[:, None] * HEAD_SIZE + dim[None, :],
                mask=held[:, None],
                other=0.0,
            )
            total = tl.dot(x, b, total)
        share = tl.load(weight + owner, mask=live, other=0.0)
        mean = tl.load(means + at * HEAD_SIZE + dim)
        result += total * tl.load(basis_scale + at) + share[:, None] * mean[None, :]
    place = (token * num_heads + head * REPEATS + repeat) * HEAD_SIZE
    tl.store(out + place[:, None] + dim[None, :], result, mask=live[:, None])
