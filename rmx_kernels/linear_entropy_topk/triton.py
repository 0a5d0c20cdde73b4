"""Whole rows of logits by the vendor's GEMM, some at a time, then entropy_topk's kernels while they are there.

Backward computes the same rows anew, turns them into their gradient in place and multiplies it back; the gradient of
the head, where one is asked for, takes a second such sweep, by slices of the vocabulary.
"""

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.triton import Statistics, StatisticsGradient
from rmx_kernels.head_triton import Head, HeadGradient, multiple, row_sizes
from rmx_kernels.linear_entropy_topk.ops import run as run
from rmx_kernels.tiles import chunks
from rmx_kernels.vec_triton import Rows


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1, x.shape[-1])


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
    x, u = hidden.reshape(-1, hidden.shape[-1]), _flat(lora_hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(weight, bias, lora_weight, models=1)
        ids = None if target is None else target.reshape(-1).contiguous()
        statistics = Statistics(hidden, x.shape[0], k, ids)
        buffer = head.buffer(multiple(min(x.shape[0], head.chunk)), head.V)
        for rows in chunks(x.shape[0], head.chunk):
            z = head.logits(head.take(x, rows), None if u is None else head.take(u, rows), buffer)
            statistics.compute(Rows(z), rows, temperature, softcap)
    return statistics.results(hidden.shape[:-1])


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
    x, u = hidden.reshape(-1, hidden.shape[-1]), _flat(lora_hidden)
    N = x.shape[0]
    given = (g_lse, g_entropy, g_logprob, g_topk)
    upstream = [None if g is None else g.to(torch.float32).reshape(N, *g.shape[m.dim() :]) for g in given]
    size = None
    if hidden.dtype == torch.float16 and any(g is not None for g in upstream):
        size = row_sizes(*upstream)
        upstream = [None if g is None else g / size.view(-1, *[1] * (g.dim() - 1)) for g in upstream]
    dx = hidden.new_empty(hidden.shape if need_hidden else (0,))
    du = hidden.new_empty(lora_hidden.shape if need_lora_hidden and lora_hidden is not None else (0,))
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(weight, bias, lora_weight, models=1)
        gradient = StatisticsGradient(target, topk_ids, (m, log_d, entropy), upstream)
        sink = HeadGradient(head, need_weight, need_bias, need_lora_weight)

        def tile(rows: slice, buffer: Tensor, cols: slice) -> tuple[Tensor, Tensor, Tensor | None]:
            """(dz, x, u) of some rows and columns, followed by rows to fill up with."""
            own, own_u = head.take(x, rows), None if u is None else head.take(u, rows)
            z = head.logits(own, own_u, buffer, cols)
            dz = head.gradient_buffer(z)
            gradient(Rows(z), dz, rows, cols.start, temperature, softcap)
            dz[rows.stop - rows.start :].zero_()
            return dz, own, own_u

        if need_hidden or need_lora_hidden:
            buffer = head.buffer(multiple(min(N, head.chunk)), head.V)
            for rows in chunks(N, head.chunk):
                part = None if size is None else size[rows]
                dz, _, _ = tile(rows, buffer, slice(0, head.V))
                if need_hidden:
                    head.back(dz, weight, part, dx.view(x.shape)[rows])
                if lora_weight is not None and need_lora_hidden:
                    head.back(dz, lora_weight, part, du.view(N, -1)[rows])
        for cols in head.slices() if sink.wanted else ():
            sink.open(cols)
            step = head.slice_rows(cols.stop - cols.start)
            buffer = head.buffer(multiple(min(N, step)), cols.stop - cols.start)
            for rows in chunks(N, step):
                n = rows.stop - rows.start
                dz, own, own_u = tile(rows, buffer, cols)
                sink.add(dz[:n], own[:n], None if own_u is None else own_u[:n], None if size is None else size[rows])
            sink.close()
    return dx, sink.weight, sink.bias, du, sink.lora_weight
