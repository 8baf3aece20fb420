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
constexpr int64_t kWhole = 128;          // tokens: pieces are of whole tiles

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
    if (items == 0) return;
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
                piece.stop = piece.row_stop(args, piece.rows - 1);
                if (args.span) {
                    piece.start = std::max(piece.start, args.first_span * args.span);
                    piece.stop = std::min(piece.stop, args.stop_span * args.span);
                }
                piece.stop = std::max(piece.start, piece.stop);
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
        const int64_t step = ((length + count - 1) / count + kWhole - 1) / kWhole * kWhole;
        unit.first_piece = int64_t(plan.pieces.size());
        int64_t from = unit.whole.start;
        do {
            Piece piece = unit.whole;
            piece.start = from;
            // Whole spans, where they are whole tiles: what is left of one costs as much.
            const int64_t end = args.span && step ? (from + step) / kWhole * kWhole : from + step;
            piece.stop = std::min(unit.whole.stop, end);
            plan.pieces.push_back(piece);
            from = piece.stop;
        } while (from < unit.whole.stop);
        unit.pieces = int64_t(plan.pieces.size()) - unit.first_piece;
    }
    return plan;
}

int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

int64_t head_floats(const Attend& args, const Piece& piece) {
    return whole_lines((2 + kMaxPlanes) * args.modalities * piece.rows);
}

int64_t result_floats(const Attend& args, const Piece& piece, int64_t lanes) {
    return head_floats(args, piece) + whole_lines(args.modalities * piece.rows * lanes);
}

// Sums begin with a cache line, as `memory` does: vectors that lie across two lines cost a third of
// the time.
void place(const Attend& args, Piece& piece, float* memory) {
    const int64_t rows = args.modalities * piece.rows;
    piece.top = memory;
    piece.total = piece.top + rows;
    piece.zeros = piece.total + rows;
    piece.sums = memory + head_floats(args, piece);
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

void ap_sizes(const void* chosen, Sizes* sizes) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    *sizes = {kernels.lanes, kernels.panel, kSegment, kLargest};
}

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
            next += result_floats(*args, piece, lanes[piece.group]);
        }
    }
    const int64_t scratch = kernels.attend_memory(*args, most_rows, widest_rank);
    const int64_t aligned = (scratch + 63) / 64 * 64;
    parallel(args->threads, int64_t(plan.pieces.size()), [&](int64_t i) {
        Piece& piece = plan.pieces[i];
        const bool alone = plan.units[owner[i]].pieces == 1;
        uint8_t* memory = thread_memory(aligned + widest_result * int64_t(sizeof(float)));
        if (alone) place(*args, piece, reinterpret_cast<float*>(memory + aligned));
        kernels.attend(*args, piece, memory);
        if (alone) kernels.merge(*args, &piece, 1, 0, piece.rows);
    });
    std::vector<const Unit*> parted;
    for (const Unit& unit : plan.units)
        if (unit.pieces > 1) parted.push_back(&unit);
    constexpr int64_t turn = 8, turns = kMaxRows / turn;  // rows
    parallel(args->threads, int64_t(parted.size()) * turns, [&](int64_t i) {
        const Unit& unit = *parted[i / turns];
        const int64_t first = i % turns * turn, end = std::min(first + turn, unit.whole.rows);
        kernels.merge(*args, &plan.pieces[unit.first_piece], unit.pieces, first, end);
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

void ap_join(const void* chosen, const Join* args) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    constexpr int64_t batch = 64;  // rows per turn
    const int64_t rows = args->tokens * args->heads;
    parallel(args->threads, (rows + batch - 1) / batch, [&](int64_t turn) {
        const int64_t end = std::min(rows, (turn + 1) * batch);
        for (int64_t row = turn * batch; row < end; ++row) kernels.join(*args, row);
    });
}

// `count` products, in one parallel region.
void ap_project(const void* chosen, const Project* args, int64_t count) {
    const Kernels& kernels = *static_cast<const Kernels*>(chosen);
    struct Turn {
        const Project* args;
        int64_t batch, first, rows;
    };
    std::vector<Turn> turns;
    int64_t memory = 0;
    for (const Project* p = args; p < args + count; ++p) {
        const int64_t rows = p->tokens * p->repeats;
        memory = std::max(memory, kernels.project_memory(*p, std::min<int64_t>(rows, kMaxRows)));
        for (int64_t batch = 0; batch < p->batch; ++batch)
            for (int64_t first = 0; first < rows; first += kMaxRows)
                turns.push_back({p, batch, first, std::min<int64_t>(kMaxRows, rows - first)});
    }
    parallel(args->threads, int64_t(turns.size()), [&](int64_t i) {
        const Turn& turn = turns[i];
        kernels.project(*turn.args, turn.batch, turn.first, turn.rows, thread_memory(memory));
    });
}

}  // extern "C"
