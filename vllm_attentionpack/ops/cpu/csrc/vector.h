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
AP_INLINE Float lane_numbers() {
    Float x;
    for (int i = 0; i < kLanes; ++i) x[i] = float(i);
    return x;
}
AP_INLINE Float to_float(Int x) { return __builtin_convertvector(x, Float); }
AP_INLINE Float to_float(Word x) { return __builtin_convertvector((Int)x, Float); }
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
AP_INLINE Float maximum(Float a, Float b) { return (Float)_mm512_max_ps((__m512)a, (__m512)b); }
AP_INLINE Float minimum(Float a, Float b) { return (Float)_mm512_min_ps((__m512)a, (__m512)b); }
#else
AP_INLINE Float maximum(Float a, Float b) { return a > b ? a : b; }
AP_INLINE Float minimum(Float a, Float b) { return a < b ? a : b; }
#endif

AP_INLINE Float magnitude(Float x) { return (Float)((Word)x & 0x7fffffffu); }

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

// A number for each of some rows, as many as are reduced at a time.
constexpr int kRowGroup = 8;
typedef float ByRow __attribute__((vector_size(4 * kRowGroup)));

#if defined(AP_SCALAR)
AP_INLINE ByRow sum_by_row(const Float (&x)[kRowGroup]) {
    ByRow out;
    for (int r = 0; r < kRowGroup; ++r) out[r] = sum(x[r]);
    return out;
}
AP_INLINE ByRow largest_by_row(const Float (&x)[kRowGroup]) {
    ByRow out;
    for (int r = 0; r < kRowGroup; ++r) out[r] = largest(x[r]);
    return out;
}
#else
// By a tree that halves lanes and doubles rows at every level.
template <class F>
AP_INLINE ByRow reduce_by_row(const Float (&x)[kRowGroup], F f) {
    __m256 a[8], b[4], c[2];
    for (int r = 0; r < 8; ++r) {
#if defined(AP_AVX2)
        a[r] = (__m256)x[r];
#else
        a[r] = f(_mm512_castps512_ps256((__m512)x[r]), _mm512_extractf32x8_ps((__m512)x[r], 1));
#endif
    }
    for (int i = 0; i < 4; ++i)
        b[i] = f(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    for (int i = 0; i < 2; ++i)
        c[i] = f(_mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                 _mm256_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
    return (ByRow)f(_mm256_permute2f128_ps(c[0], c[1], 0x20), _mm256_permute2f128_ps(c[0], c[1], 0x31));
}
AP_INLINE ByRow sum_by_row(const Float (&x)[kRowGroup]) {
    return reduce_by_row(x, [](__m256 a, __m256 b) { return _mm256_add_ps(a, b); });
}
AP_INLINE ByRow largest_by_row(const Float (&x)[kRowGroup]) {
    return reduce_by_row(x, [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); });
}
#endif

// Softmax is to the base of two: logits are multiplied by this.
constexpr float kLog2E = 1.44269504f;

// 2 ** x for x <= 0, to two units in the last place or, by a polynomial of degree 4, to 3e-6; zero below
// -126 where there is no instruction for it, so for minus infinity. The polynomials are those of least
// relative error for 0 to 1.
template <int DEGREE>
AP_INLINE Float exp2_of(Float x) {
    static_assert(DEGREE == 4 || DEGREE == 6);
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    const Float r = (Float)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF);
#else
    const Float clamped = maximum(x, splat(-126.5f));  // n is -127 then, its power zero
    const Float n = round_even(clamped - 0.5f);
    const Float r = clamped - n;
#endif
    Float p;
    if (DEGREE == 4) {
        p = r * 0.01353416778f + 0.05201146007f;
        p = p * r + 0.2414427549f;
        p = p * r + 0.6930038333f;
        p = p * r + 1.0000026226f;
    } else {
        p = r * 2.1702255e-4f + 1.24396884e-3f;
        p = p * r + 9.67884064e-3f;
        p = p * r + 0.05548334122f;
        p = p * r + 0.2402298301f;
        p = p * r + 0.6931470037f;
        p = p * r + 1.0f;
    }
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    return (Float)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
    return p * (Float)((to_int(n) + 127) << 23);
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
constexpr int kQuadSteps = 1 << 20;
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
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    return (Float)_mm512_maskz_loadu_ps((__mmask16)((1u << (count - i)) - 1), from + i);
#else
    return load_head<Float>(from + i, int((count - i) * 4));
#endif
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

// Lanes of two vectors as 16-bit integers, which hold them, every four in the order 0 2 1 3.
AP_INLINE Int packed_pairs(Int a, Int b) {
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    static const uint16_t order[] = {0,  2,  1,  3,  8,  10, 9,  11, 16, 18, 17, 19, 24, 26, 25, 27,
                                     4,  6,  5,  7,  12, 14, 13, 15, 20, 22, 21, 23, 28, 30, 29, 31};
    const __m512i both = _mm512_packs_epi32((__m512i)a, (__m512i)b);
    return (Int)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
#elif defined(AP_AVX2)
    const __m256i both = _mm256_packs_epi32((__m256i)middle_swapped(a), (__m256i)middle_swapped(b));
    return (Int)_mm256_permute4x64_epi64(both, 0xd8);
#else
    int16_t numbers[2 * kLanes];
    for (int i = 0; i < kLanes; ++i)
        numbers[i] = int16_t(middle_swapped(a)[i]), numbers[kLanes + i] = int16_t(middle_swapped(b)[i]);
    return load<Int>(numbers);
#endif
}

// Lanes of four vectors as unsigned 8-bit integers, which hold them.
AP_INLINE Int packed_quads(Int a, Int b, Int c, Int d) {
#if defined(AP_AVX512) || defined(AP_AVX512_VNNI)
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i all = _mm512_packus_epi16(_mm512_packs_epi32((__m512i)a, (__m512i)b),
                                            _mm512_packs_epi32((__m512i)c, (__m512i)d));
    return (Int)_mm512_permutexvar_epi32(order, all);
#elif defined(AP_AVX2)
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i all = _mm256_packus_epi16(_mm256_packs_epi32((__m256i)a, (__m256i)b),
                                            _mm256_packs_epi32((__m256i)c, (__m256i)d));
    return (Int)_mm256_permutevar8x32_epi32(all, order);
#else
    uint8_t numbers[4 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
        numbers[i] = uint8_t(a[i]), numbers[kLanes + i] = uint8_t(b[i]);
        numbers[2 * kLanes + i] = uint8_t(c[i]), numbers[3 * kLanes + i] = uint8_t(d[i]);
    }
    return load<Int>(numbers);
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

}  // namespace
}  // namespace attentionpack
