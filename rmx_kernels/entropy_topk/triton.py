"""Triton kernels: one read of the logits for all statistics. Also serve linear_entropy_topk, on whole rows of logits.

``fold`` takes a segment of a row a program and keeps m, d, T and the maximum of every few columns. ``finish`` merges
the segments of a row; any of the k most probable tokens lies in one of the k segments with the largest maxima (ties to
the left), and there in one of the k chunks with the largest, so it reads only those again. Neither knows how many rows
there are, so a row's bits depend on the row alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmx_kernels import configs
from rmx_kernels.entropy_topk.ops import run as run
from rmx_kernels.entropy_topk.reference import exact_topk
from rmx_kernels.tiles import VocabTiles, chunks
from rmx_kernels.vec_triton import (
    MAX_K,
    NO_KEY,
    Rows,
    bounded,
    exact_log,
    index_of,
    key_of,
    launch,
    merged,
    place,
    power_of_2,
    scaled,
    scaling,
    shifted_exp,
    unscaled,
    value_of,
)

SORT_BYTES = 64 << 20  # of rows in float32, where the top-k is found by sorting them


@triton.jit
def fold(
    x, inner, outer_stride, stride,  # [N, V]
    m, d, T,  # [N, S]
    peaks,  # [N, C], the maximum of each chunk, or None
    V, S, C, per_temperature, softcap,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    chunk = segment * (COLUMNS // CHUNK) + tl.arange(0, COLUMNS // CHUNK)
    column = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = column < V
    z = scaled(tl.load(x + start + column, mask=inside, other=0.0), inside, per_temperature, softcap)
    if peaks is not None:
        tl.store(peaks + row * C + chunk, tl.max(z, 1), mask=chunk < C)
    block_m, u, e = shifted_exp(z)
    part = row * S + segment
    tl.store(m + part, block_m)
    tl.store(d + part, tl.sum(e))
    tl.store(T + part, tl.sum(e * bounded(u)))


@triton.jit
def finish(
    x, inner, outer_stride, stride,  # [N, V]
    target,  # [N] or None
    m, d, T,  # [N, S]
    peaks,  # [N, C] or None
    row_m, row_log_d, lse, entropy, logprob,  # [N]; logprob where there is a target
    values, ids,  # [N, K] where there are peaks
    V, S, C, K, per_temperature, softcap,
    SEGMENTS: tl.constexpr, WIDEST: tl.constexpr,  # of a row, and of them read again
    CHUNKS: tl.constexpr, CHOSEN: tl.constexpr,  # of a segment, and of all read again
    CHUNK: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    row, _, start = place(tl.program_id(0), 1, inner, outer_stride, stride)
    segment = tl.arange(0, SEGMENTS)
    part, known = row * S + segment, segment < S
    segment_m = tl.load(m + part, mask=known, other=float("-inf"))
    segment_d = tl.load(d + part, mask=known, other=0.0)
    M, weight, step, D = merged(segment_m, segment_d)
    # weight * step stays finite where step * d does not (finfo.min as a mask)
    moved = tl.sum(weight * tl.load(T + part, mask=known, other=0.0) + (weight * step) * segment_d)
    exact = exact_log(D)
    log_d = exact.to(tl.float32)
    H = exact - moved.to(tl.float64) / D.to(tl.float64) + (M - M)
    tl.store(row_m + row, M)
    tl.store(row_log_d + row, log_d)
    tl.store(lse + row, M + log_d)
    tl.store(entropy + row, tl.where(H < 0, 0.0, H).to(tl.float32))
    if target is not None:
        at = tl.load(target + row)
        valid = (at >= 0) & (at < V)
        z = scaled(tl.load(x + start + at, mask=valid, other=0.0), valid, per_temperature, softcap)
        tl.store(logprob + row, tl.where(valid, (z - M) - log_d, float("nan")))
    if peaks is not None:
        best = tl.topk(tl.where(known, key_of(segment_m, segment), NO_KEY), WIDEST)
        chunk = index_of(best)[:, None] * CHUNKS + tl.arange(0, CHUNKS)[None, :]
        inside = (best != NO_KEY)[:, None] & (chunk < C)
        peak = tl.load(peaks + row * C + chunk, mask=inside, other=0.0)
        keys = tl.reshape(tl.where(inside, key_of(peak, chunk), NO_KEY), [WIDEST * CHUNKS])
        best = tl.topk(keys, CHOSEN)
        column = index_of(best)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
        inside = (best != NO_KEY)[:, None] & (column < V)
        z = scaled(tl.load(x + start + column, mask=inside, other=0.0), inside, per_temperature, softcap)
        keys = tl.reshape(tl.where(inside, key_of(z, column), NO_KEY), [CHOSEN * CHUNK])
        best = tl.topk(keys, KEPT)
        k = tl.arange(0, KEPT)
        tl.store(values + row * K + k, (value_of(best) - M) - log_d, mask=k < K)
        tl.store(ids + row * K + k, index_of(best).to(tl.int64), mask=k < K)


@triton.jit
def gradient(
    x, inner, outer_stride, stride,  # [N, columns], the columns from ``first`` on
    dx, dx_stride,  # [N, columns]; may be x
    target, topk_ids,  # [N], [N, K]
    m, log_d, entropy,  # [N]
    g_lse, g_entropy, g_logprob, g_topk,  # [N], [N, K]; each may be None
    first, columns, S, K, per_temperature, softcap,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    at = segment * COLUMNS + tl.arange(0, COLUMNS)
    inside, column = at < columns, first + at
    z = scaled(tl.load(x + start + at, mask=inside, other=0.0), inside, per_temperature, softcap)
    log_p = (z - tl.load(m + row)) - tl.load(log_d + row)
    p = tl.exp(log_p)
    along_p = 0.0
    if g_lse is not None:
        along_p += tl.load(g_lse + row)
    if g_logprob is not None:
        along_p -= tl.load(g_logprob + row)
    if g_topk is not None:
        for j in range(K):
            along_p -= tl.load(g_topk + row * K + j)
    if g_entropy is not None:
        dz = p * (along_p - tl.load(g_entropy + row) * (bounded(log_p) + tl.load(entropy + row)))
    else:
        dz = p * along_p
    if g_logprob is not None:
        dz += tl.where(column == tl.load(target + row), tl.load(g_logprob + row), 0.0)
    if g_topk is not None:
        for j in range(K):
            chosen = tl.load(topk_ids + row * K + j)
            dz += tl.where(column == chosen, tl.load(g_topk + row * K + j), 0.0)
    dz = unscaled(dz, z, per_temperature, softcap)
    tl.store(dx + row * dx_stride + at, dz.to(dx.dtype.element_ty), mask=inside)


def _sorted_topk(x: Tensor, k: int, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The k largest scaled logits of rows x [N, V] and their ids, exactly, for a k that is too large for registers."""
    values, ids = x.new_empty(x.shape[0], k, dtype=torch.float32), x.new_empty(x.shape[0], k, dtype=torch.int64)
    tiles = VocabTiles(x, temperature=temperature, softcap=softcap)
    for rows in chunks(tiles.N, max(1, SORT_BYTES // (4 * tiles.V))):
        values[rows], ids[rows] = exact_topk(tiles(rows, slice(0, tiles.V), None), k)
    return values, ids


class Statistics:
    """Room for the results of N rows, and their computation from whole rows of logits."""

    def __init__(self, like: Tensor, N: int, k: int, target: Tensor | None) -> None:
        self.k, self.target = k, target
        self.m, self.log_d, self.lse, self.entropy = (like.new_empty(N, dtype=torch.float32) for _ in range(4))
        self.logprob = self.m.new_empty(0 if target is None else N)
        self.values, self.ids = self.m.new_empty(N, k), like.new_empty(N, k, dtype=torch.int64)

    def compute(self, x: Rows, rows: slice, temperature: float, softcap: float | None) -> None:
        """The results of ``rows`` from their logits, the first rows of x."""
        n, V, device = rows.stop - rows.start, x.columns, self.m.device
        setting = configs.config(device)
        columns, in_registers = setting.statistics.columns, 0 < self.k <= MAX_K
        chunk = min(columns, configs.chunk_columns(V, self.k))
        S, C = -(-V // columns), -(-V // chunk)
        m, d, T = (self.m.new_empty(n, S) for _ in range(3))
        peaks = self.m.new_empty(n, C) if in_registers else None
        scale = scaling(temperature, softcap)
        launch(
            *(fold, n * S, device, *x.arguments, m, d, T, peaks, V, S, C, *scale),
            warps=setting.statistics.warps,
            COLUMNS=columns,
            CHUNK=chunk,
        )
        segments = power_of_2(max(2, S))  # tl.topk takes no single one
        sizes: dict[str, Any] = dict.fromkeys(("WIDEST", "CHUNKS", "CHUNK", "CHOSEN", "KEPT"), 1)
        warps, values, ids = setting.finish_warps, None, None
        if in_registers:
            chunks, kept = columns // chunk, power_of_2(max(2, self.k))
            widest = min(kept, segments)
            chosen = min(kept, widest * chunks)
            sizes = {"WIDEST": widest, "CHUNKS": chunks, "CHUNK": chunk, "CHOSEN": chosen, "KEPT": kept}
            warps *= 2 if max(widest * chunks, chosen * chunk) > 2048 else 1
            values, ids = self.values[rows], self.ids[rows]
        target, logprob = (None, None) if self.target is None else (self.target[rows], self.logprob[rows])
        launch(
            *(finish, n, device, *x.arguments, target, m, d, T, peaks, self.m[rows], self.log_d[rows], self.lse[rows]),
            *(self.entropy[rows], logprob, values, ids, V, S, C, self.k, *scale),
            warps=warps,
            SEGMENTS=segments,
            **sizes,
        )
        if self.k > MAX_K:
            z, self.ids[rows] = _sorted_topk(x.x.reshape(-1, V)[:n], self.k, temperature, softcap)
            self.values[rows] = (z - self.m[rows, None]) - self.log_d[rows, None]

    def results(self, lead: torch.Size) -> tuple[Tensor, ...]:
        """(lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d), each [B...] or [B..., k]."""
        logprob = self.logprob if self.target is None else self.logprob.view(lead)
        values, ids = (x.view(*lead, self.k) for x in (self.values, self.ids))
        return (
            self.lse.view(lead),
            self.entropy.view(lead),
            logprob,
            values,
            ids,
            self.m.view(lead),
            self.log_d.view(lead),
        )


def forward(
    logits: Tensor, target: Tensor | None, k: int, temperature: float, softcap: float | None
) -> tuple[Tensor, ...]:
    """The kernel of rmx_kernels::entropy_topk."""
    x = Rows(logits)
    ids = None if target is None else target.reshape(-1).contiguous()
    statistics = Statistics(logits, x.N, k, ids)
    statistics.compute(x, slice(0, x.N), temperature, softcap)
    return statistics.results(logits.shape[:-1])


class StatisticsGradient:
    """Upstream gradients of N rows, flattened and in float32, and what the backward kernel needs besides."""

    def __init__(
        self,
        target: Tensor | None,
        topk_ids: Tensor,
        norms: tuple[Tensor, Tensor, Tensor],
        upstream: Sequence[Tensor | None],  # of lse, entropy, logprob and the top-k
    ) -> None:
        N, self.k = norms[0].numel(), topk_ids.shape[-1]
        flat = [None if g is None else g.to(torch.float32).reshape(-1).contiguous() for g in upstream]
        target = None if target is None else target.reshape(-1).contiguous()
        self.per_row = [target, *(x.reshape(-1) for x in norms), *flat[:3]]
        self.topk_ids = topk_ids.reshape(N, self.k)
        self.g_topk = None if flat[3] is None or self.k == 0 else flat[3].view(N, self.k)

    def __call__(self, x: Rows, dx: Tensor, rows: slice, first: int, temperature: float, softcap: float | None) -> None:
        """dx of the logits x, columns from ``first`` on, for some of the rows; in place if both are the same."""
        target, *others = (None if part is None else part[rows] for part in self.per_row)
        g_topk = None if self.g_topk is None else self.g_topk[rows]
        sweep = configs.config(dx.device).statistics_gradient
        S, n = -(-x.columns // sweep.columns), rows.stop - rows.start
        launch(
            *(gradient, n * S, dx.device, *x.arguments, dx, dx.stride(0), target, self.topk_ids[rows], *others, g_topk),
            *(first, x.columns, S, self.k, *scaling(temperature, softcap)),
            warps=sweep.warps,
            COLUMNS=sweep.columns,
        )


def backward(
    logits: Tensor,
    target: Tensor | None,
    topk_ids: Tensor,
    m: Tensor,
    log_d: Tensor,
    entropy: Tensor,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    g_logprob: Tensor | None,
    g_topk: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """The kernel of rmx_kernels::entropy_topk_backward."""
    x = Rows(logits)
    backward_rows = StatisticsGradient(target, topk_ids, (m, log_d, entropy), (g_lse, g_entropy, g_logprob, g_topk))
    dx = torch.empty_like(logits, memory_format=torch.contiguous_format)
    backward_rows(x, dx.view(-1, x.columns), slice(0, x.N), 0, temperature, softcap)
    return dx
