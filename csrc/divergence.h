// The terms of a KL divergence, and what they are made of: exact near 0, where both distributions are equal.
#ifndef RMX_DIVERGENCE_H
#define RMX_DIVERGENCE_H

#include "vec_math.h"

namespace rmx {

// e^x - 1 - x for |x| <= 1/2: in float x^2 times the minimax polynomial of degree 5 (relative error 2.4e-8), in double
// the Taylor polynomial to x^14 / 14! (1e-16).
RMX_INLINE float exp_less_line(float x) {
    float q = 0x1.a0d27cp-13f;
    q = q * x + 0x1.6e87a0p-10f;
    q = q * x + 0x1.111210p-7f;
    q = q * x + 0x1.555382p-5f;
    q = q * x + 0x1.555554p-3f;
    q = q * x + 0.5f;
    return q * x * x;
}
RMX_INLINE double exp_less_line(double x) {
    double q = 1.0 / 87178291200.0;
    q = q * x + 1.0 / 6227020800.0;
    q = q * x + 1.0 / 479001600.0;
    q = q * x + 1.0 / 39916800.0;
    q = q * x + 1.0 / 3628800.0;
    q = q * x + 1.0 / 362880.0;
    q = q * x + 1.0 / 40320.0;
    q = q * x + 1.0 / 5040.0;
    q = q * x + 1.0 / 720.0;
    q = q * x + 1.0 / 120.0;
    q = q * x + 1.0 / 24.0;
    q = q * x + 1.0 / 6.0;
    q = q * x + 0.5;
    return q * x * x;
}

// p_b (e^delta - 1 - delta) = p_s - p_b (1 + delta), without cancellation near 0 or overflow far from it.
template <class T>
RMX_INLINE T kl_term(T p_s, T p_b, T delta) {
    T d = delta < T(-0.5) ? T(-0.5) : delta;
    d = d > T(0.5) ? T(0.5) : d;
    const T near = p_b * exp_less_line(d), far = p_s - p_b * (T(1) + delta);
    const T term = d == delta ? near : far;
    return p_b == T(0) ? p_s : term;
}

}  // namespace rmx
#endif
