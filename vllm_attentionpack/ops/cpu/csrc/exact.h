// Attention of a request's new tokens to its exact cached ones, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "api.h"
#include "kernels.h"
#include "vector.h"

namespace attentionpack {
namespace {

// Sixteen bits of bfloat16 or of IEEE half precision as floats.
AP_INLINE Float widened(Halves bits, int64_t type) {
    const Word word = __builtin_convertvector(bits, Word);
    if (type == Number::kBFloat16) return (Float)(word << 16);
    // The exponent is 112 too small, which a product mends, subnormal numbers included.
    const Float magnitude = (Float)((word & 0x7fff) << 13) * 0x1p112f;
    const Word special = (Word)((word & 0x7c00) == 0x7c00) & 0x7f800000;
    return (Float)((Word)magnitude | special | ((word & 0x8000) << 16));
}

// `count` numbers of a head from element `at` on, at most a vector of them; the rest is zero.
AP_INLINE Float head_of(const void* from, int64_t at, int64_t type, int64_t count) {
    if (type == Number::kFloat32) {
        const float* row = static_cast<const float*>(from) + at;
        return count == kLanes ? load<Float>(row) : load_head<Float>(row, int(4 * count));
    }
    const uint16_t* row = static_cast<const uint16_t*>(from) + at;
    return widened(count == kLanes ? load<Halves>(row) : load_head<Halves>(row, int(2 * count)), type);
}

int64_t padded(int64_t dims) { return (dims + kLanes - 1) / kLanes * kLanes; }

int64_t exact_memory(const Exact& args, int64_t rows) {
    const int64_t floats = padded(args.head_size) * (2 * rows + 1) + rows * padded(args.most);
    return floats * int64_t(sizeof(float)) + args.most * int64_t(sizeof(int64_t));
}

// Some queries of one request, all query heads of one KV head. Rows are (query, repeat).
class ExactAttention {
  public:
    ExactAttention(const Exact& args, const ExactPiece& piece, uint8_t* memory)
        : args_(args), piece_(piece), rows_(piece.queries * args.repeats) {
        width_ = padded(args.head_size);
        stride_ = padded(args.most);
        query_ = reinterpret_cast<float*>(memory);
        sums_ = query_ + rows_ * width_;
        token_ = sums_ + rows_ * width_;
        weights_ = token_ + width_;
        places_ = reinterpret_cast<int64_t*>(weights_ + rows_ * stride_);
        for (int64_t i = 0; i < args.most; ++i) {
            const int64_t at = piece.request * args.most + i;
            if (!args.present[at]) continue;
            const int64_t slot = args.slots[at];
            places_[count_++] = slot / args.block_size * args.block_stride +
                                slot % args.block_size * args.token_stride +
                                piece.head * args.head_stride;
        }
    }

    void run() {
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t head = piece_.head * args_.repeats + row % args_.repeats;
            const int64_t at = token(row) * args_.query_token + head * args_.query_head;
            widen(args_.query, at, query_ + row * width_);
            for (int64_t i = 0; i < width_; i += kLanes) {
                float* part = query_ + row * width_ + i;
                store(part, load<Float>(part) * float(args_.scale));
            }
        }
        for (int64_t t = 0; t < count_; ++t) {
            widen(args_.pages, places_[t], token_);
            for (int64_t row = 0; row < rows_; ++row)
                weights_[row * stride_ + t] = product(query_ + row * width_);
        }
        for (int64_t row = 0; row < rows_; ++row) soften(row);
        std::fill(sums_, sums_ + rows_ * width_, 0.0f);
        for (int64_t t = 0; t < count_; ++t) {
            widen(args_.pages, places_[t] + args_.side_stride, token_);
            for (int64_t row = 0; row < rows_; ++row)
                add(weights_[row * stride_ + t], sums_ + row * width_);
        }
        for (int64_t row = 0; row < rows_; ++row)
            std::memcpy(args_.out + result(row) * args_.head_size, sums_ + row * width_,
                        args_.head_size * sizeof(float));
    }

  private:
    int64_t token(int64_t row) const { return piece_.first_token + row / args_.repeats; }

    int64_t result(int64_t row) const {
        return (token(row) * args_.kv_heads + piece_.head) * args_.repeats + row % args_.repeats;
    }

    // One head of a token, with zeros up to whole vectors.
    void widen(const void* from, int64_t at, float* to) const {
        const int64_t dims = args_.head_size;
        for (int64_t i = 0; i < dims; i += kLanes)
            store(to + i, head_of(from, at + i, args_.type, std::min<int64_t>(kLanes, dims - i)));
    }

    float product(const float* query) const {
        Float acc{};
        for (int64_t i = 0; i < width_; i += kLanes)
            acc += load<Float>(query + i) * load<Float>(token_ + i);
        return sum(acc);
    }

    void add(float weight, float* sums) const {
        for (int64_t i = 0; i < width_; i += kLanes)
            store(sums + i, load<Float>(sums + i) + weight * load<Float>(token_ + i));
    }

    // Logits of a row to softmax weights.
    void soften(int64_t row) {
        float* logits = weights_ + row * stride_;
        float& lse = args_.lse[result(row)];
        lse = -std::numeric_limits<float>::infinity();
        if (!count_) return;
        const float top = *std::max_element(logits, logits + count_);
        Float totals{};
        for (int64_t t = 0; t < count_; t += kLanes) {
            Float weight = exp2_of<6>((part(logits, t, count_) - top) * kLog2E);
            for (int64_t lane = count_ - t; lane < kLanes; ++lane) weight[lane] = 0.0f;
            totals += weight;
            store(logits + t, weight);
        }
        const float total = sum(totals);
        lse = top + std::log(total);
        for (int64_t t = 0; t < count_; t += kLanes)
            store(logits + t, load<Float>(logits + t) * (1.0f / total));
    }

    const Exact& args_;
    const ExactPiece& piece_;
    int64_t rows_, width_, stride_, count_ = 0;
    float *query_, *sums_, *token_, *weights_;
    int64_t* places_;
};

}  // namespace
}  // namespace attentionpack
