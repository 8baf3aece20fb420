// Attention of a few query rows to a stretch of codes, for one instruction set.
//
// Tokens are gathered into tiles of one modality. Codes of a tile are unpacked once and multiplied
// with all rows of the head group: keys with the tokens side by side in the lanes, values with the
// latent dims side by side, so that neither product needs a sum across lanes. Both products see
// 32-bit lanes: two 16-bit integers (queries and weights are quantised per row, 16 bits against the
// 8 of bfloat16), or one float where the model runs in float32 or latents are bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "api.h"
#include "kernels.h"
#include "vector.h"

namespace attentionpack {
namespace {

constexpr int kTile = 128;
constexpr int kBlockVectors = 4;  // of a register block
// Tokens whose keys are unpacked at a time: 128 steps fill 16 KiB, 32 with 16 lanes.
constexpr int kSub = kBlockVectors * kLanes;
constexpr int kSteps = 128;    // 255 * 32767 * 2 * 128 still fits an int32
constexpr int kSubVectors = kSub / kLanes;
constexpr int kValueVectors = 4;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest16 = 32767.0f, kLargest8 = 127.0f, kLargestWeight8 = 255.0f;
// Weights of a tile go to 8 bits for planes of 2 and 4 bits. One that is more than this many times
// their root mean square is left out and added by itself; no tile has two. Rounding then adds at
// most 0.1 % to the energy of the error of dims of 2 bits (34 % of them) and 0.7 % to that of 4 bits
// (11 %), and for usual weights a fifth of that.
constexpr float kOutlier = 8.0f;
static_assert(kTile <= 2 * kOutlier * kOutlier, "room for one outlier only");
static_assert(kTile / 4 <= kQuadSteps && kSteps / 4 <= kQuadSteps, "sums of quads would overflow");
// Queries go to 8 bits for these planes where that moves logits by less than this (root mean
// square).
constexpr float kQuadError = 0.01f;

// Tokens of one modality, in the order of their positions.
struct Tile {
    int count = 0;
    const uint8_t* block[kTile];
    int64_t slot[kTile];
    int32_t position[kTile];
    float key_scale[kTile];
    float value_scale[kTile];
};

// Planes whose codes may meet numbers of 8 bits.
constexpr bool by_quads(int64_t bits) { return bits == 2 || bits == 4; }

// `NARROW`: these planes may go by quads.
template <bool NARROW>
struct Integers {
    typedef Int Sum;
    static constexpr int kPerStep = 2;
    static constexpr bool kNarrow = NARROW;
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
    static AP_INLINE Sum step(Sum acc, Int left, Int right) {
        return acc + (Float)left * (Float)right;
    }
    static AP_INLINE Float value(Sum acc) { return acc; }
};

// Rows and vectors of a register block: as many sums as there are registers for, beside the columns.
constexpr int kBlockRows = kLanes == 16 ? 4 : 2;

// out[r][n] = sum over steps of left[r][step] * right[step][n]; a register block.
template <class A, int ROWS, int N>
AP_INLINE void multiply(const int32_t* left, int64_t left_stride, const Int* right,
                        int64_t right_stride, int steps, typename A::Sum (&out)[ROWS][N]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) out[r][n] = typename A::Sum{};
    const auto one = [&](int s) {
        Int column[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) column[n] = pinned(right[s * right_stride + n]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            // Pinned, too: else it is read again for every column.
            const Int row = pinned(splat(left[r * left_stride + s]));
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) out[r][n] = pinned(A::step(out[r][n], row, column[n]));
        }
    };
    int s = 0;
    for (; s + 2 <= steps; s += 2) {
        one(s);
        one(s + 1);
    }
    if (s < steps) one(s);
}

// Calls f(vectors of the block, first vector) for blocks of 4, 2 and 1 vectors, constant expressions.
template <class F>
AP_INLINE void for_vector_blocks(int vectors, F f) {
    int v = 0;
    for (; v + kBlockVectors <= vectors; v += kBlockVectors)
        f(std::integral_constant<int, kBlockVectors>{}, v);
    if (v + 2 <= vectors) {
        f(std::integral_constant<int, 2>{}, v);
        v += 2;
    }
    if (v < vectors) f(std::integral_constant<int, 1>{}, v);
}

constexpr int zero_doubled(int64_t bits) { return bits == 16 ? 0 : (1 << bits) - 1; }

// Words of a plane that share a scale of the queries and are unpacked at a time. Planes that may go
// by quads have half of what fits, which `kQuadSteps` covers.
template <class A>
AP_INLINE int64_t words_per_segment(int64_t bits) {
    return (A::kNarrow && bits == 2 ? kSteps / 2 : kSteps) * A::kPerStep * bits / 32;
}

template <class A, int BITS, bool QUADS = false>
AP_INLINE void unpack_key_words(const uint32_t* words, int64_t count, Int* out) {
    constexpr uint32_t mask = (1u << BITS) - 1;
    const auto each = [&](int64_t w, int shift, auto unpack) {
        for (int v = 0; v < kSubVectors; ++v)
            *out++ = unpack(load<Word>(words + w * kSub + v * kLanes) >> shift);
    };
    const auto pair = [](Word word) { return (Int)(word & (mask << 16 | mask)); };
    const auto quad = [](Word word) { return (Int)(word & (mask * 0x01010101u)); };
    const auto single = [](Word word) {
        return (Int)(to_float(word & mask) - 0.5f * zero_doubled(BITS));
    };
    for (int64_t w = 0; w < count; ++w) {
        if constexpr (QUADS) {
            for (int k = 0; k < 8; k += BITS) each(w, k, quad);
            continue;
        }
        for (int k = 0; k < 8; k += BITS) {
            for (int shift = k; shift < 16; shift += 8) {
                if constexpr (A::kPerStep == 2)
                    each(w, shift, pair);
                else
                    for (int high = 0; high < 32; high += 16) each(w, high + shift, single);
            }
        }
    }
}

AP_INLINE void unpack_key_words_16(const uint32_t* words, int64_t count, Int* out) {
    for (int64_t w = 0; w < count; ++w) {
        for (int v = 0; v < kSubVectors; ++v)
            *out++ = (Int)(load<Word>(words + w * kSub + v * kLanes) << 16);
        for (int v = 0; v < kSubVectors; ++v)
            *out++ = (Int)(load<Word>(words + w * kSub + v * kLanes) & 0xffff0000u);
    }
}

// [words of a segment][kSub tokens] -> [steps][kSub tokens].
template <class A>
void unpack_keys(int64_t bits, const uint32_t* words, int64_t count, Int* out) {
    switch (bits) {
        case 8: return unpack_key_words<A, 8>(words, count, out);
        case 4: return unpack_key_words<A, 4>(words, count, out);
        case 2: return unpack_key_words<A, 2>(words, count, out);
        default: return unpack_key_words_16(words, count, out);
    }
}

float largest_magnitude(const float* from, int64_t count) {
    Float top{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Float x = part(from, i, count);
        top = maximum(top, maximum(x, Float{} - x));
    }
    return largest(top);
}

// Whole numbers of at most `limit` for `count` floats, none of them larger than `most`; returns what
// one of them stands for, and their sum.
template <class T>
float quantize(const float* from, int64_t count, float most, float limit, void* to, float* total) {
    const float scale = std::max(most, 1e-30f) / limit;
    const float inverse = 1.0f / scale;
    Int sums{};
    for (int64_t i = 0; i < count; i += kLanes) {
        const Int rounded = to_int(part(from, i, count) * inverse);
        const auto narrow = narrowed<T>(rounded);
        const int64_t lanes = std::min<int64_t>(kLanes, count - i);
        if (lanes == kLanes)
            store(static_cast<T*>(to) + i, narrow);
        else
            std::memcpy(static_cast<T*>(to) + i, &narrow, lanes * sizeof(T));
        sums += rounded;
    }
    *total = sum(to_float(sums));
    return scale;
}

// Latent dims come in the order in which pairs take the bytes of a word, 0 2 1 3; quads take them
// as they lie.
AP_INLINE void order_quads(int32_t* quads, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t q = uint32_t(quads[i]);
        quads[i] = int32_t((q & 0xff0000ffu) | (q & 0xff00u) << 8 | (q & 0xff0000u) >> 8);
    }
}

// Vectors that a chunk of kLanes bytes becomes, or of kLanes latents of 16 bits.
constexpr int vectors_per_chunk(int64_t bits) { return bits == 16 ? 1 : int(8 / bits); }
constexpr int64_t chunk_bytes(int64_t bits) { return bits == 16 ? 2 * kLanes : kLanes; }
// Bytes that a register block takes.
constexpr int64_t turn_bytes(int64_t bits) {
    return kValueVectors / vectors_per_chunk(bits) * chunk_bytes(bits);
}

// The bytes of a stretch of a plane, no more than a register block takes, of all tokens of a tile:
// out[step * stride + v] with the sub-planes of each chunk side by side.
template <class A, int BITS>
AP_INLINE void unpack_value_bytes(const uint8_t* const* rows, int64_t byte, int bytes, int steps,
                                  Int* out) {
    constexpr uint32_t mask = (1u << BITS) - 1;
    constexpr int spread = 32 / A::kPerStep;  // bits from one token of a step to the next
    constexpr int chunks = kValueVectors * BITS / 8;
    const auto unpack = [&](const uint8_t* const* tokens, int64_t at, auto read, Int* to) {
        Word word{};
#pragma GCC unroll 4
        for (int e = 0; e < A::kPerStep; ++e) word |= read(tokens[e] + at) << (spread % 32 * e);
#pragma GCC unroll 4
        for (int k = 0; k < 8 / BITS; ++k) {
            const Word codes = word >> (BITS * k);
            if constexpr (A::kPerStep == 4)
                to[k] = (Int)(codes & (mask * 0x01010101u));
            else if constexpr (A::kPerStep == 2)
                to[k] = (Int)(codes & (mask << 16 | mask));
            else
                to[k] = (Int)(to_float(codes & mask) - 0.5f * zero_doubled(BITS));
        }
    };
    const auto whole = [](const uint8_t* from) { return load_bytes(from); };
    if (bytes == chunks * kLanes) {
        // A cache line is read at one time, not once per chunk.
        for (int s = 0; s < steps; ++s, rows += A::kPerStep, out += kValueVectors)
#pragma GCC unroll 4
            for (int c = 0; c < chunks; ++c)
                unpack(rows, byte + c * kLanes, whole, out + c * (8 / BITS));
        return;
    }
    for (int at = 0; at < bytes; at += kLanes, out += 8 / BITS) {
        const int left = bytes - at;
        const auto head = [&](const uint8_t* from) { return load_bytes(from, left); };
        for (int s = 0; s < steps; ++s) {
            const uint8_t* const* tokens = rows + s * A::kPerStep;
            Int* to = out + s * kValueVectors;
            if (left >= kLanes)
                unpack(tokens, byte + at, whole, to);
            else
                unpack(tokens, byte + at, head, to);
        }
    }
}

AP_INLINE void unpack_value_bytes_16(const uint8_t* const* rows, int64_t byte, int bytes, int steps,
                                     Int* out) {
    for (int at = 0; at < bytes; at += 2 * kLanes, ++out) {
        for (int s = 0; s < steps; ++s) {
            const Halves read =
                load_head<Halves>(rows[s] + byte + at, std::min(2 * kLanes, bytes - at));
            out[s * kValueVectors] = (Int)(__builtin_convertvector(read, Word) << 16);
        }
    }
}

// Lanes of the attended values of one head group: every sub-plane is padded to whole vectors.
int64_t value_lanes(const Side& side) {
    int64_t vectors = 0;
    for (int p = 0; p < side.num_planes; ++p) {
        const Plane& plane = side.planes[p];
        const int64_t chunk = chunk_bytes(plane.bits);
        vectors += (plane.bytes + chunk - 1) / chunk * vectors_per_chunk(plane.bits);
    }
    return vectors * kLanes;
}

// Work areas of one thread.
struct Scratch {
    alignas(64) Int codes[kSteps * kSubVectors > kTile * kValueVectors ? kSteps * kSubVectors
                                                                        : kTile * kValueVectors];
    alignas(64) uint32_t words[64 * kSub];
    alignas(64) float logits[kMaxRows][kTile];
    alignas(64) int32_t weights[kMaxRows][kTile];  // kTile / 2 pairs, or kTile floats
    float weight_scale[kMaxRows];
    float weight_zero[kMaxRows];  // sum of the weights over the tile, in the units of `weights`
    // The same in 8 bits, without the row's outlier: a token of the tile, or none (-1).
    alignas(64) Int quad_codes[kTile / 4 * kValueVectors];
    alignas(64) int32_t quad_weights[kMaxRows][kTile / 4];
    float quad_scale[kMaxRows];
    float quad_zero[kMaxRows];
    int outlier[kMaxRows];
    float outlier_weight[kMaxRows];
    float keep[kMaxRows];
    Tile tiles[2];
};

// Queries of one item and modality, ready for `multiply`; filled by `prepare_queries`.
struct Queries {
    // As floats or 16-bit pairs, or as 8-bit quads; in the order of the key's words.
    struct Numbers {
        int32_t* steps;  // [rows][stride]
        float* scale;    // [rows][segments]
        float* shift;    // [rows][segments]: what the zero points of the codes amount to
        int64_t stride;
    };
    Numbers wide, quads;
    float* reach;       // [segments]: tokens of this scale or less may meet quads; -1: none
    float* mean_logit;  // [rows]
    int64_t segments;
};

template <class A>
class Attention {
  public:
    Attention(const Attend& args, const Piece& piece, uint8_t* memory)
        : args_(args), piece_(piece), group_(args.groups[piece.group]) {
        s_ = reinterpret_cast<Scratch*>(memory);
        memory += sizeof(Scratch);
        for (int64_t m = 0; m < args.modalities; ++m) {
            Queries& q = queries_[m];
            q.segments = count_segments(group_.key);
            take_numbers(memory, q, q.wide, A::kPerStep);
            if (A::kNarrow) take_numbers(memory, q, q.quads, 4);
            q.reach = take<float>(memory, q.segments);
            q.mean_logit = take<float>(memory, piece.rows);
            s_->tiles[m].count = 0;
        }
        lanes_ = value_lanes(group_.value);
        first_byte_ = std::numeric_limits<int64_t>::max();
        for (const Side* side : {&group_.key, &group_.value}) {
            for (int p = 0; p < side->num_planes; ++p) {
                const Plane& plane = side->planes[p];
                first_byte_ = std::min(first_byte_, plane.offset);
                end_byte_ = std::max(end_byte_, plane.offset + plane.bytes * args.block_size);
            }
        }
        const int64_t row_blocks = piece.rows / kBlockRows + piece.rows % kBlockRows;
        const int64_t turns = (queries_[0].segments * (kTile / kSub) + value_turns()) * row_blocks;
        ahead_bytes_ = (end_byte_ - first_byte_) * kTile / args.block_size / turns + 64;
    }

    void run() {
        prepare_queries();
        for (int64_t m = 0; m < args_.modalities; ++m) {
            std::fill_n(piece_.top + m * piece_.rows, piece_.rows, -kInfinity);
            std::fill_n(piece_.total + m * piece_.rows, piece_.rows, 0.0f);
            std::fill_n(sum(m, 0), piece_.rows * lanes_, 0.0f);
        }
        const int32_t* table = args_.table + piece_.request * args_.table_stride;
        const int64_t size = args_.block_size;
        for (int64_t position = piece_.start; position < piece_.stop;) {
            const int64_t index = position / size;
            const uint8_t* block = args_.cache + int64_t(table[index]) * args_.block_bytes;
            const int64_t end = std::min(piece_.stop, (index + 1) * size);
            if (next_block_ <= index) next_block_ = index + 1, next_byte_ = first_byte_;
            last_ahead_ = (end + 2 * kTile) / size;
            const int64_t first = index * size;
            for (; position < end; ++position) append(block, position - first, position);
        }
        for (int64_t m = 0; m < args_.modalities; ++m)
            if (s_->tiles[m].count) process(m);
    }

    static int64_t memory(const Attend& args, int64_t rows, int64_t rank) {
        const int64_t per_row = rank + 64 + rank / 4;
        return sizeof(Scratch) + args.modalities * (rows * per_row * 4 + rank + 1024);
    }

  private:
    template <class T>
    static T* take(uint8_t*& memory, int64_t count) {
        T* result = reinterpret_cast<T*>(memory);
        memory += (count * sizeof(T) + 63) / 64 * 64;
        return result;
    }

    void take_numbers(uint8_t*& memory, const Queries& q, Queries::Numbers& out, int per_step) {
        out.stride = group_.key.rank / per_step;
        out.steps = take<int32_t>(memory, piece_.rows * out.stride);
        out.scale = take<float>(memory, piece_.rows * q.segments);
        out.shift = take<float>(memory, piece_.rows * q.segments);
    }

    // How often a tile's values are unpacked.
    int64_t value_turns() const {
        int64_t turns = 0;
        for (int p = 0; p < group_.value.num_planes; ++p) {
            const Plane& plane = group_.value.planes[p];
            turns += (plane.bytes + turn_bytes(plane.bits) - 1) / turn_bytes(plane.bits);
        }
        return turns;
    }

    static int64_t count_segments(const Side& side) {
        int64_t segments = 0;
        for (int p = 0; p < side.num_planes; ++p) {
            const int64_t words = words_per_segment<A>(side.planes[p].bits);
            segments += (side.planes[p].bytes / 4 + words - 1) / words;
        }
        return segments;
    }

    float* sum(int64_t m, int64_t row) { return piece_.sums + (m * piece_.rows + row) * lanes_; }

    // Latent queries of all modalities of one row.
    const float* query(int64_t row) const {
        const int64_t heads = args_.heads_per_group * args_.repeats;
        const int64_t token = piece_.first_token + (piece_.first_row + row) / heads;
        const int64_t head = (piece_.first_row + row) % heads;
        const int64_t kv = head / args_.repeats, repeat = head % args_.repeats;
        return args_.queries[piece_.group] +
               ((kv * args_.tokens + token) * args_.repeats + repeat) * args_.modalities *
                   (group_.key.rank + 1);
    }

    void prepare_queries() {
        const int64_t rank = group_.key.rank;
        const float* rows[kMaxRows];
        for (int64_t row = 0; row < piece_.rows; ++row) rows[row] = query(row);
        for (int64_t m = 0; m < args_.modalities; ++m) {
            Queries& q = queries_[m];
            for (int64_t row = 0; row < piece_.rows; ++row) {
                q.mean_logit[row] = rows[row][args_.modalities * rank + m];
            }
            int64_t segment = 0, dim = m * rank, step = 0;
            for_segments(group_.key, [&](const Plane& plane, int64_t, int64_t words) {
                const int64_t dims = words * 32 / plane.bits;
                float magnitude[kMaxRows];
                for (int64_t row = 0; row < piece_.rows; ++row)
                    magnitude[row] = largest_magnitude(rows[row] + dim, dims);
                const bool quads = A::kNarrow && by_quads(plane.bits);
                const float most = *std::max_element(magnitude, magnitude + piece_.rows);
                q.reach[segment] = quads ? quad_reach(plane.bits, most) : -1;
                for (int64_t row = 0; row < piece_.rows; ++row) {
                    const int64_t at = row * q.segments + segment;
                    const float zero = 0.5f * float(zero_doubled(plane.bits));
                    prepare_wide(q.wide, row, rows[row] + dim, magnitude[row], zero, at, step, dims);
                    if (quads)
                        prepare_quads(q.quads, row, rows[row] + dim, magnitude[row], zero, at,
                                      step / 2, dims);
                }
                dim += dims;
                step += dims / A::kPerStep;
                ++segment;
            });
        }
    }

    // The largest scale of tokens whose logits 8-bit queries of at most this magnitude leave as they
    // are, but for kQuadError. A number is off by 0.29 steps, a code of 2 bits by 1.1 from zero, one
    // of 4 bits by 3.0.
    float quad_reach(int64_t bits, float most) const {
        const float code = bits == 2 ? 1.1f : 3.0f;
        const float error = 0.29f * most / kLargest8 * code * std::sqrt(float(group_.key.rank));
        return kQuadError / std::max(error, 1e-30f);
    }

    static void prepare_wide(Queries::Numbers& q, int64_t row, const float* query, float most,
                             float zero, int64_t at, int64_t step, int64_t dims) {
        int32_t* out = q.steps + row * q.stride + step;
        float total = 0;
        if constexpr (A::kPerStep == 1) {
            std::memcpy(out, query, dims * 4);
            q.scale[at] = 1;
        } else {
            q.scale[at] = quantize<int16_t>(query, dims, most, kLargest16, out, &total);
        }
        q.shift[at] = -q.scale[at] * zero * total;
    }

    static void prepare_quads(Queries::Numbers& q, int64_t row, const float* query, float most,
                              float zero, int64_t at, int64_t step, int64_t dims) {
        int32_t* out = q.steps + row * q.stride + step;
        float total;
        q.scale[at] = quantize<int8_t>(query, dims, most, kLargest8, out, &total);
        q.shift[at] = -q.scale[at] * zero * total;
        order_quads(out, dims / 4);
    }

    // Calls f(plane, first word, words) for every segment.
    template <class F>
    AP_INLINE void for_segments(const Side& side, F f) {
        for (int p = 0; p < side.num_planes; ++p) {
            const Plane& plane = side.planes[p];
            const int64_t limit = words_per_segment<A>(plane.bits), words = plane.bytes / 4;
            for (int64_t w = 0; w < words; w += limit) f(plane, w, std::min(limit, words - w));
        }
    }

    // Asks for a few lines of the blocks to come: one call beside every register block's work. Codes
    // are read a few bytes per token, in an order that the processor does not foresee.
    AP_INLINE void fetch_ahead() {
        if (next_block_ > last_ahead_ || next_block_ * args_.block_size >= piece_.stop) return;
        const int32_t* table = args_.table + piece_.request * args_.table_stride;
        const uint8_t* block = args_.cache + int64_t(table[next_block_]) * args_.block_bytes;
        const int64_t end = std::min(end_byte_, next_byte_ + ahead_bytes_);
        for (; next_byte_ < end; next_byte_ += 64) __builtin_prefetch(block + next_byte_);
        if (next_byte_ >= end_byte_) ++next_block_, next_byte_ = first_byte_;
    }

    AP_INLINE void append(const uint8_t* block, int64_t slot, int64_t position) {
        const uint8_t byte = block[group_.key.scales + slot];
        const int64_t m = args_.modalities == 2 ? byte >> 7 : 0;
        Tile& tile = s_->tiles[m];
        const int at = tile.count++;
        tile.block[at] = block;
        tile.slot[at] = slot;
        tile.position[at] = int32_t(position);
        tile.key_scale[at] = kScales.value[byte & 127];
        tile.value_scale[at] = kScales.value[block[group_.value.scales + slot] & 127];
        if (tile.count == kTile) process(m);
    }

    void process(int64_t m) {
        Tile& tile = s_->tiles[m];
        // Room for whole vectors: repeated tokens get no weight.
        const int padded = (tile.count + 15) / 16 * 16;
        for (int t = tile.count; t < padded; ++t) {
            tile.block[t] = tile.block[0];
            tile.slot[t] = tile.slot[0];
            tile.key_scale[t] = tile.value_scale[t] = 0;
        }
        for (int from = 0; from < padded; from += kSub)
            multiply_keys(m, from, std::min(kSub, padded - from));
        for (int64_t row = 0; row < piece_.rows; ++row) weigh(m, row, padded);
        multiply_values(m, padded);
        tile.count = 0;
    }

    // Where the codes of a plane begin, of `count` tokens; a multiple of 16 of them.
    static AP_INLINE void find_rows(const Tile& tile, const Plane& plane, int from, int count,
                                    const uint8_t** rows) {
        const int64_t offset = plane.offset, bytes = plane.bytes;
        const uint8_t* const* block = tile.block + from;
        const int64_t* slot = tile.slot + from;
        for (int t = 0; t < count; t += 8)
#pragma GCC unroll 8
            for (int i = t; i < t + 8; ++i) rows[i] = block[i] + (offset + slot[i] * bytes);
    }

    void multiply_keys(int64_t m, int from, int count) {
        const Tile& tile = s_->tiles[m];
        const float largest_scale =
            *std::max_element(tile.key_scale + from, tile.key_scale + from + count);
        const uint8_t* rows[kSub];
        int64_t step = 0, segment = 0;
        for_segments(group_.key, [&](const Plane& plane, int64_t word, int64_t words) {
            find_rows(tile, plane, from, count, rows);
            for (int t = 0; t < count; t += 8)
                for (int64_t w = 0; w < words; w += 8)
                    transpose_words(rows + t, 4 * (word + w), s_->words + w * kSub + t, kSub);
            const int steps = int(words * 32 / plane.bits / A::kPerStep);
            KeyWork work{m, step, segment, steps, from};
            if (A::kNarrow && largest_scale <= queries_[m].reach[segment]) {
                work.step /= 2;
                work.steps /= 2;
                if (plane.bits == 2)
                    key_quads<2>(words, work, count / kLanes);
                else
                    key_quads<4>(words, work, count / kLanes);
            } else {
                unpack_keys<A>(plane.bits, s_->words, words, s_->codes);
                key_columns<A>(work, count / kLanes);
            }
            step += steps;
            ++segment;
        });
    }

    // One segment of the keys of a modality, unpacked, at the tokens `from` on.
    struct KeyWork {
        int64_t m, step, segment;
        int steps, from;
    };

    template <int BITS>
    AP_INLINE void key_quads(int64_t words, const KeyWork& work, int vectors) {
        unpack_key_words<A, BITS, true>(s_->words, words, s_->codes);
        key_columns<QueryQuads<BITS>>(work, vectors);
    }

    template <class B>
    AP_INLINE void key_columns(const KeyWork& work, int vectors) {
        for_vector_blocks(vectors, [&](auto n, int v) {
            for_row_blocks([&](auto size, int64_t row) {
                fetch_ahead();
                key_block<B, size, n>(work, row, v);
            });
        });
    }

    template <class B, int ROWS, int N>
    AP_NOINLINE void key_block(const KeyWork& work, int64_t row, int v) {
        const int64_t segments = queries_[work.m].segments;
        const Queries::Numbers& q =
            B::kPerStep == 4 ? queries_[work.m].quads : queries_[work.m].wide;
        typename B::Sum acc[ROWS][N];
        multiply<B, ROWS, N>(q.steps + row * q.stride + work.step, q.stride, s_->codes + v,
                             kSubVectors, work.steps, acc);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const float scale = q.scale[(row + r) * segments + work.segment];
            const float shift = q.shift[(row + r) * segments + work.segment];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                float* logit = s_->logits[row + r] + work.from + (v + n) * kLanes;
                const Float before = work.segment ? load<Float>(logit) : Float{};
                store(logit, before + (B::value(acc[r][n]) * scale + shift));
            }
        }
    }

    // Logits of one row become weights; the running softmax of the row moves on.
    void weigh(int64_t m, int64_t row, int padded) {
        const Tile& tile = s_->tiles[m];
        float* logits = s_->logits[row];
        const int seen = visible(tile, row);
        const float mean_logit = queries_[m].mean_logit[row];
        float& top = piece_.top[m * piece_.rows + row];
        Float best = splat(-kInfinity);
        for (int t = 0; t < padded; t += kLanes) {
            const Float x = load<Float>(logits + t) * load<Float>(tile.key_scale + t) + mean_logit;
            store(logits + t, x);
            best = maximum(best, x);
        }
        if (seen < padded) {
            for (int t = seen; t < padded; ++t) logits[t] = -kInfinity;
            best = splat(-kInfinity);
            for (int t = 0; t < seen; t += kLanes) best = maximum(best, load<Float>(logits + t));
        }
        const float new_top = std::max(top, largest(best));
        s_->keep[row] = top == new_top ? 1.0f : std::exp(top - new_top);
        top = new_top;
        const float base = new_top == -kInfinity ? 0.0f : new_top;
        Float mass{}, energy{}, heaviest{};
        for (int t = 0; t < padded; t += kLanes) {
            const Float p = exponential(load<Float>(logits + t) - base);
            mass = mass + p;
            const Float weight = p * load<Float>(tile.value_scale + t);
            store(logits + t, weight);
            energy = energy + weight * weight;
            heaviest = maximum(heaviest, weight);
        }
        float& total = piece_.total[m * piece_.rows + row];
        total = total * s_->keep[row] + attentionpack::sum(mass);
        if constexpr (A::kPerStep == 1) {
            std::memcpy(s_->weights[row], logits, padded * 4);
            s_->weight_scale[row] = 1;
            s_->weight_zero[row] = 0;
        } else {
            const float most = largest(heaviest);
            s_->weight_scale[row] = quantize<int16_t>(logits, padded, most, kLargest16,
                                                      s_->weights[row], &s_->weight_zero[row]);
            if (A::kNarrow) weigh_quads(row, padded, most, attentionpack::sum(energy));
        }
    }

    // The weights of one row, in `logits`, in 8 bits.
    void weigh_quads(int64_t row, int padded, float most, float energy) {
        float* weights = s_->logits[row];
        s_->outlier[row] = -1;
        if (most * most * float(padded) > kOutlier * kOutlier * energy) {
            const int at = int(std::max_element(weights, weights + padded) - weights);
            s_->outlier[row] = at;
            s_->outlier_weight[row] = weights[at];
            weights[at] = 0;
            most = largest_magnitude(weights, padded);
        }
        s_->quad_scale[row] = quantize<uint8_t>(weights, padded, most, kLargestWeight8,
                                                s_->quad_weights[row], &s_->quad_zero[row]);
    }

    // How many tokens of the tile this row sees.
    int visible(const Tile& tile, int64_t row) const {
        const int64_t end = piece_.row_stop(args_, row);
        if (tile.position[tile.count - 1] < end) return tile.count;
        return int(std::lower_bound(tile.position, tile.position + tile.count, end) - tile.position);
    }

    void multiply_values(int64_t m, int padded) {
        const Tile& tile = s_->tiles[m];
        const uint8_t* rows[kTile];
        ValueWork work{m, 0, padded / A::kPerStep, 0};
        for (int p = 0; p < group_.value.num_planes; ++p) {
            const Plane& plane = group_.value.planes[p];
            find_rows(tile, plane, 0, padded, rows);
            const int64_t chunk = chunk_bytes(plane.bits);
            const int per_chunk = vectors_per_chunk(plane.bits);
            const int64_t turn = turn_bytes(plane.bits);
            work.zero = 0.5f * float(zero_doubled(plane.bits));
            for (int64_t byte = 0; byte < plane.bytes; byte += turn) {
                const int bytes = int(std::min(turn, plane.bytes - byte));
                const int vectors = int((bytes + chunk - 1) / chunk) * per_chunk;
                if (A::kNarrow && plane.bits == 2) {
                    value_quads<2>(rows, byte, bytes, vectors, work);
                } else if (A::kNarrow && plane.bits == 4) {
                    value_quads<4>(rows, byte, bytes, vectors, work);
                } else {
                    unpack_values(plane.bits, rows, byte, bytes, work.steps, s_->codes);
                    for_row_blocks([&](auto size, int64_t row) {
                        value_columns<A, size>(work, row, vectors);
                    });
                }
                work.lane += vectors * kLanes;
            }
        }
    }

    // Unpacked values of a modality for one register block.
    struct ValueWork {
        int64_t m, lane;
        int steps;
        float zero;
    };

    // Calls f(rows, first row) for blocks of rows and then for single ones; the number of rows is a
    // constant expression.
    template <class F>
    AP_INLINE void for_row_blocks(F f) {
        int64_t row = 0;
        for (; row + kBlockRows <= piece_.rows; row += kBlockRows)
            f(std::integral_constant<int, kBlockRows>{}, row);
        for (; row < piece_.rows; ++row) f(std::integral_constant<int, 1>{}, row);
    }

    template <int BITS>
    AP_INLINE void value_quads(const uint8_t* const* rows, int64_t byte, int bytes, int vectors,
                               const ValueWork& work) {
        unpack_value_bytes<WeightQuads<BITS>, BITS>(rows, byte, bytes, work.steps / 2, s_->quad_codes);
        for_row_blocks([&](auto size, int64_t row) {
            value_columns<WeightQuads<BITS>, size>(work, row, vectors);
        });
        for (int64_t row = 0; row < piece_.rows; ++row)
            if (s_->outlier[row] >= 0) add_outlier(row, vectors, work);
    }

    // Apart from the register blocks, which have no register to spare.
    void add_outlier(int64_t row, int vectors, const ValueWork& work) {
        const int token = s_->outlier[row];
        const Word* quads = (const Word*)s_->quad_codes + token / 4 * kValueVectors;
        float* to = sum(work.m, row) + work.lane;
        for (int v = 0; v < vectors; ++v) {
            const Float code = to_float(quads[v] >> (token % 4 * 8) & 0xff) - work.zero;
            store(to + v * kLanes,
                  load<Float>(to + v * kLanes) + code * s_->outlier_weight[row]);
        }
    }

    static void unpack_values(int64_t bits, const uint8_t* const* rows, int64_t byte, int bytes,
                              int steps, Int* out) {
        switch (bits) {
            case 8: return unpack_value_bytes<A, 8>(rows, byte, bytes, steps, out);
            case 4: return unpack_value_bytes<A, 4>(rows, byte, bytes, steps, out);
            case 2: return unpack_value_bytes<A, 2>(rows, byte, bytes, steps, out);
            default: return unpack_value_bytes_16(rows, byte, bytes, steps, out);
        }
    }

    template <class B, int ROWS>
    AP_INLINE void value_columns(const ValueWork& work, int64_t row, int vectors) {
        fetch_ahead();
        for_vector_blocks(vectors,
                          [&](auto n, int v) { value_block<B, ROWS, n>(work, row, v); });
    }

    template <class B, int ROWS, int N>
    AP_NOINLINE void value_block(const ValueWork& work, int64_t row, int v) {
        constexpr bool quads = B::kPerStep == 4;
        const int32_t* weights = quads ? s_->quad_weights[row] : s_->weights[row];
        const float* scales = quads ? s_->quad_scale : s_->weight_scale;
        const float* zeros = quads ? s_->quad_zero : s_->weight_zero;
        typename B::Sum acc[ROWS][N];
        multiply<B, ROWS, N>(weights, quads ? kTile / 4 : kTile,
                             (quads ? s_->quad_codes : s_->codes) + v, kValueVectors,
                             quads ? work.steps / 2 : work.steps, acc);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const float keep = s_->keep[row + r], scale = scales[row + r];
            const float shift = work.zero * zeros[row + r] * scale;
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                float* to = sum(work.m, row + r) + work.lane + (v + n) * kLanes;
                store(to, B::value(acc[r][n]) * scale + (load<Float>(to) * keep - shift));
            }
        }
    }

    const Attend& args_;
    const Piece& piece_;
    const Group& group_;
    Scratch* s_;
    Queries queries_[2];
    int64_t lanes_;
    // Bytes of this head group in a block, and how far they have been asked for.
    int64_t first_byte_, end_byte_ = 0, ahead_bytes_;
    int64_t next_block_ = 0, next_byte_ = 0, last_ahead_ = 0;
};

}  // namespace
}  // namespace attentionpack
