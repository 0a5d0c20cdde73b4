"""Triton kernels of the divergences: three reads of both models' logits, and one write of the gradient.

``fold`` walks along a part of a row of both and keeps m, d and T by lane, as the statistics do. ``values`` merges the
parts into norms, and walks along its part again for the terms of the divergence. The gradient needs a mean over the
row (reference.py), so ``gradient`` is a third walk. Student and teacher go through the same
operations, so that equal rows give exactly 0.

KIND is the place of the divergence in op.KINDS: 0 for KL(p || q), 1 for KL(q || p), 2 for the generalised JSD, 3 for
the alpha divergence.
"""

import triton
import triton.language as tl

from rmx_kernels.head.kernels import (
    LN2,
    LOG2E,
    LOWEST,
    NEAR,
    capped,
    columns_of,
    decay,
    excess,
    kl_terms,
    lane_sum,
    offsets,
    read,
    read_part,
    read_row,
    scaling_of,
    uncapped,
    write_row,
)
from rmx_kernels.losses.kernels import norm_of
from rmx_kernels.statistics.kernels import fold_step

NEAR_LOG = tl.constexpr(0.3)  # of 0: where y - log(1 + y) is a series
FAR = tl.constexpr(80.0)  # nats between two log-probs from which on the smaller probability adds nothing to a mixture


@triton.jit
def part_of(S, stride, teacher_stride):
    """(row, its segment, where the row of the student begins, and that of the teacher) of a program."""
    row = (tl.program_id(0) // S).to(tl.int64)
    return row, tl.program_id(0) % S, row * stride, row * teacher_stride


@triton.jit
def excess_of_log(y):
    """y - log(1 + y) for abs(y) < NEAR_LOG: y^2 times a polynomial fitted to it there (relative error 2e-7)."""
    q = -0.1319018453359604
    q = q * y + 0.14509499073028564
    q = q * y - 0.14139732718467712
    q = q * y + 0.1654950976371765
    q = q * y - 0.20003722608089447
    q = q * y + 0.25002145767211914
    q = q * y - 0.3333330750465393
    q = q * y + 0.5
    return (y * y) * q


@triton.jit
def mixed(p, q, log_p, log_q, beta, rest):
    """(m, log m, (m - p) / p, (m - q) / q) of the mixture m = beta p + rest q, the ratios exact near 0.

    Where neither distribution has a token, log m is -inf and the ratios are 0.
    """
    mixture = beta * p + rest * q
    x = tl.where((p == 0) & (q == 0), 0.0, log_q - log_p)
    x = tl.minimum(tl.maximum(x, -FAR), FAR)
    near = tl.abs(x) < NEAR
    ratio = tl.where(near, x + excess(tl.where(near, x, 0.0)), tl.exp2(x * LOG2E) - 1)  # q / p - 1
    back = -ratio * tl.exp2(-x * LOG2E)  # p / q - 1
    return mixture, tl.log2(mixture) * LN2, rest * ratio, beta * back


@triton.jit
def mixture_terms(p, log_p, mixture, log_m, y):
    """p (y - log(1 + y)) = m - p (1 + log m - log p): those of KL(p || m), m = p (1 + y)."""
    near = tl.abs(y) < NEAR_LOG
    terms = tl.where(near, p * excess_of_log(tl.where(near, y, 0.0)), mixture - p * (1 + (log_m - log_p)))
    return tl.where(p == 0, mixture, terms)


@triton.jit
def log_of(y, far):
    """log(1 + y), which is ``far`` but for its digits near 0."""
    near = tl.abs(y) < NEAR_LOG
    close = tl.where(near, y, 0.0)
    return tl.where(near, close - excess_of_log(close), far)


@triton.jit
def alpha_terms(p, q, log_p, log_q, a, b):
    """Terms of the alpha divergence of order a, (a p + b q - p^a q^b) / (a b), and (q - p^a q^b) / a; b = 1 - a.

    Near x = log q - log p = 0 the first is p times a series in x, whose coefficients c_n / n! are never negative.
    """
    x = log_q - log_p
    near = tl.abs(x) < NEAR
    x = tl.where(near, x, 0.0)
    c_3 = 1 + b
    c_4 = 1 + b * c_3
    c_5 = 1 + b * c_4
    c_6 = 1 + b * c_5
    c_7 = 1 + b * c_6
    c_8 = 1 + b * c_7
    series = c_8 / 40320
    series = series * x + c_7 / 5040
    series = series * x + c_6 / 720
    series = series * x + c_5 / 120
    series = series * x + c_4 / 24
    series = series * x + c_3 / 6
    series = series * x + 0.5
    w = tl.exp2((a * log_p + b * log_q) * LOG2E)
    far = (a * p + b * q - w) / (a * b)
    terms = tl.where(near, p * ((x * x) * series), tl.where(far < 0, 0.0, far))
    y = -a * x
    return terms, tl.where(near, -q * (y + excess(y)), q - w) / a


@triton.jit
def pair_terms(log_p, log_q, beta, rest, KIND: tl.constexpr):
    """(terms of the divergence, terms of the mean that its gradient needs)."""
    p, q = tl.exp2(log_p * LOG2E), tl.exp2(log_q * LOG2E)
    if KIND == 0:
        terms = kl_terms(q, p, log_q - log_p)
        of_mean = tl.zeros_like(terms)
    elif KIND == 1:
        terms = kl_terms(p, q, log_p - log_q)
        of_mean = tl.where(q == 0, 0.0, q * (log_q - log_p))
    elif KIND == 3:
        terms, of_mean = alpha_terms(p, q, log_p, log_q, beta, rest)
    else:
        mixture, log_m, y_p, y_q = mixed(p, q, log_p, log_q, beta, rest)
        of_q = mixture_terms(q, log_q, mixture, log_m, y_q)
        terms = beta * mixture_terms(p, log_p, mixture, log_m, y_p) + rest * of_q
        of_mean = tl.where(q == 0, 0.0, -q * log_of(y_q, log_m - log_q))
    return terms, of_mean


@triton.jit
def row_gradient(log_p, log_q, beta, rest, mean, KIND: tl.constexpr):
    """The gradient of a row's divergence with respect to the student's scaled logits."""
    p, q = tl.exp2(log_p * LOG2E), tl.exp2(log_q * LOG2E)
    if KIND == 0:
        dz = q - p  # 0 where they are equal
    elif KIND == 1:
        dz = tl.where(q == 0, 0.0, q * ((log_q - log_p) - mean))
    elif KIND == 3:
        _terms, dz = alpha_terms(p, q, log_p, log_q, beta, rest)
        dz -= q * mean
    else:
        _m, log_m, _y, y = mixed(p, q, log_p, log_q, beta, rest)
        dz = tl.where(q == 0, 0.0, -rest * q * (log_of(y, log_m - log_q) + mean))
    return dz


@triton.jit(do_not_specialize=["N", "V", "S", "STEPS"])
def fold(
    x, stride, teacher_x, teacher_stride,  # logits [N, V]
    parts,  # [5, N, S]: m, d and T of the student, m and d of the teacher
    N, V, S, STEPS, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature; the teacher's alike
    teacher_c, teacher_per_temperature, teacher_softcap, teacher_row_temperature,
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, segment, start, teacher_start = part_of(S, stride, teacher_stride)
    c, _unit = scaling_of(row_temperature, row, c, per_temperature)
    teacher_c, _teacher_unit = scaling_of(teacher_row_temperature, row, teacher_c, teacher_per_temperature)
    TILE: tl.constexpr = R * L * J
    at = offsets(L, J)
    first = segment * STEPS
    whole = tl.minimum(first + STEPS, V // TILE)
    m = tl.full([L], LOWEST, tl.float32)
    d = tl.zeros([L], tl.float32)
    T = tl.zeros([L], tl.float32)
    teacher_m = tl.full([L], LOWEST, tl.float32)
    teacher_d = tl.zeros([L], tl.float32)
    teacher_T = tl.zeros([L], tl.float32)
    for step in tl.range(first, whole, num_stages=STAGES):
        z = capped(read(x + start + step * TILE, at, R, L, J), softcap)
        teacher_z = capped(read(teacher_x + teacher_start + step * TILE, at, R, L, J), teacher_softcap)
        m, d, T = fold_step(z, m, d, T, c)
        teacher_m, teacher_d, teacher_T = fold_step(teacher_z, teacher_m, teacher_d, teacher_T, teacher_c)
    if (whole < first + STEPS) & (whole * TILE < V):
        begin, left = whole * TILE, V - whole * TILE
        inside = columns_of(at, R, L, J) < left
        z = capped(read_part(x + start + begin, at, left, 0.0, R, L, J), softcap)
        teacher_z = capped(read_part(teacher_x + teacher_start + begin, at, left, 0.0, R, L, J), teacher_softcap)
        m, d, T = fold_step(tl.where(inside, z, float("-inf")), m, d, T, c)
        teacher_z = tl.where(inside, teacher_z, float("-inf"))
        teacher_m, teacher_d, teacher_T = fold_step(teacher_z, teacher_m, teacher_d, teacher_T, teacher_c)
    M, teacher_M = tl.max(m), tl.max(teacher_m)
    fall = decay(m, M, c)
    w = tl.exp2(fall)
    part = parts + row * S + segment
    field = N.to(tl.int64) * S
    tl.store(part, M)
    tl.store(part + field, tl.sum(w * d))
    tl.store(part + 2 * field, tl.sum(w * T + (w * fall) * d))
    tl.store(part + 3 * field, teacher_M)
    tl.store(part + 4 * field, tl.sum(tl.exp2(decay(teacher_m, teacher_M, teacher_c)) * teacher_d))


@triton.jit(do_not_specialize=["N", "V", "S", "STEPS"])
def values(
    x, stride, teacher_x, teacher_stride,  # logits [N, V]
    parts,  # [5, N, S]
    norms,  # [6, N]: m and log d of the student, then of the teacher; the fifth is left out; entropy
    sums,  # [2, N, S]: of the divergence, and of the mean that its gradient needs
    N, V, S, STEPS, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature; the teacher's alike
    teacher_c, teacher_per_temperature, teacher_softcap, teacher_row_temperature,
    beta, rest,  # 1 - beta, rounded after the difference
    KIND: tl.constexpr, SEGMENTS: tl.constexpr,
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, segment, start, teacher_start = part_of(S, stride, teacher_stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    teacher_c, teacher_per_temperature = scaling_of(teacher_row_temperature, row, teacher_c, teacher_per_temperature)
    field = N.to(tl.int64) * S
    parts_at = tl.arange(0, SEGMENTS)
    known = parts_at < S
    part = parts + row * S + parts_at
    m = tl.load(part, mask=known, other=LOWEST)
    d = tl.load(part + field, mask=known, other=0.0)
    top = tl.max(m)
    fall = decay(m, top, c)
    w = tl.exp2(fall)
    D = tl.sum(w * d)
    M, log_d = norm_of(top, D)
    m = tl.load(part + 3 * field, mask=known, other=LOWEST)
    teacher_d = tl.load(part + 4 * field, mask=known, other=0.0)
    teacher_top = tl.max(m)
    teacher_M, teacher_log_d = norm_of(teacher_top, tl.sum(tl.exp2(decay(m, teacher_top, teacher_c)) * teacher_d))
    if segment == 0:
        T = tl.load(part + 2 * field, mask=known, other=0.0)
        H = log_d - (tl.sum(w * T + (w * fall) * d) * LN2) / D  # neither term is negative
        to = norms + row
        rows = N.to(tl.int64)
        tl.store(to, M)
        tl.store(to + rows, log_d)
        tl.store(to + 2 * rows, teacher_M)
        tl.store(to + 3 * rows, teacher_log_d)
        tl.store(to + 5 * rows, tl.where(H < 0, 0.0, H))
    TILE: tl.constexpr = R * L * J
    at = offsets(L, J)
    first = segment * STEPS
    whole = tl.minimum(first + STEPS, V // TILE)
    total = tl.zeros([L], tl.float32)
    mean = tl.zeros([L], tl.float32)
    for step in tl.range(first, whole, num_stages=STAGES):
        z = capped(read(x + start + step * TILE, at, R, L, J), softcap)
        teacher_z = capped(read(teacher_x + teacher_start + step * TILE, at, R, L, J), teacher_softcap)
        log_q = (z - M) * per_temperature - log_d
        log_p = (teacher_z - teacher_M) * teacher_per_temperature - teacher_log_d
        terms, of_mean = pair_terms(log_p, log_q, beta, rest, KIND)
        total += lane_sum(terms)
        mean += lane_sum(of_mean)
    if (whole < first + STEPS) & (whole * TILE < V):
        begin, left = whole * TILE, V - whole * TILE
        inside = columns_of(at, R, L, J) < left
        z = capped(read_part(x + start + begin, at, left, 0.0, R, L, J), softcap)
        teacher_z = capped(read_part(teacher_x + teacher_start + begin, at, left, 0.0, R, L, J), teacher_softcap)
        log_q = (z - M) * per_temperature - log_d
        log_p = (teacher_z - teacher_M) * teacher_per_temperature - teacher_log_d
        terms, of_mean = pair_terms(log_p, log_q, beta, rest, KIND)
        total += lane_sum(tl.where(inside, terms, 0.0))
        mean += lane_sum(tl.where(inside, of_mean, 0.0))
    nothing = (M - M) + (teacher_M - teacher_M)  # NaN where there is no distribution
    to = sums + row * S + segment
    tl.store(to, tl.sum(total) + nothing)
    tl.store(to + field, tl.sum(mean) + nothing)


@triton.jit(do_not_specialize=["norms_stride", "N", "columns", "S", "STEPS"])
def gradient(
    x, stride, teacher_x, teacher_stride,  # logits [N, columns]
    dx, dx_stride,  # [N, columns]; may be x
    norms, norms_stride,  # [6, N]: m and log d of the student, then of the teacher; a mean; the student's entropy
    g_divergence, g_entropy,  # [N], or None for 0
    N, columns, S, STEPS, per_temperature, softcap,
    row_temperature,  # [N], or None for per_temperature; the teacher's alike
    teacher_per_temperature, teacher_softcap, teacher_row_temperature,
    beta, rest,  # 1 - beta, rounded after the difference
    KIND: tl.constexpr, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    row, segment, start, teacher_start = part_of(S, stride, teacher_stride)
    _c, per_temperature = scaling_of(row_temperature, row, per_temperature, per_temperature)
    _c, teacher_per_temperature = scaling_of(
        teacher_row_temperature, row, teacher_per_temperature, teacher_per_temperature
    )
    TILE: tl.constexpr = R * L * J
    at = offsets(L, J)
    begin = segment * STEPS * TILE
    norm = norms + row
    M, log_d = tl.load(norm), tl.load(norm + norms_stride)
    teacher_M, teacher_log_d = tl.load(norm + 2 * norms_stride), tl.load(norm + 3 * norms_stride)
    mean, entropy = tl.load(norm + 4 * norms_stride), tl.load(norm + 5 * norms_stride)
    for _step in range(STEPS):
        left = columns - begin
        if left > 0:
            z = capped(read_row(x + start + begin, at, left, left >= TILE, R, L, J), softcap)
            log_q = (z - M) * per_temperature - log_d
            dz = tl.zeros([L, J, R], tl.float32)
            if g_divergence is not None:
                teacher_z = read_row(teacher_x + teacher_start + begin, at, left, left >= TILE, R, L, J)
                teacher_z = capped(teacher_z, teacher_softcap)
                log_p = (teacher_z - teacher_M) * teacher_per_temperature - teacher_log_d
                dz = row_gradient(log_p, log_q, beta, rest, mean, KIND)
                dz *= tl.load(g_divergence + row) * per_temperature
            if g_entropy is not None:
                q = tl.exp2(log_q * LOG2E)
                of_entropy = tl.where(q == 0, 0.0, q * (log_q + entropy))
                dz -= of_entropy * (tl.load(g_entropy + row) * per_temperature)
            write_row(dx + row * dx_stride + begin, at, left, left >= TILE, uncapped(dz, z, softcap), R, L, J)
        begin += TILE
