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

int64_t project_memory(const Project& args, int64_t rows) {
    const int64_t depth = args.bounds[args.segments];
    return rows * ((depth + 1) / 2 + args.segments + kPanel) * 4 + kRowGroup * (depth + kLanes) * 4 + 256;
}

class Projection {
  public:
    Projection(const Project& args, int64_t batch, uint8_t* memory, int64_t rows)
        : args_(args), batch_(batch), depth_(args.bounds[args.segments]) {
        steps_ = (depth_ + 1) / 2;
        panels_ = (args.width + kPanel - 1) / kPanel;
        floats_ = reinterpret_cast<float*>(memory);
        scale_ = floats_ + kRowGroup * whole(depth_);
        left_ = reinterpret_cast<int32_t*>(scale_ + rows * args.segments);
        sums_ = reinterpret_cast<float*>(left_ + rows * steps_);
    }

    void run(int64_t first, int64_t rows) {
        for (int64_t row = 0; row < rows; row += kRowGroup)
            prepare(first, row, std::min<int64_t>(kRowGroup, rows - row));
        for (int64_t panel = 0; panel < panels_; ++panel) {
            // A segment of a panel is small enough to stay near while all rows pass.
            for (int64_t s = 0; s < args_.segments; ++s) {
                for_blocks<kBlockRows>(
                    rows, [&](auto size, int64_t row) { add_segment<size>(row, panel, s); });
            }
            if (!full(panel)) write(rows, panel);
        }
    }

  private:
    // The rows from `row` on, `count` of them, as integers.
    void prepare(int64_t first, int64_t row, int64_t count) {
        const float* x[kRowGroup];
        for (int64_t r = 0; r < count; ++r) {
            const int64_t from = first + row + r;
            const int64_t token = from / args_.repeats, repeat = from % args_.repeats;
            const int64_t source = args_.sources ? args_.sources[token] : token;
            x[r] = read(batch_ * args_.x_batch + source * args_.x_token + repeat * args_.x_repeat,
                        floats_ + r * whole(depth_));
            if (args_.sources) x[r] = turned_back(x[r], token, floats_ + r * whole(depth_));
            out_[row + r] = args_.out + batch_ * args_.out_batch + token * args_.out_token +
                            repeat * args_.out_repeat;
            left_[(row + r) * steps_ + steps_ - 1] = 0;  // the second number of a pair that has one
        }
        for (int64_t r = count; r < kRowGroup; ++r) x[r] = x[0];
        for (int64_t s = 0; s < args_.segments; ++s) {
            const int64_t dim = args_.bounds[s], dims = args_.bounds[s + 1] - dim;
            const ByRow most = largest_magnitudes(x, dim, dims);
            const ByRow factor = float(kLargest) / most, scale = most * (float(args_.factor) / float(kLargest));
            for (int64_t r = 0; r < count; ++r) {
                scale_[(row + r) * args_.segments + s] = scale[r];
                quantize<int16_t>(x[r] + dim, dims, factor[r], left_ + (row + r) * steps_ + dim / 2);
            }
        }
    }

    // A row of `x` less the mean, as floats; `room` is for those that are none yet. The mean goes before
    // rounding: it may be many times larger than what tokens differ by.
    AP_INLINE const float* read(int64_t at, float* room) const {
        const float* x = static_cast<const float*>(args_.x) + at;
        if (args_.bfloat16) {
            const uint16_t* halves = static_cast<const uint16_t*>(args_.x) + at;
            for (int64_t i = 0; i < depth_; i += kLanes) {
                const int bytes = int(std::min<int64_t>(kLanes, depth_ - i)) * 2;
                const auto half = bytes == 2 * kLanes ? load<Halves>(halves + i)
                                                      : load_head<Halves>(halves + i, bytes);
                store(room + i, __builtin_convertvector(half, Word) << 16);
            }
            x = room;
        }
        if (!args_.shift) return x;
        for (int64_t i = 0; i < depth_; i += kLanes)
            store(room + i, part(x, i, depth_) - part(args_.shift, i, depth_));
        return room;
    }

    const float* turned_back(const float* x, int64_t token, float* to) const {
        const int64_t planes = args_.planes;
        if (x != to) std::copy_n(x, depth_, to);
        const float *cos = args_.cos + token * planes, *sin = args_.sin + token * planes;
        const int64_t next = args_.interleaved ? 1 : planes, step = args_.interleaved ? 2 : 1;
        int64_t i = 0;
        for (; !args_.interleaved && i + kLanes <= planes; i += kLanes) {
            const Float a = load<Float>(to + i), b = load<Float>(to + i + next);
            const Float c = load<Float>(cos + i), s = load<Float>(sin + i);
            store(to + i, a * c + b * s);
            store(to + i + next, b * c - a * s);
        }
        for (; i < planes; ++i) {
            float &first = to[step * i], &second = to[step * i + next];
            const float a = first, b = second;
            first = a * cos[i] + b * sin[i];
            second = b * cos[i] - a * sin[i];
        }
        return to;
    }

    static int64_t whole(int64_t floats) { return (floats + kLanes - 1) / kLanes * kLanes; }

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
        // The first rows ask for what comes after this segment, which is too much to be foreseen.
        const Int* next = right + steps * kBlockVectors;
        Stream ahead{row ? reinterpret_cast<const uint8_t*>(left_) : reinterpret_cast<const uint8_t*>(next),
                     row ? 0 : int64_t(sizeof(Int))};
        for (int i = 0; i < steps; ++i, ++left, right += kBlockVectors) {
            Int column[kBlockVectors];
#pragma GCC unroll 8
            for (int n = 0; n < kBlockVectors; ++n) {
                column[n] = pinned(right[n]);
                ahead.next();
            }
            add_step<Integers<false>>(left, left_stride, column, acc);
        }
        // Copies: after a store the compiler would read anew whatever it had not copied.
        const bool last = segment == args_.segments - 1 && full(panel);
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
    bool full(int64_t panel) const { return (panel + 1) * kPanel <= args_.width; }

    void write(int64_t rows, int64_t panel) const {
        for (int64_t row = 0; row < rows; ++row)
            std::memcpy(out_[row] + panel * kPanel, sums_ + row * kPanel,
                        (args_.width - panel * kPanel) * sizeof(float));
    }

    const Project& args_;
    int64_t batch_, depth_, steps_, panels_;
    float *floats_, *scale_;  // `floats_`: rows of a group
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
