// The C interface of the kernels: plain pointers, so that building them needs no PyTorch.
//
// `structures.py` mirrors these structures; `plan.py` makes the orders and layouts.
#pragma once

#include <cstdint>

namespace attentionpack {

// One plane of a (head group, K|V): `dims` codes of `bits` bits in `bytes` bytes per token, at
// `offset` in a block.
struct Plane {
    int64_t bits, dims, bytes, offset;
};

// All planes of one (head group, K|V). `rank` counts codes, `scales` is the offset of its plane of
// scales, `width` how many floats a row has in `queries` or `outputs`, some of them for alignment alone.
// The high parts of `dims_12` and then of `dims_10` dims come first in the plane of 8 bits, the low
// ones last in those of 4 and of 2 (`Column` of `codec/layout.py`).
struct Side {
    int64_t num_planes, rank, scales, width, dims_12, dims_10;
    Plane planes[3];
};

struct Group {
    Side key, value;
};

// Planes of keys that are coded pre-RoPE (`PreRope` of `turns.py`): the first `planes` of a head are
// rebuilt and turned by the key's own position. Of a head, first dims come before second ones.
struct PreRope {
    int64_t planes;            // 0: none
    int64_t positions_stride;  // of a request
    const float* const* basis;  // per group [M, KV heads, 2, planes, Rk], in the order of the words
    const float* const* mean;   // per group [M, KV heads, 2, planes]
    const float* query;         // [T, Hq, 2, planes]
    const float* cos;           // [positions, planes]
    const float* sin;
    const int32_t* positions;   // [B, tokens]; null: a token's index
};

// Types of numbers that come from the model.
struct Number {
    enum Type : int64_t { kBFloat16, kFloat16, kFloat32 };
};

struct Attend {
    int64_t threads, num_requests, num_groups, modalities;
    int64_t heads_per_group;  // KV heads
    int64_t repeats;          // query heads per KV head
    int64_t tokens;           // all queries of the step
    int64_t rows;             // of `queries`: `tokens`, or more where spans have queries of their own
    // Tokens that are met by the same queries, 0 for all; then only the spans from `first_span` to
    // `stop_span` of a request are read. See `SpanRows` of `turns.py`.
    int64_t span, first_span, stop_span;
    int64_t block_size, block_bytes, table_stride;
    int64_t causal;
    // Of the numbers that codes are multiplied with: 32 (floats), 16, or 8 (where codes have two).
    int64_t bits;
    const Group* groups;
    const uint8_t* cache;
    const int32_t* table;
    const int32_t* starts;  // null: all zero
    const int32_t* stops;
    const int32_t* query_start_loc;
    const int32_t* row_starts;    // [B], of each request's rows; null without spans
    PreRope own;
    const float* const* queries;  // per group [G, rows, repeats, M * (Rk + 1) and more]
    float* const* outputs;        // per group [G, T, repeats, M * (lanes of V + 1) and more]
    float* lse;                   // [T, Hq]
};

// out[b] = factor * (x[b] - shift) @ matrix[b] for `batch` matrices of 16-bit integers, each with
// its rows in segments of at most kSegment that have a scale per column; see `maps.py` for the
// order. Rows of `x` are numbered (token, repeat); strides count elements, those along a row are one.
// With `sources`, row `i` comes from the token `sources[i]` of `x`, turned back by the angles of `i`.
constexpr int64_t kSegment = 128;
// Of the integers, of both sides: so many products of two still fit an int32.
constexpr int64_t kLargest = 4095;
static_assert(kSegment * kLargest * kLargest <= INT32_MAX);

struct Project {
    int64_t threads, batch, tokens, repeats, width, segments;
    int64_t x_batch, x_token, x_repeat;
    int64_t out_batch, out_token, out_repeat;
    int64_t bfloat16;  // x is; else float
    double factor;
    const int32_t* sources;  // [tokens], or null
    const float* cos;        // [tokens, planes]
    const float* sin;
    int64_t planes, interleaved;  // of dims (2i, 2i + 1); else (i, i + planes)
    const float* shift;     // [depth], or null
    const int64_t* bounds;  // [segments + 1]: where they begin, even, and the end
    const void* x;
    const int16_t* matrix;  // [batch, panels, steps, columns of a panel, 2]
    const float* scale;     // [batch, segments, columns of all panels]
    float* out;
};

// Latents of the first `tokens` tokens of a request, less the mean.
struct Unpack {
    int64_t threads, tokens, block_size, block_bytes;
    int64_t bfloat16;  // the latents are; else float
    Side side;
    const uint8_t* cache;
    const int32_t* blocks;  // of the request
    void* latent;           // [tokens, rank]
    uint8_t* visual;        // [tokens]
};

// Attention of new tokens to exact cached ones. Strides count elements; a head's are adjacent.
struct Exact {
    int64_t threads, num_requests;
    int64_t most;  // exact tokens of a request, at most
    int64_t kv_heads, repeats, head_size;
    int64_t type;  // `Number::Type` of queries and pages
    int64_t block_size, block_stride, token_stride, side_stride, head_stride;
    int64_t query_token, query_head;
    double scale;
    const void* query;
    const void* pages;
    const int64_t* slots;            // [B, most]
    const uint8_t* present;          // [B, most]
    const int32_t* query_start_loc;  // [B + 1]
    float* out;                      // [T, Hq, D]
    float* lse;                      // [T, Hq]
};

// Attention to disjoint sets of keys from that to each: normalised outputs with natural
// log-sum-exps [T, H], -infinity where a set is empty. Strides count elements.
constexpr int64_t kMaxParts = 8;

struct Join {
    struct Part {
        const void* out;
        int64_t type, token, head;
        const float* lse;
    };
    int64_t threads, tokens, heads, head_size, num_parts;
    const Part* parts;
    float* out;  // [T, H, D]; zero where all sets are empty
    float* lse;  // [T, H]
};

// What `maps.py` needs to know: lanes of a vector, columns of a panel, and the constants above.
struct Sizes {
    int64_t lanes, panel, segment, largest;
};

struct Store {
    int64_t threads, tokens, rank, block_size, block_bytes;
    int64_t modalities;
    Side side;
    const float* latent;        // [T, rank]
    const float* step;          // [rank]
    const float* weight;        // [M, rank]
    const int64_t* slots;       // [T]
    const uint8_t* visual;      // [T], or null: all text
    uint8_t* cache;
};

}  // namespace attentionpack
