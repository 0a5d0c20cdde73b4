"""Triton kernels of the losses: one read of student and base for all values, one more with the gradient's write.

``fold`` walks along a part of a row of both models and keeps by lane, beside m and d of each, the KL in the form

    delta = log p_s - log p_b - kappa,   A = sum p_b (e^delta - 1),   Q = sum p_b (e^delta - 1 - delta)

with p_b not yet divided by its sum. No term of Q is negative, and equal rows give exactly 0, from a single read. kappa
may be any constant; that of a lane follows the step that holds most of the base's mass, and where lanes or parts are
merged it is log(d_s / d_b), so that Q is the KL but for rounding. ``finish`` merges the parts:

    KL = Q / d_b - (mu - log(1 + mu)),   mu = A / d_b,   log(1 + mu) = lse_s - lse_b - kappa

Where that last equation does not hold (an entry of -inf, a sum out of float32's range), mu is not small or the merging
left little of Q, it walks along the row a second time, with the norms known. So rows that are masked, or whose models
are far apart, cost twice the others and are as exact.
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
    exact_log,
    excess,
    kl_terms,
    lane_max,
    lane_sum,
    moved,
    offsets,
    place,
    read,
    read_part,
    read_row,
    scaling_of,
    uncapped,
    write_row,
)


@triton.jit
def row_weights(ce_weight, kl_weight, row):
    """(ce, kl) of a row; without weights, 1 and 1."""
    ce, kl = 1.0, 1.0
    if ce_weight is not None:
        ce, kl = tl.load(ce_weight + row), tl.load(kl_weight + row)
    return ce, kl


@triton.jit
def student_step(z, m, d, c):
    """(m, d) of lanes [L] with a step z [L, J, R] added."""
    new = tl.maximum(m, lane_max(z))
    w = tl.exp2(decay(m, new, c))
    return new, w * d + lane_sum(tl.exp2((z - new[:, None, None]) * c))


@triton.jit
def join(part_mass, part_kappa, part_A, part_Q, mass, kappa, A, Q):
    """(kappa, A, Q) of two parts of the base's mass, at the kappa of the larger one."""
    larger = part_mass > mass
    shift = tl.where((mass > 0) & (part_mass > 0), part_kappa - kappa, 0.0)
    less_A, less_Q = tl.where(larger, A, part_A), tl.where(larger, Q, part_Q)
    less_A, less_Q = moved(tl.where(larger, -shift, shift), tl.where(larger, mass, part_mass), less_A, less_Q)
    more_A, more_Q = tl.where(larger, part_A, A), tl.where(larger, part_Q, Q)
    return tl.where(larger, part_kappa, kappa), less_A + more_A, less_Q + more_Q


@triton.jit
def pair_step(z, base_z, inside, m, d, base_m, base_d, kappa, A, Q, c, per_temperature):
    """The seven values of lanes [L] with a step [L, J, R] of both models added."""
    step_m, step_base_m = lane_max(z), lane_max(base_z)
    e = tl.exp2((z - step_m[:, None, None]) * c)
    base_e = tl.exp2((base_z - step_base_m[:, None, None]) * c)
    step_kappa = (step_m - step_base_m) * per_temperature
    delta = (z - base_z) * per_temperature - step_kappa[:, None, None]
    if inside is not None:
        delta = tl.where(inside, delta, 0.0)
    terms = tl.where(tl.abs(delta) < NEAR, base_e * excess(delta), e - base_e * (1 + delta))
    step_Q = lane_sum(terms)
    step_A = step_Q + lane_sum(base_e * delta)
    new = tl.maximum(m, step_m)
    w = tl.exp2(decay(m, new, c))
    step_w = tl.exp2(decay(step_m, new, c))
    d = w * d + step_w * lane_sum(e)
    base_new = tl.maximum(base_m, step_base_m)
    w = tl.exp2(decay(base_m, base_new, c))
    step_w = tl.exp2(decay(step_base_m, base_new, c))
    mass, step_mass = w * base_d, step_w * lane_sum(base_e)
    kappa, A, Q = join(step_mass, step_kappa, step_w * step_A, step_w * step_Q, mass, kappa, w * A, w * Q)
    return new, d, base_new, mass + step_mass, kappa, A, Q


@triton.jit
def gathered(m, d, base_m, base_d, kappa, A, Q, c, per_temperature):
    """The seven values of all parts together: scalars from vectors. Parts without mass of the base add nothing.

    Q is NaN where the parts' terms cancel to less than an eighth, since little is left of their digits then.
    """
    M, base_M = tl.max(m), tl.max(base_m)
    D = tl.sum(tl.exp2(decay(m, M, c)) * d)
    w = tl.exp2(decay(base_m, base_M, c))
    mass = w * base_d
    base_D = tl.sum(mass)
    common = (M - base_M) * per_temperature + (tl.log2(D) - tl.log2(base_D)) * LN2
    shift = tl.where(mass > 0, kappa - common, 0.0)
    A, Q = w * A, w * Q
    _A, apart = moved(shift, mass, 0.0, 0.0)
    size = tl.sum(Q + apart)
    A, Q = moved(shift, mass, A, Q)
    Q_sum = tl.sum(Q)
    cancelled = (Q_sum * 8 < size) & (size > 1e-12 * base_D)
    return M, D, base_M, base_D, common, tl.sum(A), tl.where(cancelled, float("nan"), Q_sum)


@triton.jit(do_not_specialize=["N", "V", "S", "STEPS"])
def fold(
    x, inner, outer_stride, stride,  # the student's logits [N, V]
    base_x, base_inner, base_outer_stride, base_stride,  # the base's, read where kl is not 0
    ce_weight, kl_weight,  # [N], or None for all rows
    parts,  # [PARTS, N, S]
    N, V, S, STEPS, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    ce, kl = row_weights(ce_weight, kl_weight, row)
    if (ce != 0) | (kl != 0):
        TILE: tl.constexpr = R * L * J
        at = offsets(L, J)
        first = segment * STEPS
        whole = tl.minimum(first + STEPS, V // TILE)
        rest = (whole < first + STEPS) & (whole * TILE < V)
        m = tl.full([L], LOWEST, tl.float32)
        d = tl.zeros([L], tl.float32)
        part = parts + row * S + segment
        field = N.to(tl.int64) * S
        if kl != 0:
            base_start = place(tl.program_id(0), S, base_inner, base_outer_stride, base_stride)[2]
            base_m = tl.full([L], LOWEST, tl.float32)
            base_d = tl.zeros([L], tl.float32)
            kappa = tl.zeros([L], tl.float32)
            A = tl.zeros([L], tl.float32)
            Q = tl.zeros([L], tl.float32)
            for step in tl.range(first, whole, num_stages=STAGES):
                z = capped(read(x + start + step * TILE, at, R, L, J), softcap)
                base_z = capped(read(base_x + base_start + step * TILE, at, R, L, J), softcap)
                m, d, base_m, base_d, kappa, A, Q = pair_step(
                    z, base_z, None, m, d, base_m, base_d, kappa, A, Q, c, per_temperature
                )
            if rest:
                begin, left = whole * TILE, V - whole * TILE
                inside = columns_of(at, R, L, J) < left
                z = capped(read_part(x + start + begin, at, left, 0.0, R, L, J), softcap)
                base_z = capped(read_part(base_x + base_start + begin, at, left, 0.0, R, L, J), softcap)
                z, base_z = tl.where(inside, z, float("-inf")), tl.where(inside, base_z, float("-inf"))
                m, d, base_m, base_d, kappa, A, Q = pair_step(
                    z, base_z, inside, m, d, base_m, base_d, kappa, A, Q, c, per_temperature
                )
            M, D, base_M, base_D, common, A_sum, Q_sum = gathered(m, d, base_m, base_d, kappa, A, Q, c, per_temperature)
            tl.store(part, M)
            tl.store(part + field, D)
            tl.store(part + 2 * field, base_M)
            tl.store(part + 3 * field, base_D)
            tl.store(part + 4 * field, common)
            tl.store(part + 5 * field, A_sum)
            tl.store(part + 6 * field, Q_sum)
        else:
            for step in tl.range(first, whole, num_stages=STAGES):
                m, d = student_step(capped(read(x + start + step * TILE, at, R, L, J), softcap), m, d, c)
            if rest:
                left = V - whole * TILE
                z = capped(read_part(x + start + whole * TILE, at, left, 0.0, R, L, J), softcap)
                m, d = student_step(tl.where(columns_of(at, R, L, J) < left, z, float("-inf")), m, d, c)
            M = tl.max(m)
            w = tl.exp2(decay(m, M, c))
            tl.store(part, M)
            tl.store(part + field, tl.sum(w * d))


@triton.jit
def norm_of(m, d):
    """(m, log d) of a row, NaN where it has no distribution."""
    known = (d > 0) & (d < float("inf"))
    return tl.where(known, m, float("nan")), tl.where(known, exact_log(d).to(tl.float32), float("nan"))


@triton.jit(do_not_specialize=["N", "V", "S"])
def finish(
    x, inner, outer_stride, stride,  # the student's logits [N, V]
    base_x, base_inner, base_outer_stride, base_stride,  # the base's
    target, ce_weight, kl_weight,  # [N]; the weights may be None
    base_lse,  # [N] or None: as the caller knows it
    parts,  # [PARTS, N, S]
    terms,  # [6, N]: logprob, kl, m, log d, and m and log d of the base; NaN where not computed
    N, V, S, tolerance, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature
    SEGMENTS: tl.constexpr, R: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    row, _, start = place(tl.program_id(0), 1, inner, outer_stride, stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    ce, kl = row_weights(ce_weight, kl_weight, row)
    to = terms + row
    rows = N.to(tl.int64)
    logprob, total = float("nan"), float("nan")
    M, log_d, base_M, base_log_d = float("nan"), float("nan"), float("nan"), float("nan")
    if (ce != 0) | (kl != 0):
        segment = tl.arange(0, SEGMENTS)
        known = segment < S
        part = parts + row * S + segment
        field = rows * S
        m = tl.load(part, mask=known, other=LOWEST)
        d = tl.load(part + field, mask=known, other=0.0)
        top = tl.max(m)
        w = tl.exp2(decay(m, top, c))
        M, log_d = norm_of(top, tl.sum(w * d))
        chosen = tl.load(target + row)
        valid = (chosen >= 0) & (chosen < V)
        chosen_z = capped(tl.load(x + start + chosen, mask=valid, other=0.0), softcap)
        logprob = tl.where(valid, (chosen_z - M) * per_temperature - log_d, float("nan"))
        if kl != 0:
            base_m = tl.load(part + 2 * field, mask=known, other=LOWEST)
            base_d = tl.load(part + 3 * field, mask=known, other=0.0)
            kappa = tl.load(part + 4 * field, mask=known, other=0.0)
            A = tl.load(part + 5 * field, mask=known, other=0.0)
            Q = tl.load(part + 6 * field, mask=known, other=0.0)
            _M, _D, base_top, base_D, common, A_sum, Q_sum = gathered(
                m, d, base_m, base_d, kappa, A, Q, c, per_temperature
            )
            base_M, base_log_d = norm_of(base_top, base_D)
            mu = (A_sum / base_D).to(tl.float64)
            log_mu = tl.log(1 + mu)
            ratio = (M - base_M) * per_temperature + (log_d - base_log_d)
            mean = (Q_sum / base_D).to(tl.float64)
            exact = mean - (mu - log_mu)
            off = tl.abs(log_mu.to(tl.float32) - (ratio - common))
            fine = (off <= 3e-6 + 1e-6 * tl.abs(ratio)) & (tl.abs(common) < 1000)  # beyond, off has no digits left
            fine = fine & (tl.abs(mu) < 0.5) & ((mean < 8 * exact) | (mean < 1e-12))
            total = tl.where(exact < 0, 0.0, exact).to(tl.float32)
            if fine == 0:
                base_start = place(tl.program_id(0), 1, base_inner, base_outer_stride, base_stride)[2]
                sums = tl.zeros([L], tl.float32)
                for begin in range(0, V, R * L * J):
                    at = begin + offsets(L, J)
                    z = capped(read_part(x + start, at, V, 0.0, R, L, J), softcap)
                    base_z = capped(read_part(base_x + base_start, at, V, 0.0, R, L, J), softcap)
                    log_p = (z - M) * per_temperature - log_d
                    base_log_p = (base_z - base_M) * per_temperature - base_log_d
                    one = kl_terms(tl.exp2(log_p * LOG2E), tl.exp2(base_log_p * LOG2E), log_p - base_log_p)
                    sums += lane_sum(tl.where(columns_of(at, R, L, J) < V, one, 0.0))
                total = tl.sum(sums)
            total += (M - M) + (base_M - base_M)
            if base_lse is not None:
                mass = tl.exp((base_M * per_temperature - tl.load(base_lse + row).to(tl.float32)) + base_log_d)
                fits = tl.abs(mass - 1) <= tolerance
                total = tl.where(fits, total, float("nan"))
                base_M = tl.where(fits, base_M, float("nan"))
    tl.store(to, logprob)
    tl.store(to + rows, total)
    tl.store(to + 2 * rows, M)
    tl.store(to + 3 * rows, log_d)
    tl.store(to + 4 * rows, base_M)
    tl.store(to + 5 * rows, base_log_d)


@triton.jit(do_not_specialize=["first", "columns", "V", "S", "STEPS"])
def gradient(
    x, inner, outer_stride, stride,  # the student's logits [N, columns], the columns from ``first`` on
    base_x, base_inner, base_outer_stride, base_stride,  # the base's, read where kl is not 0
    dx, dx_stride,  # [N, columns]; may be x
    target, ce_weight, kl_weight,  # [N]
    upstream,  # a scalar, or None for 1
    m, log_d, base_m, base_log_d,  # [N]
    first, columns, V, S, STEPS, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    base_start = place(tl.program_id(0), S, base_inner, base_outer_stride, base_stride)[2]
    TILE: tl.constexpr = R * L * J
    at = offsets(L, J)
    begin = segment * STEPS * TILE
    ce, kl = tl.load(ce_weight + row), tl.load(kl_weight + row)
    live, anchored = (ce != 0) | (kl != 0), kl != 0
    chosen = tl.load(target + row)
    factor = per_temperature
    if upstream is not None:
        factor *= tl.load(upstream)
    if (chosen < 0) | (chosen >= V):
        factor = float("nan")
    ce, kl = ce * factor, kl * factor
    chosen = chosen - first - begin
    row_m, row_log_d = tl.load(m + row), tl.load(log_d + row) * LOG2E
    row_base_m, row_base_log_d = tl.load(base_m + row), tl.load(base_log_d + row) * LOG2E
    for _step in range(STEPS):
        left = columns - begin
        if left > 0:
            dz = tl.zeros([L, J, R], tl.float32)
            if live:
                z = capped(read_row(x + start + begin, at, left, left >= TILE, R, L, J), softcap)
                p = tl.exp2((z - row_m) * c - row_log_d)
                if anchored:
                    base_z = capped(read_row(base_x + base_start + begin, at, left, left >= TILE, R, L, J), softcap)
                    dz = kl * (p - tl.exp2((base_z - row_base_m) * c - row_base_log_d))  # 0 where they are equal
                if (chosen >= 0) & (chosen < TILE):
                    dz += tl.where(columns_of(at, R, L, J) == chosen, p - 1, p) * ce
                else:
                    dz += p * ce
                dz = uncapped(dz, z, softcap)
            write_row(dx + row * dx_stride + begin, at, left, left >= TILE, dz, R, L, J)
        begin += TILE
        chosen -= TILE
