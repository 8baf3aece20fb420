// Vectors of 32-bit lanes. A translation unit defines AP_LANES and one of AP_SCALAR, AP_AVX2,
// AP_AVX512, AP_AVX512_VNNI; all arithmetic but `dot` is left to the compiler's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(AP_SCALAR)
#include <immintrin.h>
#endif

namespace attentionpack {
namespace {

constexpr int kLanes = AP_LANES;

typedef int32_t Int __attribute__((vector_size(4 * AP_LANES)));
typedef uint32_t Word __attribute__((vector_size(4 * AP_LANES)));
typedef float Float __attribute__((vector_size(4 * AP_LANES)));
typedef uint8_t Bytes __attribute__((vector_size(AP_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * AP_LANES)));

#define AP_INLINE inline __attribute__((always_inline))
// For register blocks: within a large function the compiler leaves their sums in memory.
#define AP_NOINLINE __attribute__((noinline))

template <class V>
AP_INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
AP_INLINE void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

// The first `count` bytes; the rest is zero.
template <class V>
AP_INLINE V load_head(const void* from, int count) {
    V v{};
    std::memcpy(&v, from, count);
    return v;
}

// Holds a value in its register: left alone, GCC delays the sums of a register block until it runs
// out of registers.
template <class V>
AP_INLINE V pinned(V value) {
#if defined(AP_AVX2)
    asm("" : "+x"(value));
#elif !defined(AP_SCALAR)
    asm("" : "+v"(value));
#endif
    return value;
}

AP_INLINE Float splat(float x) { return Float{} + x; }
AP_INLINE Int splat(int32_t x) { return Int{} + x; }
AP_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }
AP_INLINE Float to_float(Word x) { return __builtin_convertvector((Int)x, Float); }
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
AP_INLINE Float maximum(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
AP_INLINE Float minimum(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
#else
AP_INLINE Float maximum(Float a, Float b) { return a > b ? a : b; }
AP_INLINE Float minimum(Float a, Float b) { return a < b ? a : b; }
#endif

// To the nearest whole number, halves to even; |x| < 2**22. As a float and as an integer: adding
// 1.5 * 2**23 leaves the integer in the low bits of the mantissa.
constexpr float kMagic = 12582912.0f;
constexpr int32_t kMagicBits = 0x4b400000;
AP_INLINE Float round_even(Float x) { return (x + kMagic) - kMagic; }
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
AP_INLINE Int to_int(Float x) { return (Int)_mm512_cvtps_epi32((__m512)x); }
#elif defined(AP_AVX2)
AP_INLINE Int to_int(Float x) { return (Int)_mm256_cvtps_epi32((__m256)x); }
#else
AP_INLINE Int to_int(Float x) { return (Int)(x + kMagic) - kMagicBits; }
#endif

#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
AP_INLINE float sum(Float x) { return _mm512_reduce_add_ps((__m512)x); }
AP_INLINE float largest(Float x) { return _mm512_reduce_max_ps((__m512)x); }
#elif defined(AP_AVX2)
AP_INLINE float sum(Float x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x),
                                   _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
AP_INLINE float largest(Float x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x),
                                   _mm256_extractf128_ps((__m256)x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
AP_INLINE float sum(Float x) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return total;
}
AP_INLINE float largest(Float x) {
    float top = x[0];
    for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
    return top;
}
#endif

// exp(x) for x <= 0, to about two units in the last place, or to 3e-6 by a polynomial of degree 5; zero
// below -87.
template <int DEGREE = 7>
AP_INLINE Float exponential(Float x) {
    const Float clamped = maximum(x, splat(-87.0f));
    const Float n = round_even(clamped * 1.44269504f);
    // ln 2 in two parts, so that n * high is exact.
    Float r = clamped - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    static_assert(DEGREE == 5 || DEGREE == 7);
    Float p = splat(1.0f / 120);
    if (DEGREE == 7) p = (r * (1.0f / 5040) + 1.0f / 720) * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    const __mmask16 seen = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
    return (Float)_mm512_maskz_scalef_ps(seen, (__m512)p, (__m512)n);
#else
    const Int power = (to_int(n) + 127) << 23;
    const Float y = p * (Float)power;
    return x < -87.0f ? Float{} : y;
#endif
}

// acc + the products of 16-bit pairs, summed per lane.
AP_INLINE Int dot(Int acc, Int a, Int b) {
#if defined(AP_AVX512_VNNI)
    return (Int)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(AP_AVX512)
    return acc + (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(AP_AVX2)
    return acc + (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// acc + the products of four unsigned 8-bit numbers with four signed ones per lane, of which one
// are codes of `BITS` bits. For codes of 2 bits the lanes of the sum are two 16-bit halves where the
// hardware has nothing wider: 32 steps fit, of signed numbers as of unsigned ones.
#if defined(AP_AVX512) || defined(AP_AVX2)
constexpr int kQuadSteps = 32;
#else
constexpr int kQuadSteps = 64;
#endif
template <int BITS>
AP_INLINE Int dot_quad(Int acc, Int unsigned_bytes, Int signed_bytes) {
#if defined(AP_AVX512_VNNI)
    return (Int)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)unsigned_bytes, (__m512i)signed_bytes);
#elif defined(AP_AVX512)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)unsigned_bytes, (__m512i)signed_bytes);
    return BITS == 2 ? (Int)_mm512_add_epi16((__m512i)acc, pairs)
                     : dot(acc, (Int)pairs, splat(0x00010001));
#elif defined(AP_AVX2)
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)unsigned_bytes, (__m256i)signed_bytes);
    return BITS == 2 ? (Int)_mm256_add_epi16((__m256i)acc, pairs)
                     : dot(acc, (Int)pairs, splat(0x00010001));
#else
    for (int shift = 0; shift < 32; shift += 8)
        acc += ((signed_bytes << (24 - shift)) >> 24) * ((unsigned_bytes >> shift) & 0xff);
    return acc;
#endif
}

// The sum per lane that `dot_quad` has gathered, of products that may be negative or never are.
template <int BITS, bool SIGNED>
AP_INLINE Int quad_sum(Int acc) {
#if defined(AP_AVX512) || defined(AP_AVX2)
    if (BITS == 2 && SIGNED) return dot(Int{}, acc, splat(0x00010001));
    if (BITS == 2) return (acc & 0xffff) + (Int)((Word)acc >> 16);
#endif
    return acc;
}

// The lanes as integers of type T, which holds them.
template <class T>
AP_INLINE auto narrowed(Int x) {
    typedef T Narrow __attribute__((vector_size(sizeof(T) * kLanes)));
#if defined(AP_AVX2)
    // What the compiler makes of the conversion to bytes goes by way of single lanes.
    if constexpr (sizeof(T) == 1) {
        const __m256i low = _mm256_set1_epi32(0x0c080400);
        const __m256i quads = _mm256_shuffle_epi8((__m256i)x, low);
        const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(quads),
                                                _mm256_extracti128_si256(quads, 1));
        Narrow result;
        _mm_storel_epi64((__m128i*)&result, both);
        return result;
    }
#endif
    return __builtin_convertvector(x, Narrow);
}

// The bytes of a row, one per lane.
AP_INLINE Word load_bytes(const uint8_t* from) {
#if defined(AP_AVX2)
    return (Word)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#elif defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    return (Word)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#else
    return __builtin_convertvector(load<Bytes>(from), Word);
#endif
}

// The first `count` bytes of a row, a multiple of 4 and fewer than lanes; zero in the other lanes.
AP_INLINE Word load_bytes(const uint8_t* from, int count) {
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    return (Word)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), from));
#elif defined(AP_AVX2)
    (void)count;
    return (Word)_mm256_cvtepu8_epi32(_mm_cvtsi32_si128(load<int>(from)));
#else
    return __builtin_convertvector(load_head<Bytes>(from, count), Word);
#endif
}

// The whole vector at `i`, or its first `count - i` lanes and zeros.
AP_INLINE Float part(const float* from, int64_t i, int64_t count) {
    if (i + kLanes <= count) return load<Float>(from + i);
    return load_head<Float>(from + i, int((count - i) * 4));
}

// Lanes 0 2 1 3 of every four.
AP_INLINE Int middle_swapped(Int x) {
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    return (Int)_mm512_shuffle_epi32((__m512i)x, _MM_PERM_DBCA);
#elif defined(AP_AVX2)
    return (Int)_mm256_shuffle_epi32((__m256i)x, 0xd8);
#else
    Int y = x;
    for (int i = 0; i < kLanes; i += 4) y[i + 1] = x[i + 2], y[i + 2] = x[i + 1];
    return y;
#endif
}

// The entries of a table of eight.
AP_INLINE Float look_up(const float* table, Word index) {
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    const __m512 both = _mm512_broadcast_f32x8(_mm256_loadu_ps(table));
    return (Float)_mm512_permutexvar_ps((__m512i)index, both);
#elif defined(AP_AVX2)
    return (Float)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
    Float found;
    for (int i = 0; i < kLanes; ++i) found[i] = table[index[i]];
    return found;
#endif
}

// A stretch of words of tokens, with the tokens side by side: out[w * stride + t] is word w of token
// t, for w < 4 and t < kLanes. Reads 16 bytes from every pointer.
AP_INLINE void transpose_words(const uint8_t* const* tokens, int64_t byte, uint32_t* out,
                               int64_t stride) {
#if defined(AP_SCALAR)
    for (int t = 0; t < kLanes; ++t)
        for (int w = 0; w < 4; ++w) std::memcpy(out + w * stride + t, tokens[t] + byte + 4 * w, 4);
#else
    const auto words = [&](int t) { return _mm_loadu_si128((const __m128i*)(tokens[t] + byte)); };
#if defined(AP_AVX2)
    __m256i r[4], s[4];
    for (int t = 0; t < 4; ++t)
        r[t] = _mm256_inserti128_si256(_mm256_castsi128_si256(words(t)), words(t + 4), 1);
#define AP_WIDE(name) _mm256_##name
#else
    __m512i r[4], s[4];
    for (int t = 0; t < 4; ++t) {
        r[t] = _mm512_inserti32x4(_mm512_castsi128_si512(words(t)), words(t + 4), 1);
        r[t] = _mm512_inserti32x4(r[t], words(t + 8), 2);
        r[t] = _mm512_inserti32x4(r[t], words(t + 12), 3);
    }
#define AP_WIDE(name) _mm512_##name
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

// Bytes of four tokens with the bytes side by side: lane i of out[v] is byte kLanes * v + i of each,
// the first token's lowest. `bytes`: a multiple of 4, at most those of four vectors of lanes.
AP_INLINE void interleave_bytes(const uint8_t* const* tokens, int64_t byte, int bytes, Word* out) {
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
#undef AP_WIDE

}  // namespace
}  // namespace attentionpack
