// Log-prob, KL to the base and their gradient, a row at a time. With the gradient, both rows stay in the L2 cache between
// the sweep for the normalisers and the sweep for the rest; without it, rows in float32 take one sweep for all. Serves
// both gated contrastive losses and linear_logprob_kl.
#include <algorithm>

#include "divergence.h"
#include "rows.h"

namespace rmx {
namespace {

struct LossArguments {
    const rmx_rows *student, *base, *dx;
    int64_t anchored;
    const rmx_scale* scale;
    int64_t first, columns;
    const rmx_loss* loss;
};

// m and log d of a whole row; m is NaN where there is no distribution.
template <class T, class X>
RMX_INLINE void find_norm(const X* x, int64_t V, const Scale<T>& scale, T* m, T* log_d) {
    alignas(64) T z[BLOCK];
    alignas(64) T largest[MAX_LANES];
    Sums<T, false> sums;
    for (int64_t start = 0; start < V; start += BLOCK) {
        const int64_t n = std::min(BLOCK, V - start);
        int64_t padded;
        const T block_max = load_and_max_block(z, x + start, n, scale, &padded, largest);
        sums.fold(z, padded, block_max, x + start + n);
    }
    *m = sums.m - sums.m == T(0) ? sums.m : std::numeric_limits<T>::quiet_NaN();
    *log_d = static_cast<T>(log_(sums.d));
}

// exp_less_line for |x| <= 2: x^2 times the minimax polynomial of degree 9 (relative error 2.1e-8), its coefficients in pairs.
RMX_INLINE float exp_less_line_near(float x) {
    const float s = x * x;
    float q = __builtin_fmaf(0x1.b74978p-26f, x, 0x1.3e9a62p-22f);
    q = __builtin_fmaf(q, s, __builtin_fmaf(0x1.72701ap-19f, x, 0x1.9ee1b6p-16f));
    q = __builtin_fmaf(q, s, __builtin_fmaf(0x1.a00e90p-13f, x, 0x1.6c1d7ep-10f));
    q = __builtin_fmaf(q, s, __builtin_fmaf(0x1.11114ep-7f, x, 0x1.55553cp-5f));
    q = __builtin_fmaf(q, s, __builtin_fmaf(0x1.555554p-3f, x, 0.5f));
    return q * s;
}

template <class T, class X, bool TERMS, bool GRADIENT>
RMX_INLINE void sweep(const LossArguments& a, int64_t i, const X* x, const X* base_x, T* kl, T* mass) {
    const rmx_loss& loss = *a.loss;
    const Scale<T> scale(*a.scale, i);
    const T m = static_cast<const T*>(loss.m)[i], log_d = static_cast<const T*>(loss.log_d)[i];
    const T base_m = base_x != nullptr ? static_cast<const T*>(loss.base_m)[i] : T(0);
    const T base_log_d = base_x != nullptr ? static_cast<const T*>(loss.base_log_d)[i] : T(0);
    const T ce = GRADIENT ? static_cast<const T*>(loss.ce)[i] : T(0);
    const T kl_weight = GRADIENT ? static_cast<const T*>(loss.kl_weight)[i] : T(0);
    const T lowest = opaque(constants<T>::lowest), upstream = static_cast<T>(loss.upstream);
    const int64_t target = loss.target[i];
    X* dx = GRADIENT ? row_of<X>(*a.dx, i) : nullptr;
    alignas(64) T z_block[BLOCK];
    alignas(64) T base_block[BLOCK];
    alignas(64) T dz_block[BLOCK];
    // whole blocks of plain logits are read and written where they are
    const bool plain = std::is_same<T, X>::value && scale.softcap <= 0 && scale.per_temperature == T(1) &&
                       dx != x && (dx == nullptr || dx != base_x);
    for (int64_t start = 0; start < a.columns; start += BLOCK) {
        const int64_t n = std::min(BLOCK, a.columns - start), column = a.first + start;
        const bool in_place = plain && n == BLOCK;
        const T* __restrict z = z_block;
        const T* __restrict base_z = base_block;
        T* __restrict dz = dz_block;
        if constexpr (std::is_same<T, X>::value)
            if (in_place) {
                z = x + start;
                if (base_x != nullptr) base_z = base_x + start;
                if (GRADIENT) dz = dx + start;
            }
        const int64_t padded = in_place ? n : load_block(z_block, x + start, n, scale);
        if (base_x != nullptr) {
            if (!in_place) load_block(base_block, base_x + start, n, scale);
            T kls[LANES] = {}, masses[LANES] = {};
            for (int64_t j = 0; j < padded; j += LANES) {
                if (!TERMS) {  // the rows come from memory: fetch the next block of both meanwhile
                    __builtin_prefetch(x + start + n + j);
                    __builtin_prefetch(base_x + start + n + j);
                }
                for (int64_t l = 0; l < LANES; ++l) {
                    const T log_s = (z[j + l] - m) - log_d, log_b = (base_z[j + l] - base_m) - base_log_d;
                    const T p_s = exp_or_zero(lowest, log_s), p_b = exp_or_zero(lowest, log_b);
                    if (TERMS) {
                        kls[l] += kl_term(p_s, p_b, log_s - log_b);
                        masses[l] += p_b;
                    }
                    if (GRADIENT) dz[j + l] = p_s * ce + (p_s - p_b) * kl_weight;  // the difference is exact near 0
                }
            }
            if (TERMS) {
                *kl += add_lanes(kls);
                *mass += add_lanes(masses);
            }
        } else if (GRADIENT) {
            for (int64_t j = 0; j < padded; ++j) dz[j] = exp_or_zero(lowest, (z[j] - m) - log_d) * ce;
        }
        if (GRADIENT) {
            if (target >= column && target < column + n) dz[target - column] -= ce;
            if (upstream != T(1))
                for (int64_t j = 0; j < n; ++j) dz[j] *= upstream;
            if (!in_place) store_gradient(dx + start, dz_block, z_block, n, scale);
        }
    }
}

// Both normalisers and the KL from one sweep, in float arithmetic within a block and in double from block to block:
//   delta = log p_s - log p_b - kappa,   A = sum p_b (e^delta - 1),   Q = sum p_b (e^delta - 1 - delta),
// with p_b not yet divided by its sum, which is ``mass``. kappa may be any constant; it is that of the heaviest block.
struct Pair {
    double m = -std::numeric_limits<double>::infinity(), d = 0, base_m = m, mass = 0, kappa = 0, A = 0, Q = 0;
    bool far = false;  // kappa moved by more than exp can follow, or there is none
};

// (A, Q) of a part of ``mass`` after its deltas have grown by x.
inline void move(Pair* part, double x) {
    if (x == 0) return;
    part->far = part->far || !(x < 80 && x > -80);
    const double lowest = constants<double>::lowest, grown = exp_or_zero(lowest, x < 80 ? x : 80.0);
    const double f = x < 0.5 && x > -0.5 ? exp_less_line(x) : grown - 1 - x, E = x + f;
    part->Q += part->mass * f + E * part->A;
    part->A += E * (part->mass + part->A);
}

inline void join(Pair* all, Pair part) {
    const double lowest = constants<double>::lowest;
    const double top = part.m > all->m ? part.m : all->m, base_top = part.base_m > all->base_m ? part.base_m : all->base_m;
    if (all->m != top) all->d *= exp_or_zero(lowest, all->m - top);
    if (part.m != top) part.d *= exp_or_zero(lowest, part.m - top);
    all->d += part.d;
    all->m = top;
    for (Pair* p : {all, &part}) {
        const double w = p->base_m == base_top ? 1 : exp_or_zero(lowest, p->base_m - base_top);
        p->mass *= w;
        p->A *= w;
        p->Q *= w;
    }
    all->base_m = base_top;
    const bool larger = part.mass > all->mass;
    if (larger ? all->mass != 0 || all->A != 0 : true) {
        Pair* less = larger ? all : &part;
        const double shift = part.kappa - all->kappa;
        move(less, larger ? -shift : shift);
    }
    if (larger) all->kappa = part.kappa;
    all->far = all->far || part.far;
    all->mass += part.mass;
    all->A += part.A;
    all->Q += part.Q;
}

// The maxima of a block of both, and the range of u - v; NaN is passed over.
struct Extent {
    float top, base_top, low, high;
};

RMX_INLINE Extent extent_of(const float* __restrict z, const float* __restrict base_z, int64_t n) {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    float tops[LANES], base_tops[LANES], highs[LANES], depths[LANES];
    for (int64_t l = 0; l < LANES; ++l) tops[l] = base_tops[l] = highs[l] = depths[l] = nothing;
    for (int64_t j = 0; j < n; j += LANES)
        for (int64_t l = 0; l < LANES; ++l) {
            const float u = z[j + l], v = base_z[j + l], up = u - v, down = v - u;
            tops[l] = u > tops[l] ? u : tops[l];
            base_tops[l] = v > base_tops[l] ? v : base_tops[l];
            highs[l] = up > highs[l] ? up : highs[l];
            depths[l] = down > depths[l] ? down : depths[l];
        }
    return {max_lanes<LANES>(tops), max_lanes<LANES>(base_tops), -max_lanes<LANES>(depths), max_lanes<LANES>(highs)};
}

// The sums of a block about ``kappa``, from two exponentials a column; any logits. next, base_next: the columns after the
// block, which are fetched meanwhile.
template <class X>
RMX_INLINE void sum_pair(const float* __restrict z, const float* __restrict base_z, int64_t n, float top, float base_top,
                         const X* next, const X* base_next, Pair* part) {
    const float lowest = opaque(constants<float>::lowest), most = opaque(1e30f), kappa = top - base_top;
    float ds[LANES] = {}, masses[LANES] = {}, lines[LANES] = {}, terms[LANES] = {};
    for (int64_t j = 0; j < n; j += LANES) {
        __builtin_prefetch(next + j);
        __builtin_prefetch(base_next + j);
        for (int64_t l = 0; l < LANES; ++l) {
            const float u = z[j + l], v = base_z[j + l], delta = (u - v) - kappa;
            const float e = exp_or_zero(lowest, u - top), b = exp_or_zero(lowest, v - base_top);
            const float bounded = delta > -most ? delta : -most;  // no NaN: of two -inf, where b is 0
            ds[l] += e;
            masses[l] += b;
            terms[l] += kl_term(e, b, delta);
            lines[l] += b * (bounded < most ? bounded : most);
        }
    }
    part->d = add_lanes(ds), part->mass = add_lanes(masses);
    part->Q = add_lanes(terms), part->A = part->Q + static_cast<double>(add_lanes(lines));
}

// The same where |delta| <= 2: sum e^(u - top) = mass + A, so that one exponential a column is enough. NaN where an
// entry is NaN or both are -inf.
template <class X>
RMX_INLINE void sum_near_pair(const float* __restrict z, const float* __restrict base_z, int64_t n, float kappa,
                              float base_top, const X* next, const X* base_next, Pair* part) {
    const float lowest = opaque(constants<float>::lowest);
    float masses[LANES] = {}, lines[LANES] = {}, terms[LANES] = {};
    for (int64_t j = 0; j < n; j += LANES) {
        __builtin_prefetch(next + j);
        __builtin_prefetch(base_next + j);
        for (int64_t l = 0; l < LANES; ++l) {
            const float v = base_z[j + l], delta = (z[j + l] - v) - kappa, b = exp_or_zero(lowest, v - base_top);
            masses[l] += b;
            terms[l] = __builtin_fmaf(b, exp_less_line_near(delta), terms[l]);
            lines[l] = __builtin_fmaf(b, delta, lines[l]);
        }
    }
    part->mass = add_lanes(masses);
    part->Q = add_lanes(terms), part->A = part->Q + static_cast<double>(add_lanes(lines));
    part->d = part->mass + part->A;
}

// False where the KL is not known to be exact: an entry of -inf, models that are far apart. The norms always are.
template <class X>
RMX_INLINE bool pair_row(const X* x, const X* base_x, int64_t V, const Scale<float>& scale, const rmx_loss& loss,
                         int64_t i, float* kl) {
    constexpr float nothing = -std::numeric_limits<float>::infinity();
    const bool plain = std::is_same<X, float>::value && scale.softcap <= 0 && scale.per_temperature == 1.0f;
    alignas(64) float z_block[BLOCK];
    alignas(64) float base_block[BLOCK];
    Pair all;
    for (int64_t start = 0; start < V; start += BLOCK) {
        const int64_t n = std::min(BLOCK, V - start);
        const bool in_place = plain && n % MAX_LANES == 0;  // logits are read where they are
        const float *z = z_block, *base_z = base_block;
        int64_t padded = n;
        if constexpr (std::is_same<X, float>::value)
            if (in_place) z = x + start, base_z = base_x + start;
        if (!in_place) {
            padded = load_block(z_block, x + start, n, scale);
            load_block(base_block, base_x + start, n, scale);
        }
        const Extent extent = extent_of(z, base_z, padded);
        Pair part;
        part.m = extent.top, part.base_m = extent.base_top;
        part.far = part.m != part.base_m && (extent.top == nothing || extent.base_top == nothing);
        const float top = extent.top == nothing ? 0.0f : extent.top;
        const float base_top = extent.base_top == nothing ? 0.0f : extent.base_top, kappa = top - base_top;
        const X *next = x + start + n, *base_next = base_x + start + n;
        const bool near = padded == n && extent.high - kappa <= 2 && extent.low - kappa >= -2;
        if (near) sum_near_pair(z, base_z, padded, kappa, base_top, next, base_next, &part);
        if (!near || part.d != part.d) sum_pair(z, base_z, padded, top, base_top, next, base_next, &part);
        part.kappa = kappa;
        if (part.d != 0 || part.mass != 0) join(&all, part);  // NaN, too
    }
    const auto finite = [](double m) {
        return m - m == 0 ? static_cast<float>(m) : std::numeric_limits<float>::quiet_NaN();
    };
    const double log_d = log_(all.d), base_log_d = log_(all.mass);
    static_cast<float*>(loss.m)[i] = finite(all.m);
    static_cast<float*>(loss.log_d)[i] = static_cast<float>(log_d);
    static_cast<float*>(loss.base_m)[i] = finite(all.base_m);
    static_cast<float*>(loss.base_log_d)[i] = static_cast<float>(base_log_d);
    const double ratio = (all.m - all.base_m) + (log_d - base_log_d), mean = all.Q / all.mass, mu = all.A / all.mass;
    const double log_mu = log_(1 + mu), exact = mean - (mu - log_mu), off = std::fabs(log_mu - (ratio - all.kappa));
    *kl = exact > 0 ? static_cast<float>(exact) : 0.0f;
    const bool digits = mean < 8 * exact || mean < 1e-12;
    return !all.far && off <= 3e-6 + 1e-6 * std::fabs(ratio) && std::fabs(mu) < 0.5 && digits;
}

template <class T, class X>
RMX_INLINE void loss_row(const LossArguments& a, int64_t i) {
    const rmx_loss& loss = *a.loss;
    const int64_t V = a.columns;
    const Scale<T> scale(*a.scale, i);
    const X* x = row_of<const X>(*a.student, i);
    const X* base_x = i < a.anchored ? row_of<const X>(*a.base, i) : nullptr;
    T *m = static_cast<T*>(loss.m) + i, *log_d = static_cast<T*>(loss.log_d) + i;
    const bool together = std::is_same<T, float>::value && base_x != nullptr && loss.find_base_norm != 0 && a.dx == nullptr;
    bool known = false;
    T kl = 0, mass = 0;
    if constexpr (std::is_same<T, float>::value)
        if (together) known = pair_row(x, base_x, V, scale, loss, i, &kl);
    if (!together) find_norm(x, V, scale, m, log_d);
    const int64_t target = loss.target[i];  // read before the sweep, which may write over x
    const T z = target >= 0 && target < V ? load_one(x[target], scale) : std::numeric_limits<T>::quiet_NaN();
    static_cast<T*>(loss.logprob)[i] = (z - *m) - *log_d;
    if (known) {
        static_cast<T*>(loss.kl)[i] = kl;
        return;
    }
    kl = 0;
    if (base_x != nullptr && !together) {
        T *base_m = static_cast<T*>(loss.base_m) + i, *base_log_d = static_cast<T*>(loss.base_log_d) + i;
        if (loss.find_base_norm != 0) find_norm(base_x, V, scale, base_m, base_log_d);
    }
    if (a.dx != nullptr)
        sweep<T, X, true, true>(a, i, x, base_x, &kl, &mass);
    else if (base_x != nullptr)
        sweep<T, X, true, false>(a, i, x, base_x, &kl, &mass);
    if (base_x == nullptr) return;
    const double off = static_cast<double>(mass) - 1;
    if (!(off <= loss.mass_tolerance && off >= -loss.mass_tolerance)) {
        kl = std::numeric_limits<T>::quiet_NaN();
        static_cast<T*>(loss.base_m)[i] = kl;
        if (a.dx != nullptr) {
            X* dx = row_of<X>(*a.dx, i);
            for (int64_t j = 0; j < V; ++j) store(&dx[j], kl);
        }
    }
    static_cast<T*>(loss.kl)[i] = kl;
}

template <class T, class X>
RMX_INLINE void loss_backward_row(const LossArguments& a, int64_t i) {
    const X* base_x = i < a.anchored ? row_of<const X>(*a.base, i) : nullptr;
    sweep<T, X, false, true>(a, i, row_of<const X>(*a.student, i), base_x, nullptr, nullptr);
}

RMX_ROW_FUNCTIONS(loss_row, LossArguments)
RMX_ROW_FUNCTIONS(loss_backward_row, LossArguments)

}  // namespace
}  // namespace rmx

extern "C" {

int rmx_gated_contrastive_loss(const rmx_rows* student, const rmx_rows* base, int64_t anchored, const rmx_scale* scale,
                               int64_t N, int64_t V, const rmx_loss* loss, const rmx_rows* dx, rmx_parallel_for pool) {
    return rmx::loss_row_any(student->dtype, pool, N, V, {student, base, dx, anchored, scale, 0, V, loss});
}

int rmx_gated_contrastive_loss_backward(const rmx_rows* student, const rmx_rows* base, int64_t anchored,
                                        const rmx_scale* scale, int64_t N, int64_t first, int64_t columns,
                                        const rmx_loss* loss, const rmx_rows* dx, rmx_parallel_for pool) {
    return rmx::loss_backward_row_any(student->dtype, pool, N, columns,
                                      {student, base, dx, anchored, scale, first, columns, loss});
}
}
