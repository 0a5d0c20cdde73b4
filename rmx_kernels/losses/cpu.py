"""Native kernels: one call goes over each row of student and base twice while both are in the cache.

Of hidden states as many rows of logits as fit into 48 MiB are multiplied at once, and kept while one kernel goes over
each row, for its normalisers and for its terms, writing the gradient over the student's logits. So a row costs 3
products with the head: student, base, and back; a LoRA pair adds two small ones of its own, for the student. The
gradient of the head, where one is asked for, takes a sweep of its own, by slices of the vocabulary.

Rows that carry no weight are not read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.head import cpu as tiles
from rmx_kernels.head.cpu import Head, scale_of
from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.logits import Gradients, Needs, chunks
from rmx_kernels.losses.op import BASE_MASS_TOLERANCE, LossForward, Pair, Terms, Weights
from rmx_kernels.losses.reference import live_rows


def arguments(
    target: Tensor,
    weights: Weights | None,
    norms: Tensor,
    terms: Tensor | tuple[Tensor, Tensor] | None,
    upstream: float = 1.0,
    find_base_norm: bool = True,
) -> native.Loss:
    """Of rows [n]: weights, where gradients are wanted; norms [4, n]; terms, logprob and kl [n], to be written."""
    absent = None, None
    parts = target, *(weights or absent), *norms, *(absent if terms is None else terms)
    return native.Loss(*(native.address(part) for part in parts), upstream, BASE_MASS_TOLERANCE, find_base_norm)


@dataclass(frozen=True)
class LossRows:
    """The n rows of a pair [N] that ``index`` names (None: all), the first ``anchored`` of which have a base."""

    pair: Pair
    index: Tensor | None  # [n]
    anchored: int
    target: Tensor  # [n]
    norms: Tensor  # [4, n]: m and log d of the student, then of the base
    weights: Weights | None  # ce and kl of the n rows

    @property
    def n(self) -> int:
        return self.target.shape[0]

    def scale(self, rows: slice = slice(None)) -> native.Scale:
        """Of some of the n rows."""
        return scale_of(self.pair.student, rows if self.index is None else self.index[rows])

    def terms(self, known_base_norm: bool) -> Tensor:
        """[2, n] of logits: logprob and kl, NaN where not computed; writes the norms."""
        found = torch.full((2, self.n), float("nan"), dtype=self.norms.dtype)
        loss = arguments(self.target, None, self.norms, found, find_base_norm=not known_base_norm)
        student, base = (native.rows(x, self.index) for x in (self.pair.student.x, self.pair.base_x))
        native.call(
            *("rmx_gated_contrastive_loss", student, base, self.anchored, self.scale(), self.n),
            *(self.pair.student.V, loss, None),
        )
        return found

    def gradient(self, dx: Tensor, upstream: float) -> None:
        """dx of logits, in the rows [n], from known norms."""
        student, base, out = (native.rows(x, self.index) for x in (self.pair.student.x, self.pair.base_x, dx))
        loss = arguments(self.target, self.weights, self.norms, None, upstream)
        native.call(
            *("rmx_gated_contrastive_loss_backward", student, base, self.anchored, self.scale(), self.n),
            *(0, self.pair.student.V, loss, out),
        )


class HeadRows:
    """:class:`LossRows` of hidden states, flattened: their logits are made a chunk at a time."""

    def __init__(self, rows: LossRows) -> None:
        self.rows, self.head = rows, Head(rows.pair.student)
        self.x, self.u, self.base_x = rows.pair.student.x, rows.pair.student.lora_hidden, rows.pair.base_x

    def terms(self, known_base_norm: bool, gradient: bool) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """((logprob [n], kl [n]), d x [N, H] or [0], d lora_hidden [N, r] or [0]); writes the norms."""
        own, V = self.rows, self.head.V
        logprob, kl = (own.norms.new_full((own.n,), float("nan")) for _ in range(2))
        dx, du = self._zeros(gradient, gradient)
        buffer = self._buffer(self.head.row_chunk(), V)
        for rows in chunks(own.n, self.head.row_chunk()):
            n, anchored = self._split(rows)
            _, _, z, base_z = self._multiply(rows, buffer)
            student, base = native.rows(z), native.rows(base_z)
            weights = self._weights(rows) if gradient else None
            terms = logprob[rows], kl[rows]
            loss = arguments(own.target[rows], weights, own.norms[:, rows], terms, find_base_norm=not known_base_norm)
            native.call(
                *("rmx_gated_contrastive_loss", student, base, anchored, own.scale(rows), n, V, loss),
                student if gradient else None,
            )
            self._back(z, rows, dx, du)
        return (logprob, kl), dx, du

    def gradients(self, need_x: bool, need_lora: bool) -> tuple[Tensor, Tensor]:
        """(d x [N, H], d lora_hidden [N, r]) from known norms; without elements where not needed."""
        dx, du = self._zeros(need_x, need_lora)
        if dx.numel() + du.numel() == 0:
            return dx, du
        buffer = self._buffer(self.head.row_chunk(), self.head.V)
        for rows in chunks(self.rows.n, self.head.row_chunk()):
            _, _, dz = self._tile_gradient(rows, buffer, slice(0, self.head.V))
            self._back(dz, rows, dx, du)
        return dx, du

    def d_head(self, sink: HeadGradient, upstream: Tensor | float = 1.0) -> None:
        """The gradients of the head from known norms, times ``upstream``, into the sink."""
        if not sink.wanted:
            return
        buffer = self._buffer(tiles.TILE_ROWS, tiles.TILE_COLUMNS)
        for cols in self.head.columns():
            sink.open(cols)
            for rows in chunks(self.rows.n, tiles.TILE_ROWS):
                n = rows.stop - rows.start
                x, u, dz = self._tile_gradient(rows, buffer, cols)
                sink.add(dz[:n], x[:n], None if u is None else u[:n])
            sink.close(upstream)

    def _where(self, rows: slice) -> Tensor | slice:
        return rows if self.rows.index is None else self.rows.index[rows]

    def _weights(self, rows: slice) -> Weights | None:
        return None if self.rows.weights is None else (self.rows.weights[0][rows], self.rows.weights[1][rows])

    def _split(self, rows: slice) -> tuple[int, int]:
        """(rows, rows with a base) of a chunk."""
        n = rows.stop - rows.start
        return n, min(max(self.rows.anchored - rows.start, 0), n)

    def _zeros(self, need_x: bool, need_lora: bool) -> tuple[Tensor, Tensor]:
        """Room for d x and d lora_hidden, in the dtype of the product."""
        dx = torch.zeros(self.x.shape if need_x else 0, dtype=self.head.dtype)
        return dx, dx.new_zeros(self.u.shape if self.u is not None and need_lora else 0)

    def _back(self, dz: Tensor, rows: slice, dx: Tensor, du: Tensor) -> None:
        self.head.back_into(dz, self._where(rows), rows.stop - rows.start, dx, du)

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return self.head.buffer(columns, *self._split(slice(0, min(rows, self.rows.n))))

    def _multiply(
        self, rows: slice, buffer: Tensor, cols: slice | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(student's rows of x and of lora_hidden, its logits, the base's) of a chunk of rows and columns, in fours."""
        n, anchored = self._split(rows)
        base_rows = slice(rows.start, rows.start + anchored)
        x = self.head.rows(self.x[self._where(rows)], self.base_x[self._where(base_rows)])
        u = self.head.lora_rows(self.u, self._where(rows))
        z = self.head.logits(x, buffer, cols, u)
        fours = n + -n % 4
        return x[:fours], u, z[:fours], z[fours:]

    def _tile_gradient(self, rows: slice, buffer: Tensor, cols: slice) -> tuple[Tensor, Tensor | None, Tensor]:
        n, anchored = self._split(rows)
        x, u, z, base_z = self._multiply(rows, buffer, cols)
        student, base = native.rows(z), native.rows(base_z)
        loss = arguments(self.rows.target[rows], self._weights(rows), self.rows.norms[:, rows], None)
        native.call(
            *("rmx_gated_contrastive_loss_backward", student, base, anchored, self.rows.scale(rows), n),
            *(cols.start, cols.stop - cols.start, loss, student),
        )
        return x, u, z


def live(pair: Pair, weights: Weights, norms: Tensor | None) -> LossRows:
    """The rows of a pair that carry a weight, those with an anchor first; norms [4, N], where known."""
    ce, kl = (w.reshape(-1).to(pair.student.real) for w in weights)
    target = pair.target.reshape(-1).long()
    index, anchored = live_rows(ce, kl)
    own = ce.new_full((4, index.shape[0]), float("nan")) if norms is None else norms[:, index]
    return LossRows(pair, index, anchored, target[index], own, (ce[index], kl[index]))


def every(pair: Pair, weights: Weights | None, norms: Tensor | None, anchored: bool) -> LossRows:
    """All rows of a pair, with a base or without; norms [4, N], where known."""
    target = pair.target.reshape(-1).long().contiguous()
    norms = torch.empty(4, target.shape[0], dtype=pair.student.real) if norms is None else norms
    return LossRows(pair, None, target.shape[0] if anchored else 0, target, norms, weights)


def weighted_sum(weights: Weights, terms: Tensor) -> Tensor:
    """The loss of live rows; an impossible target or an infinite KL counts only where it has a weight."""
    ce, kl_weight = weights
    both = torch.stack([-ce, kl_weight])
    total = torch.where(both != 0, both.double() * terms.double(), 0.0).sum()
    return total.to(ce.dtype)


def contrastive_loss(pair: Pair, weights: Weights, base_lse: Tensor | None, gradient: bool) -> LossForward:
    z, linear = pair.student, pair.student.weight is not None
    rows = live(pair.rows() if linear else pair, weights, None)
    assert rows.index is not None and rows.weights is not None
    if base_lse is not None:
        rows.norms[2] = base_lse.reshape(-1)[rows.index]
        rows.norms[3] = 0
    if linear:
        found, dx, du = HeadRows(rows).terms(base_lse is not None, gradient)
        terms = torch.stack(found)
    else:
        terms = rows.terms(base_lse is not None)
        dx, du = z.empty_row_gradients(False, "cpu")
    whole = terms.new_full((6, z.lead.numel()), float("nan"))  # NaN in rows that are not live
    whole[:, rows.index] = torch.cat([rows.norms, terms])
    logprob, kl = (x.clone().view(z.lead) for x in whole[4:])
    return weighted_sum(rows.weights, terms), logprob, kl, whole[:4].clone(), *z.shaped(dx, du)


def contrastive_loss_backward(pair: Pair, weights: Weights, norms: Tensor, g_loss: Tensor, needs: Needs) -> Gradients:
    z = pair.student
    if z.weight is not None:
        rows, sink = HeadRows(live(pair.rows(), weights, norms)), HeadGradient(z, needs)
        rows.d_head(sink, g_loss)
        return None, sink.weight, sink.bias, None, sink.lora_weight
    of_logits = live(pair, weights, norms)
    dx = native.scratch(z.x.numel(), z.x.dtype).view(z.x.shape)
    if of_logits.n < pair.target.numel():
        dx.zero_()  # rows without a weight have no gradient
    of_logits.gradient(dx, g_loss.item())
    return dx, None, None, None, None


def logprob_kl(pair: Pair) -> Terms:
    rows = every(pair.rows(), None, None, anchored=True)
    found, _, _ = HeadRows(rows).terms(False, False)
    logprob, kl = (x.view(pair.target.shape) for x in found)
    return logprob, kl, rows.norms


def logprob_kl_backward(
    pair: Pair, norms: Tensor, upstream: tuple[Tensor | None, Tensor | None], needs: Needs
) -> Gradients:
    z, zero = pair.student, torch.zeros_like(norms[0])
    ce, kl = (zero if g is None else g.reshape(-1).to(norms.dtype) for g in upstream)
    rows = HeadRows(every(pair.rows(), (-ce, kl.contiguous()), norms, anchored=upstream[1] is not None))
    dx, du = rows.gradients(needs[0], needs[3])
    sink = HeadGradient(z, needs)
    rows.d_head(sink)
    dx, du = z.shaped(dx.to(z.x.dtype), du.to(z.x.dtype))
    return dx, sink.weight, sink.bias, du, sink.lora_weight
