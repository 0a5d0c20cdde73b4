// Divergences between two heads and their gradient, a row at a time: both rows stay in the L2 cache between the sweep
// for the normalisers, that for the terms, and that for the gradient.
#include <algorithm>

#include "divergence.h"
#include "rows.h"

namespace rmx {
namespace {

struct DivergenceArguments {
    const rmx_rows *student, *teacher, *dx;
    const rmx_scale *scale, *teacher_scale;
    int64_t columns;
    const rmx_divergence_rows* rows;
};

template <class T>
RMX_INLINE T absolute(T x) {
    return x < T(0) ? -x : x;
}

// y - log(1 + y) for |y| < NEAR: y s - 2 s^3 (1/3 + s^2/5 + ...), s = y / (2 + y).
constexpr double NEAR = 0.3;
template <class T>
RMX_INLINE T excess_of_log(T y) {
    constexpr int last = sizeof(T) == 4 ? 13 : 23;
    const T s = y / (T(2) + y), w = s * s;
    T series = T(1) / T(last);
    for (int n = last - 2; n >= 3; n -= 2) series = series * w + T(1) / T(n);
    return y * s - T(2) * s * w * series;
}

// e^x - 1 for |x| <= 80.
template <class T>
RMX_INLINE T exp_less_one(T x) {
    T near = x < T(-0.5) ? T(-0.5) : x;
    near = near > T(0.5) ? T(0.5) : near;
    const T small = near + exp_less_line(near), large = exp_exactly(x) - T(1);
    return near == x ? small : large;
}

// p (y - log(1 + y)), a term of KL(p || m) with m = p (1 + y), and log(1 + y).
template <class T>
RMX_INLINE T mixture_term(T p, T mixture, T y, T* log_of) {
    const T bounded = absolute(y) < T(NEAR) ? y : T(0), excess = excess_of_log(bounded), far = log_positive(T(1) + y);
    const bool near = bounded == y;
    *log_of = near ? y - excess : far;
    return near ? p * excess : mixture - p * (T(1) + far);
}

// log q - log p, bounded, and 0 where both are 0.
template <class T>
RMX_INLINE T log_ratio(T p, T q, T log_p, T log_q) {
    T x = log_q - log_p;
    x = p == T(0) && q == T(0) ? T(0) : x;
    x = x < T(-80) ? T(-80) : x;
    return x > T(80) ? T(80) : x;
}

// The alpha divergence of order a, b = 1 - a. With x = log q - log p a term is
//   p (a + b e^x - e^(b x)) / (a b) = p (c_2 x^2 / 2! + c_3 x^3 / 3! + ...),  c_n = 1 + b + ... + b^(n - 2),
// whose coefficients are never negative: exact near 0. Far from it, it is (a p + b q - p^a q^b) / (a b).
template <class T>
struct Alpha {
    static constexpr int last = sizeof(T) == 4 ? 10 : 18;  // power of the series
    T a, b, per_ab, coefficients[last - 1];

    RMX_INLINE explicit Alpha(double order)
        : a(static_cast<T>(order)), b(static_cast<T>(1 - order)), per_ab(static_cast<T>(1 / (order * (1 - order)))) {
        double c = 1, factorial = 2;
        for (int n = 2; n <= last; ++n) {
            coefficients[n - 2] = static_cast<T>(c / factorial);
            c = 1 + (1 - order) * c;
            factorial *= n + 1;
        }
    }

    // A term; l: q (1 - e^(-a x)) / a = (q - p^a q^b) / a, which the gradient subtracts its mean from.
    RMX_INLINE T term(T lowest, T p, T q, T log_p, T log_q, T* l) const {
        const T x = log_q - log_p;
        T near = x < T(-0.5) ? T(-0.5) : x;
        near = near > T(0.5) ? T(0.5) : near;
        T series = coefficients[last - 2];
        for (int n = last - 3; n >= 0; --n) series = series * near + coefficients[n];
        const T w = exp_exactly(at_least(lowest, a * log_p + b * log_q)), far = (a * p + b * q - w) * per_ab;
        const bool is_near = near == x;
        *l = (is_near ? -q * exp_less_one(-a * near) : q - w) / a;
        return is_near ? p * (series * near * near) : (far < T(0) ? T(0) : far);
    }
};

// A term of the divergence; l: q's factor in the gradient, before its mean is subtracted. rest: 1 - beta.
template <int KIND, class T>
RMX_INLINE T term_of(T p, T q, T log_p, T log_q, T beta, T rest, T* l) {
    if (KIND == RMX_FORWARD_KL) return kl_term(q, p, log_q - log_p);
    if (KIND == RMX_REVERSE_KL) {
        *l = log_q - log_p;
        return kl_term(p, q, log_p - log_q);
    }
    const T x = log_ratio(p, q, log_p, log_q), mixture = beta * p + rest * q;
    T of_p, of_q;
    const T first = mixture_term(p, mixture, rest * exp_less_one(x), &of_p);
    const T second = mixture_term(q, mixture, beta * exp_less_one(-x), &of_q);
    *l = -of_q;
    return beta * first + rest * second;
}

template <class T>
struct Norms {
    T *m, *log_d, *teacher_m, *teacher_log_d, *mean, *entropy;
    Norms(const rmx_divergence_rows& rows, int64_t i) {
        T** all[] = {&m, &log_d, &teacher_m, &teacher_log_d, &mean, &entropy};
        for (int64_t k = 0; k < 6; ++k) *all[k] = static_cast<T*>(rows.norms) + k * rows.norm_stride + i;
    }
};

template <class T>
RMX_INLINE T value_or_zero(const void* array, int64_t i) {
    return array == nullptr ? T(0) : static_cast<const T*>(array)[i];
}

// A block of logits of any dtype of the arithmetic T: so one sweep serves all of them, and compiles once.
template <class T>
RMX_INLINE int64_t load_any(T* __restrict z, const rmx_rows& rows, int64_t i, int64_t start, int64_t n,
                            const Scale<T>& scale) {
    if constexpr (sizeof(T) == 8) {
        return load_block(z, row_of<const double>(rows, i) + start, n, scale);
    } else {
        if (rows.dtype == RMX_BF16) return load_block(z, row_of<const bf16>(rows, i) + start, n, scale);
        if (rows.dtype == RMX_F16) return load_block(z, row_of<const f16>(rows, i) + start, n, scale);
        return load_block(z, row_of<const float>(rows, i) + start, n, scale);
    }
}

template <class T>
RMX_INLINE void store_any(const rmx_rows& rows, int64_t i, int64_t start, T* dz, const T* z, int64_t n,
                          const Scale<T>& scale) {
    if constexpr (sizeof(T) == 8) {
        store_gradient(row_of<double>(rows, i) + start, dz, z, n, scale);
    } else {
        if (rows.dtype == RMX_BF16) return store_gradient(row_of<bf16>(rows, i) + start, dz, z, n, scale);
        if (rows.dtype == RMX_F16) return store_gradient(row_of<f16>(rows, i) + start, dz, z, n, scale);
        store_gradient(row_of<float>(rows, i) + start, dz, z, n, scale);
    }
}

// m and log d of a whole row, and the student's entropy; m is NaN where there is no distribution.
template <class T>
RMX_INLINE void norms_of(const DivergenceArguments& a, int64_t i) {
    const Norms<T> norms(*a.rows, i);
    for (int64_t k = 0; k < 2; ++k) {
        const rmx_rows& rows = k == 0 ? *a.student : *a.teacher;
        const Scale<T> scale(k == 0 ? *a.scale : *a.teacher_scale, i);
        alignas(64) T z[BLOCK];
        Sums<T, true> sums;
        for (int64_t start = 0; start < a.columns; start += BLOCK) {
            const int64_t padded = load_any(z, rows, i, start, std::min(BLOCK, a.columns - start), scale);
            T largest[MAX_LANES];
            for (int64_t l = 0; l < MAX_LANES; ++l) largest[l] = z[l];
            for (int64_t j = MAX_LANES; j < padded; j += MAX_LANES)
                for (int64_t l = 0; l < MAX_LANES; ++l) largest[l] = z[j + l] > largest[l] ? z[j + l] : largest[l];
            sums.fold(z, padded, max_lanes(largest), z);
        }
        T *m = k == 0 ? norms.m : norms.teacher_m, *log_d = k == 0 ? norms.log_d : norms.teacher_log_d;
        *m = sums.m - sums.m == T(0) ? sums.m : std::numeric_limits<T>::quiet_NaN();
        const double d = sums.d, of_sum = log_(d), entropy = of_sum - sums.t / d + (*m - *m);
        *log_d = static_cast<T>(of_sum);
        if (k == 0) *norms.entropy = static_cast<T>(entropy < 0 ? 0 : entropy);
    }
}

// One sweep over both rows: with TERMS the value and the mean, with GRADIENT dx.
template <int KIND, bool TERMS, bool GRADIENT, class T>
RMX_INLINE void sweep(const DivergenceArguments& a, int64_t i) {
    const rmx_divergence_rows& rows = *a.rows;
    const Norms<T> norms(rows, i);
    const Scale<T> scale(*a.scale, i), teacher_scale(*a.teacher_scale, i);
    const T m = *norms.m, log_d = *norms.log_d, teacher_m = *norms.teacher_m, teacher_log_d = *norms.teacher_log_d;
    const T mean = KIND == RMX_FORWARD_KL || TERMS ? T(0) : *norms.mean, entropy = *norms.entropy;
    const bool has_divergence = rows.g_divergence != nullptr, has_entropy = rows.g_entropy != nullptr;
    const T g = value_or_zero<T>(rows.g_divergence, i), g_entropy = value_or_zero<T>(rows.g_entropy, i);
    const T lowest = opaque(constants<T>::lowest), beta = static_cast<T>(rows.beta);
    const T rest = static_cast<T>(1 - rows.beta);  // rounded after the difference
    const Alpha<T> alpha(KIND == RMX_ALPHA ? rows.beta : 0.5);
    alignas(64) T z[BLOCK];
    alignas(64) T teacher_z[BLOCK];
    alignas(64) T dz[BLOCK];
    T value = 0, sum = 0;
    for (int64_t start = 0; start < a.columns; start += BLOCK) {
        const int64_t n = std::min(BLOCK, a.columns - start);
        const int64_t padded = load_any(z, *a.student, i, start, n, scale);
        load_any(teacher_z, *a.teacher, i, start, n, teacher_scale);
        T values[LANES] = {}, sums[LANES] = {};
        for (int64_t j = 0; j < padded; j += LANES)
            for (int64_t c = 0; c < LANES; ++c) {
                const T log_q = (z[j + c] - m) - log_d, log_p = (teacher_z[j + c] - teacher_m) - teacher_log_d;
                const T q = exp_exactly(at_least(lowest, log_q)), p = exp_exactly(at_least(lowest, log_p));
                T l = 0;
                if (KIND == RMX_ALPHA) {
                    values[c] += alpha.term(lowest, p, q, log_p, log_q, &l);
                    sums[c] += l;
                } else if (TERMS || KIND != RMX_FORWARD_KL) {
                    const T term = term_of<KIND>(p, q, log_p, log_q, beta, rest, &l);
                    values[c] += term;
                    sums[c] += q == T(0) ? T(0) : q * l;
                }
                if (GRADIENT) {
                    T own = q - p;  // 0 where they are equal
                    if (KIND == RMX_REVERSE_KL) own = q == T(0) ? T(0) : q * (l - mean);
                    if (KIND == RMX_JSD) own = q == T(0) ? T(0) : rest * q * (l - mean);
                    if (KIND == RMX_ALPHA) own = l - q * mean;
                    const T of_entropy = q == T(0) ? T(0) : q * (log_q + entropy);
                    dz[j + c] = (has_divergence ? own * g : T(0)) - (has_entropy ? of_entropy * g_entropy : T(0));
                }
            }
        if (TERMS) {
            value += add_lanes(values);
            sum += add_lanes(sums);
        }
        if (GRADIENT) store_any(*a.dx, i, start, dz, z, n, scale);
    }
    if (TERMS) {
        static_cast<T*>(rows.value)[i] = value;
        *norms.mean = value == value ? sum : value;
    }
}

// Each of these is cloned for every instruction set, and called a row at a time.
#define RMX_SWEEP(name, KIND, TERMS, T) \
    RMX_CLONES void name(const DivergenceArguments& a, int64_t i) { sweep<KIND, TERMS, !TERMS, T>(a, i); }
#define RMX_SWEEPS(name, KIND)                             \
    RMX_SWEEP(name##_terms_f32, KIND, true, float)         \
    RMX_SWEEP(name##_terms_f64, KIND, true, double)        \
    RMX_SWEEP(name##_turn_f32, KIND, false, float)         \
    RMX_SWEEP(name##_turn_f64, KIND, false, double)
RMX_SWEEPS(forward_kl, RMX_FORWARD_KL)
RMX_SWEEPS(reverse_kl, RMX_REVERSE_KL)
RMX_SWEEPS(jsd, RMX_JSD)
RMX_SWEEPS(alpha, RMX_ALPHA)
RMX_CLONES void norms_f32(const DivergenceArguments& a, int64_t i) { norms_of<float>(a, i); }
RMX_CLONES void norms_f64(const DivergenceArguments& a, int64_t i) { norms_of<double>(a, i); }

void rows_of(const DivergenceArguments& a, int64_t begin, int64_t end) {
    using Sweep = void (*)(const DivergenceArguments&, int64_t);
    static const Sweep terms[4][2] = {{forward_kl_terms_f32, forward_kl_terms_f64},
                                      {reverse_kl_terms_f32, reverse_kl_terms_f64},
                                      {jsd_terms_f32, jsd_terms_f64},
                                      {alpha_terms_f32, alpha_terms_f64}};
    static const Sweep turns[4][2] = {{forward_kl_turn_f32, forward_kl_turn_f64},
                                      {reverse_kl_turn_f32, reverse_kl_turn_f64},
                                      {jsd_turn_f32, jsd_turn_f64},
                                      {alpha_turn_f32, alpha_turn_f64}};
    const int wide = a.student->dtype == RMX_F64, kind = a.rows->kind;
    for (int64_t i = begin; i < end; ++i) {
        if (a.rows->value != nullptr) {
            (wide ? norms_f64 : norms_f32)(a, i);
            terms[kind][wide](a, i);
        }
        if (a.dx != nullptr) turns[kind][wide](a, i);
    }
}

}  // namespace
}  // namespace rmx

extern "C" {

int rmx_divergence(const rmx_rows* student, const rmx_rows* teacher, const rmx_scale* scale,
                   const rmx_scale* teacher_scale, int64_t N, int64_t columns, const rmx_divergence_rows* rows,
                   const rmx_rows* dx, rmx_parallel_for pool) {
    const auto known = [](int32_t dtype) { return dtype >= RMX_F32 && dtype <= RMX_F64; };
    if (!known(student->dtype) || !known(teacher->dtype) || (student->dtype == RMX_F64) != (teacher->dtype == RMX_F64))
        return RMX_BAD_DTYPE;
    if (rows->kind < RMX_FORWARD_KL || rows->kind > RMX_ALPHA) return RMX_BAD_SHAPE;
    const rmx::DivergenceArguments a{student, teacher, dx, scale, teacher_scale, columns, rows};
    return rmx::for_rows(pool, N, columns, rmx::rows_of, a);
}
}
