"""Native kernels: one pass over the logits.

Of hidden states a tile of the vocabulary at a time is multiplied by torch.mm and folded while it is in the cache. In
the backward pass whole rows are computed anew, some at a time, turned into their gradient in place and multiplied back;
the gradient of the head, where one is asked for, takes a second such sweep, by slices of the vocabulary. If the
gradient of the log-probs comes with them, the forward pass makes whole rows, and they are multiplied back at once.
"""

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.head import cpu as tiles
from rmx_kernels.head.cpu import Head, scale_of
from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.head.reference import pick
from rmx_kernels.logits import Gradients, Logits, Needs, chunks
from rmx_kernels.statistics.op import Forward, Saved, Upstream


class RunningStats:
    """The sums and the top-k of N rows while tiles of columns are folded in; csrc/rmx_cpu.h says what they hold."""

    def __init__(self, N: int, k: int, real: torch.dtype, target: Tensor | None) -> None:
        self.N, self.k, self.target = N, k, target
        self.m, self.d, self.T = (torch.empty(N, dtype=real) for _ in range(3))
        self.chosen = None if target is None else torch.empty(N, dtype=real)
        self.best = torch.empty(N, 2 * k, dtype=torch.int64)
        self.log_d, self.lse, self.entropy = (torch.empty_like(self.m) for _ in range(3))
        self.logprob = None if target is None else torch.empty(N, dtype=real)
        self.values, self.ids = torch.empty(N, k, dtype=real), torch.empty(N, k, dtype=torch.int64)

    def _sums(self, rows: slice) -> native.Sums:
        *pointers, best = native.addresses(rows, self.m, self.d, self.T, self.chosen, self.target, self.best)
        return native.Sums(*pointers, self.k, best)

    def fold(self, z: native.Rows, scale: native.Scale, rows: slice, first: int, columns: int) -> None:
        native.call("rmx_entropy_topk", z, scale, rows.stop - rows.start, first, columns, self._sums(rows))

    def finish(self, rows: slice) -> None:
        """log_d, lse, entropy, logprob [N], values and ids [N, k] of some rows whose columns were all folded in."""
        results = self.log_d, self.lse, self.entropy, self.logprob, self.values, self.ids
        stats = native.Stats(*native.addresses(rows, *results))
        dtype = native.DTYPES[self.m.dtype]
        native.call("rmx_entropy_topk_finish", dtype, rows.stop - rows.start, self._sums(rows), stats)


def forward(z: Logits, target: Tensor | None, k: int, gradient: bool) -> Forward:
    lead = z.lead
    ids = several = None
    if target is not None:
        ids = target.reshape(lead.numel(), *target.shape[len(lead) :]).long().contiguous()
        ids, several = (ids, None) if ids.dim() == 1 else (None, ids)
    stats = RunningStats(lead.numel(), k, z.real, ids)
    chosen = torch.empty(0 if several is None else several.shape, dtype=z.real)  # their logits
    dx, du = z.empty_row_gradients(gradient, "cpu")
    if gradient:
        _fold_and_turn(z, stats, dx, du)
    elif z.weight is None:
        stats.fold(native.rows(z.x), scale_of(z), slice(0, stats.N), 0, z.V)
        if target is not None and several is not None:
            chosen.copy_(z.x.gather(-1, target.long()).view(several.shape))
    else:
        head, of_rows = Head(z), z.rows()
        buffer = head.buffer(tiles.TILE_COLUMNS, min(stats.N, tiles.TILE_ROWS))
        for rows in chunks(stats.N, tiles.TILE_ROWS):
            x, u = head.rows(of_rows.x[rows]), head.lora_rows(of_rows.lora_hidden, rows)
            for cols in head.columns():
                tile = head.logits(x, buffer, cols, u)
                stats.fold(native.rows(tile), scale_of(z, rows), rows, cols.start, tile.shape[1])
                if several is not None:
                    pick(chosen, tile[: rows.stop - rows.start], several, rows, cols)
    if not gradient:
        stats.finish(slice(0, stats.N))
    logprob = stats.logprob
    if several is not None:
        logprob = (z.scaled(chosen) - stats.m[:, None]) - stats.log_d[:, None]
    lse, entropy, m, log_d = (x.view(lead) for x in (stats.lse, stats.entropy, stats.m, stats.log_d))
    logprob = m.new_empty(0) if logprob is None or target is None else logprob.view(target.shape)
    return lse, entropy, logprob, stats.values.view(*lead, k), stats.ids.view(*lead, k), m, log_d, *z.shaped(dx, du)


def _fold_and_turn(z: Logits, stats: RunningStats, dx: Tensor, du: Tensor) -> None:
    """All of ``stats``, and the gradient of the log-probs: both from the same whole rows of logits."""
    head, of_rows, target = Head(z), z.rows(), stats.target
    saved = Saved(target, stats.ids, stats.m, stats.log_d, stats.entropy)
    gradient = StatisticsGradient(saved, Upstream(None, None, torch.ones_like(stats.m), None))
    buffer = head.buffer(head.V, min(stats.N, head.row_chunk()))
    for rows in chunks(stats.N, head.row_chunk()):
        tile = _whole_rows(head, of_rows, rows, buffer)
        stats.fold(native.rows(tile), scale_of(z, rows), rows, 0, head.V)
        stats.finish(rows)
        gradient(native.rows(tile), native.rows(tile), scale_of(z, rows), rows, 0, head.V)
        head.back_into(tile, rows, rows.stop - rows.start, dx, du)


def _whole_rows(head: Head, z: Logits, rows: slice, buffer: Tensor) -> Tensor:
    """The logits of some of the flattened rows, followed by up to 3 others."""
    return head.logits(head.rows(z.x[rows]), buffer, None, head.lora_rows(z.lora_hidden, rows))


class StatisticsGradient:
    """Upstream gradients of N rows, flattened and in full precision, and what the backward kernel needs besides."""

    def __init__(self, saved: Saved, upstream: Upstream) -> None:
        target, topk_ids, m, log_d, entropy = saved
        g_lse, g_entropy, g_logprob, g_topk = upstream

        def flat(x: Tensor | None, *shape: int) -> Tensor | None:
            return None if x is None else x.to(m.dtype).reshape(-1, *shape).contiguous()

        self.k = topk_ids.shape[-1]
        self.N = m.numel()
        self.ids = topk_ids.reshape(self.N, self.k)
        self.norms = tuple(x.reshape(-1) for x in (m, log_d, entropy))
        self.g_entropy, self.g_logprob = flat(g_entropy), flat(g_logprob)
        self.g_topk = None if g_topk is None or self.k == 0 else flat(g_topk, self.k)
        self.target = None if target is None else target.reshape(-1).long().contiguous()
        self.along_p = torch.zeros(self.N, dtype=m.dtype)
        if g_lse is not None:
            self.along_p += g_lse.reshape(-1)
        if self.g_logprob is not None:
            self.along_p -= self.g_logprob
        if self.g_topk is not None:
            self.along_p -= self.g_topk.sum(-1)

    def __call__(
        self, x: native.Rows, dx: native.Rows, scale: native.Scale, rows: slice, first: int, columns: int
    ) -> None:
        """dx of a tile of the logits x, for some of the rows; in place if both are the same."""
        upstream = self.along_p, self.g_entropy, self.g_logprob, self.g_topk
        pointers = native.addresses(rows, *self.norms, self.target, self.ids, *upstream)
        gradient = native.StatsGradient(*pointers, self.k)
        count = rows.stop - rows.start
        native.call("rmx_entropy_topk_backward", x, scale, count, first, columns, gradient, dx)


def backward(z: Logits, saved: Saved, upstream: Upstream, needs: Needs) -> Gradients:
    gradient = StatisticsGradient(saved, upstream)
    if z.weight is None:
        dx = native.scratch(z.x.numel(), z.x.dtype).view(z.x.shape)
        gradient(native.rows(z.x), native.rows(dx), scale_of(z), slice(0, gradient.N), 0, z.V)
        return dx, None, None, None, None
    head, of_rows = Head(z), z.rows()
    dx, _, _, du, _ = of_rows.empty_gradients((needs[0], False, False, needs[3], False))
    if dx.numel() or du.numel():
        buffer = head.buffer(head.V, min(gradient.N, head.row_chunk()))
        for rows in chunks(gradient.N, head.row_chunk()):
            tile = _whole_rows(head, of_rows, rows, buffer)
            gradient(native.rows(tile), native.rows(tile), scale_of(z, rows), rows, 0, head.V)
            head.back_into(tile, rows, rows.stop - rows.start, dx, du)
    dx, du = z.shaped(dx, du)
    sink = HeadGradient(z, needs)
    if sink.wanted:
        _head_gradient(head, of_rows, gradient, sink)
    return dx, sink.weight, sink.bias, du, sink.lora_weight


def _head_gradient(head: Head, z: Logits, gradient: StatisticsGradient, sink: HeadGradient) -> None:
    buffer = head.buffer(tiles.TILE_COLUMNS, min(gradient.N, tiles.TILE_ROWS))
    for cols in head.columns():
        sink.open(cols)
        for rows in chunks(gradient.N, tiles.TILE_ROWS):
            n = rows.stop - rows.start
            x, u = head.rows(z.x[rows]), head.lora_rows(z.lora_hidden, rows)
            tile = head.logits(x, buffer, cols, u)
            gradient(native.rows(tile), native.rows(tile), scale_of(z, rows), rows, cols.start, tile.shape[1])
            sink.add(tile[:n], x[:n], None if u is None else u[:n])
        sink.close()
