"""What the Triton kernels share: where rows are, lanes, sortable keys, and the terms of the KL.

A *lane* is what one thread holds. A step of a kernel reads [L, J, R] logits: L lanes, J consecutive ones a load
(16 bytes), R loads a lane. Maxima and sums of a lane need no exchange between threads, so a kernel keeps them by lane
while it walks along the row, and merges the lanes once, at its end.

Exponentials are powers of 2: e^(z - m) = 2^((z - m) c) with c = log2(e) / temperature. The difference comes first, so
the largest logit gives exactly 1.
"""

import math

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of float32; where a running maximum begins
NO_POWER = tl.constexpr(-150.0)  # 2^-150 is 0 in float32; a bound from below, since 0 * -inf is NaN
NEAR = tl.constexpr(0.375)  # of 0: where e^x - 1 - x is a polynomial
NO_KEY = tl.constexpr(-(2**63))
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def place(pid, S, inner, outer_stride, stride):
    """(row, its segment, where the row begins) of a program; rows lie in groups of ``inner``."""
    row = (pid // S).to(tl.int64)
    return row, pid % S, (row // inner) * outer_stride + (row % inner) * stride


@triton.jit
def scaling_of(row_temperature, row, c, per_temperature):
    """(c, 1 / temperature) of a row, rounded once from float64; NaN where its own temperature is no positive number."""
    if row_temperature is not None:
        own = tl.load(row_temperature + row).to(tl.float64)
        own = tl.where((own > 0) & (own < float("inf")), own, float("nan"))
        c = (tl.full([], LOG2E, tl.float64) / own).to(tl.float32)
        per_temperature = (1.0 / own).to(tl.float32)
    return c, per_temperature


@triton.jit
def offsets(L: tl.constexpr, J: tl.constexpr):
    """The columns of a lane's first load, [L, J], counted from the step's first column."""
    return tl.arange(0, L)[:, None] * J + tl.arange(0, J)[None, :]


@triton.jit
def columns_of(at, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """The columns of a step, [L, J, R], whose first load has the columns ``at``."""
    if R == 2:  # noqa: SIM108
        column = tl.join(at, at + L * J)
    else:
        column = at[:, :, None]
    return column


@triton.jit
def read(pointer, at, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """A step of logits, [L, J, R]."""
    if R == 2:  # noqa: SIM108
        x = tl.join(tl.load(pointer + at), tl.load(pointer + at + L * J))
    else:
        x = tl.load(pointer + at)[:, :, None]
    return x


@triton.jit
def read_part(pointer, at, columns, other, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """A step of logits, [L, J, R], with ``other`` from ``columns`` on."""
    if R == 2:
        first = tl.load(pointer + at, mask=at < columns, other=other)
        x = tl.join(first, tl.load(pointer + at + L * J, mask=at + L * J < columns, other=other))
    else:
        x = tl.load(pointer + at, mask=at < columns, other=other)[:, :, None]
    return x


@triton.jit
def read_row(pointer, at, columns, whole, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """A step of logits, [L, J, R]; without a mask if it is ``whole``."""
    if whole:  # noqa: SIM108  as an expression it would read both
        x = read(pointer, at, R, L, J)
    else:
        x = read_part(pointer, at, columns, 0.0, R, L, J)
    return x


@triton.jit
def write_row(pointer, at, columns, whole, x, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr):
    """Store a step x [L, J, R] up to ``columns``; without a mask if it is ``whole``."""
    x = x.to(pointer.dtype.element_ty)
    if R == 2:
        first, second = tl.split(x)
        if whole:
            tl.store(pointer + at, first)
            tl.store(pointer + at + L * J, second)
        else:
            tl.store(pointer + at, first, mask=at < columns)
            tl.store(pointer + at + L * J, second, mask=at + L * J < columns)
    elif whole:
        tl.store(pointer + at, tl.reshape(x, [L, J]))
    else:
        tl.store(pointer + at, tl.reshape(x, [L, J]), mask=at < columns)


@triton.jit
def tanh(x):
    """Up to 0.625 x + x^3 P(x^2) / Q(x^2) (coefficients: Cephes mathematical library, S. Moshier, tanh.c)."""
    a = tl.abs(x)
    s = x * x
    P = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    Q = ((s + 1.12811678491631932402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
    near = x + x * s * (P / Q)
    e = tl.exp(-2 * a)
    far = 1 - (e + e) / (1 + e)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def widened(x):
    """x in float32. Of bfloat16 by its bits, which takes one instruction a number instead of one and a half."""
    if x.dtype == tl.bfloat16:
        z = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        z = x.to(tl.float32)
    return z


@triton.jit
def capped(x, softcap):
    """Logits in float32 after the softcap, before the temperature."""
    z = widened(x)
    if softcap is not None:
        z = tl.fma(softcap, tanh(z / softcap), 0.0)  # a plain product could be fused with what follows
    return z


@triton.jit
def uncapped(dz, z, softcap):
    """The gradient with respect to logits before the softcap: dcap(u) / du = 1 - (cap / softcap)^2."""
    if softcap is not None:
        ratio = z * (1.0 / softcap)
        dz = dz * (1 - ratio * ratio)
    return dz


@triton.jit
def lane_max(z):
    """The maximum of each lane of z [L, J, R], finite from below; a NaN is passed over."""
    return tl.maximum(tl.max(tl.max(z, 2), 1), LOWEST)


@triton.jit
def lane_sum(e):
    return tl.sum(tl.sum(e, 2), 1)


@triton.jit
def decay(m, new, c):
    """log2 of the factor by which sums relative to m become relative to ``new`` >= m."""
    return tl.maximum((m - new) * c, -1000.0)  # 2^-1000 is 0, and so is 0 * -1000


@triton.jit
def exact_log(x):
    """log in float64 of a float32, where float32 has too few digits left for x near 1."""
    return tl.log(x.to(tl.float64))


@triton.jit
def excess(x):
    """e^x - 1 - x for abs(x) < NEAR: x^2 times the minimax polynomial of it there (relative error 2e-7)."""
    q = 1.3903399230912328e-3
    q = q * x + 8.368234150111675e-3
    q = q * x + 4.1666921228170395e-2
    q = q * x + 0.1666654348373413
    q = q * x + 0.5
    return (x * x) * q


@triton.jit
def kl_terms(p_s, p_b, delta):
    """p_b (e^delta - 1 - delta) = p_s - p_b (1 + delta), without cancellation near 0 or overflow far from it."""
    near = tl.abs(delta) < NEAR
    terms = tl.where(near, p_b * excess(tl.where(near, delta, 0.0)), p_s - p_b * (1 + delta))
    return tl.where(p_b == 0, p_s, terms)


@triton.jit
def moved(x, mass, A, Q):
    """(A, Q) of a part of the base's mass after the reference of its deltas is lowered by x.

    A = sum p_b (e^delta - 1), Q = sum p_b (e^delta - 1 - delta) over ``mass`` = sum p_b.
    """
    near = tl.abs(x) < NEAR
    f = tl.where(near, excess(tl.where(near, x, 0.0)), (tl.exp2(x * LOG2E) - 1) - x)
    E = x + f
    return A + E * (mass + A), Q + mass * f + E * A


@triton.jit
def order_of(z):
    """int32 that sorts as the float32 z does; -0 equals 0."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def append(items, length, room, item, take):
    """The length of the list ``items`` with each ``item`` to take added; those beyond its room are counted alone."""
    count = take.to(tl.int32)
    at = length + tl.cumsum(count, 0) - 1
    tl.store(items + at, item, mask=take & (at < room))
    return length + tl.sum(count)


@triton.jit
def key_of(order, index):
    """int64 that sorts by ``order``, and among equals by the lower index first; above NO_KEY."""
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def value_of(order):
    """The float32 of that order; of a NaN, some NaN."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
