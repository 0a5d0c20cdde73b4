"""The divergences by Triton kernels, on whole rows of logits by the vendor's GEMM, some at a time.

The kernels read the rows of student and teacher for the normalisers, for the values, and for the gradient, which is
written over the student's logits. So a row costs 3 products: student, teacher, and back. A gradient of the entropy
makes the logits again. The gradient of a trained head takes a sweep of its own, by slices of the vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmx_kernels.divergences import kernels
from rmx_kernels.divergences.op import KINDS, NORMS, DivergenceForward, HeadPair, Upstream
from rmx_kernels.divergences.reference import flat_upstream, of_rows
from rmx_kernels.head import configs
from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.head.launch import Scaling, launch, power_of_2, scaling
from rmx_kernels.head.triton import Head, head_gradient, multiple, row_sizes
from rmx_kernels.logits import Gradients, Needs, chunks, gradient_dtype
from rmx_kernels.losses.triton import LEAST_SEGMENTS

PARTS = 5  # m, d and T of the student, m and d of the teacher


class RowLogits(NamedTuple):
    """The logits [.., columns] of some rows of both models, filled up with others."""

    pair: HeadPair
    rows: slice
    x: Tensor
    teacher_x: Tensor

    @property
    def n(self) -> int:
        return int(self.rows.stop - self.rows.start)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.x.stride(0), self.teacher_x, self.teacher_x.stride(0)

    @property
    def scalings(self) -> tuple[Scaling, Scaling]:
        """Of the student and of the teacher."""
        return scaling(self.pair.student, self.rows), scaling(self.pair.teacher, self.rows)

    @property
    def shares(self) -> tuple[float, float]:
        """beta and 1 - beta."""
        return self.pair.beta, 1 - self.pair.beta

    @property
    def kind(self) -> int:
        return KINDS.index(self.pair.kind)


def single(sweep: configs.Sweep) -> configs.Sweep:
    """One load a lane and step: what lies between two logits and a term takes the registers of a second one."""
    return dataclasses.replace(sweep, loads=1)


def row_values(rows: RowLogits) -> tuple[Tensor, Tensor]:
    """(divergence [n], norms [6, n]) of whole rows."""
    V, n, device, itemsize = rows.x.shape[1], rows.n, rows.x.device, rows.x.element_size()
    sweep = configs.config(device).loss
    S, steps = sweep.division(V, itemsize)
    parts, norms, sums = (
        torch.empty(*shape, dtype=torch.float32, device=device) for shape in ((PARTS, n, S), (NORMS, n), (2, n, S))
    )
    own, other = rows.scalings
    launch(
        *(kernels.fold, n * S, device, *rows.arguments, parts, n, V, S, steps, *own, *other),
        warps=sweep.warps,
        STAGES=sweep.stages,
        **sweep.shape(itemsize),
    )
    sweep = single(sweep)  # of as many programs
    S, steps = sweep.division(V, itemsize)
    launch(
        *(kernels.values, n * S, device, *rows.arguments, parts, norms, sums, n, V, S, steps),
        *(*own, *other, *rows.shares),
        warps=sweep.warps,
        KIND=rows.kind,
        SEGMENTS=max(LEAST_SEGMENTS, power_of_2(S)),
        STAGES=sweep.stages,
        **sweep.shape(itemsize),
    )
    value, mean = sums.sum(-1)
    norms[4] = mean
    return value, norms


def row_gradient(rows: RowLogits, dx: Tensor, norms: Tensor, upstream: Upstream) -> None:
    """dx [n, columns] of the rows, from norms [6, n] and upstream gradients [n]; in place if dx is x."""
    sweep, itemsize = single(configs.config(dx.device).loss_gradient), rows.x.element_size()
    S, steps = sweep.division(rows.x.shape[1], itemsize)
    own, other = rows.scalings
    launch(
        *(kernels.gradient, rows.n * S, dx.device, *rows.arguments, dx, dx.stride(0), norms, norms.stride(0)),
        *(*upstream, rows.n, rows.x.shape[1], S, steps, *own[1:], *other[1:], *rows.shares),
        warps=sweep.warps,
        KIND=rows.kind,
        **sweep.shape(itemsize),
    )


class HeadRows:
    """The rows of a pair [N, H], flattened: their logits are made a chunk at a time."""

    def __init__(self, pair: HeadPair) -> None:
        self.pair, self.x, self.u = pair, pair.student.x, pair.student.lora_hidden
        self.head, self.teacher = Head(pair.student, models=2), Head(pair.teacher, models=2)
        self.N = self.x.shape[0]

    def values(self, gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(divergence [N], norms [6, N], d x [N, H], d u [N, r]); gradients have no elements where not asked for."""
        value, norms = (torch.empty(*s, self.N, dtype=torch.float32, device=self.x.device) for s in ((), (NORMS,)))
        dx, du = self._room(gradient, gradient)
        buffers = self._buffers(self.head.chunk, self.head.V)
        for rows in chunks(self.N, self.head.chunk):
            part = self._multiply(rows, buffers)
            value[rows], norms[:, rows] = row_values(part)
            if gradient:
                ones = torch.ones_like(value[rows])
                self._back(*self._turn(part, norms[:, rows], (ones, None)), rows, dx, du)
        return value, norms, dx, du

    def gradients(self, norms: Tensor, upstream: Upstream, needs: Needs) -> tuple[Tensor, Tensor]:
        """(d x [N, H], d u [N, r]) from known norms; without elements where not asked for."""
        dx, du = self._room(needs[0], needs[3])
        if not needs[0] and not needs[3]:
            return dx, du
        buffers = self._buffers(self.head.chunk, self.head.V)
        for rows in chunks(self.N, self.head.chunk):
            part = self._multiply(rows, buffers)
            self._back(*self._turn(part, norms[:, rows], of_rows(upstream, rows)), rows, dx, du)
        return dx, du

    def head_gradients(self, norms: Tensor, upstream: Upstream, sink: HeadGradient) -> None:
        """The gradients of the student's head from known norms, into the sink."""
        if not sink.wanted:
            return
        for cols in self.head.slices():
            sink.open(cols)
            columns = cols.stop - cols.start
            step = self.head.slice_rows(columns)
            buffers = self._buffers(step, columns)
            for rows in chunks(self.N, step):
                part = self._multiply(rows, buffers, cols)
                dz, size = self._turn(part, norms[:, rows], of_rows(upstream, rows))
                sink.add(dz[: part.n], self.x[rows], None if self.u is None else self.u[rows], size)
            sink.close()

    def _room(self, need_x: bool, need_u: bool) -> tuple[Tensor, Tensor]:
        dx = self.x.new_empty(self.x.shape if need_x else (0,), dtype=gradient_dtype(self.x, "triton"))
        return dx, dx.new_empty(self.u.shape if need_u and self.u is not None else (0,))

    def _buffers(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        rows = multiple(min(rows, self.N))
        return self.head.buffer(rows, columns), self.teacher.buffer(rows, columns)

    def _multiply(self, rows: slice, buffers: tuple[Tensor, Tensor], cols: slice | None = None) -> RowLogits:
        """Logits of student and teacher, filled up."""
        u = None if self.u is None else self.head.take(self.u, rows)
        z = self.head.logits(self.head.take(self.x, rows), u, buffers[0], cols)
        teacher_z = self.teacher.logits(self.teacher.take(self.pair.teacher.x, rows), None, buffers[1], cols)
        return RowLogits(self.pair, rows, z, teacher_z)

    def _turn(self, part: RowLogits, norms: Tensor, upstream: Upstream) -> tuple[Tensor, Tensor | None]:
        """(the gradient of the student's logits, in their place where it can be; what its rows are divided by)."""
        size = None
        if self.head.narrow:  # no entry exceeds its row's upstream gradient times 1 + mean, or 1 + entropy
            bounds = (None if g is None else g * (1 + norms[4 + i]) for i, g in enumerate(upstream))
            size = row_sizes(*bounds)
            upstream = tuple(None if g is None else g / size for g in upstream)  # type: ignore[assignment]
        dz = self.head.gradient_buffer(part.x)
        row_gradient(part, dz, norms, upstream)
        dz[part.n :].zero_()
        return dz, size

    def _back(self, dz: Tensor, size: Tensor | None, rows: slice, dx: Tensor, du: Tensor) -> None:
        self.head.back_into(dz, size, rows, dx, du)


def divergence(pair: HeadPair, gradient: bool) -> DivergenceForward:
    z = pair.student
    value, norms, dx, du = HeadRows(pair.rows()).values(gradient)
    return value.view(z.lead), norms[5].clone().view(z.lead), norms, *z.shaped(dx, du)


def divergence_backward(pair: HeadPair, norms: Tensor, upstream: Upstream, needs: Needs) -> Gradients:
    z, rows, sink = pair.student, HeadRows(pair.rows()), head_gradient(pair.student, needs)
    g_divergence, g_entropy = (None if g is None else g.contiguous() for g in flat_upstream(upstream, torch.float32))
    dx, du = rows.gradients(norms, (g_divergence, g_entropy), needs)
    rows.head_gradients(norms, (g_divergence, g_entropy), sink)
    dx, du = z.shaped(dx.to(z.x.dtype), du.to(z.x.dtype))
    return dx, sink.weight, sink.bias, du, sink.lora_weight
