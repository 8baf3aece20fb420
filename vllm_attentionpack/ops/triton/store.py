"""Device code that encodes new tokens into their slots: project, choose a scale, quantise, pack."""

import triton
import triton.language as tl

from vllm_attentionpack.ops.triton.unpack import plane_addresses

#: Added and taken away, rounds a float32 below 2**22 to the nearest whole number, ties to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_even(x):
    return (x + _ROUNDER) - _ROUNDER


# What changes with the batch is not specialised: see `attend_kernel`.
@triton.jit(do_not_specialize=["num_tokens"])
def store_kernel(
    key,  # [T, Hk, D], any float, heads contiguous
    value,  # likewise
    cache,  # uint8 [blocks, block_bytes]
    slot_mapping,  # int64 [T]
    visual,  # uint8 [T]; unread unless HAS_VISUAL
    planes,  # int32 [groups, 2, 7]
    k_basis,  # float16 [groups, M, G * D, K_COLUMNS]
    k_basis_scale,  # float32 [groups, M]
    k_mean,  # float32 [groups, M, G * D]
    k_weight,  # float32 [groups, M, K_COLUMNS]
    k_codes,  # float32 [groups, 3, K_COLUMNS], see `prepared.Encoder`; unread unless K_PAIRS
    v_basis,
    v_basis_scale,
    v_mean,
    v_weight,
    v_codes,
    block_bytes,
    key_stride,
    value_stride,
    num_tokens,
    BLOCK_SIZE: tl.constexpr,
    GROUP_DIMS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    MODALITIES: tl.constexpr,
    HAS_VISUAL: tl.constexpr,
    K_BITS: tl.constexpr,
    K_START: tl.constexpr,
    K_SIZE: tl.constexpr,
    K_COLUMN: tl.constexpr,
    K_OPERAND: tl.constexpr,
    K_ALIGN: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    K_STEPS: tl.constexpr,
    K_PAIRS: tl.constexpr,
    V_BITS: tl.constexpr,
    V_START: tl.constexpr,
    V_SIZE: tl.constexpr,
    V_COLUMN: tl.constexpr,
    V_OPERAND: tl.constexpr,
    V_ALIGN: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    V_STEPS: tl.constexpr,
    V_PAIRS: tl.constexpr,
    JOINT_KV: tl.constexpr,
):
    """`TOKENS` tokens of one head group, K or V; both in one launch.

    Where they are joint, what is given for V but `value` is unread, and the basis and the mean of K
    are of both, `[groups, M, 2 * G * D, ..]`.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    group = tl.program_id(1)
    slot = tl.load(slot_mapping + token, mask=token < num_tokens, other=-1).to(tl.int64)
    stored = slot >= 0
    seen_as = tl.zeros((TOKENS,), tl.int32)
    if HAS_VISUAL:
        seen_as = tl.load(visual + token, mask=stored, other=0).to(tl.int32)
    slot = tl.where(stored, slot, 0)
    base = cache + slot // BLOCK_SIZE * block_bytes
    within = (slot % BLOCK_SIZE).to(tl.int32)
    token = tl.where(stored, token, 0).to(tl.int64)
    keys = key + token * key_stride + group * GROUP_DIMS
    values = value + token * value_stride + group * GROUP_DIMS
    sources: tl.constexpr = 2 if JOINT_KV else 1
    if tl.program_id(2) == 0:
        _encode(
            keys,
            values,
            base,
            within,
            stored,
            seen_as,
            planes + group * 14,
            k_basis + group.to(tl.int64) * MODALITIES * sources * GROUP_DIMS * K_COLUMNS,
            k_basis_scale + group * MODALITIES,
            k_mean + group * MODALITIES * sources * GROUP_DIMS,
            k_weight + group * MODALITIES * K_COLUMNS,
            k_codes + group * 3 * K_COLUMNS,
            GROUP_DIMS,
            BLOCK_DIMS,
            TOKENS,
            MODALITIES,
            K_BITS,
            K_START,
            K_SIZE,
            K_COLUMN,
            K_OPERAND,
            K_ALIGN,
            K_COLUMNS,
            K_STEPS,
            K_PAIRS,
            sources,
        )
    else:
        _encode(
            values,
            values,
            base,
            within,
            stored,
            seen_as,
            planes + group * 14 + 7,
            v_basis + group.to(tl.int64) * MODALITIES * GROUP_DIMS * V_COLUMNS,
            v_basis_scale + group * MODALITIES,
            v_mean + group * MODALITIES * GROUP_DIMS,
            v_weight + group * MODALITIES * V_COLUMNS,
            v_codes + group * 3 * V_COLUMNS,
            GROUP_DIMS,
            BLOCK_DIMS,
            TOKENS,
            MODALITIES,
            V_BITS,
            V_START,
            V_SIZE,
            V_COLUMN,
            V_OPERAND,
            V_ALIGN,
            V_COLUMNS,
            V_STEPS,
            V_PAIRS,
            1,
        )


@triton.jit
def _encode(
    first,  # pointers [TOKENS] to the dims of the tokens
    second,  # likewise, to more of them; unread if SOURCES is 1
    base,
    within,
    stored,
    seen_as,
    planes,
    basis,
    basis_scale,
    means,
    weights,
    codes,
    GROUP_DIMS: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    TOKENS: tl.constexpr,
    MODALITIES: tl.constexpr,
    BITS: tl.constexpr,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMN: tl.constexpr,
    OPERAND: tl.constexpr,
    ALIGN: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SOURCES: tl.constexpr,
):
    at, scales_at = plane_addresses(planes, BITS, ALIGN)
    rank = (tl.load(planes) + 2 * tl.load(planes + 2) + 4 * tl.load(planes + 4)) * ALIGN

    latents = ()
    for i in tl.static_range(len(BITS)):
        for _ in tl.static_range(8 // BITS[i]):
            # To Triton 3.6 an entry of a tuple is no constant within a shape; a product is.
            latents = latents + (tl.zeros((TOKENS, 1 * SIZE[i]), tl.float32),)
    unit = tl.zeros((TOKENS,), tl.float32)
    for modality in tl.static_range(MODALITIES):
        # Rows of the other modality are zero: both add up in one set of accumulators.
        mine = stored
        if MODALITIES == 2:
            mine = stored & (seen_as == modality)
        unit = tl.where(mine, tl.load(basis_scale + modality), unit)
        bound = tl.where(tl.max(mine.to(tl.int32), 0) > 0, GROUP_DIMS, 0)
        for source in tl.static_range(SOURCES):
            x = first
            if source == 1:
                x = second
            begin = (modality * SOURCES + source) * GROUP_DIMS
            for start in range(0, bound, BLOCK_DIMS):
                d = start + tl.arange(0, BLOCK_DIMS)
                taken = tl.load(x[:, None] + d[None, :], mask=mine[:, None], other=0.0)
                taken = taken.to(tl.float32) - tl.load(means + begin + d)[None, :]
                taken = tl.where(mine[:, None], taken, 0.0).to(tl.float16)
                rows = basis + ((begin + d) * COLUMNS)[:, None]
                latents = _project(taken, rows, latents, BITS, SIZE, COLUMN, OPERAND)

    squares = tl.zeros((TOKENS,), tl.float32)
    largest = tl.zeros((TOKENS,), tl.float32)
    scaled = ()
    for i in tl.static_range(len(BITS)):
        for sub in tl.static_range(8 // BITS[i]):
            latent = latents[OPERAND[i] + sub] * unit[:, None]
            scaled = scaled + (latent,)
            if PAIRS:
                columns = codes + COLUMN[i] + sub * SIZE[i] + tl.arange(0, SIZE[i])
                unit_latent = latent * tl.load(columns + COLUMNS)[None, :]
                squares += tl.sum(unit_latent * unit_latent, 1)
                fit = tl.abs(latent) / (tl.load(columns) + 0.5)[None, :]
                largest = tl.maximum(largest, tl.max(fit, 1))
            else:
                squares += tl.sum(latent * latent, 1) * (STEPS[i] * STEPS[i])
                largest = tl.maximum(
                    largest, tl.max(tl.abs(latent), 1) * (1.0 / (0.5 * (1 << BITS[i])))
                )
    rms = tl.sqrt(squares / rank.to(tl.float32))

    best = tl.zeros((TOKENS,), tl.float32)
    best_error = tl.full((TOKENS,), float("inf"), tl.float32)
    for candidate in range(5):
        wanted = tl.where(candidate < 3, rms, largest)
        wanted *= tl.where(
            (candidate == 1) | (candidate == 4), 0.8, tl.where(candidate == 2, 1.3, 1.0)
        )
        exponent = round_even(tl.log2(tl.maximum(wanted, 1e-9)) * 8.0) + 64.0
        exponent = tl.minimum(tl.maximum(exponent, 0.0), 127.0)
        scale = tl.exp2((exponent - 64.0) * 0.125)
        error = _weighted_error(
            scaled,
            scale,
            weights,
            codes,
            seen_as,
            TOKENS,
            MODALITIES,
            BITS,
            SIZE,
            COLUMN,
            OPERAND,
            COLUMNS,
            PAIRS,
        )
        better = error < best_error
        best = tl.where(better, exponent, best)
        best_error = tl.where(better, error, best_error)

    scale = tl.exp2((best - 64.0) * 0.125)
    tl.store(
        base + scales_at + within, (best.to(tl.int32) + seen_as * 128).to(tl.uint8), mask=stored
    )
    for i in tl.static_range(len(BITS)):
        packed = tl.zeros((TOKENS, 1 * SIZE[i]), tl.int32)
        for sub in tl.static_range(8 // BITS[i]):
            columns = codes + COLUMN[i] + sub * SIZE[i] + tl.arange(0, SIZE[i])
            zero = _zero(columns, BITS[i], PAIRS)
            code = _code(scaled[OPERAND[i] + sub], scale, zero).to(tl.int32)
            if PAIRS:  # the part of a whole code that this column holds
                shift = tl.load(columns + 2 * COLUMNS).to(tl.int32)
                code = (code >> shift[None, :]) & ((1 << BITS[i]) - 1)
            packed = packed | (code << (BITS[i] * sub))
        column = START[i] + tl.arange(0, SIZE[i])
        width = at[2 * i]
        tl.store(
            (base + at[2 * i + 1] + within * width)[:, None] + column[None, :],
            packed.to(tl.uint8),
            mask=stored[:, None] & (column < width)[None, :],
        )


@triton.jit
def _zero(columns, BITS: tl.constexpr, PAIRS: tl.constexpr):
    """The code of zero: one number, or float32 `[1, columns]`, of whole codes."""
    if PAIRS:
        zero = tl.load(columns)[None, :]
    else:
        zero = 0.5 * ((1 << BITS) - 1)
    return zero


@triton.jit
def _code(latent, scale, zero):
    """float32 whole numbers; see `codec.quantize.to_codes`."""
    code = round_even(latent / scale[:, None] + zero)
    return tl.minimum(tl.maximum(code, 0.0), 2.0 * zero)


# Functions of their own, since a loop at run time may not see one name with tiles of several sizes.


@triton.jit
def _project(
    x,
    rows,
    latents,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMN: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """`latents` plus `x` `[tokens, dims]` times the basis at the pointers `rows` `[dims, 1]`."""
    updated = ()
    for i in tl.static_range(len(BITS)):
        for sub in tl.static_range(8 // BITS[i]):
            columns = COLUMN[i] + sub * SIZE[i] + tl.arange(0, SIZE[i])
            updated = updated + (
                tl.dot(x, tl.load(rows + columns[None, :]), latents[OPERAND[i] + sub]),
            )
    return updated


@triton.jit
def _weighted_error(
    latents,
    scale,
    weights,
    codes,
    seen_as,
    TOKENS: tl.constexpr,
    MODALITIES: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    COLUMN: tl.constexpr,
    OPERAND: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """float32 `[tokens]`: what quantisation at `scale` costs; see `codec.quantize.choose_scale`."""
    error = tl.zeros((TOKENS,), tl.float32)
    for i in tl.static_range(len(BITS)):
        for sub in tl.static_range(8 // BITS[i]):
            columns = COLUMN[i] + sub * SIZE[i] + tl.arange(0, SIZE[i])
            weight = tl.load(weights + columns)[None, :]
            if MODALITIES == 2:
                other = tl.load(weights + COLUMNS + columns)[None, :]
                weight = tl.where((seen_as == 1)[:, None], other, weight)
            latent = latents[OPERAND[i] + sub]
            zero = _zero(codes + columns, BITS[i], PAIRS)
            miss = latent - (_code(latent, scale, zero) - zero) * scale[:, None]
            error += tl.sum(miss * miss * weight, 1)
    return error
