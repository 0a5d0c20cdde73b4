"""Native kernels: a tile of the vocabulary at a time is multiplied by torch.mm and folded while it is in the cache.

Backward, whole rows are computed anew, some at a time, turned into their gradient in place and multiplied back; the
gradient of the head, where one is asked for, takes a second such sweep, by slices of the vocabulary.
"""

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.entropy_topk.cpu import RunningStats, StatsGradient, named, shaped, token_ids
from rmx_kernels.head_cpu import TILE_COLUMNS, TILE_ROWS, Head, HeadGradient
from rmx_kernels.results import VocabStats
from rmx_kernels.tiles import chunks


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """The kernel of rmx_kernels::linear_entropy_topk."""
    lead, x = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast("cpu", enabled=False):
        head = Head(weight, bias)
        scale = native.scale(temperature, softcap)
        stats = RunningStats(x.shape[0], k, head.real, token_ids(target, head.V))
        buffer = head.buffer(TILE_COLUMNS, min(x.shape[0], TILE_ROWS))
        for rows in chunks(x.shape[0], TILE_ROWS):
            own = head.rows(x[rows])
            for cols in head.columns():
                z = head.logits(own, buffer, cols)
                stats.fold(native.rows(z), scale, rows, cols.start, z.shape[1])
    return shaped(stats.finish(), lead, target is not None)


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_entropy_topk_backward."""
    x = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast("cpu", enabled=False):
        head = Head(weight, bias)
        scale = native.scale(temperature, softcap)
        gradient = StatsGradient(target, topk_ids, m, log_d, entropy, g_lse, g_entropy, g_logprob, g_topk)
        dx = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype)
        if need_hidden:
            _d_hidden(head, scale, gradient, x, dx.view(x.shape))
        sink = HeadGradient(head, weight, bias, need_weight, need_bias)
        if sink.wanted:
            _d_head(head, scale, gradient, x, sink)
    return dx, sink.weight, sink.bias


def _d_hidden(head: Head, scale: native.Scale, gradient: StatsGradient, x: Tensor, dx: Tensor) -> None:
    N, size = x.shape[0], head.row_chunk()
    buffer = head.buffer(head.V, min(N, size))
    for rows in chunks(N, size):
        z = head.logits(head.rows(x[rows]), buffer)
        gradient(native.rows(z), native.rows(z), scale, rows, 0, head.V)
        dx[rows] = head.back(z)[: rows.stop - rows.start].to(dx.dtype)


def _d_head(head: Head, scale: native.Scale, gradient: StatsGradient, x: Tensor, sink: HeadGradient) -> None:
    N = x.shape[0]
    buffer = head.buffer(TILE_COLUMNS, min(N, TILE_ROWS))
    for cols in head.columns():
        sink.open(cols)
        for rows in chunks(N, TILE_ROWS):
            own, n = head.rows(x[rows]), rows.stop - rows.start
            z = head.logits(own, buffer, cols)
            gradient(native.rows(z), native.rows(z), scale, rows, cols.start, z.shape[1])
            sink.add(z[:n], own[:n])
        sink.close()


def run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
) -> VocabStats:
    """Arguments as checked by the public operator."""
    stats = torch.ops.rmx_kernels.linear_entropy_topk(hidden, weight, bias, target, k, temperature, softcap)
    return named(stats, target, k)
