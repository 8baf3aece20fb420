// Quantising one token's latent and writing it into its slot, for one instruction set. The scale is
// chosen as in `codec/quantize.py::choose_scale`: the same candidates, the same order.
#pragma once

#include <algorithm>
#include <cmath>

#include "api.h"
#include "kernels.h"
#include "vector.h"

namespace attentionpack {
namespace {

constexpr int kScaleZeroPoint = 64, kScaleSteps = 8, kModalityBit = 0x80;

class TokenStore {
  public:
    TokenStore(const Store& args, int64_t token, float* memory)
        : args_(args), side_(args.side), rank_(args.side.rank), latent_(memory) {
        visual_ = args.visual && args.visual[token];
        const int64_t basis = args.modalities == 2 && visual_ ? 1 : 0;
        weight_ = args.weight + basis * rank_;
        zero_ = memory + padded(rank_);
        codes_ = zero_ + padded(rank_);
        source_ = args.latent + token * args.rank;
        const int64_t slot = args.slots[token];
        block_ = args.cache + slot / args.block_size * args.block_bytes;
        slot_ = slot % args.block_size;
    }

    void run() {
        for (int64_t i = 0; i < rank_; i += kLanes)
            store(latent_ + i, part(source_, i, rank_));
        if (side_.planes[0].bits == 16) return write_16();
        int64_t dim = 0;
        for (int p = 0; p < side_.num_planes; ++p) {
            const Plane& plane = side_.planes[p];
            std::fill_n(zero_ + dim, plane.dims, zero_of(plane.bits));
            dim += plane.dims;
        }
        // Both parts of a pair are of one latent and one code.
        for_pairs([&](int64_t high, int64_t low, int bits) {
            latent_[low] = latent_[high];
            zero_[high] = zero_[low] = zero_of(8 + bits);
        });
        write(choose());
    }

    static int64_t memory(int64_t rank) { return 3 * padded(rank); }

  private:
    static int64_t padded(int64_t rank) { return (rank + 15) / 16 * 16; }

    static float zero_of(int64_t bits) { return 0.5f * float((1 << bits) - 1); }

    // Calls f(high, low, bits of the low part) for every pair of columns.
    template <class F>
    void for_pairs(F f) const {
        int64_t end = 0, high = 0;
        for (int p = 0; p < side_.num_planes; ++p) {
            const int bits = int(side_.planes[p].bits);
            const int64_t pairs = bits == 4 ? side_.dims_12 : bits == 2 ? side_.dims_10 : 0;
            end += side_.planes[p].dims;
            for (int64_t low = end - pairs; low < end; ++low) f(high++, low, bits);
        }
    }

    // The scale byte, without the modality.
    int choose() {
        Float energy{}, fit{};
        for (int64_t i = 0; i < rank_; i += kLanes) {
            const Float x = part(latent_, i, rank_);
            const Float unit = x * part(args_.step, i, rank_);
            energy = energy + unit * unit;
            const Float magnitude = maximum(x, Float{} - x);
            fit = maximum(fit, magnitude / (part(zero_, i, rank_) + 0.5f));
        }
        const float rms = std::sqrt(sum(energy) / float(rank_)), largest_fit = largest(fit);
        const float candidates[] = {rms, 0.8f * rms, 1.3f * rms, largest_fit, 0.8f * largest_fit};
        int best = -1;
        float best_error = 0;
        int tried[5], count = 0;
        for (float candidate : candidates) {
            const float exponent = std::log2(std::max(1e-9f, candidate)) * kScaleSteps;
            const float clamped =
                std::min(std::max(float(-kScaleZeroPoint), exponent),
                         float(kModalityBit - 1 - kScaleZeroPoint));  // before it is an integer
            const int byte = int(std::nearbyint(clamped)) + kScaleZeroPoint;
            if (std::find(tried, tried + count, byte) != tried + count) continue;
            tried[count++] = byte;
            const float error = this->error(kScales.value[byte]);
            if (best < 0 || error < best_error) best = byte, best_error = error;
        }
        return best;
    }

    // The codes of latents in units of the scale.
    static AP_INLINE Float code(Float latent, Float zero) {
        return minimum(maximum(round_even(latent + zero), Float{}), zero + zero);
    }

    // Times the inverse instead of divided by the scale: of two scales that do equally well by this
    // small a difference, either will do.
    float error(float scale) const {
        const float inverse = 1 / scale;
        Float total{};
        for (int64_t i = 0; i < rank_; i += kLanes) {
            const Float x = part(latent_, i, rank_), zero = part(zero_, i, rank_);
            const Float off = x - (code(x * inverse, zero) - zero) * scale;
            total = total + off * off * part(weight_, i, rank_);
        }
        return sum(total);
    }

    void write(int byte) {
        const float scale = kScales.value[byte];
        for (int64_t i = 0; i < rank_; i += kLanes)
            store(codes_ + i, code(part(latent_, i, rank_) / scale, part(zero_, i, rank_)));
        for_pairs([&](int64_t high, int64_t low, int bits) {
            const int whole = int(codes_[high]);
            codes_[high] = float(whole >> bits);
            codes_[low] = float(whole & ((1 << bits) - 1));
        });
        block_[side_.scales + slot_] = uint8_t(byte | (visual_ ? kModalityBit : 0));
        const float* codes = codes_;
        for (int p = 0; p < side_.num_planes; ++p) {
            const Plane& plane = side_.planes[p];
            uint8_t* to = block_ + plane.offset + slot_ * plane.bytes;
            for (int64_t j = 0; j < plane.bytes; j += kLanes) {
                Int packed{};
                for (int64_t k = 0; k < 8 / plane.bits; ++k)
                    packed |= to_int(part(codes + k * plane.bytes, j, plane.bytes))
                              << int(k * plane.bits);
                const auto bytes = narrowed<uint8_t>(packed);
                std::memcpy(to + j, &bytes, std::min<int64_t>(kLanes, plane.bytes - j));
            }
            codes += plane.dims;
        }
    }

    // bfloat16 latents, rounded to the nearest, halves to even.
    void write_16() {
        const Plane& plane = side_.planes[0];
        uint8_t* to = block_ + plane.offset + slot_ * plane.bytes;
        for (int64_t i = 0; i < rank_; ++i) {
            uint32_t bits;
            std::memcpy(&bits, latent_ + i, 4);
            const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
            const uint16_t high =
                nan ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
            std::memcpy(to + 2 * i, &high, 2);
        }
        block_[side_.scales + slot_] = uint8_t(kScaleZeroPoint | (visual_ ? kModalityBit : 0));
    }

    const Store& args_;
    const Side& side_;
    int64_t rank_;
    float* latent_;
    float* zero_;
    float* codes_;
    const float* source_;
    const float* weight_;
    uint8_t* block_;
    int64_t slot_;
    bool visual_;
};

}  // namespace
}  // namespace attentionpack
