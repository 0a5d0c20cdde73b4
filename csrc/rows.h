// One block of a row at a time, in the L1 cache: scaled logits in full precision, and the sums that are made of them.
// Sums run in LANES lanes that are added up in a fixed order, over blocks in the order of the columns, so that a row's
// bits depend on nothing but the row.
#ifndef RMX_ROWS_H
#define RMX_ROWS_H

#include <type_traits>

#include "parallel.h"
#include "rmx_cpu.h"
#include "vec_math.h"

namespace rmx {

constexpr int64_t BLOCK = 1024;  // columns: 4 KiB in float; tiles start at multiples of it
constexpr int64_t LANES = 16;    // of a sum: one register of AVX-512
constexpr int64_t MAX_LANES = 4 * LANES;

template <class X> struct real_of { using type = float; };
template <> struct real_of<double> { using type = double; };

template <class T>
struct Scale {
    T softcap, per_softcap, per_temperature;
    Scale(const rmx_scale& s, int64_t row)
        : softcap(static_cast<T>(s.softcap)),
          per_softcap(s.softcap > 0 ? static_cast<T>(1 / s.softcap) : T(0)),
          per_temperature(static_cast<T>(
              1 / (s.row_temperature != nullptr ? static_cast<const T*>(s.row_temperature)[row] : s.temperature))) {}
};

template <class X>
RMX_INLINE X* row_of(const rmx_rows& rows, int64_t i) {
    return static_cast<X*>(rows.data) + (rows.rows != nullptr ? rows.rows[i] : i) * rows.stride;
}

// z [n] of the raw logits x [n], filled up with -inf to a whole number of MAX_LANES, which is returned.
template <class T, class X>
RMX_INLINE int64_t load_block(T* __restrict z, const X* __restrict x, int64_t n, const Scale<T>& scale) {
    for (int64_t j = 0; j < n; ++j) z[j] = load(x[j]);
    if (scale.softcap > 0)
        for (int64_t j = 0; j < n; ++j) z[j] = scale.softcap * tanh_(z[j] * scale.per_softcap);
    if (scale.per_temperature != T(1))
        for (int64_t j = 0; j < n; ++j) z[j] *= scale.per_temperature;
    const int64_t padded = (n + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
    for (int64_t j = n; j < padded; ++j) z[j] = -std::numeric_limits<T>::infinity();
    return padded;
}

// z of one raw logit.
template <class T, class X>
RMX_INLINE T load_one(X x, const Scale<T>& scale) {
    T z[MAX_LANES];
    load_block(z, &x, 1, scale);
    return z[0];
}

// dx = the gradient with respect to the raw logits, from dz, that with respect to z: dcap(u) / du = 1 - (cap / softcap)^2.
template <class T, class X>
RMX_INLINE void store_gradient(X* __restrict dx, T* __restrict dz, const T* __restrict z, int64_t n,
                               const Scale<T>& scale) {
    if (scale.softcap > 0) {
        const T ratio = scale.per_softcap / scale.per_temperature;
        for (int64_t j = 0; j < n; ++j) dz[j] *= T(1) - (z[j] * ratio) * (z[j] * ratio);
    }
    if (scale.per_temperature != T(1))
        for (int64_t j = 0; j < n; ++j) dz[j] *= scale.per_temperature;
    for (int64_t j = 0; j < n; ++j) store(&dx[j], dz[j]);
}

// The halves of the lanes added up, down to one.
template <int64_t WIDTH = LANES, class T>
RMX_INLINE T add_lanes(const T* lanes) {
    if constexpr (WIDTH == 1) {
        return lanes[0];
    } else {
        T half[WIDTH / 2];
        for (int64_t l = 0; l < WIDTH / 2; ++l) half[l] = lanes[l] + lanes[l + WIDTH / 2];
        return add_lanes<WIDTH / 2>(half);
    }
}

template <int64_t WIDTH = MAX_LANES, class T>
RMX_INLINE T max_lanes(const T* lanes) {
    if constexpr (WIDTH == 1) {
        return lanes[0];
    } else {
        T half[WIDTH / 2];
        for (int64_t l = 0; l < WIDTH / 2; ++l)
            half[l] = lanes[l] > lanes[l + WIDTH / 2] ? lanes[l] : lanes[l + WIDTH / 2];
        return max_lanes<WIDTH / 2>(half);
    }
}

// load_block, and largest[l] = the maximum of the columns l, l + MAX_LANES, ... of z, and that of the block; NaN is passed
// over. Both in one loop, since the conversion waits for its loads.
template <class T, class X>
RMX_INLINE T load_and_max_block(T* __restrict z, const X* __restrict x, int64_t n, const Scale<T>& scale, int64_t* padded,
                                T* __restrict largest) {
    for (int64_t l = 0; l < MAX_LANES; ++l) largest[l] = -std::numeric_limits<T>::infinity();
    const int64_t whole = scale.softcap > 0 ? 0 : n / MAX_LANES * MAX_LANES;
    for (int64_t j = 0; j < whole; j += MAX_LANES)
        for (int64_t l = 0; l < MAX_LANES; ++l) {
            const T u = load(x[j + l]) * scale.per_temperature;
            z[j + l] = u;
            largest[l] = u > largest[l] ? u : largest[l];
        }
    *padded = whole;
    if (whole < n) {
        *padded += load_block(z + whole, x + whole, n - whole, scale);
        for (int64_t j = whole; j < *padded; j += MAX_LANES)
            for (int64_t l = 0; l < MAX_LANES; ++l) largest[l] = z[j + l] > largest[l] ? z[j + l] : largest[l];
    }
    return max_lanes(largest);
}

// sum exp(z - shift) and sum exp(z - shift) (z - shift). Four columns are added up before a lane is: one that holds the 1
// of a confident row would swallow what comes later in small pieces. next: the raw logits after this block, which are
// fetched meanwhile (1.3 x from memory in bfloat16, 1.5 x in float).
template <bool ENTROPY, class T, class X>
RMX_INLINE void sum_block(const T* __restrict z, int64_t n, T shift, const X* next, T* d, T* t) {
    const T lowest = opaque(constants<T>::lowest);
    T ds[LANES] = {}, ts[LANES] = {};
    for (int64_t j = 0; j < n; j += MAX_LANES) {
        for (size_t line = 0; line < MAX_LANES; line += 64 / sizeof(X)) __builtin_prefetch(next + j + line);
        for (int64_t l = 0; l < LANES; ++l) {
            const T* at = z + j + l;
            const T u0 = at_least(lowest, at[0] - shift), e0 = exp_in_range(u0);
            const T u1 = at_least(lowest, at[LANES] - shift), e1 = exp_in_range(u1);
            const T u2 = at_least(lowest, at[2 * LANES] - shift), e2 = exp_in_range(u2);
            const T u3 = at_least(lowest, at[3 * LANES] - shift), e3 = exp_in_range(u3);
            ds[l] += (e0 + e1) + (e2 + e3);
            if (ENTROPY) ts[l] += (e0 * u0 + e1 * u1) + (e2 * u2 + e3 * u3);
        }
    }
    *d = add_lanes(ds);
    if (ENTROPY) *t = add_lanes(ts);
}

// m = max z, d = sum exp(z - m), T = sum exp(z - m) (z - m), moved along as m grows.
template <class T, bool ENTROPY>
struct Sums {
    T m = -std::numeric_limits<T>::infinity(), d = 0, t = 0;

    template <class X>
    RMX_INLINE void fold(const T* z, int64_t n, T block_max, const X* next) {
        constexpr T nothing = -std::numeric_limits<T>::infinity();
        const T top = block_max > m ? block_max : m;
        T more_d, more_t = 0;
        sum_block<ENTROPY>(z, n, top == nothing ? T(0) : top, next, &more_d, &more_t);
        if (block_max == nothing) {  // adds nothing, unless a NaN hides among the -inf
            if (more_d != more_d) d = more_d;
            return;
        }
        if (d != T(0) && top > m) {
            const T step = top - m, decay = exp_or_zero(constants<T>::lowest, -step);
            t = decay * t - (step * decay) * d;  // step * decay is finite where step * d is not
            d *= decay;
        }
        d += more_d;
        t += more_t;
        m = top;
    }
};

}  // namespace rmx

// name_f32 .. name_f64(arguments, begin, end): the row function `name<T, X>` over a range of rows, cloned for every
// instruction set, and name_any, which goes over all rows of a dtype.
#define RMX_ROW_FUNCTION(name, suffix, X, Arguments)                                                       \
    RMX_CLONES void name##_##suffix(const Arguments& a, int64_t begin, int64_t end) {                      \
        for (int64_t i = begin; i < end; ++i) name<typename rmx::real_of<X>::type, X>(a, i);               \
    }
#define RMX_ROW_FUNCTIONS(name, Arguments)                                                                 \
    RMX_ROW_FUNCTION(name, f32, float, Arguments)                                                          \
    RMX_ROW_FUNCTION(name, bf16, rmx::bf16, Arguments)                                                     \
    RMX_ROW_FUNCTION(name, f16, rmx::f16, Arguments)                                                       \
    RMX_ROW_FUNCTION(name, f64, double, Arguments)                                                         \
    int name##_any(int32_t dtype, rmx_parallel_for pool, int64_t N, int64_t columns, const Arguments& a) { \
        switch (dtype) {                                                                                   \
            case RMX_F32: return rmx::for_rows(pool, N, columns, name##_f32, a);                           \
            case RMX_BF16: return rmx::for_rows(pool, N, columns, name##_bf16, a);                         \
            case RMX_F16: return rmx::for_rows(pool, N, columns, name##_f16, a);                           \
            case RMX_F64: return rmx::for_rows(pool, N, columns, name##_f64, a);                           \
            default: return RMX_BAD_DTYPE;                                                                 \
        }                                                                                                  \
    }
#endif
