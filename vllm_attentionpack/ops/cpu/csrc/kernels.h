// What the instruction sets have in common: the pieces that work is cut into, and the functions that
// each one offers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "api.h"

namespace attentionpack {

constexpr int kMaxRows = 64, kMaxPlanes = 3;

// 2 ** ((byte - 64) / 8) for the seven bits of a scale byte; see `codec/quantize.py`.
struct Scales {
    float value[128];
    Scales() {
        for (int i = 0; i < 128; ++i) value[i] = float(std::exp2((i - 64) / 8.0));
    }
};
extern const Scales kScales;

// Some query rows of one request and head group against a stretch of its context. Rows are numbered
// (query of the request, query head of the group).
struct Piece {
    int64_t request, group;
    int64_t first_token;           // of the request, in the step
    int64_t queries;               // of the request
    int64_t first_row, rows;
    int64_t start, stop;           // positions
    int64_t request_stop;
    // Unnormalised results by modality. `top`: the largest logit to the base of two, -infinity over no
    // token, where the others mean nothing. `zeros`: what the zero points of each plane make too much
    // of the sums.
    float* top;    // [M, rows]
    float* total;  // [M, rows]
    float* zeros;  // [M, rows, kMaxPlanes]
    float* sums;   // [M, rows, lanes]

    int64_t row_stop(const Attend& args, int64_t row) const {
        if (!args.causal) return request_stop;
        const int64_t query = (first_row + row) / (args.heads_per_group * args.repeats);
        return request_stop - (queries - 1 - query);
    }

    // Of a row: where it lies in [G, T, repeats] of its group, where its query for a span lies in
    // [G, rows, repeats], and where it lies in [T, Hq].
    int64_t place(const Attend& args, int64_t row) const {
        return place(args, row, first_token, args.tokens);
    }
    int64_t query_place(const Attend& args, int64_t row, int64_t span) const {
        if (!args.span) return place(args, row);
        const int64_t before = (span - args.first_span) * queries;
        return place(args, row, args.row_starts[request] + before, args.rows);
    }
    int64_t column(const Attend& args, int64_t row) const {
        const int64_t heads = args.heads_per_group * args.repeats;
        const int64_t token = first_token + (first_row + row) / heads, head = (first_row + row) % heads;
        return (token * args.num_groups + group) * heads + head;
    }

  private:
    int64_t place(const Attend& args, int64_t row, int64_t first, int64_t all) const {
        const int64_t heads = args.heads_per_group * args.repeats;
        const int64_t query = first + (first_row + row) / heads, head = (first_row + row) % heads;
        return (head / args.repeats * all + query) * args.repeats + head % args.repeats;
    }
};

// Some queries of one request against its exact tokens, by the query heads of one KV head.
struct ExactPiece {
    int64_t request, head;
    int64_t first_token, queries;  // in the step
};

// One instruction set.
struct Kernels {
    const char* name;
    int lanes, panel;
    void (*attend)(const Attend&, const Piece&, uint8_t* memory);
    int64_t (*attend_memory)(const Attend&, int64_t rows, int64_t rank);
    // Puts the rows from `first` to `end` of pieces that share them together, normalised.
    void (*merge)(const Attend&, const Piece* pieces, int64_t count, int64_t first, int64_t end);
    int64_t (*value_lanes)(const Side&);
    void (*store)(const Store&, int64_t token, float* memory);
    void (*project)(const Project&, int64_t batch, int64_t first_row, int64_t rows, uint8_t* memory);
    int64_t (*project_memory)(const Project&, int64_t rows);
    void (*unpack)(const Unpack&, int64_t token);
    void (*exact)(const Exact&, const ExactPiece&, uint8_t* memory);
    int64_t (*exact_memory)(const Exact&, int64_t rows);
    void (*join)(const Join&, int64_t row);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels, kAvx512VnniKernels;
#endif

}  // namespace attentionpack
