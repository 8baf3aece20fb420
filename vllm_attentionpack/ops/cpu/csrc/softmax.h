// From the logits of a tile to the numbers that meet the codes of its values, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "products.h"
#include "tile.h"
#include "vector.h"

namespace attentionpack {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargestPair = 32767.0f, kLargestQuad = 255.0f;
// Weights of a tile go to 8 bits for planes of 2 and 4 bits. One that is more than this many times
// their root mean square is left out and added by itself; no tile has two. Rounding then adds at
// most 0.1 % to the energy of the error of dims of 2 bits (34 % of them) and 0.7 % to that of 4 bits
// (11 %), and for usual weights a fifth of that.
constexpr float kOutlier = 8.0f;
static_assert(kTile <= 2 * kOutlier * kOutlier, "room for one outlier only");
static_assert(kTile / 4 <= kQuadSteps, "sums of quads would overflow");

// Sums of a modality over the tiles so far, by lanes of the tokens; of the weights that were rounded,
// not of the exact ones, where codes have a zero point.
struct RunningRow {
    Float mass, pairs, quads;
};

// Weights of the values of a tile as integers.
struct Weights {
    // Pairs of 16-bit integers or floats; every four tokens in the order 0 2 1 3.
    alignas(64) int32_t pairs[kMaxRows][kTile];
    // Unsigned, without the row's outlier: a token of the tile, or none (-1).
    alignas(64) int32_t quads[kMaxRows][kTile / 4];
    float pair_scale[kMaxRows], quad_scale[kMaxRows];  // what one unit stands for
    int outlier[kMaxRows];
    float outlier_weight[kMaxRows];
    float keep[kMaxRows];  // the factor of what earlier tiles gave
};

// The softmax of kRowGroup rows over a tile: sums across lanes are then taken of all of them at once,
// and what follows from them is computed in lanes.
template <class A>
class TileSoftmax {
  public:
    // `products` become weights. `wide`: whether pairs are wanted beside quads.
    TileSoftmax(const Tile& tile, float (*products)[kTile], Weights& to, int64_t first, bool wide)
        : tile_(tile), products_(products), to_(to), first_(first), wide_(wide) {}

    // Only the first `count` rows exist; `top` and `mean_logit` are those of the first of them, with room
    // for all.
    void run(int count, const float* mean_logit, float* top, RunningRow* running) {
        const ByRow before = load<ByRow>(top), best = largest_logits(mean_logit, count);
        const ByRow now = best > before ? best : before;
        store(top, now);
        ByRow keep = ByRow{} + 1.0f;
        if (std::memcmp(&before, &now, sizeof now))
            for (int r = 0; r < count; ++r)
                if (before[r] != now[r]) keep[r] = std::exp2(before[r] - now[r]);
        store(to_.keep + first_, keep);
        const ByRow shift = load<ByRow>(mean_logit) - (now > -kInfinity ? now : ByRow{});
        weigh(shift, count, running);
        if constexpr (A::kPerStep == 1) {
            for (int r = 0; r < count; ++r) {
                for (int t = 0; t < kTile; t += kLanes)
                    store(to_.pairs[first_ + r] + t, middle_swapped(load<Int>(products_[r] + t)));
                to_.pair_scale[first_ + r] = 1;
            }
        } else {
            round(count, running);
        }
    }

  private:
    ByRow largest_logits(const float* mean_logit, int count) const {
        Float best[kRowGroup];
        for (int r = 0; r < kRowGroup; ++r) {
            best[r] = splat(-kInfinity);
            if (r >= count) continue;
            const float* products = products_[r];
#pragma GCC unroll 16
            for (int t = 0; t < kTile; t += kLanes) {
                const Float scale = load<Float>(tile_.key_scale + t);
                best[r] = maximum(best[r], load<Float>(products + t) * scale + mean_logit[r]);
            }
        }
        return largest_by_row(best);
    }

    void weigh(const ByRow& shift, int count, RunningRow* running) {
        constexpr int degree = A::kPerStep == 1 ? 6 : 4;  // what 16-bit weights can tell
        Float energy[kRowGroup], heaviest[kRowGroup];
        for (int r = 0; r < kRowGroup; ++r) {
            Float mass{}, squares{}, most{};
            float* products = products_[r];
            if (r < count) {
#pragma GCC unroll 16
                for (int t = 0; t < kTile; t += kLanes) {
                    const Float x = load<Float>(products + t) * load<Float>(tile_.key_scale + t) + shift[r];
                    const Float p = exp2_of<degree>(x);
                    mass = mass + p;
                    const Float weight = p * load<Float>(tile_.value_scale + t);
                    store(products + t, weight);
                    squares = squares + weight * weight;
                    most = maximum(most, weight);
                }
                running[r].mass = running[r].mass * to_.keep[first_ + r] + mass;
            }
            energy[r] = squares, heaviest[r] = most;
        }
        heaviest_ = largest_by_row(heaviest);
        if (A::kNarrow) energy_ = sum_by_row(energy);
    }

    void round(int count, RunningRow* running) {
        if (wide_) {
            const ByRow most = heaviest_ + 1e-30f;
            const ByRow inverse = kLargestPair / most, scale = most / kLargestPair;
            store(to_.pair_scale + first_, scale);
            for (int r = 0; r < count; ++r) {
                const Float total = to_float(round_to_pairs(r, inverse[r]));
                RunningRow& sums = running[r];
                sums.pairs = sums.pairs * to_.keep[first_ + r] + total * scale[r];
            }
        }
        if constexpr (A::kNarrow) {
            for (int r = 0; r < count; ++r) leave_out(r);
            const ByRow most = heaviest_ + 1e-30f;
            const ByRow inverse = kLargestQuad / most, scale = most / kLargestQuad;
            store(to_.quad_scale + first_, scale);
            for (int r = 0; r < count; ++r) {
                const Float total = to_float(round_to_quads(r, inverse[r]));
                RunningRow& sums = running[r];
                sums.quads = sums.quads * to_.keep[first_ + r] + total * scale[r];
                if (to_.outlier[first_ + r] >= 0) sums.quads[0] += to_.outlier_weight[first_ + r];
            }
        }
    }

    // Sets an outlier to zero.
    AP_INLINE void leave_out(int r) {
        const float most = heaviest_[r];
        to_.outlier[first_ + r] = -1;
        if (most * most * float(kTile) <= kOutlier * kOutlier * energy_[r]) return;
        float* weights = products_[r];
        Float place{};
        for (int t = 0; t < kTile; t += kLanes)
            place = maximum(place, load<Float>(weights + t) == most ? lane_numbers() + float(t) : Float{});
        const int at = int(largest(place));
        to_.outlier[first_ + r] = at;
        to_.outlier_weight[first_ + r] = weights[at];
        weights[at] = 0;
        heaviest_[r] = largest_magnitude(weights, kTile);
    }

    // Returns the sums of the integers.
    AP_INLINE Int round_to_pairs(int r, float inverse) {
        const float* weights = products_[r];
        int32_t* to = to_.pairs[first_ + r];
        Int total{};
#pragma GCC unroll 16
        for (int t = 0; t < kTile; t += 2 * kLanes, to += kLanes) {
            const Int pairs = packed_pairs(to_int(load<Float>(weights + t) * inverse),
                                           to_int(load<Float>(weights + t + kLanes) * inverse));
            store(to, pairs);
            total = dot(total, pairs, splat(0x00010001));
        }
        return total;
    }

    AP_INLINE Int round_to_quads(int r, float inverse) {
        const float* weights = products_[r];
        int32_t* to = to_.quads[first_ + r];
        Int total{};
#pragma GCC unroll 16
        for (int t = 0; t < kTile; t += 4 * kLanes, to += kLanes) {
            const auto number = [&](int i) {
                return to_int(load<Float>(weights + t + i * kLanes) * inverse);
            };
            const Int quads = packed_quads(number(0), number(1), number(2), number(3));
            store(to, quads);
            total = dot_quad<4>(total, quads, splat(0x01010101));
        }
        return total;
    }

    const Tile& tile_;
    float (*products_)[kTile];
    Weights& to_;
    int64_t first_;
    bool wide_;
    ByRow heaviest_, energy_;
};

}  // namespace
}  // namespace attentionpack
