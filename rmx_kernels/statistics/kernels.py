"""Triton kernels of the statistics: one read of the logits for all of them.

``fold`` walks along a part of a row and keeps m, d and T by lane, and the largest logit of every chunk: 2^LOG_U steps
of one lane. ``finish`` merges the parts of a row and finds the top-k. It takes a bound that at least k lanes reach,
reads the chunks that reach it again, and ranks their logits from the bound on. Where those are too many (rows of equal
logits), it walks along the whole row once for each distinct value instead. Neither kernel knows how many rows there
are, so a row's bits depend on the row alone; neither knows V or k at compile time.
"""

import triton
import triton.language as tl

from rmx_kernels.head.kernels import (
    LN2,
    LOG2E,
    LOWEST,
    NO_KEY,
    NO_POWER,
    append,
    capped,
    columns_of,
    decay,
    exact_log,
    index_of,
    key_of,
    lane_max,
    lane_sum,
    offsets,
    order_of,
    place,
    read,
    read_part,
    read_row,
    scaling_of,
    uncapped,
    value_of,
    widened,
    write_row,
)


@triton.jit
def fold_step(z, m, d, T, c):
    """(m, d, T) of lanes [L] with a step z [L, J, R] added: d = sum e, T = sum e u, e = 2^u, u = (z - m) c."""
    new = tl.maximum(m, lane_max(z))
    step = decay(m, new, c)
    w = tl.exp2(step)
    u = (z - new[:, None, None]) * c
    e = tl.exp2(u)
    T = w * T + (w * step) * d + lane_sum(e * tl.maximum(u, NO_POWER))
    return new, w * d + lane_sum(e), T


@triton.jit(do_not_specialize=["N", "V", "S", "C", "STEPS", "LOG_U"])
def fold(
    x, inner, outer_stride, stride,  # [N, V]
    parts,  # [3, N, S]: m, d and T
    peaks,  # [N, C], the largest logit of each chunk, or None
    lanes,  # [N, S * L], that of each lane, or None
    N, V, S, C, STEPS, LOG_U, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    TILE: tl.constexpr = R * L * J
    at = offsets(L, J)
    lane = tl.arange(0, L)
    first = segment * STEPS
    whole = tl.minimum(first + STEPS, V // TILE)
    lm = tl.full([L], LOWEST, tl.float32)
    ld = tl.zeros([L], tl.float32)
    lT = tl.zeros([L], tl.float32)
    peak = tl.full([L], float("-inf"), tl.float32)
    top = tl.full([L], float("-inf"), tl.float32)
    for step in tl.range(first, whole, num_stages=STAGES):
        raw = widened(read(x + start + step * TILE, at, R, L, J))
        lm, ld, lT = fold_step(capped(raw, softcap), lm, ld, lT, c)
        if peaks is not None:
            peak = tl.maximum(peak, tl.max(tl.max(raw, 2), 1))
            if ((step + 1) >> LOG_U << LOG_U) == step + 1:
                tl.store(peaks + row * C + (step >> LOG_U) * L + lane, peak.to(peaks.dtype.element_ty))
                top = tl.maximum(top, peak)
                peak = tl.full([L], float("-inf"), tl.float32)
    rest = (whole < first + STEPS) & (whole * TILE < V)
    if rest:
        left = V - whole * TILE
        raw = widened(read_part(x + start + whole * TILE, at, left, float("-inf"), R, L, J))
        z = capped(raw, softcap)
        if softcap is not None:
            z = tl.where(columns_of(at, R, L, J) < left, z, float("-inf"))
        lm, ld, lT = fold_step(z, lm, ld, lT, c)
        whole += 1
        peak = tl.maximum(peak, tl.max(tl.max(raw, 2), 1))
    if peaks is not None:
        top = tl.maximum(top, peak)
        unfinished = rest | ((whole >> LOG_U << LOG_U) != whole)
        group = peaks + row * C + ((whole - 1) >> LOG_U) * L
        tl.store(group + lane, peak.to(peaks.dtype.element_ty), mask=unfinished & (whole > first))
        tl.store(lanes + (row * S + segment) * L + lane, top)
    M = tl.max(lm)
    fall = decay(lm, M, c)
    w = tl.exp2(fall)
    part = parts + row * S + segment
    field = N.to(tl.int64) * S
    tl.store(part, M)
    tl.store(part + field, tl.sum(w * ld))
    tl.store(part + 2 * field, tl.sum(w * lT + (w * fall) * ld))


@triton.jit(do_not_specialize=["N", "V", "S", "C", "STEPS", "LOG_U", "K", "room"])
def finish(
    x, inner, outer_stride, stride,  # [N, V]
    target,  # [N] or None
    parts,  # [3, N, S]
    peaks, lanes,  # [N, C], [N, S * L], or None
    lists, keys,  # [N, 3 room] int32: lanes, chunks, loads; [N, room] int64: logits; or None
    row_m, row_log_d, lse, entropy, logprob,  # [N]; the last where there is a target
    values, ids,  # [N, K] where there are peaks
    N, V, S, C, STEPS, LOG_U, K, room, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, _, start = place(tl.program_id(0), 1, inner, outer_stride, stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    segment = tl.arange(0, SEGMENTS)
    known = segment < S
    part = parts + row * S + segment
    field = N.to(tl.int64) * S
    m = tl.load(part, mask=known, other=LOWEST)
    d = tl.load(part + field, mask=known, other=0.0)
    T = tl.load(part + 2 * field, mask=known, other=0.0)
    M = tl.max(m)
    fall = decay(m, M, c)
    w = tl.exp2(fall)
    D = tl.sum(w * d)
    moved_T = tl.sum(w * T + (w * fall) * d)
    M = tl.where((D > 0) & (tl.abs(D) < float("inf")), M, float("nan"))  # NaN where there is no distribution
    exact = exact_log(D).to(tl.float32)
    log_d = tl.where(M == M, exact, float("nan"))
    H = exact - (moved_T * LN2) / D  # neither term is negative
    tl.store(row_m + row, M)
    tl.store(row_log_d + row, log_d)
    tl.store(lse + row, M * per_temperature + log_d)
    tl.store(entropy + row, tl.where(H < 0, 0.0, H) + (log_d - log_d))
    if target is not None:
        at = tl.load(target + row)
        valid = (at >= 0) & (at < V)
        z = capped(tl.load(x + start + at, mask=valid, other=0.0), softcap)
        tl.store(logprob + row, tl.where(valid, (z - M) * per_temperature - log_d, float("nan")))
    if peaks is not None:
        # low: as large as at least K lanes reach, and not many more
        slot = tl.arange(0, SEGMENTS * L)
        there = slot < S * L
        order = order_of(tl.load(lanes + row * (S * L) + slot, mask=there, other=float("-inf")))
        low = tl.min(tl.where(there, order, 0x7FFFFFFF))
        high = tl.max(tl.where(there, order, -0x80000000))
        reached = S * L
        while (low < high) & (reached > K + K // 4 + 2):
            middle = (low | high) - ((low ^ high) >> 1)  # the upper of the two in the middle
            count = tl.sum((there & (order >= middle)).to(tl.int32))
            enough = count >= K
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, count, reached)
            high = tl.where(enough, high, middle - 1)
        least = value_of(low)
        few = lists + row * (3 * room)
        chunks, loads, keys_of_row = few + room, few + 2 * room, keys + row * room
        n = append(few, 0, room, slot, there & (order >= low))
        tl.debug_barrier()
        groups = STEPS >> LOG_U
        found = 0
        listed = tl.minimum(n, room)
        for begin in range(0, listed * groups, 128):
            index = begin + tl.arange(0, 128)
            entry, group = index // groups, index % groups
            own = tl.load(few + entry, mask=entry < listed, other=0)
            chunk = (own // L * groups + group) * L + own % L
            inside = (entry < listed) & (chunk < C)
            peak = widened(tl.load(peaks + row * C + chunk, mask=inside, other=float("-inf")))
            found = append(chunks, found, room, chunk, inside & (peak >= least))
        tl.debug_barrier()
        aligned = V // J * J
        again = 0
        listed = tl.minimum(found, room)
        for begin in range(0, (listed * R) << LOG_U, 64):
            index = begin + tl.arange(0, 64)
            entry, load = index >> (LOG_U + (R - 1)), index & ((R << LOG_U) - 1)
            own = tl.load(chunks + entry, mask=entry < listed, other=0)
            step = (own // L << LOG_U) + load // R
            first = step * (R * L * J) + load % R * (L * J) + own % L * J
            inside = (entry < listed) & (first < aligned)
            column = first[:, None] + tl.arange(0, J)[None, :]
            raw = widened(tl.load(x + start + column, mask=inside[:, None], other=float("-inf")))
            again = append(loads, again, room, first, inside & (tl.max(raw, 1) >= least))
        tl.debug_barrier()
        logits = 0
        listed = tl.minimum(again, room)
        for begin in range(0, listed * J, 128):
            index = begin + tl.arange(0, 128)
            inside = index // J < listed
            column = tl.load(loads + index // J, mask=inside, other=0) + index % J
            raw = widened(tl.load(x + start + column, mask=inside, other=float("-inf")))
            logits = append(keys_of_row, logits, room, key_of(order_of(raw), column), inside & (raw >= least))
        if aligned < V:
            column = aligned + tl.arange(0, J)
            raw = widened(tl.load(x + start + column, mask=column < V, other=float("-inf")))
            taken = (column < V) & (raw >= least)
            logits = append(keys_of_row, logits, room, key_of(order_of(raw), column), taken)
        tl.debug_barrier()
        longest = tl.maximum(tl.maximum(n, found), tl.maximum(again, logits))
        if (longest <= room) & (logits >= K):
            for first_entry in range(0, logits, 32):
                entry = first_entry + tl.arange(0, 32)
                key = tl.load(keys_of_row + entry, mask=entry < logits, other=NO_KEY)
                rank = tl.zeros([32], tl.int32)
                for other in range(0, logits, 32):
                    against = other + tl.arange(0, 32)
                    rival = tl.load(keys_of_row + against, mask=against < logits, other=NO_KEY)
                    rank += tl.sum((rival[:, None] > key[None, :]).to(tl.int32), 0)
                kept = (entry < logits) & (rank < K)
                value = value_of((key >> 32).to(tl.int32))
                logprobs = (capped(value, softcap) - M) * per_temperature - log_d
                tl.store(values + row * K + rank, logprobs, mask=kept)
                tl.store(ids + row * K + rank, index_of(key).to(tl.int64), mask=kept)
        else:
            written = 0
            below = row * 0 + 0x80000000  # above every order
            while written < K:
                best = tl.full([BLOCK], -0x80000000, tl.int32)
                for begin in range(0, V, BLOCK):
                    at_block = begin + tl.arange(0, BLOCK)
                    block = order_of(widened(tl.load(x + start + at_block, mask=at_block < V, other=0.0)))
                    best = tl.where((at_block < V) & (block < below), tl.maximum(best, block), best)
                most = tl.max(best)
                logprobs_of_most = (capped(value_of(most), softcap) - M) * per_temperature - log_d
                for begin in range(0, V, BLOCK):
                    if written < K:
                        at_block = begin + tl.arange(0, BLOCK)
                        block = order_of(widened(tl.load(x + start + at_block, mask=at_block < V, other=0.0)))
                        equal = (at_block < V) & (block == most)
                        place_of = written + tl.cumsum(equal.to(tl.int32), 0) - 1
                        tl.store(values + row * K + place_of, logprobs_of_most, mask=equal & (place_of < K))
                        tl.store(ids + row * K + place_of, at_block.to(tl.int64), mask=equal & (place_of < K))
                        written += tl.sum(equal.to(tl.int32))
                below = most.to(tl.int64)


@triton.jit(do_not_specialize=["first", "columns", "S", "STEPS", "K"])
def gradient(
    x, inner, outer_stride, stride,  # [N, columns], the columns from ``first`` on
    dx, dx_stride,  # [N, columns]; may be x
    target, topk_ids,  # [N], [N, K]
    m, log_d, entropy,  # [N]
    g_lse, g_entropy, g_logprob, g_topk,  # [N], [N, K]; each may be None
    first, columns, S, STEPS, K, c, per_temperature, softcap,
    row_temperature,  # [N], or None for c and per_temperature
    R: tl.constexpr, L: tl.constexpr, J: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    c, per_temperature = scaling_of(row_temperature, row, c, per_temperature)
    TILE: tl.constexpr = R * L * J
    row_m = tl.load(m + row)
    row_log_d = tl.load(log_d + row)
    along_p = 0.0
    if g_lse is not None:
        along_p += tl.load(g_lse + row)
    if g_logprob is not None:
        along_p -= tl.load(g_logprob + row)
    if g_topk is not None:
        for j in range(K):
            along_p -= tl.load(g_topk + row * K + j)
    g_H = 0.0
    if g_entropy is not None:  # p (along_p - g (log p + H)), log p = u ln 2 - log d
        g_H = tl.load(g_entropy + row)
        along_p -= g_H * (tl.load(entropy + row) - row_log_d)
    at = offsets(L, J)
    begin = segment * STEPS * TILE
    for _step in range(STEPS):
        left = columns - begin
        if left > 0:
            z = capped(read_row(x + start + begin, at, left, left >= TILE, R, L, J), softcap)
            u = (z - row_m) * c
            p = tl.exp2(u - row_log_d * LOG2E)
            dz = p * along_p
            if g_entropy is not None:
                dz -= p * ((g_H * LN2) * tl.maximum(u, NO_POWER))
            if g_logprob is not None:
                chosen = tl.load(target + row).to(tl.int64) - first - begin
                if (chosen >= 0) & (chosen < TILE):
                    dz += tl.where(columns_of(at, R, L, J) == chosen, tl.load(g_logprob + row), 0.0)
            if g_topk is not None:
                for j in range(K):
                    chosen = tl.load(topk_ids + row * K + j) - first - begin
                    if (chosen >= 0) & (chosen < TILE):
                        dz += tl.where(columns_of(at, R, L, J) == chosen, tl.load(g_topk + row * K + j), 0.0)
            dz = uncapped(dz * per_temperature, z, softcap)
            write_row(dx + row * dx_stride + begin, at, left, left >= TILE, dz, R, L, J)
        begin += TILE
