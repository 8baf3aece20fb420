// Results of the pieces of a context, put together and normalised, for one instruction set.
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

class Merge {
  public:
    Merge(const Attend& args, const Piece* pieces, int64_t count)
        : args_(args),
          pieces_(pieces),
          count_(count),
          values_(args.groups[pieces->group].value),
          lanes_(value_lanes(values_)) {}

    void run(int64_t row) {
        constexpr float ln2 = 0.693147181f;
        const int64_t modalities = args_.modalities;
        float* out = args_.outputs[pieces_->group] + pieces_->place(args_, row) * values_.width;
        float* masses = out + modalities * lanes_;
        float& lse = args_.lse[pieces_->column(args_, row)];
        float top = kNothing, total = 0;
        for_each(row, [&](const Piece& piece, int64_t at) { top = std::max(top, piece.top[at]); });
        std::memset(masses, 0, modalities * sizeof(float));
        for_each(row, [&](const Piece& piece, int64_t at) {
            total += std::exp2(piece.top[at] - top) * piece.total[at];
        });
        lse = top == kNothing ? kNothing : (top + std::log2(total)) * ln2;
        for (int64_t m = 0; m < modalities; ++m, out += lanes_) {
            bool begun = false;
            for_each_of(m, row, [&](const Piece& piece, int64_t at) {
                const float share = std::exp2(piece.top[at] - top) / total;
                masses[m] += share * piece.total[at];
                add(piece.sums + at * lanes_, piece.zeros + at * kMaxPlanes, share, begun, out);
                begun = true;
            });
            if (!begun) std::memset(out, 0, lanes_ * sizeof(float));
        }
    }

  private:
    static constexpr float kNothing = -std::numeric_limits<float>::infinity();

    // Calls f(piece, index) for the pieces in which this row has seen a token.
    template <class F>
    AP_INLINE void for_each_of(int64_t m, int64_t row, F f) const {
        const int64_t at = m * pieces_->rows + row;
        for (const Piece* piece = pieces_; piece < pieces_ + count_; ++piece)
            if (piece->top[at] != kNothing) f(*piece, at);
    }

    template <class F>
    AP_INLINE void for_each(int64_t row, F f) const {
        for (int64_t m = 0; m < args_.modalities; ++m) for_each_of(m, row, f);
    }

    // out = [out +] share * (sums - zeros), where each plane has its own.
    void add(const float* sums, const float* zeros, float share, bool onto, float* out) const {
        for (int p = 0; p < values_.num_planes; ++p) {
            const int64_t lanes = plane_lanes(values_.planes[p]);
            const float zero = zeros[p] * share;
            for (int64_t i = 0; i < lanes; i += kLanes, sums += kLanes, out += kLanes) {
                const Float part = load<Float>(sums) * share - zero;
                store(out, onto ? load<Float>(out) + part : part);
            }
        }
    }

    const Attend& args_;
    const Piece* pieces_;
    int64_t count_;
    const Side& values_;
    int64_t lanes_;
};

}  // namespace
}  // namespace attentionpack
