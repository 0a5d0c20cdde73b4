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
from rmx_kernels.head_cpu import TILE_COLUMNS, TILE_ROWS, Head, HeadGradient
from rmx_kernels.linear_logprob_kl.reference import BASE_MASS_TOLERANCE
from rmx_kernels.results import LogprobKL
from rmx_kernels.tiles import chunks


@dataclass(frozen=True)
class Rows:
    """The n rows of x [N, H] that ``index`` names (None: all), the first ``anchored`` of which have a base."""

    head: Head
    scale: native.Scale
    x: Tensor  # [N, H]
    base_x: Tensor  # [N, H]
    index: Tensor | None  # [n]
    anchored: int
    target: Tensor  # [n]
    norms: Tensor  # [4, n]: m and log d of the student, then of the base

    def terms(
        self, weights: tuple[Tensor, Tensor] | None, known_base_norm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logprob [n], kl [n], d x [N, H] or [0]); writes the norms. weights: (ce, kl) of the n rows, for d x."""
        logprob = torch.full_like(self.norms[0], float("nan"))
        kl = torch.full_like(logprob, float("nan"))
        dx = self._gradient(weights is not None)
        buffer = self._buffer(self.head.row_chunk(), self.head.V)
        for rows in chunks(self.target.shape[0], self.head.row_chunk()):
            n, anchored = self._split(rows)
            _, z, base_z = self._multiply(rows, buffer)
            loss = self._arguments(rows, weights, (logprob, kl), not known_base_norm)
            student, base = native.rows(z), native.rows(base_z)
            gradient = None if weights is None else student
            native.call(
                *("rmx_gated_contrastive_loss", student, base, anchored, self.scale, n, self.head.V, loss, gradient)
            )
            if weights is not None:
                dx[self._where(rows)] = self.head.back(z)[:n]
        return logprob, kl, dx

    def d_x(self, weights: tuple[Tensor, Tensor]) -> Tensor:
        """d x [N, H] from known norms."""
        dx = self._gradient(True)
        buffer = self._buffer(self.head.row_chunk(), self.head.V)
        for rows in chunks(self.target.shape[0], self.head.row_chunk()):
            _, dz = self._tile_gradient(rows, buffer, slice(0, self.head.V), weights)
            dx[self._where(rows)] = self.head.back(dz)[: rows.stop - rows.start]
        return dx

    def d_head(self, weights: tuple[Tensor, Tensor], sink: HeadGradient, upstream: Tensor | float = 1.0) -> None:
        """The gradients of the head from known norms, times ``upstream``, into the sink."""
        if not sink.wanted:
            return
        buffer = self._buffer(TILE_ROWS, TILE_COLUMNS)
        for cols in self.head.columns():
            sink.open(cols)
            for rows in chunks(self.target.shape[0], TILE_ROWS):
                n = rows.stop - rows.start
                x, dz = self._tile_gradient(rows, buffer, cols, weights)
                sink.add(dz[:n], x[:n])
            sink.close(upstream)

    def _where(self, rows: slice) -> Tensor | slice:
        return rows if self.index is None else self.index[rows]

    def _split(self, rows: slice) -> tuple[int, int]:
        """(rows, rows with a base) of a chunk."""
        n = rows.stop - rows.start
        return n, min(max(self.anchored - rows.start, 0), n)

    def _gradient(self, wanted: bool) -> Tensor:
        return torch.zeros(self.x.shape if wanted else 0, dtype=self.head.dtype)

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return self.head.buffer(columns, *self._split(slice(0, min(rows, self.target.shape[0]))))

    def _multiply(self, rows: slice, buffer: Tensor, cols: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(student's rows, their logits, the base's logits) of a chunk of rows and columns, filled up to fours."""
        n, anchored = self._split(rows)
        base_rows = slice(rows.start, rows.start + anchored)
        x = self.head.rows(self.x[self._where(rows)], self.base_x[self._where(base_rows)])
        z = self.head.logits(x, buffer, cols)
        fours = n + -n % 4
        return x[:fours], z[:fours], z[fours:]

    def _arguments(
        self, rows: slice, weights: tuple[Tensor, Tensor] | None, terms: tuple[Tensor, Tensor] | None, find_base: bool
    ) -> native.Loss:
        own = [self.target[rows]]
        own += [self.norms.new_empty(0)] * 2 if weights is None else [w[rows] for w in weights]
        own += [norm[rows] for norm in self.norms]
        own += [self.norms.new_empty(0)] * 2 if terms is None else [t[rows] for t in terms]
        return native.Loss(*(native.address(part) for part in own), 1.0, BASE_MASS_TOLERANCE, find_base)

    def _tile_gradient(
        self, rows: slice, buffer: Tensor, cols: slice, weights: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        n, anchored = self._split(rows)
        x, z, base_z = self._multiply(rows, buffer, cols)
        student, base, loss = native.rows(z), native.rows(base_z), self._arguments(rows, weights, None, False)
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
    has_base: bool = True,
) -> Rows:
    """All rows, with a base or without."""
    head = Head(weight, bias)
    x, base_x = (h.reshape(-1, h.shape[-1]) for h in (hidden, base_hidden))
    ids = token_ids(target, head.V)
    assert ids is not None
    norms = torch.empty(4, x.shape[0], dtype=head.real) if norms is None else norms
    anchored = x.shape[0] if has_base else 0
    return Rows(head, native.scale(temperature, softcap), x, base_x, None, anchored, ids, norms)


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
    zero = torch.zeros(norms.shape[1], dtype=norms.dtype)
    ce, kl_weight = (zero if g is None else g.reshape(-1).to(norms.dtype) for g in (g_logprob, g_kl))
    with torch.autocast("cpu", enabled=False):
        rows = flat_rows(hidden, base_hidden, weight, bias, target, temperature, softcap, norms, g_kl is not None)
        sink = HeadGradient(rows.head, weight, bias, need_weight, need_bias)
        weights = -ce, kl_weight.contiguous()
        dx = rows.d_x(weights).to(hidden.dtype).view(hidden.shape) if need_hidden else hidden.new_empty(0)
        rows.d_head(weights, sink)
    return dx, sink.weight, sink.bias


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
