// Element-wise work of a decoder layer, forward and backward: RMSNorm, the gated activation, the rotation of heads.
#include <algorithm>

#include "rows.h"

namespace rmx {
namespace {

template <class X, class T>
RMX_INLINE T rounded_to(T x) {
    X narrow;
    store(&narrow, x);
    return load(narrow);
}

// sum_j of(j) over j < n, in lanes.
template <class T, class F>
RMX_INLINE T lane_sum(int64_t n, F of) {
    T sums[LANES] = {};
    const int64_t whole = n / LANES * LANES;
    for (int64_t j = 0; j < whole; j += LANES)
        for (int64_t l = 0; l < LANES; ++l) sums[l] += of(j + l);
    for (int64_t j = whole; j < n; ++j) sums[j - whole] += of(j);
    return add_lanes(sums);
}

template <class T, class X>
RMX_INLINE void norm_row(const rmx_norm& a, int64_t i) {
    const X* __restrict x = static_cast<const X*>(a.x) + i * a.H;
    const X* __restrict weight = static_cast<const X*>(a.weight);
    X* __restrict y = static_cast<X*>(a.y) + i * a.H;
    const T mean = lane_sum<T>(a.H, [&](int64_t j) __attribute__((always_inline)) { return load(x[j]) * load(x[j]); }) / static_cast<T>(a.H);
    const T scale = T(1) / std::sqrt(mean + static_cast<T>(a.eps)), offset = static_cast<T>(a.offset);
    static_cast<T*>(a.rstd)[i] = scale;
    if (a.rounded != 0)
        for (int64_t j = 0; j < a.H; ++j) store(&y[j], rounded_to<X>(load(x[j]) * scale) * (load(weight[j]) + offset));
    else
        for (int64_t j = 0; j < a.H; ++j) store(&y[j], load(x[j]) * scale * (load(weight[j]) + offset));
}

template <class T, class X>
RMX_INLINE void norm_backward_row(const rmx_norm& a, int64_t i) {
    const X* __restrict x = static_cast<const X*>(a.x) + i * a.H;
    const X* __restrict g = static_cast<const X*>(a.g) + i * a.H;
    const X* __restrict weight = static_cast<const X*>(a.weight);
    X* __restrict dx = static_cast<X*>(a.y) + i * a.H;
    const T scale = static_cast<const T*>(a.rstd)[i], offset = static_cast<T>(a.offset);
    const T along = lane_sum<T>(a.H, [&](int64_t j) __attribute__((always_inline)) {
        return load(g[j]) * (load(weight[j]) + offset) * (load(x[j]) * scale);
    });
    const T mean = along / static_cast<T>(a.H);
    for (int64_t j = 0; j < a.H; ++j)
        store(&dx[j], scale * (load(g[j]) * (load(weight[j]) + offset) - load(x[j]) * scale * mean));
}

// (act(z), act'(z)): silu(z) = z / (1 + e^-z), or GELU in its form with tanh.
template <class T>
struct Activation {
    const T lowest = opaque(constants<T>::lowest);
    RMX_INLINE void silu(T z, T* value, T* slope) const {
        const T up = -z < T(80) ? -z : T(80), s = T(1) / (T(1) + exp_or_zero(lowest, up));
        *value = z * s;
        *slope = s * (T(1) + z * (T(1) - s));
    }
    static RMX_INLINE void gelu(T z, T* value, T* slope) {
        constexpr T scale = T(0.79788456080286535588), cube = T(0.044715);
        const T t = tanh_(scale * (z + cube * z * z * z));
        *value = T(0.5) * z * (T(1) + t);
        *slope = T(0.5) * (T(1) + t) + T(0.5) * z * (T(1) - t * t) * scale * (T(1) + T(3) * cube * z * z);
    }
};

// Block i of BLOCK elements.
template <class T, class X>
RMX_INLINE void gated_row(const rmx_gated& a, int64_t i) {
    const int64_t start = i * BLOCK, n = std::min(BLOCK, a.size - start);
    const X *__restrict gate = static_cast<const X*>(a.gate) + start, *__restrict up = static_cast<const X*>(a.up) + start;
    X* __restrict y = static_cast<X*>(a.y) + start;
    const Activation<T> act;
    T value, slope;
    if (a.gelu != 0)
        for (int64_t j = 0; j < n; ++j) {
            Activation<T>::gelu(load(gate[j]), &value, &slope);
            store(&y[j], rounded_to<X>(value) * load(up[j]));
        }
    else
        for (int64_t j = 0; j < n; ++j) {
            act.silu(load(gate[j]), &value, &slope);
            store(&y[j], rounded_to<X>(value) * load(up[j]));
        }
}

template <class T, class X>
RMX_INLINE void gated_backward_row(const rmx_gated& a, int64_t i) {
    const int64_t start = i * BLOCK, n = std::min(BLOCK, a.size - start);
    const X *__restrict gate = static_cast<const X*>(a.gate) + start, *__restrict up = static_cast<const X*>(a.up) + start;
    const X* __restrict g = static_cast<const X*>(a.g) + start;
    X *__restrict d_gate = static_cast<X*>(a.y) + start, *__restrict d_up = static_cast<X*>(a.d_up) + start;
    const Activation<T> act;
    T value, slope;
    if (a.gelu != 0)
        for (int64_t j = 0; j < n; ++j) {
            Activation<T>::gelu(load(gate[j]), &value, &slope);
            store(&d_gate[j], load(g[j]) * load(up[j]) * slope);
            store(&d_up[j], load(g[j]) * value);
        }
    else
        for (int64_t j = 0; j < n; ++j) {
            act.silu(load(gate[j]), &value, &slope);
            store(&d_gate[j], load(g[j]) * load(up[j]) * slope);
            store(&d_up[j], load(g[j]) * value);
        }
}

template <class T, class X>
RMX_INLINE void rotate_head(const X* __restrict x1, const X* __restrict x2, X* __restrict y1, X* __restrict y2,
                            const X* __restrict cos1, const X* __restrict sin1, const X* __restrict sin2, int64_t D, T sign) {
    const X* __restrict cos2 = cos1 + D;
    for (int64_t j = 0; j < D; ++j) {
        const T u = load(x1[j]), v = load(x2[j]);
        store(&y1[j], u * load(cos1[j]) - sign * (v * load(sin1[j])));
        store(&y2[j], v * load(cos2[j]) + sign * (u * load(sin2[j])));
    }
}

// Token i: all heads of it.
template <class T, class X>
RMX_INLINE void rotate_row(const rmx_rotation& a, int64_t i) {
    const int64_t batch = i / a.T, token = i % a.T, D = a.half, table = batch * a.table_batch + token * 2 * D;
    const X *cos = static_cast<const X*>(a.cos) + table, *sin = static_cast<const X*>(a.sin) + table;
    const X* x = static_cast<const X*>(a.x) + batch * a.x_batch + token * a.x_token;
    X* y = static_cast<X*>(a.y) + batch * a.y_batch + token * a.y_token;
    for (int64_t head = 0; head < a.heads; ++head, x += a.x_head, y += a.y_head)
        if (a.inverse != 0)
            rotate_head(x, x + D, y, y + D, cos, sin + D, sin, D, T(-1));
        else
            rotate_head(x, x + D, y, y + D, cos, sin, sin + D, D, T(1));
}

RMX_ROW_FUNCTIONS(norm_row, rmx_norm)
RMX_ROW_FUNCTIONS(norm_backward_row, rmx_norm)
RMX_ROW_FUNCTIONS(gated_row, rmx_gated)
RMX_ROW_FUNCTIONS(gated_backward_row, rmx_gated)
RMX_ROW_FUNCTIONS(rotate_row, rmx_rotation)

}  // namespace
}  // namespace rmx

extern "C" {

int rmx_rms_norm(const rmx_norm* a, rmx_parallel_for pool) {
    return a->g == nullptr ? rmx::norm_row_any(a->dtype, pool, a->N, a->H, *a)
                           : rmx::norm_backward_row_any(a->dtype, pool, a->N, a->H, *a);
}

int rmx_gated_activation(const rmx_gated* a, rmx_parallel_for pool) {
    const int64_t blocks = (a->size + rmx::BLOCK - 1) / rmx::BLOCK;
    return a->g == nullptr ? rmx::gated_row_any(a->dtype, pool, blocks, rmx::BLOCK, *a)
                           : rmx::gated_backward_row_any(a->dtype, pool, blocks, rmx::BLOCK, *a);
}

int rmx_rotate(const rmx_rotation* a, rmx_parallel_for pool) {
    return rmx::rotate_row_any(a->dtype, pool, a->B * a->T, 2 * a->heads * a->half, *a);
}
}
