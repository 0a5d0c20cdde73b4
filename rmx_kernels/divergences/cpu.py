"""Native kernels: torch.mm makes whole rows of logits, and one kernel goes over each row of student and teacher.

As many rows as fit into 48 MiB are multiplied at once, student and teacher, and kept while the kernel goes over them
for normalisers, values and the gradient, which it writes over the student's logits. So a row costs 3 products: student,
teacher, and back. A gradient of the entropy makes the logits again. The gradient of a trained head takes a sweep of its
own, by slices of the vocabulary.
"""

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.divergences.op import KINDS, NORMS, DivergenceForward, HeadPair, Upstream
from rmx_kernels.divergences.reference import flat_upstream, of_rows
from rmx_kernels.head import cpu as tiles
from rmx_kernels.head.cpu import Head, scale_of
from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.logits import Gradients, Needs, chunks, gradient_dtype


class LogitRows:
    """Logits of some rows of both models [n, columns], which the student's gradient may overwrite."""

    def __init__(self, pair: HeadPair, rows: slice, z: Tensor, teacher_z: Tensor) -> None:
        self.pair, self.z, self.teacher_z = pair, z, teacher_z
        self.scales = scale_of(pair.student, rows), scale_of(pair.teacher, rows)

    def values(self, norms: Tensor, gradient: bool) -> Tensor:
        """The divergence [n]; writes the norms [6, n], and where it is asked for the gradient over the logits."""
        found = torch.empty(norms.shape[1], dtype=norms.dtype)
        self._sweep(norms, found, (torch.ones_like(found), None), gradient)
        return found

    def turn(self, norms: Tensor, upstream: Upstream) -> None:
        """The gradient of the logits over them, from known norms [6, n] and upstream gradients [n]."""
        self._sweep(norms, None, upstream, True)

    def _sweep(self, norms: Tensor, value: Tensor | None, upstream: Upstream, gradient: bool) -> None:
        student, teacher = native.rows(self.z), native.rows(self.teacher_z)
        addresses = norms.data_ptr(), *(native.address(x) for x in (value, *upstream))
        rows = native.DivergenceRows(*addresses, norms.stride(0), self.pair.beta, KINDS.index(self.pair.kind))
        count, columns = self.z.shape
        native.call(
            *("rmx_divergence", student, teacher, *self.scales, count, columns, rows, student if gradient else None)
        )


class HeadRows:
    """The rows of a pair [N, H], flattened: their logits are made a chunk at a time."""

    def __init__(self, pair: HeadPair) -> None:
        self.pair, self.student, self.teacher = pair, Head(pair.student), Head(pair.teacher)
        self.x, self.u = pair.student.x, pair.student.lora_hidden
        self.chunk = self.student.row_chunk()  # two whole rows of logits each
        self.N = self.x.shape[0]

    def values(self, norms: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(divergence [N], d x [N, H] or [0], d lora_hidden [N, r] or [0]); writes the norms [6, N]."""
        found = torch.empty_like(norms[0])
        dx, du = self._room(gradient, gradient)
        buffers = self._buffers(self.chunk, self.student.V)
        for rows in chunks(self.N, self.chunk):
            _, _, z, logits = self._multiply(rows, buffers)
            found[rows] = logits.values(norms[:, rows], gradient)
            self._back(z, rows, dx, du)
        return found, dx, du

    def gradients(self, norms: Tensor, upstream: Upstream, needs: Needs) -> tuple[Tensor, Tensor]:
        """(d x [N, H], d lora_hidden [N, r]) from known norms; without elements where not needed."""
        dx, du = self._room(needs[0], needs[3])
        if dx.numel() + du.numel() == 0:
            return dx, du
        buffers = self._buffers(self.chunk, self.student.V)
        for rows in chunks(self.N, self.chunk):
            _, _, z, logits = self._multiply(rows, buffers)
            logits.turn(norms[:, rows], of_rows(upstream, rows))
            self._back(z, rows, dx, du)
        return dx, du

    def head_gradients(self, norms: Tensor, upstream: Upstream, sink: HeadGradient) -> None:
        """The gradients of the student's head from known norms, into the sink."""
        if not sink.wanted:
            return
        buffers = self._buffers(tiles.TILE_ROWS, tiles.TILE_COLUMNS)
        for cols in self.student.columns():
            sink.open(cols)
            for rows in chunks(self.N, tiles.TILE_ROWS):
                n = rows.stop - rows.start
                x, u, z, logits = self._multiply(rows, buffers, cols)
                logits.turn(norms[:, rows], of_rows(upstream, rows))
                sink.add(z[:n], x[:n], None if u is None else u[:n])
            sink.close()

    def _room(self, need_x: bool, need_lora: bool) -> tuple[Tensor, Tensor]:
        dx = torch.empty(self.x.shape if need_x else 0, dtype=gradient_dtype(self.x, "cpu"))
        return dx, dx.new_empty(self.u.shape if self.u is not None and need_lora else 0)

    def _buffers(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        rows = min(rows, self.N)
        return self.student.buffer(columns, rows), self.teacher.buffer(columns, rows)

    def _multiply(
        self, rows: slice, buffers: tuple[Tensor, Tensor], cols: slice | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, LogitRows]:
        """(the student's rows of x and of lora_hidden, its logits, all in fours; the logits of both)."""
        n = rows.stop - rows.start
        x, u = self.student.rows(self.x[rows]), self.student.lora_rows(self.u, rows)
        z = self.student.logits(x, buffers[0], cols, u)
        teacher_z = self.teacher.logits(self.teacher.rows(self.pair.teacher.x[rows]), buffers[1], cols)
        return x, u, z, LogitRows(self.pair, rows, z[:n], teacher_z[:n])

    def _back(self, dz: Tensor, rows: slice, dx: Tensor, du: Tensor) -> None:
        self.student.back_into(dz, rows, rows.stop - rows.start, dx, du)


def divergence(pair: HeadPair, gradient: bool) -> DivergenceForward:
    z, pair = pair.student, pair.rows()
    norms = torch.full((NORMS, pair.student.x.shape[0]), float("nan"), dtype=z.real)
    value, dx, du = HeadRows(pair).values(norms, gradient)
    return value.view(z.lead), norms[5].clone().view(z.lead), norms, *z.shaped(dx, du)


def divergence_backward(pair: HeadPair, norms: Tensor, upstream: Upstream, needs: Needs) -> Gradients:
    z, rows = pair.student, HeadRows(pair.rows())
    g_divergence, g_entropy = (None if g is None else g.contiguous() for g in flat_upstream(upstream, norms.dtype))
    upstream = g_divergence, g_entropy
    dx, du = rows.gradients(norms, upstream, needs)
    sink = HeadGradient(z, needs)
    rows.head_gradients(norms, upstream, sink)
    dx, du = z.shaped(dx.to(z.x.dtype), du.to(z.x.dtype))
    return dx, sink.weight, sink.bias, du, sink.lora_weight
