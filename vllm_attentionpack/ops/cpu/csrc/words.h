// Bytes of a tile as words of 32 bits, for one instruction set: of keys four bytes of one token, with the
// tokens side by side in the lanes; of values a byte of each of four tokens, with the bytes side by side.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "products.h"
#include "vector.h"

namespace attentionpack {
namespace {

// Where the codes of tokens begin: anywhere, or at equal distances.
struct Scattered {
    const uint8_t* const* rows;
    AP_INLINE const uint8_t* operator[](int t) const { return rows[t]; }
    AP_INLINE Scattered from(int t) const { return {rows + t}; }
};
struct Run {
    const uint8_t* first;
    int64_t bytes;
    AP_INLINE const uint8_t* operator[](int t) const { return first + t * bytes; }
    AP_INLINE Run from(int t) const { return {first + t * bytes, bytes}; }
};

#if defined(AP_AVX2)
#define AP_WIDE(name) _mm256_##name
#elif !defined(AP_SCALAR)
#define AP_WIDE(name) _mm512_##name
#endif

// out[w * stride + t] is the word at `byte + 4 * w` of token t, for w < 4 and t < kLanes. Reads 16 bytes
// from every token.
template <class R>
AP_INLINE void transpose_words(R tokens, int64_t byte, uint32_t* out, int64_t stride) {
#if defined(AP_SCALAR)
    for (int t = 0; t < kLanes; ++t)
        for (int w = 0; w < 4; ++w) std::memcpy(out + w * stride + t, tokens[t] + byte + 4 * w, 4);
#else
    const auto words = [&](int t) { return _mm_loadu_si128((const __m128i*)(tokens[t] + byte)); };
#if defined(AP_AVX2)
    __m256i r[4], s[4];
    for (int t = 0; t < 4; ++t)
        r[t] = _mm256_inserti128_si256(_mm256_castsi128_si256(words(t)), words(t + 4), 1);
#else
    __m512i r[4], s[4];
    for (int t = 0; t < 4; ++t) {
        r[t] = _mm512_inserti32x4(_mm512_castsi128_si512(words(t)), words(t + 4), 1);
        r[t] = _mm512_inserti32x4(r[t], words(t + 8), 2);
        r[t] = _mm512_inserti32x4(r[t], words(t + 12), 3);
    }
#endif
    for (int i = 0; i < 2; ++i) {
        s[2 * i] = AP_WIDE(unpacklo_epi32)(r[2 * i], r[2 * i + 1]);
        s[2 * i + 1] = AP_WIDE(unpackhi_epi32)(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        store(out + 2 * i * stride, AP_WIDE(unpacklo_epi64)(s[i], s[i + 2]));
        store(out + (2 * i + 1) * stride, AP_WIDE(unpackhi_epi64)(s[i], s[i + 2]));
    }
#endif
}

// Lane i of out[v] is byte kLanes * v + i of each of four tokens, the first token's lowest. `bytes`: a
// multiple of 4, at most those of four vectors of lanes.
template <class R>
AP_INLINE void interleave_bytes(R tokens, int64_t byte, int bytes, Word* out) {
#if defined(AP_SCALAR)
    for (int v = 0; v * kLanes < bytes; ++v) {
        Word word{};
        for (int t = 0; t < 4; ++t) {
            const uint8_t* from = tokens[t] + byte + v * kLanes;
            word |= __builtin_convertvector(
                        load_head<Bytes>(from, bytes - v * kLanes < kLanes ? bytes - v * kLanes : kLanes),
                        Word)
                    << (8 * t);
        }
        out[v] = word;
    }
#else
    // Unpacking stays within 128 bits, so the words that it leaves in one part are first brought
    // there: word `part` of every 128 bits of the result.
#if defined(AP_AVX2)
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
    const __m256i some = _mm256_cmpgt_epi32(_mm256_set1_epi32(bytes / 4),
                                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    const auto row = [&](int t) {
        const __m256i x = _mm256_maskload_epi32((const int*)(tokens[t] + byte), some);
        return _mm256_permutevar8x32_epi32(x, order);
    };
#else
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __mmask16 some = (__mmask16)((1u << bytes / 4) - 1);
    const auto row = [&](int t) {
        return _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi32(some, tokens[t] + byte));
    };
#endif
    const auto a = row(0), b = row(1), c = row(2), d = row(3);
    const auto low = AP_WIDE(unpacklo_epi8)(a, b), low2 = AP_WIDE(unpacklo_epi8)(c, d);
    out[0] = (Word)AP_WIDE(unpacklo_epi16)(low, low2);
    if (bytes <= kLanes) return;
    out[1] = (Word)AP_WIDE(unpackhi_epi16)(low, low2);
    if (bytes <= 2 * kLanes) return;
    const auto high = AP_WIDE(unpackhi_epi8)(a, b), high2 = AP_WIDE(unpackhi_epi8)(c, d);
    out[2] = (Word)AP_WIDE(unpacklo_epi16)(high, high2);
    if (bytes > 3 * kLanes) out[3] = (Word)AP_WIDE(unpackhi_epi16)(high, high2);
#endif
}

// Latents of 16 bits of four tokens as two vectors of words, for dims side by side: tokens 0 and 2,
// then 1 and 3.
template <class R>
AP_INLINE void interleave_halves(R tokens, int64_t byte, int bytes, Word* even, Word* odd) {
    const auto read = [&](int t) {
        return __builtin_convertvector(load_head<Halves>(tokens[t] + byte, bytes), Word);
    };
    *even = read(0) | read(2) << 16;
    *odd = read(1) | read(3) << 16;
}

#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
// Planes of which four tokens fill two vectors at most, where they lie one after the other.
class NarrowRun {
  public:
    static bool fits(int64_t bytes) { return bytes <= 2 * kLanes; }

    explicit NarrowRun(Run tokens) : run_(tokens) {
        const int words = int(run_.bytes / 4);  // of a token; four of them have as many vectors' lanes
        low_ = head(4 * words), high_ = head(4 * words - 16);
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i token = _mm512_and_si512(lane, _mm512_set1_epi32(3));
        index_ = _mm512_add_epi32(_mm512_mullo_epi32(token, _mm512_set1_epi32(words)),
                                  _mm512_srli_epi32(lane, 2));
        next_ = _mm512_add_epi32(index_, _mm512_set1_epi32(4));
    }

    // Calls f(words 0 to 3, words 4 to 7) with words of four tokens from `t` on: of each word those of the
    // four in 128 bits. Words that do not exist are zero.
    template <class F>
    AP_INLINE void four(int t, F f) const {
        const uint8_t* from = run_[t];
        const __m512i a = _mm512_maskz_loadu_epi32(low_, from);
        const __m512i b = _mm512_maskz_loadu_epi32(high_, from + 64);
        f(_mm512_maskz_permutex2var_epi32(low_, a, index_, b),
          _mm512_maskz_permutex2var_epi32(high_, a, next_, b));
    }

    // As `key_words`.
    void keys(int vectors, int64_t count, Word* out) const {
        for (int v = 0; v < vectors; ++v, ++out) {
            __m512i x[4], y[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                four(v * kLanes + 4 * i, [&](__m512i first, __m512i second) { x[i] = first, y[i] = second; });
            transpose(x, out);
            if (count > 4) transpose(y, out + 4 * kSubVectors);
        }
    }

    // As `value_words`.
    void values(int quads, Word* out) const {
        const __m512i order = _mm512_broadcast_i32x4(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (int w = 0; w < quads; ++w, out += kChunkVectors) {
            four(4 * w, [&](__m512i first, __m512i second) {
                out[0] = (Word)_mm512_shuffle_epi8(first, order);
                if (high_) out[1] = (Word)_mm512_shuffle_epi8(second, order);
            });
        }
    }

  private:
    static __mmask16 head(int count) { return __mmask16((1u << std::clamp(count, 0, 16)) - 1); }

    // 128 bits `w` of x[i] go to those of number `i` of word `w`.
    static AP_INLINE void transpose(const __m512i (&x)[4], Word* out) {
        const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(x[0], x[1], 0xee), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
        out[0] = (Word)_mm512_shuffle_i32x4(a, b, 0x88);
        out[kSubVectors] = (Word)_mm512_shuffle_i32x4(a, b, 0xdd);
        out[2 * kSubVectors] = (Word)_mm512_shuffle_i32x4(c, d, 0x88);
        out[3 * kSubVectors] = (Word)_mm512_shuffle_i32x4(c, d, 0xdd);
    }

    Run run_;
    __mmask16 low_, high_;
    __m512i index_, next_;
};
#else
// Not worth it with fewer lanes.
struct NarrowRun {
    static bool fits(int64_t) { return false; }
    explicit NarrowRun(Run) {}
    void keys(int, int64_t, Word*) const {}
    void values(int, Word*) const {}
};
#endif

// `count` words from `byte` on of kSub tokens or fewer whole vectors of them, into [words][kSub].
template <class R>
AP_NOINLINE void key_words(R tokens, int vectors, int64_t byte, int64_t count, Word* out) {
    if constexpr (std::is_same_v<R, Run>)
        if (NarrowRun::fits(tokens.bytes)) return NarrowRun(tokens).keys(vectors, count, out);
    for (int64_t w = 0; w < count; w += 4, out += 4 * kSubVectors)
        for (int v = 0; v < vectors; ++v)
            transpose_words(tokens.from(v * kLanes), byte + 4 * w, reinterpret_cast<uint32_t*>(out + v),
                            kSub);
}

// `bytes` bytes from `byte` on, of four tokens to a word, into [words][kChunkVectors]; of latents of 16
// bits, of two.
template <class R>
AP_NOINLINE void value_words(R tokens, int quads, const Plane& plane, int64_t byte, int bytes, Word* out) {
    if (plane.bits == 16) {
        for (int w = 0; w < quads; ++w, out += 2 * kChunkVectors)
            for (int at = 0; at < bytes; at += 2 * kLanes)
                interleave_halves(tokens.from(4 * w), byte + at, std::min(2 * kLanes, bytes - at),
                                  out + at / (2 * kLanes), out + at / (2 * kLanes) + kChunkVectors);
        return;
    }
    if constexpr (std::is_same_v<R, Run>)
        if (NarrowRun::fits(tokens.bytes)) return NarrowRun(tokens).values(quads, out);
    for (int w = 0; w < quads; ++w, out += kChunkVectors)
        interleave_bytes(tokens.from(4 * w), byte, bytes, out);
}

#undef AP_WIDE

}  // namespace
}  // namespace attentionpack
