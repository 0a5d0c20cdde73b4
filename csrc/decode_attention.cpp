// Attention of one new token a sequence to the keys before it. Heads that share keys read them together, once.
#include "rows.h"

namespace rmx {
namespace {

struct AttentionArguments {
    const rmx_attention* attention;
};

constexpr int64_t KEYS = 64;  // whose products with the queries are added up together

// scores[g, l] = scale q[g] . k[l] + bias[l] for the G queries of one head of keys. The lanes of a key are added up to
// four, and those of all keys of a block at the end: compilers make one vector of it, where a whole sum a key is scalar.
template <class T>
RMX_INLINE void find_scores(const rmx_attention& a, const T* __restrict q, const T* __restrict k, const T* __restrict bias,
                            T* __restrict scores) {
    const T scale = static_cast<T>(a.scale);
    alignas(64) T quarters[4 * KEYS];
    for (int64_t first = 0; first < a.L; first += KEYS) {
        const int64_t n = a.L - first < KEYS ? a.L - first : KEYS;
        for (int64_t g = 0; g < a.G; ++g) {
            for (int64_t l = 0; l < n; ++l) {
                const T *own = q + g * a.D, *key = k + (first + l) * a.D;
                T sums[LANES] = {};
                for (int64_t d = 0; d < a.D; d += LANES)
                    for (int64_t lane = 0; lane < LANES; ++lane) sums[lane] += own[d + lane] * key[d + lane];
                T half[LANES / 2];
                for (int64_t c = 0; c < LANES / 2; ++c) half[c] = sums[c] + sums[c + LANES / 2];
                for (int64_t c = 0; c < LANES / 4; ++c) quarters[4 * l + c] = half[c] + half[c + LANES / 4];
            }
            T* __restrict to = scores + g * a.L + first;
            for (int64_t l = 0; l < n; ++l)
                to[l] = scale * ((quarters[4 * l] + quarters[4 * l + 2]) + (quarters[4 * l + 1] + quarters[4 * l + 3]));
            if (bias != nullptr)
                for (int64_t l = 0; l < n; ++l) to[l] += bias[first + l];
        }
    }
}

// p = exp(scores - max) in place, and 1 / sum p. A row with nothing but -inf comes out as NaN, as softmax does.
template <class T>
RMX_INLINE T exponentiate(T* __restrict scores, int64_t n) {
    const T lowest = opaque(constants<T>::lowest);
    const int64_t whole = n / LANES * LANES;
    T tops[LANES], sums[LANES] = {};
    for (int64_t lane = 0; lane < LANES; ++lane) tops[lane] = -std::numeric_limits<T>::infinity();
    for (int64_t l = 0; l < whole; l += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) tops[lane] = scores[l + lane] > tops[lane] ? scores[l + lane] : tops[lane];
    for (int64_t l = whole; l < n; ++l) tops[0] = scores[l] > tops[0] ? scores[l] : tops[0];
    const T top = max_lanes<LANES>(tops);
    for (int64_t l = 0; l < whole; l += LANES)
        for (int64_t lane = 0; lane < LANES; ++lane) {
            scores[l + lane] = exp_or_zero(lowest, scores[l + lane] - top);
            sums[lane] += scores[l + lane];
        }
    for (int64_t l = whole; l < n; ++l) {
        scores[l] = exp_or_zero(lowest, scores[l] - top);
        sums[l - whole] += scores[l];
    }
    return T(1) / add_lanes(sums);
}

// out [WIDTH] = norm * sum_l p[l] v[l], the rows of v being D apart.
template <int64_t WIDTH, class T>
RMX_INLINE void weigh(const T* __restrict p, const T* __restrict v, int64_t n, int64_t D, T norm, T* __restrict out) {
    T sums[WIDTH] = {};
    for (int64_t l = 0; l < n; ++l)
        for (int64_t lane = 0; lane < WIDTH; ++lane) sums[lane] += p[l] * v[l * D + lane];
    for (int64_t lane = 0; lane < WIDTH; ++lane) out[lane] = norm * sums[lane];
}

template <class T, class X>
RMX_INLINE void attend_row(const AttentionArguments& arguments, int64_t i) {  // i: one head of keys of one sequence
    const rmx_attention& a = *arguments.attention;
    const int64_t sequence = i / a.Hk, head = i % a.Hk;
    const X* k = static_cast<const X*>(a.k) + sequence * a.k_batch + head * a.k_head;
    const X* v = static_cast<const X*>(a.v) + sequence * a.v_batch + head * a.v_head;
    const X* bias = a.bias != nullptr ? static_cast<const X*>(a.bias) + sequence * a.L : nullptr;
    X* scores = static_cast<X*>(a.scores) + i * a.G * a.L;
    X* out = static_cast<X*>(a.out) + i * a.G * a.D;
    find_scores(a, static_cast<const X*>(a.q) + i * a.G * a.D, k, bias, scores);
    for (int64_t g = 0; g < a.G; ++g) {
        T* own = scores + g * a.L;
        const T norm = exponentiate(own, a.L);
        int64_t d = 0;
        for (; d + MAX_LANES <= a.D; d += MAX_LANES) weigh<MAX_LANES>(own, v + d, a.L, a.D, norm, out + g * a.D + d);
        for (; d < a.D; d += LANES) weigh<LANES>(own, v + d, a.L, a.D, norm, out + g * a.D + d);
    }
}

RMX_ROW_FUNCTION(attend_row, f32, float, AttentionArguments)

}  // namespace
}  // namespace rmx

extern "C" {

int rmx_decode_attention(const rmx_attention* a, rmx_parallel_for pool) {
    if (a->D % rmx::LANES != 0 || a->G > rmx::MAX_LANES) return RMX_BAD_SHAPE;
    return rmx::for_rows(pool, a->B * a->Hk, a->G * a->L * a->D / 8, rmx::attend_row_f32, rmx::AttentionArguments{a});
}
}
