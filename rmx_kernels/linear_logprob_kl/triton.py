"""Whole rows of logits of student and base by the vendor's GEMM, some at a time; serves both linear losses.

gated_contrastive_loss's kernels read the rows once for all values, and once more to write the gradient over the
student's logits. So a row costs 3 products with the head: student, base, and back. The gradient of the head, where one
is asked for, takes a sweep of its own, by slices of the vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.gated_contrastive_loss.triton import row_gradient, row_terms
from rmx_kernels.head_cpu import gradient_dtype
from rmx_kernels.head_triton import Head, HeadGradient, Index, multiple, row_sizes
from rmx_kernels.linear_logprob_kl.ops import run as run
from rmx_kernels.tiles import chunks
from rmx_kernels.vec_triton import Rows

Weights = tuple[Tensor, Tensor]  # (ce, kl) of every row, float32 [N]


@dataclass(frozen=True)
class LossRows:
    """The n rows of x [N, H] that ``index`` names (None: all), the first ``anchored`` of which have a base."""

    head: Head
    temperature: float
    softcap: float | None
    x: Tensor  # [N, H]
    base_x: Tensor  # [N, H]
    u: Tensor | None  # [N, r], the student's LoRA
    target: Tensor  # [N]
    index: Tensor | None  # [n]
    anchored: int

    @property
    def n(self) -> int:
        return self.x.shape[0] if self.index is None else self.index.shape[0]

    def terms(
        self, weights: Weights | None, base_lse: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(logprob [N], kl [N], norms [4, N], d x [N, H], d u [N, r]); NaN, or 0 for gradients, where not computed.

        Gradients have no elements where not asked for; without weights, all rows have both values.
        """
        found = torch.empty(6, self.n, dtype=torch.float32, device=self.x.device)
        dx, du = self._room(gradient, gradient)
        buffers = self._buffers(multiple(min(self.n, self.head.chunk)), self.head.V)
        own_weights = None if weights is None else self._chosen(*weights)
        target, known = self._chosen(self.target, base_lse)
        size = row_sizes(*own_weights) if gradient and own_weights is not None and self.head.narrow else None
        scale = self.temperature, self.softcap
        for rows in chunks(self.n, self.head.chunk):
            z, base_z = self._multiply(rows, buffers)
            given = (None, None) if own_weights is None else (own_weights[0][rows], own_weights[1][rows])
            lse = None if known is None else known[rows]
            terms = row_terms(Rows(z), Rows(base_z), rows.stop - rows.start, target[rows], given, lse, *scale)
            found[:, rows] = terms
            if gradient and own_weights is not None:
                dz = self._turn(z, base_z, rows, terms[2:], target, own_weights, size)
                self._back(dz, rows, size, dx, du)
        found = self._placed(found)
        return found[0].clone(), found[1].clone(), found[2:].clone(), self._in_place(dx), self._in_place(du)

    def gradients(self, weights: Weights, norms: Tensor, need_x: bool, need_u: bool) -> tuple[Tensor, Tensor]:
        """(d x [N, H], d u [N, r]) of all rows, from known norms; without elements where not asked for."""
        dx, du = self._room(need_x, need_u)
        if not need_x and not need_u:
            return dx, du
        buffers = self._buffers(multiple(min(self.n, self.head.chunk)), self.head.V)
        size = row_sizes(*weights) if self.head.narrow else None
        for rows in chunks(self.n, self.head.chunk):
            z, base_z = self._multiply(rows, buffers)
            dz = self._turn(z, base_z, rows, norms[:, rows], self.target, weights, size)
            self._back(dz, rows, size, dx, du)
        return dx, du

    def head_gradients(
        self, weights: Weights, norms: Tensor, sink: HeadGradient, upstream: Tensor | float = 1.0
    ) -> None:
        """The gradients of the head from known norms, times ``upstream``, into the sink."""
        if not sink.wanted:
            return
        weights = self._chosen(*weights)
        size = row_sizes(*weights) if self.head.narrow else None
        target, norms = self._chosen(self.target)[0], norms if self.index is None else norms[:, self.index]
        for cols in self.head.slices():
            sink.open(cols)
            columns = cols.stop - cols.start
            step = self.head.slice_rows(columns)
            buffers = self._buffers(multiple(min(self.n, step)), columns)
            for rows in chunks(self.n, step):
                n = rows.stop - rows.start
                z, base_z = self._multiply(rows, buffers, cols)
                dz = self._turn(z, base_z, rows, norms[:, rows], target, weights, size, cols.start)
                own = self._own(rows)
                sink.add(
                    dz[:n], self.x[own], None if self.u is None else self.u[own], None if size is None else size[rows]
                )
            sink.close(upstream)

    def _own(self, rows: slice) -> Index:
        return rows if self.index is None else self.index[rows]

    def _chosen(self, *of_rows: Any) -> Any:
        """Those of the rows that are computed, in their order."""
        return tuple(x if x is None or self.index is None else x[self.index] for x in of_rows)

    def _room(self, need_x: bool, need_u: bool) -> tuple[Tensor, Tensor]:
        """For the gradients of the n rows of x and u, in their order, and of one more where rows are left out."""
        dtype, rows = gradient_dtype(self.x), min(self.n + 1, self.x.shape[0])
        dx = self.x.new_empty((rows, self.x.shape[1]) if need_x else (0,), dtype=dtype)
        du = self.x.new_empty((rows, self.u.shape[1]) if need_u and self.u is not None else (0,), dtype=dtype)
        return dx, du

    def _in_place(self, gradient: Tensor) -> Tensor:
        """The gradients of the rows in the places of all rows [N, H]; 0 for rows that are not computed."""
        if self.index is None or gradient.dim() == 1:
            return gradient
        gradient[self.n :].zero_()
        place = torch.full((self.x.shape[0],), self.n, device=self.index.device)
        place[self.index] = torch.arange(self.n, device=self.index.device)
        return gradient[place]

    def _placed(self, found: Tensor) -> Tensor:
        """found [6, n] in the places of its rows [6, N]; NaN elsewhere."""
        if self.index is None:
            return found
        placed = found.new_full((found.shape[0], self.x.shape[0]), float("nan"))
        placed[:, self.index] = found
        return placed

    def _with_base(self, rows: slice) -> int:
        return min(max(self.anchored - rows.start, 0), rows.stop - rows.start)

    def _buffers(self, rows: int, columns: int) -> list[Tensor]:
        return [self.head.buffer(rows, columns) for _ in range(2 if self.anchored else 1)]

    def _multiply(self, rows: slice, buffers: list[Tensor], cols: slice | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the student and of the base, filled up; where no row has a base, the student's."""
        own, based = self._own(rows), self._with_base(rows)
        u = None if self.u is None else self.head.take(self.u, own)
        z = self.head.logits(self.head.take(self.x, own), u, buffers[0], cols)
        if not based:
            return z, z
        base_own = own[:based] if isinstance(own, Tensor) else slice(own.start, own.start + based)
        return z, self.head.logits(self.head.take(self.base_x, base_own), None, buffers[1], cols)

    def _turn(
        self,
        z: Tensor,
        base_z: Tensor,
        rows: slice,
        norms: Tensor,
        target: Tensor,
        weights: Weights,
        size: Tensor | None,
        first: int = 0,
    ) -> Tensor:
        """The gradient of the logits z, in their place where it can be; divided by ``size`` where there is one."""
        ce, kl = (w[rows] if size is None else w[rows] / size[rows] for w in weights)
        scale = self.temperature, self.softcap
        dz, n = self.head.gradient_buffer(z), rows.stop - rows.start
        row_gradient(Rows(z), Rows(base_z), n, dz, target[rows], (ce, kl), norms, *scale, first=first, V=self.head.V)
        dz[n:].zero_()
        return dz

    def _back(self, dz: Tensor, rows: slice, size: Tensor | None, dx: Tensor, du: Tensor) -> None:
        part = None if size is None else size[rows]
        for gradient, weight in ((dx, self.head.weight), (du, self.head.lora_weight)):
            if gradient.numel() and weight is not None:
                self.head.back(dz, weight, part, gradient[rows])


def all_rows(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    index: Tensor | None = None,
    anchored: int | None = None,
) -> LossRows:
    """The rows of ``index`` [n], in that order, or all; the first ``anchored`` have a base (None: all)."""
    x, base_x = (h.reshape(-1, h.shape[-1]) for h in (hidden, base_hidden))
    u = None if lora_hidden is None else lora_hidden.reshape(-1, lora_hidden.shape[-1])
    anchored = x.shape[0] if anchored is None else anchored
    head = Head(weight, bias, lora_weight, models=2 if anchored else 1)
    return LossRows(head, temperature, softcap, x, base_x, u, target.reshape(-1).contiguous(), index, anchored)


def forward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_logprob_kl."""
    with torch.autocast(hidden.device.type, enabled=False):
        rows = all_rows(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap)
        logprob, kl, norms, _, _ = rows.terms(None, None, gradient=False)
    return logprob.view(target.shape), kl.view(target.shape), norms


def backward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    norms: Tensor,
    g_logprob: Tensor | None,
    g_kl: Tensor | None,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    need_lora_hidden: bool,
    need_lora_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_logprob_kl_backward."""
    zero = torch.zeros(norms.shape[1], dtype=torch.float32, device=norms.device)
    ce, kl = (zero if g is None else g.reshape(-1).to(torch.float32) for g in (g_logprob, g_kl))
    weights = -ce, kl.contiguous()
    with torch.autocast(hidden.device.type, enabled=False):
        rows = all_rows(
            *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap),
            anchored=0 if g_kl is None else None,
        )
        dx, du = rows.gradients(weights, norms, need_hidden, need_lora_hidden)
        sink = HeadGradient(rows.head, need_weight, need_bias, need_lora_weight)
        rows.head_gradients(weights, norms, sink)
    dx, du = dx.to(hidden.dtype), du.to(hidden.dtype)
    dx = dx.view(hidden.shape) if need_hidden else dx
    du = du.view(lora_hidden.shape) if need_lora_hidden and lora_hidden is not None else du
    return dx, sink.weight, sink.bias, du, sink.lora_weight
