"""Device functions: planes of a block to float16 operands of tensor cores, without conversions.

A byte shifted by one under the exponent pattern `0x6400` is the float16 number `1024 + 2 byte`, so
codes become floats by bit operations. A sub-plane is masked in place, not moved: its codes come out
times 2, 4, 16 or more, the *unit* of the sub-plane, which the host folds into the bases. The zero
point of a code, `(2**bits - 1) / 2`, is a whole number of half units (hence the shift), so one
exact subtraction leaves `unit * (code - zero point)` and no offset has to be folded anywhere.
"""

import triton
import triton.language as tl


@triton.jit
def plane_addresses(planes, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """(width, offset) of the plane of each piece, one after the other, and the scales' offset.

    The products tell the compiler what divides them, which decides how wide its loads are.
    """
    found = ()
    for i in tl.static_range(len(BITS)):
        plane = planes + 2 * (8 // (2 * BITS[i]))
        found = found + (tl.load(plane) * ALIGN, tl.load(plane + 1) * 16)
    return found, tl.load(planes + 6) * 16


@triton.jit
def entries(OF: tl.constexpr):
    """A constant tuple as one that has a name: Triton 3.6 gives none to the constant itself."""
    found = ()
    for i in tl.static_range(len(OF)):
        found = found + (OF[i],)
    return found


@triton.jit
def load_plane(
    base,
    WIDTH: tl.constexpr,
    width,
    within,
    START: tl.constexpr,
    SIZE: tl.constexpr,
    FULL: tl.constexpr,
):
    """Bytes `[tokens, SIZE]` of one piece of a plane, from byte `START` of each token on.

    Args:
        base: pointer or pointers `[tokens]` to the plane in the token's block.
        WIDTH: bytes per token of the plane, 0 where head groups differ: a constant saves the
            compiler an address in registers per load.
        width: the same at run time.
        within: int32 `[tokens]`, index of the token in its block.
        FULL: True if no group's plane is narrower than this piece.
    """
    column = START + tl.arange(0, SIZE)
    if WIDTH > 0:
        pointers = (base + within * WIDTH)[:, None] + column[None, :]
    else:
        pointers = (base + within * width)[:, None] + column[None, :]
    if FULL:
        return tl.load(pointers)
    if WIDTH > 0:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0)
    return tl.load(pointers, mask=(column < width)[None, :], other=0)


@triton.jit
def widen(data):
    """uint16 `0x6400 | byte << 1` of uint8 `data`."""
    return (data.to(tl.uint16) << 1) | 0x6400


@triton.jit
def sub_plane(wide, BITS: tl.constexpr, INDEX: tl.constexpr):
    """float16 of the shape of `wide`: `unit * (code - zero point)`, see `tiles.unit`."""
    KEEP: tl.constexpr = 0x6400 | (((1 << BITS) - 1) << (BITS * INDEX + 1))
    ZERO: tl.constexpr = 1024 + (((1 << BITS) - 1) << (BITS * INDEX))
    return (wide & KEEP).to(tl.float16, bitcast=True) - tl.full((), ZERO, tl.float16)


@triton.jit
def sub_planes(wide, BITS: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """`COUNT` (1, 2 or 4) sub-planes side by side, `[tokens, COUNT * columns]`, alternating."""
    if COUNT == 1:
        result = sub_plane(wide, BITS, FIRST)
    else:
        if COUNT == 2:
            both = tl.join(sub_plane(wide, BITS, FIRST), sub_plane(wide, BITS, FIRST + 1))
        else:
            even = tl.join(sub_plane(wide, BITS, FIRST), sub_plane(wide, BITS, FIRST + 2))
            odd = tl.join(sub_plane(wide, BITS, FIRST + 1), sub_plane(wide, BITS, FIRST + 3))
            both = tl.join(even, odd)
        result = tl.reshape(both, (wide.shape[0], wide.shape[1] * COUNT))
    return result


@triton.jit
def scale_of(byte):
    """float32 scale of a scale byte; see `codec.quantize.decode_scale`."""
    return tl.exp2(((byte & 0x7F).to(tl.float32) - 64.0) * 0.125)
