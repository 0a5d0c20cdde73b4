// Row statistics and top-k of logits, tile by tile, and their gradient. Serves entropy_topk and linear_entropy_topk.
#include <algorithm>

#include "rows.h"

namespace rmx {
namespace {

RMX_INLINE bool comes_first(const rmx_entry& a, const rmx_entry& b) {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
}

// The K best so far, as a heap with the worst of them on top.
struct TopK {
    rmx_entry* heap;
    int64_t K, count;

    void sink(int64_t at) {  // heap[at] down to its place
        const rmx_entry entry = heap[at];
        for (int64_t child = 2 * at + 1; child < count; child = 2 * at + 1) {
            child += child + 1 < count && comes_first(heap[child], heap[child + 1]);
            if (comes_first(heap[child], entry)) break;
            heap[at] = heap[child];
            at = child;
        }
        heap[at] = entry;
    }

    void fill(double value, int64_t id) {
        heap[count++] = {value, id};
        if (count == K)
            for (int64_t at = K / 2; at-- > 0;) sink(at);
    }

    void offer(double value, int64_t id) {
        const rmx_entry entry{value, id};
        if (!comes_first(entry, heap[0])) return;
        heap[0] = entry;
        sink(0);
    }

    // The first block of a row, if K lanes hold numbers: at least K columns reach the K-th largest of the lanes' maxima,
    // and only they are looked at.
    template <class T>
    RMX_INLINE bool fill_block(const T* z, int64_t n, int64_t first, const T* largest) {
        if (count > 0 || K > MAX_LANES || n < MAX_LANES) return false;
        T sorted[MAX_LANES];
        std::copy(largest, largest + MAX_LANES, sorted);
        std::nth_element(sorted, sorted + (K - 1), sorted + MAX_LANES, [](T a, T b) { return a > b; });
        const T bound = sorted[K - 1];
        if (!(bound > -std::numeric_limits<T>::infinity())) return false;
        for (int64_t l = 0; l < MAX_LANES; ++l)
            if (largest[l] >= bound)
                for (int64_t j = l; j < n; j += MAX_LANES)
                    if (z[j] >= bound) count < K ? fill(z[j], first + j) : offer(z[j], first + j);
        return true;
    }

    // Lanes whose maximum is below the worst of K hold nothing new; only the others are read again.
    template <class T>
    RMX_INLINE void offer_block(const T* z, int64_t n, int64_t first, T block_max, const T* largest) {
        if (fill_block(z, n, first, largest)) return;
        if (count < K) {
            const int64_t filling = std::min(n, K - count);
            for (int64_t j = 0; j < filling; ++j) fill(z[j], first + j);
            for (int64_t j = filling; j < n; ++j)
                if (!(z[j] < heap[0].value)) offer(z[j], first + j);
            return;
        }
        if (block_max < heap[0].value) return;
        for (int64_t l = 0; l < MAX_LANES; ++l)
            if (!(largest[l] < heap[0].value))
                for (int64_t j = l; j < n; j += MAX_LANES)
                    if (!(z[j] < heap[0].value)) offer(z[j], first + j);
    }
};

struct FoldArguments {
    const rmx_rows* x;
    const rmx_scale* scale;
    int64_t first, columns;
    const rmx_sums* sums;
};

template <class T, class X>
RMX_INLINE void fold_row(const FoldArguments& a, int64_t i) {
    const rmx_sums& out = *a.sums;
    const Scale<T> scale(*a.scale, i);
    const X* x = row_of<const X>(*a.x, i);
    T *m = static_cast<T*>(out.m) + i, *d = static_cast<T*>(out.d) + i, *t = static_cast<T*>(out.T) + i;
    Sums<T, true> sums;
    TopK topk{out.best + i * out.K, out.K, std::min(out.K, a.first)};
    const int64_t target = out.target != nullptr ? out.target[i] : -1;
    T* chosen = out.chosen != nullptr ? static_cast<T*>(out.chosen) + i : nullptr;
    if (a.first > 0) {
        sums.m = *m, sums.d = *d, sums.t = *t;
    } else if (chosen != nullptr) {
        *chosen = std::numeric_limits<T>::quiet_NaN();
    }
    alignas(64) T z[BLOCK];
    alignas(64) T largest[MAX_LANES];
    for (int64_t start = 0; start < a.columns; start += BLOCK) {
        const int64_t n = std::min(BLOCK, a.columns - start), column = a.first + start;
        int64_t padded;
        const T block_max = load_and_max_block(z, x + start, n, scale, &padded, largest);
        if (chosen != nullptr && target >= column && target < column + n) *chosen = z[target - column];
        if (out.K > 0) topk.offer_block(z, n, column, block_max, largest);
        sums.fold(z, padded, block_max, x + start + n);
    }
    *m = sums.m, *d = sums.d, *t = sums.t;
}

struct FinishArguments {
    const rmx_sums* sums;
    const rmx_stats* stats;
};

template <class T>
void finish_rows(const FinishArguments& a, int64_t begin, int64_t end) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    const rmx_sums& in = *a.sums;
    const rmx_stats& out = *a.stats;
    for (int64_t i = begin; i < end; ++i) {
        T& m = static_cast<T*>(in.m)[i];
        const double d = static_cast<const T*>(in.d)[i], t = static_cast<const T*>(in.T)[i];
        if (!(m - m == T(0))) m = static_cast<T>(nan);  // -inf, +inf
        const double log_d = log_(d), entropy = log_d - t / d + (m - m);
        const double norm = static_cast<T>(log_d);
        static_cast<T*>(out.log_d)[i] = static_cast<T>(log_d);
        static_cast<T*>(out.lse)[i] = static_cast<T>(m + log_d);
        static_cast<T*>(out.entropy)[i] = static_cast<T>(entropy < 0 ? 0 : entropy);
        if (out.logprob != nullptr)
            static_cast<T*>(out.logprob)[i] =
                static_cast<T>((static_cast<double>(static_cast<const T*>(in.chosen)[i]) - m) - norm);
        if (in.K == 0) continue;
        rmx_entry* best = in.best + i * in.K;
        std::sort_heap(best, best + in.K, comes_first);
        for (int64_t j = 0; j < in.K; ++j) {
            static_cast<T*>(out.topk_logprobs)[i * in.K + j] = static_cast<T>((best[j].value - m) - norm);
            out.topk_ids[i * in.K + j] = best[j].id;
        }
    }
}

struct BackwardArguments {
    const rmx_rows *x, *dx;
    const rmx_scale* scale;
    int64_t first, columns;
    const rmx_stats_gradient* gradient;
};

template <class T>
RMX_INLINE T value_at(const void* values, int64_t i) {
    return values != nullptr ? static_cast<const T*>(values)[i] : T(0);
}

template <class T, class X>
RMX_INLINE void backward_row(const BackwardArguments& a, int64_t i) {
    const rmx_stats_gradient& g = *a.gradient;
    const Scale<T> scale(*a.scale, i);
    const X* x = row_of<const X>(*a.x, i);
    X* dx = row_of<X>(*a.dx, i);
    const T m = value_at<T>(g.m, i), log_d = value_at<T>(g.log_d, i), entropy = value_at<T>(g.entropy, i);
    const T along_p = value_at<T>(g.along_p, i), g_entropy = value_at<T>(g.g_entropy, i);
    const T lowest = opaque(constants<T>::lowest);
    alignas(64) T z[BLOCK];
    alignas(64) T dz[BLOCK];
    for (int64_t start = 0; start < a.columns; start += BLOCK) {
        const int64_t n = std::min(BLOCK, a.columns - start), column = a.first + start;
        load_block(z, x + start, n, scale);
        if (g.g_entropy != nullptr) {
            for (int64_t j = 0; j < n; ++j) {
                const T log_p = (z[j] - m) - log_d;
                dz[j] = exp_or_zero(lowest, log_p) * (along_p - g_entropy * (at_least(lowest, log_p) + entropy));  // not 0 * -inf
            }
        } else {
            for (int64_t j = 0; j < n; ++j) dz[j] = exp_or_zero(lowest, (z[j] - m) - log_d) * along_p;
        }
        if (g.g_logprob != nullptr && g.target[i] >= column && g.target[i] < column + n)
            dz[g.target[i] - column] += value_at<T>(g.g_logprob, i);
        if (g.g_topk != nullptr)
            for (int64_t k = i * g.K; k < (i + 1) * g.K; ++k)
                if (g.topk_ids[k] >= column && g.topk_ids[k] < column + n)
                    dz[g.topk_ids[k] - column] += value_at<T>(g.g_topk, k);
        store_gradient(dx + start, dz, z, n, scale);
    }
}

RMX_ROW_FUNCTIONS(fold_row, FoldArguments)
RMX_ROW_FUNCTIONS(backward_row, BackwardArguments)

}  // namespace
}  // namespace rmx

extern "C" {

int rmx_entropy_topk(const rmx_rows* x, const rmx_scale* scale, int64_t N, int64_t first, int64_t columns,
                     const rmx_sums* sums, rmx_parallel_for pool) {
    return rmx::fold_row_any(x->dtype, pool, N, columns, {x, scale, first, columns, sums});
}

int rmx_entropy_topk_finish(int32_t dtype, int64_t N, const rmx_sums* sums, const rmx_stats* stats,
                            rmx_parallel_for pool) {
    const rmx::FinishArguments a{sums, stats};
    const int64_t work = 16 * (sums->K + 4);
    return dtype == RMX_F64 ? rmx::for_rows(pool, N, work, rmx::finish_rows<double>, a)
                            : rmx::for_rows(pool, N, work, rmx::finish_rows<float>, a);
}

int rmx_entropy_topk_backward(const rmx_rows* x, const rmx_scale* scale, int64_t N, int64_t first, int64_t columns,
                              const rmx_stats_gradient* gradient, const rmx_rows* dx, rmx_parallel_for pool) {
    return rmx::backward_row_any(x->dtype, pool, N, columns, {x, dx, scale, first, columns, gradient});
}
}
