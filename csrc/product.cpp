// a w in float32 for CPUs with AVX2 and fused multiply-add: tiles of 6 x 16 sums in registers. A row's bits depend on the
// row and w alone.
#include <algorithm>

#include "parallel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define RMX_AVX2 __attribute__((target("avx2,fma")))

namespace rmx {
namespace {

constexpr int64_t ROWS = 6, PANEL = 16;  // of a tile
constexpr int64_t DEPTH = 320;           // at most; PANEL columns of that depth stay in the L1 cache
constexpr int64_t TALL = 192;            // rows; of that depth they stay in the L2 cache

struct Depth {
    int64_t step;
    explicit Depth(int64_t K) {
        const int64_t parts = (K + DEPTH - 1) / DEPTH;
        step = (K + parts - 1) / parts;
    }
};

// Panels [begin, end) of w: for each part of the depth, PANEL columns a row, one panel after the other.
RMX_AVX2 void pack(const rmx_product& p, int64_t begin, int64_t end) {
    const float* w = static_cast<const float*>(p.w);
    const int64_t step = Depth(p.K).step;
    for (int64_t k0 = 0; k0 < p.K; k0 += step) {
        const int64_t n = std::min(step, p.K - k0);
        float* part = static_cast<float*>(p.packed) + k0 * p.N;
        for (int64_t panel = begin; panel < end; ++panel) {
            float* to = part + panel * PANEL * n;
            const float* from = w + k0 * p.w_row + panel * PANEL * p.w_column;
            if (p.w_column == 1)
                for (int64_t k = 0; k < n; ++k)
                    for (int64_t l = 0; l < PANEL; ++l) to[k * PANEL + l] = from[k * p.w_row + l];
            else
                for (int64_t k = 0; k < n; ++k)
                    for (int64_t l = 0; l < PANEL; ++l) to[k * PANEL + l] = from[k * p.w_row + l * p.w_column];
        }
    }
}

// c [HEIGHT, PANEL] (+)= a [HEIGHT, K] b [K, PANEL].
template <int HEIGHT>
RMX_AVX2 inline __attribute__((always_inline)) void tile(const float* a, int64_t a_row, const float* b, int64_t K, float* c,
                                                         int64_t c_row, bool add) {
    __m256 s[HEIGHT][2];
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; ++i) s[i][0] = s[i][1] = _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int64_t k = 0; k < K; ++k) {
        const __m256 b0 = _mm256_loadu_ps(b + k * PANEL), b1 = _mm256_loadu_ps(b + k * PANEL + 8);
#pragma GCC unroll 8
        for (int i = 0; i < HEIGHT; ++i) {
            const __m256 x = _mm256_broadcast_ss(a + i * a_row + k);
            s[i][0] = _mm256_fmadd_ps(x, b0, s[i][0]);
            s[i][1] = _mm256_fmadd_ps(x, b1, s[i][1]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < HEIGHT; ++i) {
        float* to = c + i * c_row;
        if (add) {
            s[i][0] = _mm256_add_ps(s[i][0], _mm256_loadu_ps(to));
            s[i][1] = _mm256_add_ps(s[i][1], _mm256_loadu_ps(to + 8));
        }
        _mm256_storeu_ps(to, s[i][0]);
        _mm256_storeu_ps(to + 8, s[i][1]);
    }
}

RMX_AVX2 void multiply(const rmx_product& p, int64_t begin, int64_t end) {
    const int64_t step = Depth(p.K).step;
    for (int64_t top = begin; top < end; top += TALL) {
        const int64_t bottom = std::min(end, top + TALL);
        for (int64_t k0 = 0; k0 < p.K; k0 += step) {
            const int64_t n = std::min(step, p.K - k0);
            const float *a = static_cast<const float*>(p.a) + k0, *part = static_cast<const float*>(p.packed) + k0 * p.N;
            const bool add = p.add != 0 || k0 > 0;
            for (int64_t j = 0; j < p.N; j += PANEL) {
                const float* b = part + j * n;
                float* c = static_cast<float*>(p.out) + j;
                int64_t i = top;
                for (; i + ROWS <= bottom; i += ROWS)
                    tile<ROWS>(a + i * p.a_row, p.a_row, b, n, c + i * p.out_row, p.out_row, add);
                for (; i < bottom; ++i) tile<1>(a + i * p.a_row, p.a_row, b, n, c + i * p.out_row, p.out_row, add);
            }
        }
    }
}

}  // namespace
}  // namespace rmx
#endif

extern "C" {

int rmx_has_product(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    return __builtin_cpu_is("amd") && !__builtin_cpu_supports("avx512f") ? 2 : 1;
#else
    return 0;
#endif
}

int rmx_product_f32(const rmx_product* p, rmx_parallel_for pool) {
#if defined(__x86_64__)
    if (rmx_has_product() == 0) return RMX_NO_KERNEL;
    if (p->N % rmx::PANEL != 0 || p->K < 1) return RMX_BAD_SHAPE;
    const int status = rmx::for_rows(pool, p->N / rmx::PANEL, rmx::PANEL * p->K, rmx::pack, *p);
    return status != RMX_OK ? status : rmx::for_rows(pool, p->M, p->N * p->K / 16, rmx::multiply, *p);
#else
    (void)p, (void)pool;
    return RMX_NO_KERNEL;
#endif
}
}
