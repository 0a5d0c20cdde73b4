"""Native kernels: a tile of the vocabulary at a time is multiplied by torch.mm and folded while it is in the cache.

Backward, whole rows are computed anew, some at a time, turned into their gradient in place and multiplied back; the
gradient of the head, where one is asked for, takes a second such sweep, by slices of the vocabulary.
"""

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.entropy_topk.cpu import RunningStats, StatsGradient, shaped, token_ids
from rmx_kernels.head_cpu import TILE_COLUMNS, TILE_ROWS, Head, HeadGradient
from rmx_kernels.linear_entropy_topk.ops import run as run
from rmx_kernels.tiles import chunks, flat


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """The kernel of rmx_kernels::linear_entropy_topk."""
    lead, x, u = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1]), flat(lora_hidden)
    with torch.autocast("cpu", enabled=False):
        head = Head(weight, bias, lora_weight)
        scale = native.scale(temperature, softcap)
        stats = RunningStats(x.shape[0], k, head.real, token_ids(target, head.V))
        buffer = head.buffer(TILE_COLUMNS, min(x.shape[0], TILE_ROWS))
        for rows in chunks(x.shape[0], TILE_ROWS):
            own, own_u = head.rows(x[rows]), head.lora_rows(u, rows)
            for cols in head.columns():
                z = head.logits(own, buffer, cols, own_u)
                stats.fold(native.rows(z), scale, rows, cols.start, z.shape[1])
    return shaped(stats.finish(), lead, target is not None)


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
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
    need_lora_hidden: bool,
    need_lora_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_entropy_topk_backward."""
    x, u = hidden.reshape(-1, hidden.shape[-1]), flat(lora_hidden)
    with torch.autocast("cpu", enabled=False):
        head = Head(weight, bias, lora_weight)
        scale = native.scale(temperature, softcap)
        gradient = StatsGradient(target, topk_ids, m, log_d, entropy, g_lse, g_entropy, g_logprob, g_topk)
        dx = torch.empty(hidden.shape if need_hidden else (0,), dtype=hidden.dtype)
        wanted = lora_hidden is not None and need_lora_hidden
        du = torch.empty(lora_hidden.shape if lora_hidden is not None and wanted else (0,), dtype=hidden.dtype)
        if need_hidden or wanted:
            _d_hidden(head, scale, gradient, x, u, flat(dx) if need_hidden else None, flat(du) if wanted else None)
        sink = HeadGradient(head, need_weight, need_bias, need_lora_weight)
        if sink.wanted:
            _d_head(head, scale, gradient, x, u, sink)
    return dx, sink.weight, sink.bias, du, sink.lora_weight


def _d_hidden(
    head: Head,
    scale: native.Scale,
    gradient: StatsGradient,
    x: Tensor,
    u: Tensor | None,
    dx: Tensor | None,
    du: Tensor | None,
) -> None:
    """Fills dx [N, H] and du [N, r], where given; u [N, r] is lora_hidden."""
    N, size = x.shape[0], head.row_chunk()
    buffer = head.buffer(head.V, min(N, size))
    for rows in chunks(N, size):
        z = head.logits(head.rows(x[rows]), buffer, lora_hidden=head.lora_rows(u, rows))
        gradient(native.rows(z), native.rows(z), scale, rows, 0, head.V)
        n = rows.stop - rows.start
        if dx is not None:
            dx[rows] = head.back(z)[:n].to(dx.dtype)
        if du is not None:
            du[rows] = head.lora_back(z)[:n].to(du.dtype)


def _d_head(
    head: Head, scale: native.Scale, gradient: StatsGradient, x: Tensor, u: Tensor | None, sink: HeadGradient
) -> None:
    N = x.shape[0]
    buffer = head.buffer(TILE_COLUMNS, min(N, TILE_ROWS))
    for cols in head.columns():
        sink.open(cols)
        for rows in chunks(N, TILE_ROWS):
            own, own_u, n = head.rows(x[rows]), head.lora_rows(u, rows), rows.stop - rows.start
            z = head.logits(own, buffer, cols, own_u)
            gradient(native.rows(z), native.rows(z), scale, rows, cols.start, z.shape[1])
            sink.add(z[:n], own[:n], None if own_u is None else own_u[:n])
        sink.close()
