// Arithmetic of the row functions: loads and stores of every dtype, exp, log and tanh, all branch-free and all made of
// single-rounded operations, so that every instruction set gives the same bits. A fused multiply-add is one only where it
// is written, never by the compiler's choice; the C library's fmaf computes it where the CPU (x86-64 before 2013) has none.
#ifndef RMX_VEC_MATH_H
#define RMX_VEC_MATH_H

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define RMX_INLINE inline __attribute__((always_inline))

namespace rmx {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

template <class To, class From>
RMX_INLINE To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

RMX_INLINE float load(float x) { return x; }
RMX_INLINE double load(double x) { return x; }
RMX_INLINE float load(bf16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }
RMX_INLINE float load(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
    const float finite = bits_of<float>(rest << 13) * 0x1p112f;  // rebias the exponent; exact, subnormals too
    const uint32_t special = 0x7f800000u | (rest << 13);
    return bits_of<float>(sign | (rest >= 0x7c00u ? special : bits_of<uint32_t>(finite)));
}

RMX_INLINE void store(float* to, float x) { *to = x; }
RMX_INLINE void store(double* to, double x) { *to = x; }
RMX_INLINE void store(bf16* to, float x) {  // round to nearest even; NaN stays NaN
    const uint32_t b = bits_of<uint32_t>(x);
    const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
RMX_INLINE void store(f16* to, float x) {
    const uint32_t b = bits_of<uint32_t>(x), a = b & 0x7fffffffu;
    const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
    // below 2^-14 the sum with 0.5 has an ulp of 2^-24, the step of the subnormals, and rounds to it
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(a) + 0.5f) - 0x3f000000u;
    const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t h = a >= 0x47800000u ? special : (a < 0x38800000u ? subnormal : normal);
    to->bits = static_cast<uint16_t>(h | ((b >> 16) & 0x8000u));
}

template <class T> struct constants;
template <> struct constants<float> {
    using bits = uint32_t;
    static constexpr float lowest = -88.03f;  // here n = -127, whose biased exponent is that of 0
    static constexpr float magic = 0x1.8p23f + 127;  // adding it rounds to an integer and puts n + 127 into the low bits
    static constexpr float log2e = 0x1.715476p+0f, log2e_low = 0x1.4ae0c0p-26f;
    static constexpr int mantissa = 23;
    using integer = int32_t;
    static constexpr uint32_t root_half = 0x3f3504f3u;
    static constexpr int odd = 11;  // the last power of the series
    static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // 15 bits, and the rest
};
template <> struct constants<double> {
    using bits = uint64_t;
    static constexpr double lowest = -709.09;
    static constexpr double magic = 0x1.8p52 + 1023;
    static constexpr double log2e = 0x1.71547652b82fep+0, log2e_low = 0x1.777d0ffda0d24p-56;
    static constexpr int mantissa = 52;
    using integer = int64_t;
    static constexpr uint64_t root_half = 0x3fe6a09e667f3bccull;
    static constexpr int odd = 23;
    static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 1.9082149292705877e-10;  // 33 bits, and the rest
};

// 2^f for |f| <= 1/2, exactly 1 at 0. In float the minimax polynomial of degree 6 (relative error 2.3e-9 before
// rounding), its coefficients in pairs, since operations that wait for each other cost more than one more of them; in
// double the Taylor polynomial of exp(f log 2) to degree 13 (4e-18).
RMX_INLINE float exp2_fraction(float f) {
    const float s = f * f;
    const float high = __builtin_fmaf(0x1.4225a6p-13f, f, 0x1.5f43c0p-10f);
    const float middle = __builtin_fmaf(0x1.3b2cdcp-7f, f, 0x1.c6aed8p-5f);
    const float low = __builtin_fmaf(0x1.ebfbdep-3f, f, 0x1.62e430p-1f);
    return __builtin_fmaf(__builtin_fmaf(__builtin_fmaf(high, s, middle), s, low), f, 1.0f);
}
RMX_INLINE double exp2_fraction(double f) {
    const double r = f * 0x1.62e42fefa39efp-1;
    double q = 1.0 / 6227020800.0;
    q = q * r + 1.0 / 479001600.0;
    q = q * r + 1.0 / 39916800.0;
    q = q * r + 1.0 / 3628800.0;
    q = q * r + 1.0 / 362880.0;
    q = q * r + 1.0 / 40320.0;
    q = q * r + 1.0 / 5040.0;
    q = q * r + 1.0 / 720.0;
    q = q * r + 1.0 / 120.0;
    q = q * r + 1.0 / 24.0;
    q = q * r + 1.0 / 6.0;
    q = q * r + 0.5;
    q = q * r + 1.0;
    return q * r + 1.0;
}

// A constant that the optimiser cannot see through: a visible one makes it split x < lowest ? lowest : x into two paths.
template <class T>
RMX_INLINE T opaque(T x) {
    __asm__("" : "+m"(x));
    return x;
}

// x, or `lowest` below it; NaN stays NaN.
template <class T>
RMX_INLINE T at_least(T lowest, T x) {
    return lowest > x ? lowest : x;
}

// exp(x) for lowest <= x <= 80, relative error 1e-7 + 6e-8 |x| (2e-16 + 1e-16 |x|); exactly 0 at lowest. NaN stays NaN.
template <class T>
RMX_INLINE T exp_in_range(T x) {
    using C = constants<T>;
    const T t = x * C::log2e, shifted = t + C::magic;
    const T f = t - (shifted - C::magic);
    return exp2_fraction(f) * bits_of<T>(static_cast<typename C::bits>(bits_of<typename C::bits>(shifted) << C::mantissa));
}

// exp(x) for lowest <= x <= 80 to a rounding or two at any x: what is off in x log2(e) is made up for.
RMX_INLINE float fused(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
RMX_INLINE double fused(double x, double y, double z) { return __builtin_fma(x, y, z); }
template <class T>
RMX_INLINE T exp_exactly(T x) {
    using C = constants<T>;
    const T shifted = fused(x, C::log2e, C::magic), n = shifted - C::magic;
    const T f = fused(x, C::log2e_low, fused(x, C::log2e, -n));
    return exp2_fraction(f) * bits_of<T>(static_cast<typename C::bits>(bits_of<typename C::bits>(shifted) << C::mantissa));
}

// exp(x) for x <= 80, exactly 0 below constants::lowest. lowest: that constant, made opaque by the caller.
template <class T>
RMX_INLINE T exp_or_zero(T lowest, T x) {
    return exp_in_range(at_least(lowest, x));
}

// tanh: x + x^3 P(x^2) / Q(x^2) up to 0.625 (coefficients: Cephes mathematical library, S. Moshier, tanh.c), then
// 1 - 2 / (exp(2 |x|) + 1).
template <class T>
RMX_INLINE T tanh_(T x) {
    const T a = x < T(0) ? -x : x, s = x * x;
    const T P = (T(-9.64399179425052238628E-1) * s + T(-9.92877231001918586564E1)) * s + T(-1.61468768441708447952E3);
    const T Q = ((s + T(1.12811678491632931402E2)) * s + T(2.23548839060100448583E3)) * s + T(4.84406305325125486048E3);
    const T near = x + x * s * (P / Q);
    const T e = exp_or_zero(constants<T>::lowest, T(-2) * a);
    const T far = T(1) - (e + e) / (T(1) + e);
    return a < T(0.625) ? near : (x < T(0) ? -far : far);  // a NaN takes the last branch, where e is NaN
}

// log of positive normal numbers, many at a time: 2 atanh((f - 1) / (f + 1)) + exponent log 2.
template <class T>
RMX_INLINE T log_positive(T x) {
    using C = constants<T>;
    using B = typename C::bits;
    constexpr B half = C::root_half;  // the bits of sqrt(1/2), rounded down
    const B above = bits_of<B>(x) - half;
    const auto exponent = static_cast<typename C::integer>(above) >> C::mantissa;
    const T f = bits_of<T>(static_cast<B>((above & ((B(1) << C::mantissa) - 1)) + half));
    const T s = (f - T(1)) / (f + T(1)), w = s * s;  // |s| <= 0.1716
    T series = T(1) / T(C::odd);
    for (int n = C::odd - 2; n >= 3; n -= 2) series = series * w + T(1) / T(n);
    const T k = static_cast<T>(exponent);
    return k * C::ln2_high + (T(2) * s + (T(2) * s * w * series + k * C::ln2_low));
}

// log of one positive number, in double: 2 atanh((f - 1) / (f + 1)) + exponent log 2; NaN for anything else.
inline double log_(double x) {
    constexpr double LN2_HIGH = 0x1.62e42feep-1, LN2_LOW = 1.9082149292705877e-10;  // 33 bits, and the rest
    if (!(x > 0) || x > std::numeric_limits<double>::max()) return std::numeric_limits<double>::quiet_NaN();
    int exponent;
    double f = std::frexp(x, &exponent);
    if (f < 0.70710678118654752) {
        f += f;
        --exponent;
    }
    const double s = (f - 1) / (f + 1), s2 = s * s;  // |s| <= 0.1716
    double series = 1.0 / 25;
    for (int n = 23; n >= 3; n -= 2) series = series * s2 + 1.0 / n;
    const double tail = 2 * s * s2 * series;
    return exponent * LN2_HIGH + (2 * s + (tail + exponent * LN2_LOW));
}

}  // namespace rmx
#endif
