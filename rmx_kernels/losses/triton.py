"""The losses by Triton kernels, on logits or on whole rows of them by the vendor's GEMM, some at a time.

The kernels read the rows of student and base once for all values, and once more to write the gradient, of hidden states
over the student's logits. So a row of hidden states costs 3 products with the head: student, base, and back. The
gradient of the head, where one is asked for, takes a sweep of its own, by slices of the vocabulary.

Rows of hidden states that carry no weight are not multiplied. How many they are is asked of the device once a call.
Inside a captured CUDA graph that cannot be asked: there all rows are multiplied, and those without a weight count for
nothing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmx_kernels.head import configs
from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.head.launch import Rows, Scaling, launch, power_of_2, scaling
from rmx_kernels.head.triton import Head, Index, head_gradient, multiple, row_sizes
from rmx_kernels.logits import Gradients, Needs, chunks, gradient_dtype
from rmx_kernels.losses import kernels
from rmx_kernels.losses.op import BASE_MASS_TOLERANCE, LossForward, Pair, Terms, Weights
from rmx_kernels.losses.reference import live_rows

PARTS = 7  # m and d of student and base, kappa, A and Q
LEAST_SEGMENTS = 4  # parts of a row are padded to so many, so that vocabularies below 160,000 share one compilation


class RowPair(NamedTuple):
    """The first n rows of the logits of student and base, columns from ``first`` on of V."""

    x: Rows
    base_x: Rows
    n: int
    target: Tensor  # [n]
    scaling: Scaling  # of the n rows
    first: int = 0
    V: int = 0  # 0: those of x


def row_terms(rows: RowPair, weights: Weights | None, base_lse: Tensor | None) -> Tensor:
    """[6, n] of whole rows: logprob, kl, and the norms m, log d of student and base; NaN where not computed."""
    x, base_x, n, target, scale, _, _ = rows
    V, device, itemsize = x.columns, target.device, x.x.element_size()
    sweep = configs.config(device).loss
    shape = sweep.shape(itemsize)
    S, steps = sweep.division(V, itemsize)
    parts = torch.empty(PARTS, n, S, dtype=torch.float32, device=device)
    terms = torch.empty(6, n, dtype=torch.float32, device=device)
    given, of_rows = weights or (None, None), (*x.arguments, *base_x.arguments)
    launch(
        *(kernels.fold, n * S, device, *of_rows, *given, parts, n, V, S, steps, *scale),
        warps=sweep.warps,
        STAGES=sweep.stages,
        **shape,
    )
    launch(
        *(kernels.finish, n, device, *of_rows, target, *given, base_lse, parts, terms),
        *(n, V, S, BASE_MASS_TOLERANCE, *scale),
        warps=sweep.warps,
        SEGMENTS=max(LEAST_SEGMENTS, power_of_2(S)),
        **shape | {"R": 1},  # for few registers: most rows are not walked along again
    )
    return terms


def row_gradient(rows: RowPair, dx: Tensor, weights: Weights, norms: Tensor, upstream: Tensor | None = None) -> None:
    """dx [n, columns] of the rows, from norms [4, n]; in place if dx holds x."""
    x, base_x, n, target, scale, first, V = rows
    sweep, itemsize = configs.config(dx.device).loss_gradient, x.x.element_size()
    S, steps = sweep.division(x.columns, itemsize)
    launch(
        *(kernels.gradient, n * S, dx.device, *x.arguments, *base_x.arguments, dx, dx.stride(0), target, *weights),
        *(upstream, *norms, first, x.columns, V or x.columns, S, steps, *scale),
        warps=sweep.warps,
        **sweep.shape(itemsize),
    )


@dataclass(frozen=True)
class HeadRows:
    """The n rows of hidden states [N] that ``index`` names (None: all), the first ``anchored`` of which have a base."""

    pair: Pair  # of flattened rows
    head: Head
    index: Tensor | None  # [n]
    anchored: int

    @property
    def N(self) -> int:
        return self.pair.target.shape[0]

    @property
    def n(self) -> int:
        return self.N if self.index is None else self.index.shape[0]

    def terms(
        self, weights: Weights | None, base_lse: Tensor | None, gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(logprob [N], kl [N], norms [4, N], d x [N, H], d u [N, r]); NaN, or 0 for gradients, where not computed.

        Gradients have no elements where not asked for; without weights, all rows have both values.
        """
        found = torch.empty(6, self.n, dtype=torch.float32, device=self.pair.base_x.device)
        dx, du = self._room(gradient, gradient)
        buffers = self._buffers(multiple(min(self.n, self.head.chunk)), self.head.V)
        own_weights = None if weights is None else self._chosen(*weights)
        target, known = self._chosen(self.pair.target, base_lse)
        size = row_sizes(*own_weights) if gradient and own_weights is not None and self.head.narrow else None
        for rows in chunks(self.n, self.head.chunk):
            part = self._multiply(rows, buffers, target)
            given = None if own_weights is None else (own_weights[0][rows], own_weights[1][rows])
            terms = row_terms(part, given, None if known is None else known[rows])
            found[:, rows] = terms
            if gradient and given is not None:
                own_size = None if size is None else size[rows]
                self._back(self._turn(part, terms[2:], given, own_size), rows, own_size, dx, du)
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
            part = self._multiply(rows, buffers, self.pair.target)
            own_size = None if size is None else size[rows]
            dz = self._turn(part, norms[:, rows], (weights[0][rows], weights[1][rows]), own_size)
            self._back(dz, rows, own_size, dx, du)
        return dx, du

    def head_gradients(
        self, weights: Weights, norms: Tensor, sink: HeadGradient, upstream: Tensor | float = 1.0
    ) -> None:
        """The gradients of the head from known norms, times ``upstream``, into the sink."""
        if not sink.wanted:
            return
        weights = self._chosen(*weights)
        size = row_sizes(*weights) if self.head.narrow else None
        target, norms = self._chosen(self.pair.target)[0], norms if self.index is None else norms[:, self.index]
        x, u = self.pair.student.x, self.pair.student.lora_hidden
        for cols in self.head.slices():
            sink.open(cols)
            columns = cols.stop - cols.start
            step = self.head.slice_rows(columns)
            buffers = self._buffers(multiple(min(self.n, step)), columns)
            for rows in chunks(self.n, step):
                part, own = self._multiply(rows, buffers, target, cols), self._own(rows)
                own_size = None if size is None else size[rows]
                dz = self._turn(part, norms[:, rows], (weights[0][rows], weights[1][rows]), own_size)
                sink.add(dz[: part.n], x[own], None if u is None else u[own], own_size)
            sink.close(upstream)

    def _own(self, rows: slice) -> Index:
        return rows if self.index is None else self.index[rows]

    def _chosen(self, *of_rows: Any) -> Any:
        """Those of the rows that are computed, in their order."""
        return tuple(x if x is None or self.index is None else x[self.index] for x in of_rows)

    def _room(self, need_x: bool, need_u: bool) -> tuple[Tensor, Tensor]:
        """For the gradients of the n rows of x and u, in their order, and of one more where rows are left out."""
        x, u = self.pair.student.x, self.pair.student.lora_hidden
        dtype, rows = gradient_dtype(x, "triton"), min(self.n + 1, self.N)
        dx = x.new_empty((rows, x.shape[1]) if need_x else (0,), dtype=dtype)
        return dx, x.new_empty((rows, u.shape[1]) if need_u and u is not None else (0,), dtype=dtype)

    def _in_place(self, gradient: Tensor) -> Tensor:
        """The gradients of the rows in the places of all rows [N, H]; 0 for rows that are not computed."""
        if self.index is None or gradient.dim() == 1:
            return gradient
        gradient[self.n :].zero_()
        place = torch.full((self.N,), self.n, device=self.index.device)
        place[self.index] = torch.arange(self.n, device=self.index.device)
        return gradient[place]

    def _placed(self, found: Tensor) -> Tensor:
        """found [6, n] in the places of its rows [6, N]; NaN elsewhere."""
        if self.index is None:
            return found
        placed = found.new_full((found.shape[0], self.N), float("nan"))
        placed[:, self.index] = found
        return placed

    def _buffers(self, rows: int, columns: int) -> list[Tensor]:
        return [self.head.buffer(rows, columns) for _ in range(2 if self.anchored else 1)]

    def _multiply(self, rows: slice, buffers: list[Tensor], target: Tensor, cols: slice | None = None) -> RowPair:
        """Logits of the student and of the base, filled up; where no row has a base, the student's."""
        n, own, student = rows.stop - rows.start, self._own(rows), self.pair.student
        based = min(max(self.anchored - rows.start, 0), n)
        u = None if student.lora_hidden is None else self.head.take(student.lora_hidden, own)
        z = base_z = self.head.logits(self.head.take(student.x, own), u, buffers[0], cols)
        if based:
            base_own = own[:based] if isinstance(own, Tensor) else slice(own.start, own.start + based)
            base_z = self.head.logits(self.head.take(self.pair.base_x, base_own), None, buffers[1], cols)
        scale, first = scaling(student, own), 0 if cols is None else cols.start
        return RowPair(Rows(z), Rows(base_z), n, target[rows], scale, first, self.head.V)

    def _turn(self, part: RowPair, norms: Tensor, weights: Weights, size: Tensor | None) -> Tensor:
        """The gradient of the student's logits, in their place where it can be; divided by ``size``, where given."""
        ce, kl = (w if size is None else w / size for w in weights)
        dz = self.head.gradient_buffer(part.x.x[0])
        row_gradient(part, dz, (ce, kl), norms)
        dz[part.n :].zero_()
        return dz

    def _back(self, dz: Tensor, rows: slice, size: Tensor | None, dx: Tensor, du: Tensor) -> None:
        self.head.back_into(dz, size, rows, dx, du)


def head_rows(pair: Pair, index: Tensor | None, anchored: int | None) -> HeadRows:
    """The rows of ``index`` [n], in that order, or all; the first ``anchored`` have a base (None: all)."""
    pair = pair.rows()
    pair = pair._replace(target=pair.target.contiguous())
    anchored = pair.target.shape[0] if anchored is None else anchored
    return HeadRows(pair, Head(pair.student, models=2 if anchored else 1), index, anchored)


def live(pair: Pair, weights: Weights) -> HeadRows:
    """The rows that carry a weight, those with an anchor first."""
    capturing = pair.base_x.is_cuda and torch.cuda.is_current_stream_capturing()
    index, anchored = (None, None) if capturing else live_rows(*weights)
    if index is not None and index.shape[0] == weights[0].shape[0] and anchored in (0, index.shape[0]):
        index = None  # every row, in its own order
    return head_rows(pair, index, anchored)


def weighted_sum(weights: Weights, logprob: Tensor, kl: Tensor) -> Tensor:
    """The loss; an impossible target or an infinite KL counts only where it has a weight. Waits for no device."""
    terms = [(-weights[0], logprob), (weights[1], kl)]
    parts = (torch.where(weight != 0, weight.double() * term.double(), 0.0).sum() for weight, term in terms)
    return sum(parts, start=torch.zeros((), dtype=torch.float64, device=kl.device)).to(torch.float32)


def flat(weights: Weights) -> Weights:
    """Weights [B...] as float32 [N], without strides."""
    ce, kl = (x.reshape(-1).to(torch.float32).contiguous() for x in weights)
    return ce, kl


def whole(pair: Pair) -> RowPair:
    """All rows of logits."""
    z, x = pair.student, Rows(pair.student.x)
    ids = pair.target.reshape(-1).contiguous()
    return RowPair(x, Rows(pair.base_x), x.N, ids, scaling(z))


def contrastive_loss(pair: Pair, weights: Weights, base_lse: Tensor | None, gradient: bool) -> LossForward:
    z, lead, weights = pair.student, pair.target.shape, flat(weights)
    if z.weight is None:
        terms = row_terms(whole(pair), weights, None)
        logprob, kl, norms = terms[0].clone(), terms[1].clone(), terms[2:].clone()
        dx, du = z.empty_row_gradients(False, "triton")
    else:
        known = None if base_lse is None else base_lse.reshape(-1)
        logprob, kl, norms, dx, du = live(pair, weights).terms(weights, known, gradient)
        dx, du = z.shaped(dx, du)
    return weighted_sum(weights, logprob, kl), logprob.view(lead), kl.view(lead), norms, dx, du


def contrastive_loss_backward(pair: Pair, weights: Weights, norms: Tensor, g_loss: Tensor, needs: Needs) -> Gradients:
    z, weights, upstream = pair.student, flat(weights), g_loss.to(torch.float32)
    if z.weight is None:
        dx = torch.empty_like(z.x, memory_format=torch.contiguous_format)
        row_gradient(whole(pair), dx.view(-1, z.V), weights, norms, upstream)
        return dx, None, None, None, None
    sink = head_gradient(z, needs)
    live(pair, weights).head_gradients(weights, norms, sink, upstream)
    return None, sink.weight, sink.bias, None, sink.lora_weight


def logprob_kl(pair: Pair) -> Terms:
    logprob, kl, norms, _, _ = head_rows(pair, None, None).terms(None, None, gradient=False)
    return logprob.view(pair.target.shape), kl.view(pair.target.shape), norms


def logprob_kl_backward(
    pair: Pair, norms: Tensor, upstream: tuple[Tensor | None, Tensor | None], needs: Needs
) -> Gradients:
    z, zero = pair.student, torch.zeros_like(norms[0])
    ce, kl = (zero if g is None else g.reshape(-1).to(torch.float32) for g in upstream)
    weights = -ce, kl.contiguous()
    rows, sink = head_rows(pair, None, 0 if upstream[1] is None else None), head_gradient(z, needs)
    dx, du = rows.gradients(weights, norms, needs[0], needs[3])
    rows.head_gradients(weights, norms, sink)
    dx, du = z.shaped(dx.to(z.x.dtype), du.to(z.x.dtype))
    return dx, sink.weight, sink.bias, du, sink.lora_weight
