// Keys that are coded pre-RoPE: rebuilt for the tokens of a part of a tile, turned, and met by queries.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "products.h"
#include "queries.h"
#include "tile.h"
#include "vector.h"

namespace attentionpack {
namespace {

template <class A>
class PreRopeKeys {
  public:
    int64_t rows = 0;     // of the basis, those of all KV heads of the group
    Queries<A> basis[2];  // by modality
    float* rebuilt;       // [rows][kSub], in units of the token's scale

    void lay_out(const Attend& args, const Piece& piece, uint8_t*& memory) {
        args_ = &args, piece_ = &piece;
        planes_ = args.own.planes;
        rows = args.heads_per_group * 2 * planes_;
        if (!rows) return;
        pointers_ = take<const float*>(memory, args.modalities * rows);
        rebuilt = take<float>(memory, rows * kSub);
        cos_ = take<float>(memory, planes_ * kSub);
        sin_ = take<float>(memory, planes_ * kSub);
        for (int64_t m = 0; m < args.modalities; ++m)
            basis[m].lay_out(args.groups[piece.group].key, rows, memory);
    }

    static int64_t memory(const Attend& args, int64_t rank) {
        const int64_t rows = args.heads_per_group * 2 * args.own.planes;
        if (!rows) return 0;
        return rows * (8 * args.modalities + 4 * kSub) + args.own.planes * 8 * kSub + 1024 +
               args.modalities * (Queries<A>::memory(rows, rank) + 8 * rows * 4 + 1024);
    }

    void prepare() {
        if (!rows) return;
        const Side& key = args_->groups[piece_->group].key;
        float most = 0;
        for (int64_t row = 0; row < piece_->rows; ++row) {
            const float* query = query_of(row);
            float squares = 0;
            for (int64_t i = 0; i < 2 * planes_; ++i) squares += query[i] * query[i];
            most = std::max(most, squares);
        }
        for (int64_t m = 0; m < args_->modalities; ++m) {
            const float** pointers = pointers_ + m * rows;
            for (int64_t r = 0; r < rows; ++r)
                pointers[r] = args_->own.basis[piece_->group] + (m * rows + r) * key.rank;
            basis[m].prepare(key, pointers, nullptr, rows);
            basis[m].limit_reach(std::sqrt(most));
        }
    }

    // Adds to the logits [piece.rows][kTile] of tokens `from` on, which are in units of their scales.
    void add_logits(const Tile& tile, int64_t m, int from, int count, float (*logits)[kTile]) {
        look_up(tile, from, count);
        turn(tile, m, from, count);
        for (int64_t row = 0; row < piece_->rows; ++row) {
            const int64_t heads = args_->heads_per_group * args_->repeats;
            const int64_t head = (piece_->first_row + row) % heads / args_->repeats;
            const float* keys = rebuilt + head * 2 * planes_ * kSub;
            const float* query = query_of(row);
            float* out = logits[row] + from;
            for (int t = 0; t < count; t += kLanes) {
                Float sum = load<Float>(out + t);
                for (int64_t i = 0; i < 2 * planes_; ++i)
                    sum = sum + load<Float>(keys + i * kSub + t) * query[i];
                store(out + t, sum);
            }
        }
    }

  private:
    const float* query_of(int64_t row) const {
        return args_->own.query + piece_->column(*args_, row) * 2 * planes_;
    }

    // The angles of the tokens, side by side.
    void look_up(const Tile& tile, int from, int count) {
        const PreRope& own = args_->own;
        const int32_t* known =
            own.positions ? own.positions + piece_->request * own.positions_stride : nullptr;
        int32_t at[kSub];
        for (int t = 0; t < count; ++t) {
            // Places that are filled up stand for no token.
            const int32_t token = tile.position[std::min(from + t, tile.count - 1)];
            at[t] = known ? known[token] : token;
        }
        for (int t = 0; t < count; ++t) {
            const float *cos = own.cos + at[t] * planes_, *sin = own.sin + at[t] * planes_;
            for (int64_t p = 0; p < planes_; ++p)
                cos_[p * kSub + t] = cos[p], sin_[p * kSub + t] = sin[p];
        }
    }

    void turn(const Tile& tile, int64_t m, int from, int count) {
        constexpr float log2e = 1.442695041f;
        const float* mean = args_->own.mean[piece_->group] + m * rows;
        for (int t = 0; t < count; t += kLanes) {
            const Float unit = log2e / load<Float>(tile.key_scale + from + t);
            for (int64_t head = 0; head < args_->heads_per_group; ++head) {
                for (int64_t p = 0; p < planes_; ++p) {
                    const int64_t at = head * 2 * planes_ + p;
                    float *first = rebuilt + at * kSub + t, *second = first + planes_ * kSub;
                    const Float a = load<Float>(first) + unit * mean[at];
                    const Float b = load<Float>(second) + unit * mean[at + planes_];
                    const Float c = load<Float>(cos_ + p * kSub + t), s = load<Float>(sin_ + p * kSub + t);
                    store(first, a * c - b * s);
                    store(second, b * c + a * s);
                }
            }
        }
    }

    const Attend* args_;
    const Piece* piece_;
    int64_t planes_ = 0;
    const float** pointers_;  // [M][rows]
    float *cos_, *sin_;  // [planes][kSub]
};

}  // namespace
}  // namespace attentionpack
