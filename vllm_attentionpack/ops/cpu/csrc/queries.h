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
// Logits are logarithms to the base of two.
constexpr float kLog2E = 1.44269504f;
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

// Words of a plane that share a scale of the queries and are multiplied at a time.
template <class A>
AP_INLINE int64_t words_per_segment(int64_t bits) {
    const int64_t fit = std::min<int64_t>(kSteps * A::kPerStep * bits / 32, kSubWords);
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

// Queries of one piece and modality.
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
    float* mean_logit;  // [rows]
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
        mean_logit = take<float>(memory, rows);
    }

    static int64_t memory(int64_t rows, int64_t rank) {
        return rows * (rank + 64 + rank / 4) * 4 + rank + 1024;
    }

    // `rows` point to the latent queries, in the order of the keys' words; `means` to the logits of the
    // mean keys.
    void prepare(const Side& key, const float* const* rows, const float* const* means, int64_t count) {
        for (int64_t row = 0; row < count; ++row) mean_logit[row] = *means[row] * kLog2E;
        int64_t segment = 0, dim = 0;
        for_segments<A>(key, [&](const Plane& plane, int64_t, int64_t words) {
            const int64_t dims = words * 32 / plane.bits;
            const float zero = 0.5f * float(zero_doubled(plane.bits));
            const bool by_eight = A::kNarrow && by_quads(plane.bits);
            float highest = 0;
            for (int64_t row = 0; row < count; ++row) {
                const float* from = rows[row] + dim;
                const float most = largest_magnitude(from, dims);
                const int64_t at = row * segments + segment;
                highest = std::max(highest, most);
                if constexpr (A::kPerStep == 1) {
                    std::memcpy(wide.steps + row * wide.stride + dim, from, dims * 4);
                    wide.scale[at] = kLog2E;
                    wide.shift[at] = 0;
                } else {
                    set<int16_t>(wide, row, at, dim, from, dims, most, kLargest16, zero);
                    if (by_eight) {
                        int32_t* out = set<int8_t>(quads, row, at, dim, from, dims, most, kLargest8, zero);
                        order_quads(out, dims / 4);
                    }
                }
            }
            reach[segment] = by_eight ? quad_reach(plane.bits, highest, key.rank) : -1;
            dim += dims;
            ++segment;
        });
    }

  private:
    template <class T>
    int32_t* set(Numbers& to, int64_t row, int64_t at, int64_t dim, const float* from, int64_t dims,
                 float most, float limit, float zero) {
        int32_t* out = to.steps + row * to.stride + dim * int64_t(sizeof(T)) / 4;
        float total;
        to.scale[at] = kLog2E * quantize<T>(from, dims, most, limit, out, &total);
        to.shift[at] = -to.scale[at] * zero * total;
        return out;
    }

    // The largest scale of tokens whose logits 8-bit queries of at most this magnitude leave as they
    // are, but for kQuadError. A number is off by 0.29 steps, a code of 2 bits by 1.1 from zero, one
    // of 4 bits by 3.0.
    static float quad_reach(int64_t bits, float most, int64_t rank) {
        const float code = bits == 2 ? 1.1f : 3.0f;
        const float error = 0.29f * most / kLargest8 * code * std::sqrt(float(rank));
        return kQuadError / std::max(error, 1e-30f);
    }
};

}  // namespace
}  // namespace attentionpack
