"""The statistics by Triton kernels, on logits or on whole rows of them by the vendor's GEMM, some at a time.

Backward computes the rows anew, turns them into their gradient in place and multiplies it back; the gradient of the
head, where one is asked for, takes a second such sweep, by slices of the vocabulary. The gradient of the log-probs can
be made in the forward pass from the same rows.
"""

from typing import Any

import torch
from torch import Tensor

from rmx_kernels.head import configs
from rmx_kernels.head.launch import Rows, launch, power_of_2, scaling
from rmx_kernels.head.reference import VocabTiles
from rmx_kernels.head.triton import Head, head_gradient, multiple, row_sizes
from rmx_kernels.logits import Gradients, Logits, Needs, chunks
from rmx_kernels.statistics import kernels
from rmx_kernels.statistics.op import Forward, Saved, Upstream
from rmx_kernels.statistics.reference import exact_topk

SORT_BYTES = 64 << 20  # of rows in float32, where the top-k is found by sorting them
MAX_K = 128  # of the top-k by ``finish``; above it the rows are sorted
ROOM = 64  # of the lists in which ``finish`` looks for up to 16 tokens; as much more for each 16
BLOCK = 512  # columns that ``finish`` reads at a time where it walks along a row
FEW = 16  # tokens of the top-k, up to which chunks are large: a chunk is 16 bytes at a time from places far apart
LEAST_SEGMENTS = 4  # parts of a row are padded to so many: vocabularies below 160,000 share a compilation
LANES_A_WARP = 512  # of ``finish``, in which a warp keeps the largest logits of so many lanes in registers


class Statistics:
    """Room for the results of all rows of z, and their computation from whole rows of logits."""

    def __init__(self, z: Logits, target: Tensor | None, k: int) -> None:
        self.lead, self.N, self.k = z.lead, z.lead.numel(), k
        self.z, self.target, self.several = z, None, None
        if target is not None:
            ids = target.reshape(self.N, *target.shape[len(self.lead) :]).contiguous()
            self.target, self.several = (ids, None) if ids.dim() == 1 else (None, ids.long())
        self.m = torch.empty(self.N, dtype=torch.float32, device=z.x.device)  # before the temperature
        self.log_d, self.lse, self.entropy = (torch.empty_like(self.m) for _ in range(3))
        self.logprob = self.m.new_empty(0 if self.target is None else self.N)
        self.of_several = self.m.new_empty(0 if self.several is None else self.several.shape)
        self.shape = None if target is None else target.shape
        self.values = self.m.new_empty(self.N, k)
        self.ids = torch.empty(self.N, k, dtype=torch.int64, device=z.x.device)

    def compute(self, x: Rows, rows: slice) -> None:
        """The results of ``rows`` from their logits, the first rows of x."""
        n, V, device, itemsize = rows.stop - rows.start, x.columns, self.m.device, x.x.element_size()
        setting = configs.config(device)
        sweep, shape = setting.statistics, setting.statistics.shape(itemsize)
        most = max(1, setting.chunk // (shape["R"] * shape["J"]))  # steps of a chunk; halved where many are read again
        log_u = (most if self.k <= FEW else max(1, most // 2)).bit_length() - 1
        S, steps = sweep.division(V, itemsize, most)
        C = -(-V // (sweep.columns(itemsize) << log_u)) * sweep.lanes
        scale = scaling(self.z, rows)
        parts = torch.empty(3, n, S, dtype=torch.float32, device=device)
        peaks = lanes = lists = keys = None
        room = ROOM * (1 + self.k // 16)
        if 0 < self.k <= MAX_K:
            peaks = x.x.new_empty(n, C)
            lanes = parts.new_empty(n, S * sweep.lanes)
            lists = torch.empty(n, 3 * room, dtype=torch.int32, device=device)
            keys = torch.empty(n, room, dtype=torch.int64, device=device)
        launch(
            *(kernels.fold, n * S, device, *x.arguments, parts, peaks, lanes),
            *(n, V, S, C, steps, log_u, *scale),
            warps=sweep.warps,
            STAGES=sweep.stages,
            **shape,
        )
        segments = max(LEAST_SEGMENTS, power_of_2(S))
        launch(
            *(kernels.finish, n, device, *x.arguments, self._own(self.target, rows), parts, peaks, lanes, lists, keys),
            *(self._own(of, rows) for of in (self.m, self.log_d, self.lse, self.entropy, self.logprob)),
            *(self._own(of, rows) for of in (self.values, self.ids)),
            *(n, V, S, C, steps, log_u, self.k, room, *scale),
            warps=max(1, segments * sweep.lanes // LANES_A_WARP),
            SEGMENTS=segments,
            BLOCK=BLOCK,
            **shape,
        )
        if self.k > MAX_K:
            self._sort(x.x.reshape(-1, V)[:n], rows)
        if self.several is not None:
            self._pick(x.x.reshape(-1, V)[:n], self.several[rows], rows)

    def results(self, dx: Tensor, du: Tensor) -> Forward:
        lse, entropy, m, log_d = (x.view(self.lead) for x in (self.lse, self.entropy, self.m, self.log_d))
        logprob = self.logprob if self.several is None else self.of_several
        logprob = logprob if self.shape is None else logprob.view(self.shape)
        values, ids = (x.view(*self.lead, self.k) for x in (self.values, self.ids))
        return lse, entropy, logprob, values, ids, m, log_d, dx, du

    def _own(self, of_rows: Any, rows: slice) -> Any:
        """The part of ``rows``, without a view where that is all."""
        return of_rows if of_rows is None or rows.stop - rows.start == self.N else of_rows[rows]

    def _pick(self, x: Tensor, ids: Tensor, rows: slice) -> None:
        """The log-probs of several ids [n, K] a row from logits x [n, V]; NaN for ids outside of the vocabulary."""
        valid = (ids >= 0) & (ids < x.shape[1])
        chosen = self.z.scaled(x.gather(1, torch.where(valid, ids, 0)).to(torch.float32), rows)
        logprob = (chosen - self._scaled_m(rows)) - self.log_d[rows, None]
        self.of_several[rows] = torch.where(valid, logprob, float("nan"))

    def _sort(self, x: Tensor, rows: slice) -> None:
        """The top-k of ``rows`` from their logits x [n, V], by sorting, for a k that is too large for registers."""
        tiles = VocabTiles(self.z.of_logits(x, rows))
        for part in chunks(tiles.N, max(1, SORT_BYTES // (4 * tiles.V))):
            own = slice(rows.start + part.start, rows.start + part.stop)
            z, self.ids[own] = exact_topk(tiles(part, slice(0, tiles.V), None), self.k)
            self.values[own] = (z - self._scaled_m(own)) - self.log_d[own, None]

    def _scaled_m(self, rows: slice) -> Tensor:
        """m after the temperature, [n, 1]."""
        own = self.z.divisors(rows)
        return self.m[rows, None] * (1.0 / self.z.temperature if own is None else own.double().reciprocal().float())


def forward(z: Logits, target: Tensor | None, k: int, gradient: bool) -> Forward:
    statistics = Statistics(z, target, k)
    dx, du = z.empty_row_gradients(gradient, "triton")
    if z.weight is None:
        statistics.compute(Rows(z.x), slice(0, statistics.N))
        return statistics.results(dx, du)
    head, of_rows = Head(z, models=1), z.rows()
    turn = size = None
    if gradient:
        ones = torch.ones_like(statistics.m)
        size = row_sizes(ones) if head.narrow else None
        saved = Saved(statistics.target, statistics.ids, statistics.m, statistics.log_d, statistics.entropy)
        turn = StatisticsGradient(z, saved, Upstream(None, None, ones if size is None else ones / size, None))
    buffer = head.buffer(multiple(min(statistics.N, head.chunk)), head.V)
    for rows in chunks(statistics.N, head.chunk):
        u = None if of_rows.lora_hidden is None else head.take(of_rows.lora_hidden, rows)
        logits = head.logits(head.take(of_rows.x, rows), u, buffer)
        statistics.compute(Rows(logits), rows)
        if turn is not None:
            dz = turn.beside(head, logits, rows, 0)
            head.back_into(dz, None if size is None else size[rows], rows, dx, du)
    return statistics.results(*z.shaped(dx, du))


class StatisticsGradient:
    """The gradient of rows of logits, from what the forward saved and upstream gradients in float32."""

    def __init__(self, z: Logits, saved: Saved, upstream: Upstream) -> None:
        N, self.k = saved.m.numel(), saved.topk_ids.shape[-1]
        self.z = z
        flat = [None if g is None else g.to(torch.float32).reshape(-1).contiguous() for g in upstream]
        target = None if saved.target is None else saved.target.reshape(-1).contiguous()
        self.per_row = [target, *(x.reshape(-1) for x in (saved.m, saved.log_d, saved.entropy)), *flat[:3]]
        self.topk_ids = saved.topk_ids.reshape(N, self.k)
        self.g_topk = None if flat[3] is None or self.k == 0 else flat[3].view(N, self.k)

    def __call__(self, x: Rows, dx: Tensor, rows: slice, first: int) -> None:
        """dx of the logits x, columns from ``first`` on, for some of the rows; in place if both are the same."""
        target, *others = (None if part is None else part[rows] for part in self.per_row)
        g_topk = None if self.g_topk is None else self.g_topk[rows]
        sweep, itemsize = configs.config(dx.device).statistics_gradient, x.x.element_size()
        (S, steps), n = sweep.division(x.columns, itemsize), rows.stop - rows.start
        launch(
            *(kernels.gradient, n * S, dx.device, *x.arguments, dx, dx.stride(0), target, self.topk_ids[rows]),
            *(*others, g_topk, first, x.columns, S, steps, self.k, *scaling(self.z, rows)),
            warps=sweep.warps,
            **sweep.shape(itemsize),
        )

    def beside(self, head: Head, logits: Tensor, rows: slice, first: int) -> Tensor:
        """The gradient of a tile of logits, in their place where it can be; 0 in rows to fill up with."""
        dz = head.gradient_buffer(logits)
        self(Rows(logits), dz, rows, first)
        dz[rows.stop - rows.start :].zero_()
        return dz


def backward(z: Logits, saved: Saved, upstream: Upstream, needs: Needs) -> Gradients:
    if z.weight is None:
        dx = torch.empty_like(z.x, memory_format=torch.contiguous_format)
        StatisticsGradient(z, saved, upstream)(Rows(z.x), dx.view(-1, z.V), slice(0, saved.m.numel()), 0)
        return dx, None, None, None, None
    of_rows, N, size = z.rows(), saved.m.numel(), None
    dx, _, _, du, _ = of_rows.empty_gradients((needs[0], False, False, needs[3], False))
    x, u = of_rows.x, of_rows.lora_hidden
    if x.dtype == torch.float16 and any(g is not None for g in upstream):
        given = [None if g is None else g.to(torch.float32).reshape(N, *g.shape[saved.m.dim() :]) for g in upstream]
        size = row_sizes(*given)
        upstream = Upstream(*(None if g is None else g / size.view(-1, *[1] * (g.dim() - 1)) for g in given))
    head, gradient, sink = Head(z, models=1), StatisticsGradient(z, saved, upstream), head_gradient(z, needs)

    def tile(rows: slice, buffer: Tensor, cols: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dz, x, u) of some rows and columns, followed by rows to fill up with."""
        own, own_u = head.take(x, rows), None if u is None else head.take(u, rows)
        logits = head.logits(own, own_u, buffer, cols)
        return gradient.beside(head, logits, rows, cols.start), own, own_u

    if needs[0] or needs[3]:
        buffer = head.buffer(multiple(min(N, head.chunk)), head.V)
        for rows in chunks(N, head.chunk):
            dz, _, _ = tile(rows, buffer, slice(0, head.V))
            head.back_into(dz, None if size is None else size[rows], rows, dx, du)
    dx, du = z.shaped(dx, du)
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
