// Tiles of tokens of one modality: where their codes lie, and their scales.
#pragma once

#include <algorithm>
#include <limits>

#include "kernels.h"
#include "products.h"
#include "vector.h"
#include "words.h"

namespace attentionpack {
namespace {

constexpr int kTile = 128;

// Tokens of one modality, in the order of their positions. After `fill` all places stand for some token.
struct Tile {
    int count = 0;
    bool one_run = false;  // whether the tokens are neighbours in one block
    const uint8_t* block[kTile];
    uint32_t slot[kTile];
    int32_t position[kTile];
    alignas(64) float key_scale[kTile];
    alignas(64) float value_scale[kTile];

    // Takes tokens in the slots from `slot` on that are of one modality; returns how many had room.
    AP_INLINE int64_t take(const uint8_t* from, int64_t first, int64_t tokens, int64_t at,
                           const Group& group) {
        const int64_t taken = std::min<int64_t>(tokens, kTile - count);
        one_run = count == 0;
        for (int64_t i = 0; i < taken; ++i) {
            block[count + i] = from;
            slot[count + i] = uint32_t(first + i);
            position[count + i] = int32_t(at + i);
        }
        read_scales(from + group.key.scales + first, taken, key_scale + count);
        read_scales(from + group.value.scales + first, taken, value_scale + count);
        count += int(taken);
        return taken;
    }

    // Room for whole vectors: repeated tokens get no weight. Returns how many places there are.
    AP_INLINE int fill() {
        constexpr int whole = kBlockVectors * kLanes;
        if (count < kTile) one_run = false;
        for (int t = count; t < kTile; ++t) {
            block[t] = block[0];
            slot[t] = slot[0];
            key_scale[t] = std::numeric_limits<float>::min();  // minus infinity stays what it is
            value_scale[t] = 0;
        }
        return (count + whole - 1) / whole * whole;
    }

    // Calls f(rows) with where the codes of a plane begin, of `tokens` tokens; a multiple of 8 of them.
    template <class F>
    AP_INLINE void with_rows(const Plane& plane, int from, int tokens, F f) const {
        const int64_t offset = plane.offset;
        const uint32_t bytes = uint32_t(plane.bytes);  // so that the product is of 32 bits each
        if (one_run) return f(Run{block[0] + offset + (slot[0] + from) * plane.bytes, plane.bytes});
        const uint8_t* rows[kTile];
        for (int t = 0; t < tokens; t += 8)
#pragma GCC unroll 8
            for (int i = t; i < t + 8; ++i)
                rows[i] = block[from + i] + (offset + uint64_t(slot[from + i]) * bytes);
        f(Scattered{rows});
    }

    // How many of the tokens are before position `end`.
    int before(int64_t end) const {
        if (position[count - 1] < end) return count;
        return int(std::lower_bound(position, position + count, end) - position);
    }

  private:
    static AP_INLINE void read_scales(const uint8_t* bytes, int64_t tokens, float* out) {
        constexpr int kOne = 64;  // the byte of a scale of one; eight steps double it
        int64_t i = 0;
        for (; i + kLanes <= tokens; i += kLanes) {
            const Word byte = load_bytes(bytes + i) & 127;
            const Word power = (byte >> 3) - kOne / 8;
            store(out + i, (Word)look_up(kScales.value + kOne, byte & 7) + (power << 23));
        }
        for (; i < tokens; ++i) out[i] = kScales.value[bytes[i] & 127];
    }
};

}  // namespace
}  // namespace attentionpack
