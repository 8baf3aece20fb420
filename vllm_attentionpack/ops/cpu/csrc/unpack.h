// Codes of tokens back to latents, row by row, for one instruction set.
#pragma once

#include <algorithm>

#include "api.h"
#include "kernels.h"
#include "vector.h"

namespace attentionpack {
namespace {

// The lanes as bfloat16, rounded to the nearest, halves to even; no lane is NaN.
AP_INLINE auto bfloat16_bits(Float x) {
    const Word bits = (Word)x;
    return narrowed<uint16_t>((Int)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16));
}

class TokenUnpack {
  public:
    TokenUnpack(const Unpack& args, int64_t token)
        : args_(args),
          side_(args.side),
          block_(args.cache + int64_t(args.blocks[token / args.block_size]) * args.block_bytes),
          slot_(token % args.block_size),
          at_(token * side_.rank) {
        const uint8_t byte = block_[side_.scales + slot_];
        scale_ = kScales.value[byte & 127];
        args.visual[token] = byte >> 7;
    }

    void run() {
        for (int p = 0; p < side_.num_planes; ++p) {
            const Plane& plane = side_.planes[p];
            const uint8_t* row = block_ + plane.offset + slot_ * plane.bytes;
            switch (plane.bits) {
                case 8: codes<8>(plane, row); break;
                case 4: codes<4>(plane, row); break;
                case 2: codes<2>(plane, row); break;
                default: halves(plane, row);
            }
            at_ += plane.dims;
        }
    }

  private:
    template <int BITS>
    void codes(const Plane& plane, const uint8_t* row) {
        constexpr uint32_t mask = (1u << BITS) - 1;
        for (int64_t byte = 0; byte < plane.bytes; byte += kLanes) {
            const int count = int(std::min<int64_t>(kLanes, plane.bytes - byte));
            const Word word =
                count == kLanes ? load_bytes(row + byte) : load_bytes(row + byte, count);
            for (int k = 0; k < 8 / BITS; ++k) {
                const Float code = to_float((word >> (BITS * k)) & mask);
                write(at_ + k * plane.bytes + byte, (code - 0.5f * float(mask)) * scale_, count);
            }
        }
    }

    void halves(const Plane& plane, const uint8_t* row) {
        for (int64_t dim = 0; dim < plane.dims; dim += kLanes) {
            const int count = int(std::min<int64_t>(kLanes, plane.dims - dim));
            const Word word =
                __builtin_convertvector(load_head<Halves>(row + 2 * dim, 2 * count), Word);
            write(at_ + dim, (Float)(word << 16), count);
        }
    }

    AP_INLINE void write(int64_t at, Float x, int count) {
        if (args_.bfloat16) {
            const auto bits = bfloat16_bits(x);
            std::memcpy(static_cast<uint16_t*>(args_.latent) + at, &bits, count * 2);
        } else {
            std::memcpy(static_cast<float*>(args_.latent) + at, &x, count * 4);
        }
    }

    const Unpack& args_;
    const Side& side_;
    const uint8_t* block_;
    int64_t slot_, at_;
    float scale_;
};

}  // namespace
}  // namespace attentionpack
