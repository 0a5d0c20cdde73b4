"""Native kernels: whole rows of logits of student and base, some at a time; serves both linear losses.

As many rows as fit into 48 MiB are multiplied at once, and kept while one kernel goes over each row twice, for its
normalisers and for its terms, writing the gradient over the student's logits. So a row costs 3 products with the head:
student, base, and back. The gradient of the head, where one is asked for, takes a sweep of its own, by slices of the
vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.entropy_topk.cpu import token_ids
from rmx_kernels.head_cpu import TILE_COLUMNS, TILE_ROWS, Head, HeadGradient, chunks
from rmx_kernels.linear_logprob_kl.reference import BASE_MASS_TOLERANCE
from rmx_kernels.results import LogprobKL


@dataclass(frozen=True)
class Rows:
    """n rows, of which the first ``anchored`` have a base, with m and log d of both: norms [4, n]."""

    head: Head
    scale: native.Scale
    x: Tensor  # [n, H]
    base_x: Tensor  # [anchored, H]
    target: Tensor  # [n]
    norms: Tensor

    def split(self, rows: slice) -> tuple[int, int]:
        """(rows, rows with a base) of a chunk."""
        n = rows.stop - rows.start
        return n, min(max(self.base_x.shape[0] - rows.start, 0), n)

    def multiply(self, rows: slice, buffer: Tensor, cols: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(student's rows, their logits, the base's logits) of a chunk of rows and columns, filled up to fours."""
        n, anchored = self.split(rows)
        x = self.head.rows(self.x[rows], self.base_x[rows.start : rows.start + anchored])
        z = self.head.logits(x, buffer, cols)
        fours = n + -n % 4
        return x[:fours], z[:fours], z[fours:]

    def arguments(
        self, rows: slice, weights: tuple[Tensor, Tensor] | None, terms: tuple[Tensor, Tensor] | None, find_base: bool
    ) -> native.Loss:
        own = [self.target[rows]]
        own += [self.norms.new_empty(0)] * 2 if weights is None else [w[rows] for w in weights]
        own += [norm[rows] for norm in self.norms]
        own += [self.norms.new_empty(0)] * 2 if terms is None else [t[rows] for t in terms]
        return native.Loss(*(native.address(part) for part in own), 1.0, BASE_MASS_TOLERANCE, find_base)

    def terms(
        self, weights: tuple[Tensor, Tensor] | None, known_base_norm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprob [n], kl [n], d x [n, H] or [0]); writes the norms. weights: (ce, kl) of each row, for d x."""
        logprob = self.norms.new_full((self.x.shape[0],), float("nan"))
        kl = torch.full_like(logprob, float("nan"))
        dx = torch.empty(self.x.shape if weights is not None else 0, dtype=self.head.dtype)
        size = self.head.row_chunk()
        buffer = self._buffer(size, self.head.V)
        for rows in chunks(self.x.shape[0], size):
            n, anchored = self.split(rows)
            _, z, base_z = self.multiply(rows, buffer)
            loss = self.arguments(rows, weights, (logprob, kl), not known_base_norm)
            student, base = native.rows(z), native.rows(base_z)
            gradient = None if weights is None else student
            native.call(
                *("rmx_gated_contrastive_loss", student, base, anchored, self.scale, n, self.head.V, loss, gradient)
            )
            if weights is not None:
                dx[rows] = self.head.back(z)[:n]
        return logprob, kl, dx

    def backward(
        self, weights: tuple[Tensor, Tensor], need_x: bool, sink: HeadGradient, upstream: Tensor | float = 1.0
    ) -> Tensor:
        """d x [n, H] or [0] from known norms; the gradients of the head go to the sink, times ``upstream``."""
        N = self.x.shape[0]
        dx = torch.empty(self.x.shape if need_x else 0, dtype=self.head.dtype)
        if need_x:
            size = self.head.row_chunk()
            buffer = self._buffer(size, self.head.V)
            for rows in chunks(N, size):
                z = self._tile_gradient(rows, buffer, slice(0, self.head.V), weights)[1]
                dx[rows] = self.head.back(z)[: rows.stop - rows.start]
            del buffer
        if sink.wanted:
            buffer = self._buffer(TILE_ROWS, TILE_COLUMNS)
            for cols in self.head.columns():
                sink.open(cols)
                for rows in chunks(N, TILE_ROWS):
                    n = rows.stop - rows.start
                    x, dz = self._tile_gradient(rows, buffer, cols, weights)
                    sink.add(dz[:n], x[:n])
                sink.close(upstream)
        return dx

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return self.head.buffer(columns, *self.split(slice(0, min(rows, self.x.shape[0]))))

    def _tile_gradient(
        self, rows: slice, buffer: Tensor, cols: slice, weights: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        n, anchored = self.split(rows)
        x, z, base_z = self.multiply(rows, buffer, cols)
        student, base, loss = native.rows(z), native.rows(base_z), self.arguments(rows, weights, None, False)
        native.call(
            *("rmx_gated_contrastive_loss_backward", student, base, anchored, self.scale, n),
            *(cols.start, cols.stop - cols.start, loss, student),
        )
        return x, z


def flat_rows(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    norms: Tensor | None = None,
) -> Rows:
    """All rows, each with a base."""
    head = Head(weight, bias)
    x, base_x = (h.reshape(-1, h.shape[-1]) for h in (hidden, base_hidden))
    ids = token_ids(target, head.V)
    assert ids is not None
    norms = torch.empty(4, x.shape[0], dtype=head.real) if norms is None else norms
    return Rows(head, native.scale(temperature, softcap), x, base_x, ids, norms)


def forward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_logprob_kl."""
    with torch.autocast("cpu", enabled=False):
        rows = flat_rows(hidden, base_hidden, weight, bias, target, temperature, softcap)
        logprob, kl, _ = rows.terms(None)
    return logprob.view(target.shape), kl.view(target.shape), rows.norms


def backward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    norms: Tensor,
    g_logprob: Tensor | None,
    g_kl: Tensor | None,
    temperature: float,
    softcap: float | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_logprob_kl_backward."""
    if g_kl is None:
        base_hidden = base_hidden.reshape(-1, base_hidden.shape[-1])[:0]  # the base has no part in it
    zero = torch.zeros(norms.shape[1], dtype=norms.dtype)
    ce, kl_weight = (zero if g is None else g.reshape(-1).to(norms.dtype) for g in (g_logprob, g_kl))
    with torch.autocast("cpu", enabled=False):
        rows = flat_rows(hidden, base_hidden, weight, bias, target, temperature, softcap, norms)
        sink = HeadGradient(rows.head, weight, bias, need_weight, need_bias)
        dx = rows.backward((-ce, kl_weight.contiguous()), need_hidden, sink)
    return dx.to(hidden.dtype).view(hidden.shape if need_hidden else 0), sink.weight, sink.bias


def run(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> LogprobKL:
    """Arguments as checked by the public operator."""
    logprob, kl, _ = torch.ops.rmx_kernels.linear_logprob_kl(
        hidden, base_hidden.detach(), weight, bias, target, temperature, softcap
    )
    return LogprobKL(logprob, kl)
