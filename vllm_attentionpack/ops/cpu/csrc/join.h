// Attention to disjoint sets of keys put together, one row of results at a time, for one instruction
// set.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "api.h"
#include "exact.h"
#include "kernels.h"
#include "vector.h"

namespace attentionpack {
namespace {

// One query head of one token: `row` counts both.
void join_row(const Join& args, int64_t row) {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    const int64_t token = row / args.heads, head = row % args.heads, dims = args.head_size;
    float top = nothing, total = 0;
    for (int64_t p = 0; p < args.num_parts; ++p) top = std::max(top, args.parts[p].lse[row]);
    // A set without a token has no share, whatever its output holds.
    int64_t seen = 0, type[kMaxParts], at[kMaxParts];
    const void* from[kMaxParts];
    float share[kMaxParts];
    for (int64_t p = 0; p < args.num_parts; ++p) {
        const Join::Part& part = args.parts[p];
        if (part.lse[row] == nothing) continue;
        from[seen] = part.out;
        type[seen] = part.type;
        at[seen] = token * part.token + head * part.head;
        share[seen] = std::exp(part.lse[row] - top);
        total += share[seen++];
    }
    args.lse[row] = top + std::log(total);
    for (int64_t p = 0; p < seen; ++p) share[p] /= total;
    float* out = args.out + row * dims;
    for (int64_t i = 0; i < dims; i += kLanes) {
        const int64_t count = std::min<int64_t>(kLanes, dims - i);
        Float sum{};
        for (int64_t p = 0; p < seen; ++p) sum += head_of(from[p], at[p] + i, type[p], count) * share[p];
        std::memcpy(out + i, &sum, 4 * count);
    }
}

}  // namespace
}  // namespace attentionpack
