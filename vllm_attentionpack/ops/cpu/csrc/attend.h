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
#include <cstring>
#include <limits>

#include "api.h"
#include "kernels.h"
#include "pre_rope.h"
#include "products.h"
#include "queries.h"
#include "softmax.h"
#include "tile.h"
#include "vector.h"

namespace attentionpack {
namespace {

// Work areas of one thread.
struct Scratch {
    // Of a segment of keys [kSubWords][kSub], or of a chunk of values, tokens by kChunkVectors.
    alignas(64) Word words[kSubWords * kSubVectors > kTile / 2 * kChunkVectors
                               ? kSubWords * kSubVectors
                               : kTile / 2 * kChunkVectors];
    alignas(64) float logits[kMaxRows][kTile];
    Weights weights;
    RunningRow running[2][kMaxRows];
    float top[2][kMaxRows];  // largest logit so far
    const float *queries[2][kMaxRows], *means[kMaxRows];
    Tile tiles[2];
};

template <class A>
class Attention {
  public:
    Attention(const Attend& args, const Piece& piece, uint8_t* memory)
        : args_(args), piece_(piece), group_(args.groups[piece.group]) {
        s_ = take<Scratch>(memory, 1);
        for (int64_t m = 0; m < args.modalities; ++m) {
            queries_[m].lay_out(group_.key, piece.rows, memory);
            s_->tiles[m].count = 0;
        }
        own_.lay_out(args, piece, memory);
        lanes_ = value_lanes(group_.value);
        first_byte_ = std::numeric_limits<int64_t>::max();
        for (const Side* side : {&group_.key, &group_.value}) {
            for (int p = 0; p < side->num_planes; ++p) {
                const Plane& plane = side->planes[p];
                first_byte_ = std::min(first_byte_, plane.offset);
                end_byte_ = std::max(end_byte_, plane.offset + plane.bytes * args.block_size);
            }
        }
        const int64_t bytes = (end_byte_ - first_byte_) * kTile / args.block_size;
        ahead_step_ = bytes / steps_per_tile() + 1;
        for (int p = 0; p < group_.value.num_planes; ++p)
            wide_weights_ |= !in_quads(group_.value.planes[p]);
    }

    void run() {
        own_.prepare();
        std::fill_n(s_->top[0], 2 * kMaxRows, -kInfinity);
        std::memset(s_->running, 0, args_.modalities * sizeof s_->running[0]);
        for (int64_t position = piece_.start; position < piece_.stop;) {
            const int64_t span = args_.span ? position / args_.span : 0;
            const int64_t end = args_.span ? std::min(piece_.stop, (span + 1) * args_.span) : piece_.stop;
            prepare_queries(span);
            read(position, end);
            position = end;
        }
        for (int64_t m = 0; m < args_.modalities; ++m) finish(m);
    }

    static int64_t memory(const Attend& args, int64_t rows, int64_t rank) {
        return sizeof(Scratch) + 64 + args.modalities * Queries<A>::memory(rows, rank) +
               PreRopeKeys<A>::memory(args, rank);
    }

  private:
    static bool in_quads(const Plane& plane) { return A::kNarrow && by_quads(plane.bits); }

    // The tokens from `position` to `stop`, all met by the same queries.
    void read(int64_t position, int64_t stop) {
        const int32_t* table = args_.table + piece_.request * args_.table_stride;
        const int64_t size = args_.block_size;
        while (position < stop) {
            const int64_t index = position / size;
            const uint8_t* block = args_.cache + int64_t(table[index]) * args_.block_bytes;
            const int64_t end = std::min(stop, (index + 1) * size);
            if (next_block_ <= index) next_block_ = index + 1, next_byte_ = first_byte_;
            last_ahead_ = (end + 2 * kTile) / size;
            append(block, position - index * size, end - index * size, position);
            position = end;
        }
        for (int64_t m = 0; m < args_.modalities; ++m)
            if (s_->tiles[m].count) process(m);
    }

    float* sum(int64_t m, int64_t row) { return piece_.sums + (m * piece_.rows + row) * lanes_; }

    void prepare_queries(int64_t span) {
        const int64_t rank = group_.key.rank, modalities = args_.modalities;
        for (int64_t m = 0; m < modalities; ++m) {
            for (int64_t row = 0; row < piece_.rows; ++row) {
                const float* query = args_.queries[piece_.group] +
                                     piece_.query_place(args_, row, span) * group_.key.width;
                s_->queries[m][row] = query + m * rank;
                s_->means[row] = query + modalities * rank + m;
            }
            queries_[m].prepare(group_.key, s_->queries[m], s_->means, piece_.rows);
        }
    }

    // Of all register blocks over a whole tile.
    int64_t steps_per_tile() const {
        int64_t row_blocks = 0, own_blocks = 0;
        for_blocks<kBlockRows>(piece_.rows, [&](auto, int64_t) { ++row_blocks; });
        for_blocks<kBlockRows>(own_.rows, [&](auto, int64_t) { ++own_blocks; });
        int64_t keys = 0, values = 0;
        for (const Side* side : {&group_.key, &group_.value}) {
            for (int p = 0; p < side->num_planes; ++p) {
                const Plane& plane = side->planes[p];
                const int64_t per_step = in_quads(plane) ? 4 : A::kPerStep;
                if (side == &group_.key)
                    keys += plane.dims / per_step;
                else
                    values += (vectors_of(plane.bytes, plane.bits) * places(int(plane.bits)) + 1) /
                              kBlockVectors * (kTile / per_step);
            }
        }
        return keys * (kTile / kLanes / kBlockVectors) * (row_blocks + own_blocks) + values * row_blocks;
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
        while (slot < stop) {
            int64_t m = 0, count = stop - slot;
            if (args_.modalities == 2) {
                m = key_scale[slot] >> 7;
                for (count = 1; slot + count < stop && key_scale[slot + count] >> 7 == m;) ++count;
            }
            const int64_t taken = s_->tiles[m].take(block, slot, count, position, group_);
            slot += taken;
            position += taken;
            if (s_->tiles[m].count == kTile) process(m);
        }
    }

    void process(int64_t m) {
        Tile& tile = s_->tiles[m];
        const int padded = tile.fill();
        for (int from = 0; from < padded; from += kSub)
            multiply_keys(m, from, std::min(kSub, padded - from));
        hide_later_tokens(tile);
        for (int64_t row = 0; row < piece_.rows; row += kRowGroup) {
            TileSoftmax<A>(tile, s_->logits + row, s_->weights, row, wide_weights_)
                .run(int(std::min<int64_t>(kRowGroup, piece_.rows - row)),
                     queries_[m].mean_logit + row, s_->top[m] + row, s_->running[m] + row);
        }
        multiply_values(m, padded);
        begun_[m] = true;
        tile.count = 0;
    }

    void hide_later_tokens(const Tile& tile) {
        for (int64_t row = 0; row < piece_.rows; ++row) {
            const int seen = tile.before(piece_.row_stop(args_, row));
            if (seen == kTile) return;  // and so do the rows that follow
            std::fill(s_->logits[row] + seen, s_->logits[row] + kTile, -kInfinity);
        }
    }

    // What is summed by lanes of tokens.
    void finish(int64_t m) {
        for (int64_t row = 0; row < piece_.rows; ++row) {
            const RunningRow& running = s_->running[m][row];
            const int64_t at = m * piece_.rows + row;
            piece_.top[at] = s_->top[m][row];
            piece_.total[at] = attentionpack::sum(running.mass);
            for (int p = 0; p < group_.value.num_planes; ++p) {
                const Plane& plane = group_.value.planes[p];
                const float zero = A::kPerStep == 1 ? 0 : 0.5f * float(zero_doubled(plane.bits));
                piece_.zeros[at * kMaxPlanes + p] =
                    zero * attentionpack::sum(in_quads(plane) ? running.quads : running.pairs);
            }
        }
    }

    void multiply_keys(int64_t m, int from, int count) {
        const Tile& tile = s_->tiles[m];
        const float largest_scale = largest_magnitude(tile.key_scale + from, count);
        KeyWork work{nullptr, 0, nullptr, 0, 0, 0, 0, count / kLanes};
        for_segments<A>(group_.key, [&](const Plane& plane, int64_t word, int64_t count_words) {
            tile.with_rows(plane, from, count, [&](auto rows) {
                key_words(rows, work.vectors, 4 * word, count_words, s_->words);
            });
            work.words = int(count_words);
            const auto multiply = [&](Queries<A>& queries, int64_t rows, float* out, int64_t stride) {
                work.queries = &queries, work.rows = rows, work.out = out, work.stride = stride;
                multiply_segment(plane, largest_scale, work);
            };
            multiply(queries_[m], piece_.rows, s_->logits[0] + from, kTile);
            multiply(own_.basis[m], own_.rows, own_.rebuilt, kSub);
            work.dim += count_words * 32 / plane.bits;
            ++work.segment;
        });
        if (own_.rows) own_.add_logits(tile, m, from, count, s_->logits);
    }

    // One segment of keys as words, and the rows that it meets: [rows][stride] products.
    struct KeyWork {
        Queries<A>* queries;
        int64_t rows;
        float* out;
        int64_t stride, dim, segment;
        int words, vectors;
    };

    void multiply_segment(const Plane& plane, float largest_scale, const KeyWork& work) {
        if (!work.rows) return;
        const bool quads = A::kNarrow && largest_scale <= work.queries->reach[work.segment];
        if (!quads) work.queries->widen(plane, work.segment, work.dim, work.words * 32 / plane.bits);
        switch (plane.bits) {
            case 2: key_segment<2>(quads, work); break;
            case 4: key_segment<4>(quads, work); break;
            case 8: key_blocks<A, 8>(work); break;
            default: if constexpr (A::kPerStep == 1) key_blocks<A, 16>(work);
        }
    }

    template <int BITS>
    AP_INLINE void key_segment(bool quads, const KeyWork& work) {
        if constexpr (A::kNarrow)
            if (quads) return key_blocks<QueryQuads<BITS>, BITS>(work);
        key_blocks<A, BITS>(work);
    }

    template <class B, int BITS>
    AP_INLINE void key_blocks(const KeyWork& work) {
        for (int v = 0; v < work.vectors; v += kBlockVectors) {
            for_blocks<kBlockRows>(work.rows, [&](auto size, int64_t row) {
                key_block<B, BITS, size>(work, row, v);
            });
        }
    }

    template <class B, int BITS, int ROWS>
    AP_NOINLINE void key_block(const KeyWork& work, int64_t row, int v) {
        // Copies: after a store the compiler would read anew whatever it had not copied.
        const int64_t segments = work.queries->segments, stride = work.stride;
        const typename Queries<A>::Numbers q =
            B::kPerStep == 4 ? work.queries->quads : work.queries->wide;
        typename B::Sum acc[ROWS][kBlockVectors];
        const int steps = work.words * places(BITS) * kWordSteps<B, BITS>;
        multiply_key_words<B, BITS>(q.steps + row * q.stride + work.dim / B::kPerStep, q.stride,
                                    s_->words + v, work.words, fetch_ahead(steps), acc);
        const float* scales = q.scale + row * segments + work.segment;
        const float* shifts = q.shift + row * segments + work.segment;
        float* products = work.out + row * stride + v * kLanes;
        const Int before = splat(work.segment == 0 ? 0 : -1);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const float scale = scales[r * segments], shift = shifts[r * segments];
#pragma GCC unroll 8
            for (int n = 0; n < kBlockVectors; ++n) {
                float* to = products + r * stride + n * kLanes;
                const Float old = (Float)(load<Int>(to) & before);
                store(to, old + (B::value(acc[r][n]) * scale + shift));
            }
        }
    }

    void multiply_values(int64_t m, int padded) {
        const Tile& tile = s_->tiles[m];
        ValueWork work{m, 0, padded / 4, 0};
        for (int p = 0; p < group_.value.num_planes; ++p) {
            const Plane& plane = group_.value.planes[p];
            const int64_t chunk = kChunkVectors * vector_bytes(plane.bits);
            for (int64_t byte = 0; byte < plane.bytes; byte += chunk) {
                const int bytes = int(std::min(chunk, plane.bytes - byte));
                work.vectors = int(vectors_of(bytes, plane.bits));
                tile.with_rows(plane, 0, padded, [&](auto rows) {
                    value_words(rows, work.words, plane, byte, bytes, s_->words);
                });
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
    };

    template <int BITS>
    AP_INLINE void value_chunk(const ValueWork& work) {
        if constexpr (A::kNarrow) {
            value_blocks<WeightQuads<BITS>, BITS>(work);
            for (int64_t row = 0; row < piece_.rows; ++row)
                if (s_->weights.outlier[row] >= 0) add_outlier<BITS>(row, work);
        } else {
            value_blocks<A, BITS>(work);
        }
    }

    // Apart from the register blocks, which have no register to spare.
    template <int BITS>
    void add_outlier(int64_t row, const ValueWork& work) {
        const int token = s_->weights.outlier[row];
        const float weight = s_->weights.outlier_weight[row];
        const Word* words = s_->words + token / 4 * kChunkVectors;
        float* to = sum(work.m, row) + work.lane;
        for (int v = 0; v < work.vectors; ++v) {
            for (int k = 0; k < places(BITS); ++k, to += kLanes) {
                const Word codes = words[v] >> (token % 4 * 8 + BITS * k) & ((1u << BITS) - 1);
                store(to, load<Float>(to) + to_float(codes) * weight);
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
        const Weights& w = s_->weights;
        typename B::Sum acc[ROWS][N];
        const int words = BITS == 16 ? 2 * work.words : work.words;
        multiply_value_words<B, BITS, FIRST>(quads ? w.quads[row] : w.pairs[row], quads ? kTile / 4 : kTile,
                                             s_->words + v, words,
                                             fetch_ahead(words * kWordSteps<B, BITS>), acc);
        // Copies, as in `key_block`.
        const float* keeps = w.keep + row;
        const float* scales = (quads ? w.quad_scale : w.pair_scale) + row;
        const Int before = splat(begun_[work.m] ? -1 : 0);
        const int64_t stride = lanes_;
        float* sums = sum(work.m, row) + lane;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r, sums += stride) {
            const float keep = keeps[r], scale = scales[r];
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                float* to = sums + n * kLanes;
                const Float old = (Float)(load<Int>(to) & before);
                store(to, B::value(acc[r][n]) * scale + old * keep);
            }
        }
    }

    const Attend& args_;
    const Piece& piece_;
    const Group& group_;
    Scratch* s_;
    Queries<A> queries_[2];
    PreRopeKeys<A> own_;
    bool begun_[2] = {};
    int64_t lanes_;
    bool wide_weights_ = false;  // whether values need weights of more than 8 bits
    // Bytes of this head group in a block, and how far they have been asked for.
    int64_t first_byte_, end_byte_ = 0, ahead_step_;
    int64_t next_block_ = 0, next_byte_ = 0, last_ahead_ = 0;
};

}  // namespace
}  // namespace attentionpack
