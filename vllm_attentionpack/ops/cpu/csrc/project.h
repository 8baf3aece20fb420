// The maps in and out, `x @ matrix`, of a few rows: for one instruction set.
//
// The general products of a BLAS bring both matrices into an order of their own at every call, which
// for a few rows costs as much as the product. Here the matrix has its order since it was loaded,
// and rows are rounded to integers as attention rounds them, which doubles the products per cycle.
#pragma once

#include <algorithm>
#include <cstring>

#include "api.h"
#include "kernels.h"
#include "products.h"
#include "vector.h"

namespace attentionpack {
namespace {

constexpr int kPanel = kBlockVectors * kLanes;  // columns of a register block
// 128 products of two numbers of 12 bits and a sign still fit an int32.
constexpr float kLargest13 = 4095.0f;

int64_t project_memory(const Project& args, int64_t rows) {
    const int64_t depth = args.bounds[args.segments];
    return rows * ((depth + 1) / 2 + args.segments + kPanel) * 4 + depth * 4 + 256;
}

class Projection {
  public:
    Projection(const Project& args, int64_t batch, uint8_t* memory, int64_t rows)
        : args_(args), batch_(batch), depth_(args.bounds[args.segments]) {
        steps_ = (depth_ + 1) / 2;
        panels_ = (args.width + kPanel - 1) / kPanel;
        row_ = reinterpret_cast<float*>(memory);
        scale_ = row_ + depth_;
        left_ = reinterpret_cast<int32_t*>(scale_ + rows * args.segments);
        sums_ = reinterpret_cast<float*>(left_ + rows * steps_);
    }

    void run(int64_t first, int64_t rows) {
        for (int64_t row = 0; row < rows; ++row) prepare(first + row, row);
        for (int64_t panel = 0; panel < panels_; ++panel) {
            // A segment of a panel is small enough to stay near while all rows pass.
            for (int64_t s = 0; s < args_.segments; ++s) {
                for_blocks<kBlockRows>(
                    rows, [&](auto size, int64_t row) { add_segment<size>(row, panel, s); });
            }
            if (!whole(panel)) write(rows, panel);
        }
    }

  private:
    void prepare(int64_t from, int64_t row) {
        const int64_t at = batch_ * args_.x_batch + from / args_.repeats * args_.x_token +
                           from % args_.repeats * args_.x_repeat;
        const float* x = row_;
        if (args_.bfloat16) {
            const uint16_t* halves = static_cast<const uint16_t*>(args_.x) + at;
            for (int64_t i = 0; i < depth_; ++i) {
                const uint32_t word = uint32_t(halves[i]) << 16;
                std::memcpy(row_ + i, &word, 4);
            }
        } else {
            x = static_cast<const float*>(args_.x) + at;
        }
        out_[row] = args_.out + batch_ * args_.out_batch + from / args_.repeats * args_.out_token +
                    from % args_.repeats * args_.out_repeat;
        // Before rounding: a mean may be many times larger than what tokens differ by.
        if (args_.shift) {
            for (int64_t i = 0; i < depth_; ++i) row_[i] = x[i] - args_.shift[i];
            x = row_;
        }
        int32_t* out = left_ + row * steps_;
        out[steps_ - 1] = 0;  // the second number of a pair that has one
        for (int64_t s = 0; s < args_.segments; ++s) {
            const int64_t dim = args_.bounds[s], dims = args_.bounds[s + 1] - dim;
            const float most = largest_magnitude(x + dim, dims);
            float total;
            scale_[row * args_.segments + s] =
                float(args_.factor) *
                quantize<int16_t>(x + dim, dims, most, kLargest13, out + dim / 2, &total);
        }
    }

    template <int ROWS>
    AP_NOINLINE void add_segment(int64_t row, int64_t panel, int64_t segment) const {
        const int64_t columns = panels_ * kPanel, step = args_.bounds[segment] / 2;
        const int steps = int((args_.bounds[segment + 1] + 1) / 2 - step);
        const Int* right = reinterpret_cast<const Int*>(args_.matrix) +
                           ((batch_ * panels_ + panel) * steps_ + step) * kBlockVectors;
        const float* scale =
            args_.scale + (batch_ * args_.segments + segment) * columns + panel * kPanel;
        Int acc[ROWS][kBlockVectors];
        const int32_t* left = left_ + row * steps_ + step;
        const int64_t left_stride = steps_;
        clear(acc);
        for (int i = 0; i < steps; ++i, ++left, right += kBlockVectors) {
            Int column[kBlockVectors];
#pragma GCC unroll 8
            for (int n = 0; n < kBlockVectors; ++n) column[n] = pinned(right[n]);
            add_step<Integers<false>>(left, left_stride, column, acc);
        }
        // Copies: after a store the compiler would read anew whatever it had not copied.
        const bool last = segment == args_.segments - 1 && whole(panel);
        const Int before = splat(segment == 0 ? 0 : -1);
        const int64_t segments = args_.segments;
        const float* row_scales = scale_ + row * segments + segment;
        float* sums = sums_ + row * kPanel;
        float* const* outs = out_ + row;
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r, sums += kPanel) {
            const float row_scale = row_scales[r * segments];
            float* to = last ? outs[r] + panel * kPanel : sums;
#pragma GCC unroll 8
            for (int n = 0; n < kBlockVectors; ++n) {
                const Float old = (Float)(load<Int>(sums + n * kLanes) & before);
                const Float factor = load<Float>(scale + n * kLanes) * row_scale;
                store(to + n * kLanes, old + to_float(acc[r][n]) * factor);
            }
        }
    }

    // Whether all columns of a panel exist: then its sums go where they belong.
    bool whole(int64_t panel) const { return (panel + 1) * kPanel <= args_.width; }

    void write(int64_t rows, int64_t panel) const {
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(out_[row] + panel * kPanel, sums_ + row * kPanel,
                        (args_.width - panel * kPanel) * sizeof(float));
    }

    const Project& args_;
    int64_t batch_, depth_, steps_, panels_;
    float *row_, *scale_;
    int32_t* left_;  // [rows][steps], pairs of 16-bit integers
    float* sums_;    // [rows][columns of a panel]
    float* out_[kMaxRows];
};

void project_rows(const Project& args, int64_t batch, int64_t first, int64_t rows,
                  uint8_t* memory) {
    Projection(args, batch, memory, rows).run(first, rows);
}

}  // namespace
}  // namespace attentionpack
