// Products of numbers with codes: what either may be, how numbers are rounded, and the register blocks
// that unpack words of codes as they go. Both sides are lanes of 32 bits: four 8-bit or two 16-bit
// integers, or one float.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "api.h"
#include "vector.h"

namespace attentionpack {
namespace {

// Of a register block: as many sums as there are registers for, beside the columns.
constexpr int kBlockRows = kLanes == 16 ? 8 : 4;
constexpr int kBlockVectors = 2;
// Tokens whose keys are words at a time: 64 words fill 16 KiB with 16 lanes.
constexpr int kSub = 4 * kLanes;
constexpr int kSubVectors = kSub / kLanes;
constexpr int kSubWords = 64;
constexpr int kChunkVectors = 4;  // vectors of words that values have at a time

// Planes whose codes may meet numbers of 8 bits.
constexpr bool by_quads(int64_t bits) { return bits == 2 || bits == 4; }

constexpr int zero_doubled(int64_t bits) { return bits == 16 ? 0 : (1 << bits) - 1; }

// How words meet queries and weights. `column` is what step `i` of a word sees of its codes: those at
// place `k` of each byte. Steps take the bytes in the order 0 2 1 3, but for quads, which take all.
// `NARROW`: planes of 2 and 4 bits may go by quads.
template <bool NARROW>
struct Integers {
    typedef Int Sum;
    static constexpr int kPerStep = 2;
    static constexpr bool kNarrow = NARROW;
    template <int BITS>
    static AP_INLINE Int column(Word word, int k, int i) {
        return (Int)(word >> (BITS * k + 8 * i) & ((1u << BITS) - 1) * 0x00010001u);
    }
    static AP_INLINE Sum step(Sum acc, Int left, Int right) {
        return dot(acc, left, right);
    }
    static AP_INLINE Float value(Sum acc) { return to_float(acc); }
};

// Four codes to a lane, against numbers of 8 bits: queries, which have a sign, or weights, which have
// none. What that adds to the error of codes of so few bits is small, and it is twice as fast.
template <int BITS, bool SIGNED>
struct Quads {
    typedef Int Sum;
    static constexpr int kPerStep = 4;
    template <int>
    static AP_INLINE Int column(Word word, int k, int) {
        return (Int)(word >> BITS * k & ((1u << BITS) - 1) * 0x01010101u);
    }
    static AP_INLINE Sum step(Sum acc, Int left, Int right) {
        return SIGNED ? dot_quad<BITS>(acc, right, left) : dot_quad<BITS>(acc, left, right);
    }
    static AP_INLINE Float value(Sum acc) { return to_float(quad_sum<BITS, SIGNED>(acc)); }
};
template <int BITS>
using QueryQuads = Quads<BITS, true>;
template <int BITS>
using WeightQuads = Quads<BITS, false>;

struct Floats {
    typedef Float Sum;
    static constexpr int kPerStep = 1;
    static constexpr bool kNarrow = false;
    template <int BITS>
    static AP_INLINE Int column(Word word, int k, int i) {
        if (BITS == 16) return (Int)(i == 0 ? word << 16 : word & 0xffff0000u);
        const Word codes = word >> (BITS * k + i % 2 * 16 + i / 2 * 8) & ((1u << BITS % 16) - 1);
        return (Int)(to_float(codes) - 0.5f * zero_doubled(BITS));
    }
    static AP_INLINE Sum step(Sum acc, Int left, Int right) {
        return acc + (Float)left * (Float)right;
    }
    static AP_INLINE Float value(Sum acc) { return acc; }
};

constexpr int places(int bits) { return bits == 16 ? 1 : 8 / bits; }

// Bytes of a token that a vector of words holds, of codes or of latents of 16 bits.
constexpr int64_t vector_bytes(int64_t bits) { return bits == 16 ? 2 * kLanes : kLanes; }
constexpr int64_t vectors_of(int64_t bytes, int64_t bits) {
    return (bytes + vector_bytes(bits) - 1) / vector_bytes(bits);
}

// Lanes of the attended values of a plane, which is padded to whole vectors, and of a head group.
AP_INLINE int64_t plane_lanes(const Plane& plane) {
    return vectors_of(plane.bytes, plane.bits) * places(int(plane.bits)) * kLanes;
}
inline int64_t value_lanes(const Side& side) {
    int64_t lanes = 0;
    for (int p = 0; p < side.num_planes; ++p) lanes += plane_lanes(side.planes[p]);
    return lanes;
}

template <class A, int BITS>
constexpr int kWordSteps = (BITS == 16 ? 2 : 4) / A::kPerStep;

// out[r][n] += left[r] * right[n].
template <class A, int ROWS, int N>
AP_INLINE void add_step(const int32_t* left, int64_t left_stride, const Int (&right)[N],
                        typename A::Sum (&out)[ROWS][N]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        // Pinned: else it is read again for every column.
        const Int row = pinned(splat(left[r * left_stride]));
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) out[r][n] = pinned(A::step(out[r][n], row, right[n]));
    }
}

template <class V, int ROWS, int N>
AP_INLINE void clear(V (&out)[ROWS][N]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) out[r][n] = V{};
}

// What a register block asks for beside its work, a little at every step: prefetches in one go would
// wait for each other.
struct Stream {
    const uint8_t* at;
    int64_t step;  // bytes

    AP_INLINE void next() {
        // Into the second cache: with what it works on, a tile of codes fills the first.
        __builtin_prefetch(at, 0, 2);
        at += step;
    }
};

// Sums of queries times all codes of `count` words of keys, for `N` vectors of tokens.
template <class A, int BITS, int ROWS, int N>
AP_INLINE void multiply_key_words(const int32_t* left, int64_t left_stride, const Word* words,
                                  int count, Stream ahead, typename A::Sum (&out)[ROWS][N]) {
    constexpr int steps = kWordSteps<A, BITS>;
    clear(out);
    for (int w = 0; w < count; ++w, words += kSubVectors) {
        Word word[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) word[n] = pinned(words[n]);
#pragma GCC unroll 16
        for (int s = 0; s < places(BITS) * steps; ++s, ++left) {
            Int column[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                column[n] = pinned(A::template column<BITS>(word[n], s / steps, s % steps));
            add_step<A>(left, left_stride, column, out);
            ahead.next();
        }
    }
}

// Sums of weights times codes of `count` words of values: `N` places of each byte from `FIRST` on, or
// `N` vectors of words that have one code a byte.
template <class A, int BITS, int FIRST, int ROWS, int N>
AP_INLINE void multiply_value_words(const int32_t* left, int64_t left_stride, const Word* words,
                                    int count, Stream ahead, typename A::Sum (&out)[ROWS][N]) {
    constexpr bool one = places(BITS) == 1;
    clear(out);
    for (int w = 0; w < count; ++w, words += kChunkVectors) {
        Word word[one ? N : 1];
        for (int n = 0; n < (one ? N : 1); ++n) word[n] = pinned(words[n]);
        for (int i = 0; i < kWordSteps<A, BITS>; ++i, ++left) {
            Int column[N];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n)
                column[n] = pinned(A::template column<BITS>(word[one ? n : 0], one ? 0 : FIRST + n, i));
            add_step<A>(left, left_stride, column, out);
            ahead.next();
        }
    }
}

// Calls f(block, first) for blocks of 2 * SIZE - 1 to 1, constant expressions, that make up `count`.
template <int SIZE, class F>
AP_INLINE void for_blocks(int64_t count, F f, int64_t first = 0) {
    for (; first + SIZE <= count; first += SIZE) f(std::integral_constant<int, SIZE>{}, first);
    if constexpr (SIZE > 1) for_blocks<SIZE / 2>(count, f, first);
}

float largest_magnitude(const float* from, int64_t count) {
    Float top{};
    for (int64_t i = 0; i < count; i += kLanes) top = maximum(top, magnitude(part(from, i, count)));
    return largest(top);
}

// The same of some rows at once, from element `first` of each on; never zero.
inline ByRow largest_magnitudes(const float* const* rows, int64_t first, int64_t count) {
    Float top[kRowGroup];
    for (int r = 0; r < kRowGroup; ++r) {
        top[r] = splat(1e-30f);
        for (int64_t i = 0; i < count; i += kLanes)
            top[r] = maximum(top[r], magnitude(part(rows[r] + first, i, count)));
    }
    return largest_by_row(top);
}

// Whole numbers for `count` floats times `factor`, which T must hold; returns sums of them by lane. Floats
// come in the order in which pairs take the bytes of a word, 0 2 1 3; quads take them as they lie.
template <class T>
AP_INLINE Float quantize(const float* from, int64_t count, float factor, void* to) {
    Int sums{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Int rounded = to_int(part(from, i, count) * factor);
        const auto narrow = narrowed<T>(sizeof(T) == 1 ? middle_swapped(rounded) : rounded);
        const int64_t lanes = std::min<int64_t>(kLanes, count - i);
        if (lanes == kLanes)
            store(static_cast<T*>(to) + i, narrow);
        else
            std::memcpy(static_cast<T*>(to) + i, &narrow, lanes * sizeof(T));
        sums += rounded;
    }
    return to_float(sums);
}

}  // namespace
}  // namespace attentionpack
