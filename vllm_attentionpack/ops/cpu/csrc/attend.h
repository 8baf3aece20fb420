// Attention of a few query rows to a stretch of codes, for one instruction set.
//
// Tokens are gathered into tiles of one modality. Their bytes become words of 32 bits once: keys with
// the tokens side by side in the lanes and four bytes of a token in a word, values with the latent
// dims side by side and four tokens in a word, so that neither product needs a sum across lanes. The
// register blocks of the products unpack words as they go. Both products see 32-bit lanes: four 8-bit
// or two 16-bit integers (queries and weights are quantised per row), or one float where the model
// runs in float32 or latents are bfloat16.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "api.h"
#include "kernels.h"
#include "products.h"
#include "vector.h"

namespace attentionpack {
namespace {

constexpr int kTile = 128;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest16 = 32767.0f, kLargest8 = 127.0f, kLargestWeight8 = 255.0f;
// Weights of a tile go to 8 bits for planes of 2 and 4 bits. One that is more than this many times
// their root mean square is left out and added by itself; no tile has two. Rounding then adds at
// most 0.1 % to the energy of the error of dims of 2 bits (34 % of them) and 0.7 % to that of 4 bits
// (11 %), and for usual weights a fifth of that.
constexpr float kOutlier = 8.0f;
static_assert(kTile <= 2 * kOutlier * kOutlier, "room for one outlier only");
static_assert(kTile / 4 <= kQuadSteps, "sums of quads would overflow");
// Queries go to 8 bits for these planes where that moves logits by less than this (root mean
// square).
constexpr float kQuadError = 0.01f;

// Tokens of one modality, in the order of their positions.
struct Tile {
    int count = 0;
    const uint8_t* block[kTile];
    uint32_t slot[kTile];
    int32_t position[kTile];
    float key_scale[kTile];
    float value_scale[kTile];
};

// Bytes of a token that a vector of words holds, of codes or of latents of 16 bits.
constexpr int64_t vector_bytes(int64_t bits) { return bits == 16 ? 2 * kLanes : kLanes; }
constexpr int64_t vectors_of(int64_t bytes, int64_t bits) {
    return (bytes + vector_bytes(bits) - 1) / vector_bytes(bits);
}

// Latents of 16 bits of four tokens as two vectors of words, for dims side by side: tokens 0 and 2,
// then 1 and 3.
AP_INLINE void interleave_halves(const uint8_t* const* tokens, int64_t byte, int bytes, Word* even,
                                 Word* odd) {
    const auto read = [&](int t) {
        return __builtin_convertvector(load_head<Halves>(tokens[t] + byte, bytes), Word);
    };
    *even = read(0) | read(2) << 16;
    *odd = read(1) | read(3) << 16;
}

// Lanes of the attended values of one head group: every sub-plane is padded to whole vectors.
int64_t value_lanes(const Side& side) {
    int64_t vectors = 0;
    for (int p = 0; p < side.num_planes; ++p) {
        const Plane& plane = side.planes[p];
        vectors += vectors_of(plane.bytes, plane.bits) * places(int(plane.bits));
    }
    return vectors * kLanes;
}

// Work areas of one thread.
struct Scratch {
    // Of a segment of keys [kSubWords][kSub], or of a chunk of values, tokens by kChunkVectors.
    alignas(64) Word words[kSubWords * kSubVectors > kTile / 2 * kChunkVectors
                               ? kSubWords * kSubVectors
                               : kTile / 2 * kChunkVectors];
    alignas(64) float logits[kMaxRows][kTile];
    // Pairs of 16-bit integers or floats; every four tokens in the order 0 2 1 3.
    alignas(64) int32_t weights[kMaxRows][kTile];
    float weight_scale[kMaxRows];
    float weight_zero[kMaxRows];  // sum of the weights over the tile, in the units of `weights`
    // The same in 8 bits, without the row's outlier: a token of the tile, or none (-1).
    alignas(64) int32_t quad_weights[kMaxRows][kTile / 4];
    float quad_scale[kMaxRows];
    float quad_zero[kMaxRows];
    int outlier[kMaxRows];
    float outlier_weight[kMaxRows];
    float keep[kMaxRows];
    float heaviest[kMaxRows], energy[kMaxRows];  // of the weights
    Tile tiles[2];
};

// Queries of one item and modality, ready for `multiply_key_words`; filled by `prepare_queries`.
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
        int64_t row_blocks = 0;
        for_blocks<kBlockRows>(piece.rows, [&](auto, int64_t) { ++row_blocks; });
        const int64_t bytes = (end_byte_ - first_byte_) * kTile / args.block_size;
        ahead_step_ = bytes / (steps_per_tile() * row_blocks) + 1;
        for (int p = 0; p < group_.value.num_planes; ++p)
            wide_weights_ |= !by_quads(group_.value.planes[p].bits) || !A::kNarrow;
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
            append(block, position - index * size, end - index * size, position);
            position = end;
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

    // Of the register blocks of a few rows over a whole tile.
    int64_t steps_per_tile() const {
        int64_t keys = 0, values = 0;
        for (const Side* side : {&group_.key, &group_.value}) {
            for (int p = 0; p < side->num_planes; ++p) {
                const Plane& plane = side->planes[p];
                const bool quads = A::kNarrow && by_quads(plane.bits);
                const int64_t per_step = quads ? 4 : A::kPerStep;
                if (side == &group_.key)
                    keys += plane.dims / per_step;
                else
                    values += (vectors_of(plane.bytes, plane.bits) * places(int(plane.bits)) + 1) /
                              kBlockVectors * (kTile / per_step);
            }
        }
        return keys * (kTile / kLanes / kBlockVectors) + values;
    }

    // What the next `steps` steps are to ask for of the blocks to come. Codes are read a few bytes per
    // token, in an order that the processor does not foresee.
    AP_INLINE Stream fetch_ahead(int64_t steps) {
        if (next_block_ > last_ahead_ || next_block_ * args_.block_size >= piece_.stop)
            return {reinterpret_cast<const uint8_t*>(s_), 0};
        const int32_t* table = args_.table + piece_.request * args_.table_stride;
        const uint8_t* block = args_.cache + int64_t(table[next_block_]) * args_.block_bytes;
        if (next_byte_ == first_byte_) {
            for (const Side* side : {&group_.key, &group_.value})
                for (int64_t i = 0; i < args_.block_size; i += 64)
                    __builtin_prefetch(block + side->scales + i, 0, 2);
        }
        const Stream stream{block + next_byte_, ahead_step_};
        next_byte_ += steps * ahead_step_;
        if (next_byte_ >= end_byte_) ++next_block_, next_byte_ = first_byte_;
        return stream;
    }

    // The tokens in the slots from `slot` to `stop` of a block, at the positions from `position` on.
    AP_INLINE void append(const uint8_t* block, int64_t slot, int64_t stop, int64_t position) {
        const uint8_t* key_scale = block + group_.key.scales;
        const uint8_t* value_scale = block + group_.value.scales;
        while (slot < stop) {
            int64_t m = 0, count = stop - slot;
            if (args_.modalities == 2) {
                m = key_scale[slot] >> 7;
                for (count = 1; slot + count < stop && key_scale[slot + count] >> 7 == m;) ++count;
            }
            Tile& tile = s_->tiles[m];
            const int at = tile.count;
            count = std::min<int64_t>(count, kTile - at);
            for (int64_t i = 0; i < count; ++i) {
                tile.block[at + i] = block;
                tile.slot[at + i] = uint32_t(slot + i);
                tile.position[at + i] = int32_t(position + i);
            }
            read_scales(key_scale + slot, count, tile.key_scale + at);
            read_scales(value_scale + slot, count, tile.value_scale + at);
            tile.count += int(count);
            slot += count;
            position += count;
            if (tile.count == kTile) process(m);
        }
    }

    static AP_INLINE void read_scales(const uint8_t* bytes, int64_t count, float* out) {
        constexpr int kOne = 64;  // the byte of a scale of one; eight steps double it
        int64_t i = 0;
        for (; i + kLanes <= count; i += kLanes) {
            const Word byte = load_bytes(bytes + i) & 127;
            const Word power = (byte >> 3) - kOne / 8;
            store(out + i, (Word)look_up(kScales.value + kOne, byte & 7) + (power << 23));
        }
        for (; i < count; ++i) out[i] = kScales.value[bytes[i] & 127];
    }

    void process(int64_t m) {
        Tile& tile = s_->tiles[m];
        // Room for whole vectors: repeated tokens get no weight.
        constexpr int whole = kBlockVectors * kLanes;
        const int padded = (tile.count + whole - 1) / whole * whole;
        for (int t = tile.count; t < kTile; ++t) {
            tile.block[t] = tile.block[0];
            tile.slot[t] = tile.slot[0];
            tile.key_scale[t] = tile.value_scale[t] = 0;
        }
        for (int from = 0; from < padded; from += kSub)
            multiply_keys(m, from, std::min(kSub, padded - from));
        // Three passes over all rows, so that the sums across lanes of one hide behind the next.
        for (int64_t row = 0; row < piece_.rows; ++row) move_top(m, row);
        for (int64_t row = 0; row < piece_.rows; ++row) weigh(m, row);
        for (int64_t row = 0; row < piece_.rows; ++row) round_weights(row);
        multiply_values(m, padded);
        tile.count = 0;
    }

    // Where the codes of a plane begin, of `count` tokens; a multiple of 16 of them.
    static AP_INLINE void find_rows(const Tile& tile, const Plane& plane, int from, int count,
                                    const uint8_t** rows) {
        const int64_t offset = plane.offset;
        const uint32_t bytes = uint32_t(plane.bytes);  // so that the product is of 32 bits each
        const uint8_t* const* block = tile.block + from;
        const uint32_t* slot = tile.slot + from;
        for (int t = 0; t < count; t += 8)
#pragma GCC unroll 8
            for (int i = t; i < t + 8; ++i) rows[i] = block[i] + (offset + uint64_t(slot[i]) * bytes);
    }

    void multiply_keys(int64_t m, int from, int count) {
        const Tile& tile = s_->tiles[m];
        const float largest_scale = largest_magnitude(tile.key_scale + from, count);
        uint32_t* words = reinterpret_cast<uint32_t*>(s_->words);
        const uint8_t* rows[kSub];
        KeyWork work{m, 0, 0, 0, from, count / kLanes};
        for_segments(group_.key, [&](const Plane& plane, int64_t word, int64_t count_words) {
            find_rows(tile, plane, from, count, rows);
            for (int t = 0; t < count; t += kLanes)
                for (int64_t w = 0; w < count_words; w += 4)
                    transpose_words(rows + t, 4 * (word + w), words + w * kSub + t, kSub);
            work.words = int(count_words);
            const bool quads = A::kNarrow && largest_scale <= queries_[m].reach[work.segment];
            switch (plane.bits) {
                case 2: key_segment<2>(quads, work); break;
                case 4: key_segment<4>(quads, work); break;
                case 8: key_blocks<A, 8>(work); break;
                default: if constexpr (A::kPerStep == 1) key_blocks<A, 16>(work);
            }
            work.dim += count_words * 32 / plane.bits;
            ++work.segment;
        });
    }

    // One segment of the keys of a modality as words, of the tokens `from` on.
    struct KeyWork {
        int64_t m, dim, segment;
        int words, from, vectors;
    };

    template <int BITS>
    AP_INLINE void key_segment(bool quads, const KeyWork& work) {
        if constexpr (A::kNarrow)
            if (quads) return key_blocks<QueryQuads<BITS>, BITS>(work);
        key_blocks<A, BITS>(work);
    }

    template <class B, int BITS>
    AP_INLINE void key_blocks(const KeyWork& work) {
        for (int v = 0; v < work.vectors; v += kBlockVectors) {
            for_blocks<kBlockRows>(piece_.rows, [&](auto size, int64_t row) {
                key_block<B, BITS, size>(work, row, v);
            });
        }
    }

    template <class B, int BITS, int ROWS>
    AP_NOINLINE void key_block(const KeyWork& work, int64_t row, int v) {
        // Copies: after a store the compiler would read anew whatever it had not copied.
        const int64_t segments = queries_[work.m].segments;
        const Queries::Numbers q =
            B::kPerStep == 4 ? queries_[work.m].quads : queries_[work.m].wide;
        typename B::Sum acc[ROWS][kBlockVectors];
        const int steps = work.words * places(BITS) * kWordSteps<B, BITS>;
        multiply_key_words<B, BITS>(q.steps + row * q.stride + work.dim / B::kPerStep, q.stride,
                                    s_->words + v, work.words, fetch_ahead(steps), acc);
        const float* scales = q.scale + row * segments + work.segment;
        const float* shifts = q.shift + row * segments + work.segment;
        float* logits = s_->logits[row] + work.from + v * kLanes;
        const Int before = splat(work.segment == 0 ? 0 : -1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const float scale = scales[r * segments], shift = shifts[r * segments];
#pragma GCC unroll 8
            for (int n = 0; n < kBlockVectors; ++n) {
                float* logit = logits + r * kTile + n * kLanes;
                const Float old = (Float)(load<Int>(logit) & before);
                store(logit, old + (B::value(acc[r][n]) * scale + shift));
            }
        }
    }

    // Scales the logits of one row; its running maximum moves on.
    void move_top(int64_t m, int64_t row) {
        const Tile& tile = s_->tiles[m];
        float* logits = s_->logits[row];
        const int seen = visible(tile, row);
        const float mean_logit = queries_[m].mean_logit[row];
        float& top = piece_.top[m * piece_.rows + row];
        Float best = splat(-kInfinity);
#pragma GCC unroll 16
        for (int t = 0; t < kTile; t += kLanes) {
            const Float x = load<Float>(logits + t) * load<Float>(tile.key_scale + t) + mean_logit;
            store(logits + t, x);
            best = maximum(best, x);
        }
        if (seen < kTile) {
            std::fill(logits + seen, logits + kTile, -kInfinity);
            best = splat(-kInfinity);
            for (int t = 0; t < seen; t += kLanes) best = maximum(best, load<Float>(logits + t));
        }
        const float new_top = std::max(top, largest(best));
        s_->keep[row] = top == new_top ? 1.0f : std::exp(top - new_top);
        top = new_top;
    }

    // Logits of one row become weights of the values' codes.
    void weigh(int64_t m, int64_t row) {
        const Tile& tile = s_->tiles[m];
        float* logits = s_->logits[row];
        const float top = piece_.top[m * piece_.rows + row];
        const float base = top == -kInfinity ? 0.0f : top;
        constexpr int degree = A::kPerStep == 1 ? 7 : 5;  // what 16-bit weights can tell
        Float mass{}, energy{}, heaviest{};
#pragma GCC unroll 16
        for (int t = 0; t < kTile; t += kLanes) {
            const Float p = exponential<degree>(load<Float>(logits + t) - base);
            mass = mass + p;
            const Float weight = p * load<Float>(tile.value_scale + t);
            store(logits + t, weight);
            energy = energy + weight * weight;
            heaviest = maximum(heaviest, weight);
        }
        float& total = piece_.total[m * piece_.rows + row];
        total = total * s_->keep[row] + attentionpack::sum(mass);
        s_->heaviest[row] = largest(heaviest);
        s_->energy[row] = attentionpack::sum(energy);
    }

    // Weights of one row, in `logits`, become the numbers that meet codes.
    void round_weights(int64_t row) {
        float* weights = s_->logits[row];
        float most = s_->heaviest[row];
        if constexpr (A::kPerStep == 1) {
            for (int t = 0; t < kTile; t += kLanes)
                store(s_->weights[row] + t, middle_swapped(load<Int>(weights + t)));
            s_->weight_scale[row] = 1;
            s_->weight_zero[row] = 0;
        } else {
            if (wide_weights_) {
                s_->weight_scale[row] = round_to<int16_t>(weights, most, kLargest16, s_->weights[row],
                                                          &s_->weight_zero[row]);
            }
            if constexpr (A::kNarrow) {
                s_->outlier[row] = -1;
                if (most * most * float(kTile) > kOutlier * kOutlier * s_->energy[row]) {
                    const int at = int(std::find(weights, weights + kTile, most) - weights);
                    s_->outlier[row] = at;
                    s_->outlier_weight[row] = weights[at];
                    weights[at] = 0;
                    most = largest_magnitude(weights, kTile);
                }
                s_->quad_scale[row] = round_to<uint8_t>(weights, most, kLargestWeight8,
                                                        s_->quad_weights[row], &s_->quad_zero[row]);
            }
        }
    }

    // As `quantize`, for the weights of a tile; pairs of them in the order of `Scratch`.
    template <class T>
    static AP_INLINE float round_to(const float* weights, float most, float limit, void* to,
                                    float* total) {
        const float scale = std::max(most, 1e-30f) / limit;
        const float inverse = 1.0f / scale;
        Int sums{};
#pragma GCC unroll 16
        for (int t = 0; t < kTile; t += kLanes) {
            const Int rounded = to_int(load<Float>(weights + t) * inverse);
            sums += rounded;
            store(static_cast<T*>(to) + t,
                  narrowed<T>(sizeof(T) == 2 ? middle_swapped(rounded) : rounded));
        }
        *total = attentionpack::sum(to_float(sums));
        return scale;
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
        ValueWork work{m, 0, padded / 4, 0, 0};
        for (int p = 0; p < group_.value.num_planes; ++p) {
            const Plane& plane = group_.value.planes[p];
            find_rows(tile, plane, 0, padded, rows);
            work.zero = 0.5f * float(zero_doubled(plane.bits));
            const int64_t chunk = kChunkVectors * vector_bytes(plane.bits);
            for (int64_t byte = 0; byte < plane.bytes; byte += chunk) {
                const int bytes = int(std::min(chunk, plane.bytes - byte));
                work.vectors = int(vectors_of(bytes, plane.bits));
                if (plane.bits == 16)
                    read_halves(rows, byte, bytes, work);
                else
                    for (int w = 0; w < work.words; ++w)
                        interleave_bytes(rows + 4 * w, byte, bytes, s_->words + w * kChunkVectors);
                switch (plane.bits) {
                    case 2: value_chunk<2>(work); break;
                    case 4: value_chunk<4>(work); break;
                    case 8: value_blocks<A, 8>(work); break;
                    default: if constexpr (A::kPerStep == 1) value_blocks<A, 16>(work);
                }
                work.lane += work.vectors * places(int(plane.bits)) * kLanes;
            }
        }
    }

    // Some vectors of words of the values of a modality; each word holds four tokens. Sums begin at
    // `lane` of a row.
    struct ValueWork {
        int64_t m, lane;
        int words, vectors;
        float zero;
    };

    void read_halves(const uint8_t* const* rows, int64_t byte, int bytes, const ValueWork& work) {
        for (int w = 0; w < work.words; ++w) {
            for (int v = 0; v < work.vectors; ++v) {
                const int at = v * 2 * kLanes;
                Word* even = s_->words + 2 * w * kChunkVectors + v;
                interleave_halves(rows + 4 * w, byte + at, std::min(2 * kLanes, bytes - at), even,
                                  even + kChunkVectors);
            }
        }
    }

    template <int BITS>
    AP_INLINE void value_chunk(const ValueWork& work) {
        if constexpr (A::kNarrow) {
            value_blocks<WeightQuads<BITS>, BITS>(work);
            for (int64_t row = 0; row < piece_.rows; ++row)
                if (s_->outlier[row] >= 0) add_outlier<BITS>(row, work);
        } else {
            value_blocks<A, BITS>(work);
        }
    }

    // Apart from the register blocks, which have no register to spare.
    template <int BITS>
    void add_outlier(int64_t row, const ValueWork& work) {
        const int token = s_->outlier[row];
        const Word* words = s_->words + token / 4 * kChunkVectors;
        float* to = sum(work.m, row) + work.lane;
        for (int v = 0; v < work.vectors; ++v) {
            for (int k = 0; k < places(BITS); ++k, to += kLanes) {
                const Word codes = words[v] >> (token % 4 * 8 + BITS * k) & ((1u << BITS) - 1);
                store(to, load<Float>(to) + (to_float(codes) - work.zero) * s_->outlier_weight[row]);
            }
        }
    }

    template <class B, int BITS>
    AP_INLINE void value_blocks(const ValueWork& work) {
        if constexpr (places(BITS) == 1) {
            for_blocks<kBlockVectors>(work.vectors, [&](auto n, int64_t v) {
                value_rows<B, BITS, 0, n>(work, int(v), v);
            });
        } else {
            for (int v = 0; v < work.vectors; ++v) {
                value_rows<B, BITS, 0, 2>(work, v, places(BITS) * v);
                if constexpr (BITS == 2) value_rows<B, BITS, 2, 2>(work, v, places(BITS) * v + 2);
            }
        }
    }

    // Codes at the places from `FIRST` on of the words of vector `v`, into the sums at vector `to`.
    template <class B, int BITS, int FIRST, int N>
    AP_INLINE void value_rows(const ValueWork& work, int v, int64_t to) {
        for_blocks<kBlockRows>(piece_.rows, [&](auto size, int64_t row) {
            value_block<B, BITS, FIRST, size, N>(work, row, v, work.lane + to * kLanes);
        });
    }

    template <class B, int BITS, int FIRST, int ROWS, int N>
    AP_NOINLINE void value_block(const ValueWork& work, int64_t row, int v, int64_t lane) {
        constexpr bool quads = B::kPerStep == 4;
        const int32_t* weights = quads ? s_->quad_weights[row] : s_->weights[row];
        typename B::Sum acc[ROWS][N];
        const int words = BITS == 16 ? 2 * work.words : work.words;
        multiply_value_words<B, BITS, FIRST>(weights, quads ? kTile / 4 : kTile, s_->words + v, words,
                                             fetch_ahead(words * kWordSteps<B, BITS>), acc);
        // Copies, as in `key_block`.
        const float* keeps = s_->keep + row;
        const float* scales = (quads ? s_->quad_scale : s_->weight_scale) + row;
        const float* zeros = (quads ? s_->quad_zero : s_->weight_zero) + row;
        const float zero = work.zero;
        const int64_t stride = lanes_;
        float* sums = sum(work.m, row) + lane;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r, sums += stride) {
            const float keep = keeps[r], scale = scales[r], shift = zero * zeros[r] * scale;
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                float* to = sums + n * kLanes;
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
    bool wide_weights_ = false;  // whether values need weights of more than 8 bits
    // Bytes of this head group in a block, and how far they have been asked for.
    int64_t first_byte_, end_byte_ = 0, ahead_step_;
    int64_t next_block_ = 0, next_byte_ = 0, last_ahead_ = 0;
};

}  // namespace
}  // namespace attentionpack
