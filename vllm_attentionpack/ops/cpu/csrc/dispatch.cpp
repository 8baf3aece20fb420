// The C functions: choice of the instruction set, cutting of the work, merge of the pieces.
//
// Threads come from the OpenMP runtime that PyTorch has loaded: this library names none of its own
// and takes the number of threads from the caller.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "api.h"
#include "kernels.h"

namespace attentionpack {

const Scales kScales;

namespace {

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512VnniKernels, &kAvx512Kernels, &kAvx2Kernels,
#endif
    &kScalarKernels,
};

bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (&kernels == &kAvx512VnniKernels) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (&kernels == &kAvx512Kernels) return avx512;
    if (&kernels == &kAvx2Kernels)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &kScalarKernels;
}

constexpr int64_t kShortest = 256;      // tokens of context that a piece is worth
constexpr int64_t kPiecesPerThread = 4;  // so that threads end together
constexpr int64_t kUsualRows = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Memory that is kept between calls; begins with a cache line.
struct Area {
    uint8_t* data = nullptr;
    int64_t size = 0;
    ~Area() { std::free(data); }

    uint8_t* of(int64_t bytes) {
        if (size < bytes) {
            std::free(data);
            size = (bytes + 4095) / 4096 * 4096;
            data = static_cast<uint8_t*>(std::aligned_alloc(64, size));
        }
        return data;
    }
};

uint8_t* thread_memory(int64_t bytes) {
    thread_local Area area;
    return area.of(bytes);
}

template <class F>
void parallel(int64_t threads, int64_t items, F work) {
    std::atomic<int64_t> next{0};
    const int64_t team = std::max<int64_t>(1, std::min(threads, items));
#pragma omp parallel num_threads(team)
    for (int64_t i; (i = next.fetch_add(1)) < items;) work(i);
}

// The pieces of one run of rows; they share a merge.
struct Unit {
    Piece whole;
    int64_t first_piece, pieces;
};

struct Plan {
    std::vector<Unit> units;
    std::vector<Piece> pieces;
};

Plan cut(const Attend& args) {
    Plan plan;
    const int64_t heads = args.heads_per_group * args.repeats;
    double cost = 0;
    int64_t all_rows = args.tokens * heads * args.num_groups;
    const int64_t most_rows = all_rows >= args.threads * kPiecesPerThread * kMaxRows
                                  ? kMaxRows : kUsualRows;
    for (int64_t request = 0; request < args.num_requests; ++request) {
        const int64_t first = args.query_start_loc[request];
        const int64_t queries = args.query_start_loc[request + 1] - first;
        const int64_t rows = queries * heads;
        for (int64_t group = 0; group < args.num_groups && rows > 0; ++group) {
            for (int64_t row = 0; row < rows; row += most_rows) {
                Piece piece{};
                piece.request = request;
                piece.group = group;
                piece.first_token = first;
                piece.queries = queries;
                piece.first_row = row;
                piece.rows = std::min(most_rows, rows - row);
                piece.request_stop = args.stops[request];
                piece.start = args.starts ? args.starts[request] : 0;
                piece.stop = std::max(piece.start, piece.row_stop(args, piece.rows - 1));
                cost += double(piece.rows) * double(piece.stop - piece.start);
                plan.units.push_back({piece, 0, 0});
            }
        }
    }
    const double share = cost / double(args.threads * kPiecesPerThread);
    for (Unit& unit : plan.units) {
        const int64_t length = unit.whole.stop - unit.whole.start;
        const double wanted = double(unit.whole.rows) * double(length) / std::max(share, 1.0);
        int64_t count = std::min<int64_t>(int64_t(std::ceil(wanted - 0.5)), length / kShortest);
        count = std::max<int64_t>(count, 1);
        const int64_t step = ((length + count - 1) / count + 127) / 128 * 128;
        unit.first_piece = int64_t(plan.pieces.size());
        int64_t from = unit.whole.start;
        do {
            Piece piece = unit.whole;
            piece.start = from;
            piece.stop = std::min(unit.whole.stop, from + step);
            plan.pieces.push_back(piece);
            from = piece.stop;
        } while (from < unit.whole.stop);
        unit.pieces = int64_t(plan.pieces.size()) - unit.first_piece;
    }
    return plan;
}

int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

int64_t result_floats(const Attend& args, const Piece& piece, int64_t lanes) {
    const int64_t rows = args.modalities * piece.rows;
    return whole_lines(2 * rows) + whole_lines(rows * lanes);
}

// Sums begin with a cache line, as `memory` does: vectors that lie across two lines cost a third of
// the time.
void place(const Attend& args, Piece& piece, float* memory) {
    piece.top = memory;
    piece.total = memory + args.modalities * piece.rows;
    piece.sums = memory + whole_lines(2 * args.modalities * piece.rows);
}

// Writes the rows of a unit from its pieces, normalised.
void merge(const Attend& args, const Unit& unit, const Piece* pieces, int64_t lanes) {
    const Piece& whole = unit.whole;
    const int64_t heads = args.heads_per_group * args.repeats;
    const int64_t modalities = args.modalities, width = modalities * (lanes + 1);
    for (int64_t row = 0; row < whole.rows; ++row) {
        const int64_t token = whole.first_token + (whole.first_row + row) / heads;
        const int64_t head = (whole.first_row + row) % heads;
        const int64_t kv = head / args.repeats, repeat = head % args.repeats;
        float* out = args.outputs[whole.group] +
                     ((kv * args.tokens + token) * args.repeats + repeat) * width;
        float top = -kInfinity;
        for (int64_t p = 0; p < unit.pieces; ++p)
            for (int64_t m = 0; m < modalities; ++m)
                top = std::max(top, pieces[p].top[m * whole.rows + row]);
        float& lse = args.lse[token * args.num_groups * heads + whole.group * heads + head];
        std::memset(out, 0, width * sizeof(float));
        if (top == -kInfinity) {
            lse = -kInfinity;
            continue;
        }
        float total = 0;
        for (int64_t p = 0; p < unit.pieces; ++p)
            for (int64_t m = 0; m < modalities; ++m)
                total += std::exp(pieces[p].top[m * whole.rows + row] - top) *
                         pieces[p].total[m * whole.rows + row];
        lse = top + std::log(total);
        for (int64_t p = 0; p < unit.pieces; ++p) {
            for (int64_t m = 0; m < modalities; ++m) {
                const int64_t at = m * whole.rows + row;
                if (pieces[p].top[at] == -kInfinity) continue;
                const float share = std::exp(pieces[p].top[at] - top) / total;
                const float* sums = pieces[p].sums + at * lanes;
                float* to = out + m * lanes;
                for (int64_t i = 0; i < lanes; ++i) to[i] += share * sums[i];
                out[modalities * lanes + m] += share * pieces[p].total[at];
            }
        }
    }
}

}  // namespace
}  // namespace attentionpack

using namespace attentionpack;

extern "C" {

// The fastest kernels that run here, or those of this name; null if there are none.
const void* ap_kernels(const char* name) {
    for (const Kernels* kernels : kAll)
        if (runs_here(*kernels) && (!name || !*name || !std::strcmp(name, kernels->name)))
            return kernels;
    return nullptr;
}

const char* ap_name(const void* kernels) { return static_cast<const Kernels*>(kernels)->name; }

int64_t ap_lanes(const void* kernels) { return static_cast<const Kernels*>(kernels)->lanes; }

void ap_attend(const void* chosen, const Attend* args) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    Plan plan = cut(*args);
    std::vector<int64_t> lanes(args->num_groups);
    int64_t widest_rank = 0, widest_result = 0, split = 0;
    for (int64_t g = 0; g < args->num_groups; ++g) {
        lanes[g] = kernels.value_lanes(args->groups[g].value);
        widest_rank = std::max(widest_rank, args->groups[g].key.rank);
    }
    int64_t most_rows = 0;
    for (const Unit& unit : plan.units) {
        const int64_t floats = result_floats(*args, unit.whole, lanes[unit.whole.group]);
        most_rows = std::max(most_rows, unit.whole.rows);
        if (unit.pieces > 1)
            split += unit.pieces * floats;
        else
            widest_result = std::max(widest_result, floats);
    }
    // Results of pieces that are merged after all threads are done.
    thread_local Area shared;
    std::vector<int64_t> owner(plan.pieces.size());
    float* next = reinterpret_cast<float*>(shared.of(split * int64_t(sizeof(float))));
    for (size_t u = 0; u < plan.units.size(); ++u) {
        const Unit& unit = plan.units[u];
        for (int64_t p = 0; p < unit.pieces; ++p) {
            Piece& piece = plan.pieces[unit.first_piece + p];
            owner[unit.first_piece + p] = int64_t(u);
            if (unit.pieces == 1) continue;
            place(*args, piece, next);
            next += result_floats(*args, unit.whole, lanes[unit.whole.group]);
        }
    }
    const int64_t scratch = kernels.attend_memory(*args, most_rows, widest_rank);
    const int64_t aligned = (scratch + 63) / 64 * 64;
    parallel(args->threads, int64_t(plan.pieces.size()), [&](int64_t i) {
        Piece& piece = plan.pieces[i];
        const Unit& unit = plan.units[owner[i]];
        uint8_t* memory = thread_memory(aligned + widest_result * int64_t(sizeof(float)));
        if (unit.pieces == 1) place(*args, piece, reinterpret_cast<float*>(memory + aligned));
        kernels.attend(*args, piece, memory);
        if (unit.pieces == 1) merge(*args, unit, &piece, lanes[piece.group]);
    });
    std::vector<const Unit*> parted;
    for (const Unit& unit : plan.units)
        if (unit.pieces > 1) parted.push_back(&unit);
    parallel(args->threads, int64_t(parted.size()), [&](int64_t i) {
        merge(*args, *parted[i], &plan.pieces[parted[i]->first_piece],
              lanes[parted[i]->whole.group]);
    });
}

void ap_store(const void* chosen, const Store* args) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    constexpr int64_t batch = 16;  // tokens per turn
    parallel(args->threads, (args->tokens + batch - 1) / batch, [&](int64_t turn) {
        float* memory = reinterpret_cast<float*>(thread_memory(12 * (args->side.rank + 16)));
        const int64_t end = std::min(args->tokens, (turn + 1) * batch);
        for (int64_t token = turn * batch; token < end; ++token)
            if (args->slots[token] >= 0) kernels.store(*args, token, memory);
    });
}

void ap_unpack(const void* chosen, const Unpack* args) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    constexpr int64_t batch = 64;  // tokens per turn
    parallel(args->threads, (args->tokens + batch - 1) / batch, [&](int64_t turn) {
        const int64_t end = std::min(args->tokens, (turn + 1) * batch);
        for (int64_t token = turn * batch; token < end; ++token) kernels.unpack(*args, token);
    });
}

void ap_exact(const void* chosen, const Exact* args) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    const int64_t step = std::max<int64_t>(1, kMaxRows / args->repeats);  // queries of a piece
    std::vector<ExactPiece> pieces;
    for (int64_t request = 0; request < args->num_requests; ++request) {
        const int64_t stop = args->query_start_loc[request + 1];
        for (int64_t from = args->query_start_loc[request]; from < stop; from += step)
            for (int64_t head = 0; head < args->kv_heads; ++head)
                pieces.push_back({request, head, from, std::min(step, stop - from)});
    }
    const int64_t memory = kernels.exact_memory(*args, step * args->repeats);
    parallel(args->threads, int64_t(pieces.size()), [&](int64_t i) {
        kernels.exact(*args, pieces[i], thread_memory(memory));
    });
}

void ap_project(const void* chosen, const Project* args) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    const int64_t rows = args->tokens * args->repeats;
    const int64_t turns = (rows + kMaxRows - 1) / kMaxRows;
    const int64_t memory = kernels.project_memory(*args, std::min<int64_t>(rows, kMaxRows));
    parallel(args->threads, args->batch * turns, [&](int64_t i) {
        const int64_t first = i % turns * kMaxRows;
        kernels.project(*args, i / turns, first, std::min<int64_t>(kMaxRows, rows - first),
                        thread_memory(memory));
    });
}

}  // extern "C"
