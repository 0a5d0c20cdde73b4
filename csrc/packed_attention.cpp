// Causal attention inside each of many sequences that lie end to end, and its gradient, all in float. The scores exist
// for a few rows of queries at a time, in the cache.
#include <algorithm>
#include <cmath>

#include "rows.h"

namespace rmx {
namespace {

typedef float Lane8 __attribute__((vector_size(32)));  // one register of AVX2, two of the baseline

constexpr int64_t ROWS = 4;    // of a tile of sums: 4 x 16 sums stay in registers
constexpr int64_t COLUMNS = 16;
constexpr int64_t QUERIES = 64;  // whose probabilities the gradient of keys and values keeps at once
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Matrix {  // element (i, j) at data[i * row + j * column]
    const float* data;
    int64_t row, column;
};

RMX_INLINE Lane8 load8(const float* x) {
    Lane8 found;
    __builtin_memcpy(&found, x, sizeof(found));
    return found;
}

RMX_INLINE void store8(float* x, Lane8 value) { __builtin_memcpy(x, &value, sizeof(value)); }

// to [R, COLUMNS] = factor[r] * sum_k a(r, k) b[k * b_row + c], k < n, on top of what is there where ADD.
template <int64_t R, bool ADD>
RMX_INLINE void tile_of(const Matrix& a, const float* __restrict b, int64_t b_row, int64_t n, const float* factor,
                        float* __restrict to, int64_t to_row) {
    Lane8 low[R] = {}, high[R] = {};
    for (int64_t k = 0; k < n; ++k) {
        const Lane8 b_low = load8(b + k * b_row), b_high = load8(b + k * b_row + 8);
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; ++r) {
            const float own = a.data[r * a.row + k * a.column];
            low[r] += own * b_low;
            high[r] += own * b_high;
        }
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; ++r) {
        float* at = to + r * to_row;
        if (ADD) {
            store8(at, load8(at) + factor[r] * low[r]);
            store8(at + 8, load8(at + 8) + factor[r] * high[r]);
        } else {
            store8(at, factor[r] * low[r]);
            store8(at + 8, factor[r] * high[r]);
        }
    }
}

template <bool ADD>
RMX_INLINE void tile(int64_t rows, const Matrix& a, const float* b, int64_t b_row, int64_t n, const float* factor, float* to,
                     int64_t to_row) {
    if (rows == ROWS) {
        tile_of<ROWS, ADD>(a, b, b_row, n, factor, to, to_row);
        return;
    }
    for (int64_t r = 0; r < rows; ++r)
        tile_of<1, ADD>({a.data + r * a.row, a.row, a.column}, b, b_row, n, factor + r, to + r * to_row, to_row);
}

struct Span {  // of keys, whole tiles: [tiles_begin, tiles_end) in steps of COLUMNS around [begin, end)
    int64_t begin, end, tiles_begin, tiles_end;
};

struct Task {  // one head of keys of one sequence
    const rmx_packed& a;
    int64_t start, L, head;
    float *keys, *values, *p, *ds;  // scratch: k and v with their rows across, tile by tile; [rows, width] each
    int64_t width;

    RMX_INLINE const float* k(int64_t j) const { return a.k + (start + j) * a.k_token + head * a.k_head; }
    RMX_INLINE const float* v(int64_t j) const { return a.v + (start + j) * a.v_token + head * a.v_head; }
    RMX_INLINE const float* q(int64_t i, int64_t h) const { return a.q + (start + i) * a.q_token + h * a.q_head; }
    RMX_INLINE int64_t place(int64_t i, int64_t h) const { return ((start + i) * a.Hk * a.G + h) * a.D; }  // of out, g, dq
    RMX_INLINE int64_t key_place(int64_t j) const { return ((start + j) * a.Hk + head) * a.D; }            // of dk, dv

    // What the queries [i, i + rows) see, each all of it or less.
    RMX_INLINE Span seen(int64_t i, int64_t rows) const {
        const int64_t begin = std::max(int64_t(0), i - a.window + 1), end = i + rows;
        return {begin, end, begin / COLUMNS * COLUMNS, (end + COLUMNS - 1) / COLUMNS * COLUMNS};
    }

    // to: columns of k or v, COLUMNS of them together: [tiles, D, COLUMNS], filled up with 0.
    template <class Row>
    RMX_INLINE void across(float* __restrict to, Row row) const {
        for (int64_t first = 0; first < L; first += COLUMNS)
            for (int64_t c = 0; c < COLUMNS; ++c) {
                float* at = to + first * a.D + c;
                if (first + c < L) {
                    const float* from = row(first + c);
                    for (int64_t d = 0; d < a.D; ++d) at[d * COLUMNS] = from[d];
                } else {
                    for (int64_t d = 0; d < a.D; ++d) at[d * COLUMNS] = 0;
                }
            }
    }

    // scores [rows, seen] = scale q . k, -inf where a query may not look.
    RMX_INLINE void find_scores(int64_t i, int64_t rows, int64_t h, const Span& s, float* scores) const {
        const float scale = static_cast<float>(a.scale), factor[ROWS] = {scale, scale, scale, scale};
        for (int64_t j = s.tiles_begin; j < s.tiles_end; j += COLUMNS)
            tile<false>(rows, {q(i, h), a.q_token, 1}, keys + j * a.D, COLUMNS, a.D, factor, scores + j, width);
        for (int64_t r = 0; r < rows; ++r) {
            float* own = scores + r * width;
            for (int64_t j = s.tiles_begin; j <= i + r - a.window; ++j) own[j] = NOTHING;
            for (int64_t j = i + r + 1; j < s.tiles_end; ++j) own[j] = NOTHING;
        }
    }

    RMX_INLINE void forward(int64_t i, int64_t rows, int64_t h) const {
        const Span s = seen(i, rows);
        find_scores(i, rows, h, s, p);
        const float lowest = opaque(constants<float>::lowest);
        float norms[ROWS];
        for (int64_t r = 0; r < rows; ++r) {
            float* __restrict own = p + r * width;
            float tops[COLUMNS], sums[COLUMNS] = {};
            for (int64_t c = 0; c < COLUMNS; ++c) tops[c] = NOTHING;
            for (int64_t j = s.tiles_begin; j < s.tiles_end; j += COLUMNS)
                for (int64_t c = 0; c < COLUMNS; ++c) tops[c] = own[j + c] > tops[c] ? own[j + c] : tops[c];
            const float top = max_lanes<COLUMNS>(tops);
            for (int64_t j = s.tiles_begin; j < s.tiles_end; j += COLUMNS)
                for (int64_t c = 0; c < COLUMNS; ++c) {
                    own[j + c] = exp_exactly(at_least(lowest, own[j + c] - top));
                    sums[c] += own[j + c];
                }
            norms[r] = 1.0f / add_lanes<COLUMNS>(sums);
            float* kept = a.norms + ((start + i + r) * a.Hk * a.G + h) * 2;
            kept[0] = top;
            kept[1] = norms[r];
        }
        for (int64_t d = 0; d < a.D; d += COLUMNS)
            tile<false>(rows, {p + s.begin, width, 1}, v(s.begin) + d, a.v_token, std::min(s.end, L) - s.begin, norms,
                        a.out + place(i, h) + d, a.Hk * a.G * a.D);
    }

    // p and ds of the queries [i, i + rows), in their rows of the scratch, and dq.
    RMX_INLINE void backward_rows(int64_t i, int64_t rows, int64_t h, float* own_p, float* own_ds) const {
        const Span s = seen(i, rows);
        find_scores(i, rows, h, s, own_p);
        const float lowest = opaque(constants<float>::lowest), scale = static_cast<float>(a.scale);
        const float one[ROWS] = {1, 1, 1, 1};
        const int64_t row = a.Hk * a.G * a.D;
        for (int64_t j = s.tiles_begin; j < s.tiles_end; j += COLUMNS)
            tile<false>(rows, {a.g + place(i, h), row, 1}, values + j * a.D, COLUMNS, a.D, one, own_ds + j, width);
        for (int64_t r = 0; r < rows; ++r) {
            const float* kept = a.norms + ((start + i + r) * a.Hk * a.G + h) * 2;
            const float top = kept[0], norm = kept[1];
            const float *g = a.g + place(i + r, h), *out = a.out + place(i + r, h);
            float sums[COLUMNS] = {};
            for (int64_t d = 0; d < a.D; d += COLUMNS)
                for (int64_t c = 0; c < COLUMNS; ++c) sums[c] += g[d + c] * out[d + c];
            const float mean = add_lanes<COLUMNS>(sums);
            float *__restrict to_p = own_p + r * width, *__restrict to_ds = own_ds + r * width;
            for (int64_t j = s.tiles_begin; j < s.tiles_end; ++j) {
                to_p[j] = norm * exp_exactly(at_least(lowest, to_p[j] - top));
                to_ds[j] = to_p[j] * (to_ds[j] - mean) * scale;
            }
        }
        for (int64_t d = 0; d < a.D; d += COLUMNS)
            tile<false>(rows, {own_ds + s.begin, width, 1}, k(s.begin) + d, a.k_token, std::min(s.end, L) - s.begin, one,
                        a.dq + place(i, h) + d, row);
    }

    // dk and dv of the keys [j, j + rows), from the queries [first, last) that see them.
    RMX_INLINE void backward_keys(int64_t j, int64_t rows, int64_t h, int64_t first, int64_t last) const {
        const float one[ROWS] = {1, 1, 1, 1};
        const int64_t begin = std::max(first, j), end = std::min(last, j + rows - 1 + a.window), n = end - begin;
        if (n <= 0) return;
        const int64_t at = (begin - first) * width + j, row = a.Hk * a.G * a.D, to = key_place(j);
        for (int64_t d = 0; d < a.D; d += COLUMNS) {
            tile<true>(rows, {p + at, 1, width}, a.g + place(begin, h) + d, row, n, one, a.dv + to + d, a.Hk * a.D);
            tile<true>(rows, {ds + at, 1, width}, q(begin, h) + d, a.q_token, n, one, a.dk + to + d, a.Hk * a.D);
        }
    }

    RMX_INLINE void run() const {
        across(keys, [&](int64_t j) __attribute__((always_inline)) { return k(j); });
        const int64_t first_head = head * a.G;
        if (a.g == nullptr) {
            for (int64_t h = first_head; h < first_head + a.G; ++h)
                for (int64_t i = 0; i < L; i += ROWS) forward(i, std::min(ROWS, L - i), h);
            return;
        }
        across(values, [&](int64_t j) __attribute__((always_inline)) { return v(j); });
        for (int64_t j = 0; j < L; ++j)
            for (int64_t d = 0; d < a.D; ++d) a.dk[key_place(j) + d] = a.dv[key_place(j) + d] = 0;
        for (int64_t h = first_head; h < first_head + a.G; ++h)
            for (int64_t first = 0; first < L; first += QUERIES) {
                const int64_t last = std::min(first + QUERIES, L), lowest = seen(first, 1).begin / ROWS * ROWS;
                for (int64_t i = first; i < last; i += ROWS)
                    backward_rows(i, std::min(ROWS, last - i), h, p + (i - first) * width, ds + (i - first) * width);
                for (int64_t j = lowest; j < last; j += ROWS) backward_keys(j, std::min(ROWS, last - j), h, first, last);
            }
    }
};

struct PackedArguments {
    const rmx_packed* packed;
};

// Every `slots`-th head of keys of all sequences: the results of a head depend on nothing but its sequence.
template <class T, class X>
RMX_INLINE void packed_row(const PackedArguments& arguments, int64_t slot) {
    const rmx_packed& a = *arguments.packed;
    const int64_t width = (a.longest + COLUMNS - 1) / COLUMNS * COLUMNS, rows = a.g == nullptr ? ROWS : QUERIES;
    const int64_t both = a.g == nullptr ? 1 : 2;
    float* keys = a.scratch + slot * both * (a.D + rows) * width;
    float* p = keys + both * a.D * width;
    for (int64_t i = slot; i < a.N * a.Hk; i += a.slots) {
        const int64_t sequence = i / a.Hk, start = a.ends[sequence], L = a.ends[sequence + 1] - start;
        Task{a, start, L, i % a.Hk, keys, keys + a.D * width, p, p + rows * width, width}.run();
    }
}

RMX_ROW_FUNCTION(packed_row, f32, float, PackedArguments)

}  // namespace
}  // namespace rmx

extern "C" {

int rmx_packed_attention(const rmx_packed* a, rmx_parallel_for pool) {
    if (a->D % rmx::COLUMNS != 0) return RMX_BAD_SHAPE;
    return rmx::for_rows(pool, a->slots, rmx::WORK, rmx::packed_row_f32, rmx::PackedArguments{a});
}
}
