// Latent queries as the numbers that meet words of keys, for one instruction set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "products.h"
#include "vector.h"

namespace attentionpack {
namespace {

constexpr float kLargest16 = 32767.0f, kLargest8 = 127.0f;
// Queries go to 8 bits for planes of 2 and 4 bits where that moves logits by less than this (root mean
// square).
constexpr float kQuadError = 0.01f;

// The next `count` of a work area, which begins with a cache line.
template <class T>
T* take(uint8_t*& memory, int64_t count) {
    T* result = reinterpret_cast<T*>(memory);
    memory += (count * sizeof(T) + 63) / 64 * 64;
    return result;
}

// Words of a plane that share a scale of the queries and are multiplied at a time. Sums of 16-bit
// numbers times codes fit an int32.
template <class A>
AP_INLINE int64_t words_per_segment(int64_t bits) {
    if (A::kPerStep == 1) return kSubWords;
    const int64_t dims = INT32_MAX / (int64_t(kLargest16) * ((1 << bits) - 1));
    const int64_t fit = std::min<int64_t>(dims * bits / 32, kSubWords);
    return A::kNarrow && bits == 2 ? std::min<int64_t>(fit, kQuadSteps * bits / 8) : fit;
}

// Calls f(plane, first word, words) for every segment.
template <class A, class F>
AP_INLINE void for_segments(const Side& side, F f) {
    for (int p = 0; p < side.num_planes; ++p) {
        const Plane& plane = side.planes[p];
        const int64_t limit = words_per_segment<A>(plane.bits), words = plane.bytes / 4;
        for (int64_t w = 0; w < words; w += limit) f(plane, w, std::min(limit, words - w));
    }
}

// Queries of one piece and modality; or rows of a basis, whose products are parts of keys.
template <class A>
class Queries {
  public:
    // As floats or 16-bit pairs, or as 8-bit quads; in the order of the key's words.
    struct Numbers {
        int32_t* steps;  // [rows][stride]
        float* scale;    // [rows][segments]
        float* shift;    // [rows][segments]: what the zero points of the codes amount to
        int64_t stride;
    };
    Numbers wide, quads;
    float* reach;       // [segments]: tokens of this scale or less may meet quads; -1: none
    float* mean_logit;  // [rows], room for whole groups of rows
    bool* widened;      // [segments]
    int64_t segments;

    void lay_out(const Side& key, int64_t rows, uint8_t*& memory) {
        segments = 0;
        for_segments<A>(key, [&](const Plane&, int64_t, int64_t) { ++segments; });
        const auto numbers = [&](Numbers& out, int per_step) {
            out.stride = key.rank / per_step;
            out.steps = take<int32_t>(memory, rows * out.stride);
            out.scale = take<float>(memory, rows * segments);
            out.shift = take<float>(memory, rows * segments);
        };
        numbers(wide, A::kPerStep);
        if (A::kNarrow) numbers(quads, 4);
        reach = take<float>(memory, segments);
        mean_logit = take<float>(memory, rows + kRowGroup);
        widened = take<bool>(memory, segments);
    }

    // `factor`: of the products, where they become logits.
    void limit_reach(float factor) {
        for (int64_t s = 0; s < segments; ++s) reach[s] /= std::max(factor, 1e-30f);
    }

    static int64_t memory(int64_t rows, int64_t rank) {
        return rows * (rank + 64 + rank / 4) * 4 + rank + 1024;
    }

    // `rows` point to the latent queries, in the order of the keys' words, and stay valid; `means` to the
    // logits of the mean keys, null for none. Planes that may meet quads get no wide numbers before `widen`.
    void prepare(const Side& key, const float* const* rows, const float* const* means, int64_t count) {
        for (int64_t row = 0; row < count; ++row) mean_logit[row] = means ? *means[row] * kLog2E : 0;
        rows_ = rows, count_ = count;
        int64_t segment = 0, dim = 0;
        for_segments<A>(key, [&](const Plane& plane, int64_t, int64_t words) {
            const int64_t dims = words * 32 / plane.bits;
            reach[segment] = -1;
            widened[segment] = !(A::kNarrow && by_quads(plane.bits));
            if (widened[segment]) {
                set_wide(plane, segment, dim, dims);
            } else {
                const float most = set<int8_t>(quads, plane, segment, dim, dims, kLargest8);
                reach[segment] = quad_reach(plane.bits, most, key.rank);
            }
            dim += dims;
            ++segment;
        });
    }

    AP_INLINE void widen(const Plane& plane, int64_t segment, int64_t dim, int64_t dims) {
        if (widened[segment]) return;
        widened[segment] = true;
        set_wide(plane, segment, dim, dims);
    }

  private:
    AP_NOINLINE void set_wide(const Plane& plane, int64_t segment, int64_t dim, int64_t dims) {
        if constexpr (A::kPerStep == 2) {
            set<int16_t>(wide, plane, segment, dim, dims, kLargest16);
        } else {
            for (int64_t row = 0; row < count_; ++row) {
                std::memcpy(wide.steps + row * wide.stride + dim, rows_[row] + dim, dims * 4);
                wide.scale[row * segments + segment] = kLog2E;
                wide.shift[row * segments + segment] = 0;
            }
        }
    }

    // Returns the largest magnitude of all rows.
    template <class T>
    AP_NOINLINE float set(Numbers& to, const Plane& plane, int64_t segment, int64_t dim, int64_t dims,
                          float limit) {
        const float zero = 0.5f * float(zero_doubled(plane.bits));
        float highest = 0;
        for (int64_t first = 0; first < count_; first += kRowGroup) {
            const int64_t count = std::min<int64_t>(kRowGroup, count_ - first);
            const float* rows[kRowGroup];
            for (int64_t r = 0; r < kRowGroup; ++r) rows[r] = rows_[first + std::min(r, count - 1)];
            const ByRow most = largest_magnitudes(rows, dim, dims);
            const ByRow factor = limit / most, scale = most * (kLog2E / limit);
            Float sums[kRowGroup] = {};
            for (int64_t r = 0; r < count; ++r) {
                int32_t* out = to.steps + (first + r) * to.stride + dim * int64_t(sizeof(T)) / 4;
                sums[r] = quantize<T>(rows[r] + dim, dims, factor[r], out);
                highest = std::max(highest, most[r]);
            }
            const ByRow shift = -scale * zero * sum_by_row(sums);
            for (int64_t r = 0; r < count; ++r) {
                to.scale[(first + r) * segments + segment] = scale[r];
                to.shift[(first + r) * segments + segment] = shift[r];
            }
        }
        return highest;
    }

    // The largest scale of tokens whose logits 8-bit queries of at most this magnitude leave as they
    // are, but for kQuadError. A number is off by 0.29 steps, a code of 2 bits by 1.1 from zero, one
    // of 4 bits by 3.0.
    static float quad_reach(int64_t bits, float most, int64_t rank) {
        const float code = bits == 2 ? 1.1f : 3.0f;
        const float error = 0.29f * most / kLargest8 * code * std::sqrt(float(rank));
        return kQuadError / std::max(error, 1e-30f);
    }

    const float* const* rows_;
    int64_t count_;
};

}  // namespace
}  // namespace attentionpack
