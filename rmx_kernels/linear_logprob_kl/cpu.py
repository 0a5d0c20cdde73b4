"""Native kernels: whole rows of logits of student and base, some at a time; serves both linear losses.

As many rows as fit into 48 MiB are multiplied at once, and kept while one kernel goes over each row twice, for its
normalisers and for its terms, writing the gradient over the student's logits. So a row costs 3 products with the head:
student, base, and back; a LoRA pair adds two small ones of its own, for the student. The gradient of the head, where
one is asked for, takes a sweep of its own, by slices of the vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.entropy_topk.cpu import token_ids
from rmx_kernels.head_cpu import TILE_COLUMNS, TILE_ROWS, Head, HeadGradient
from rmx_kernels.linear_logprob_kl.ops import run as run
from rmx_kernels.linear_logprob_kl.reference import BASE_MASS_TOLERANCE
from rmx_kernels.tiles import chunks, flat


@dataclass(frozen=True)
class Rows:
    """The n rows of x [N, H] that ``index`` names (None: all), the first ``anchored`` of which have a base."""

    head: Head
    scale: native.Scale
    x: Tensor  # [N, H]
    base_x: Tensor  # [N, H]
    lora_hidden: Tensor | None  # [N, r], of the student
    index: Tensor | None  # [n]
    anchored: int
    target: Tensor  # [n]
    norms: Tensor  # [4, n]: m and log d of the student, then of the base

    def terms(
        self, weights: tuple[Tensor, Tensor] | None, known_base_norm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(logprob [n], kl [n], d x [N, H] or [0], d lora_hidden [N, r] or [0]); writes the norms.

        weights: (ce, kl) of the n rows, for the gradients.
        """
        logprob = torch.full_like(self.norms[0], float("nan"))
        kl = torch.full_like(logprob, float("nan"))
        dx, du = self._zeros(weights is not None, weights is not None)
        buffer = self._buffer(self.head.row_chunk(), self.head.V)
        for rows in chunks(self.target.shape[0], self.head.row_chunk()):
            n, anchored = self._split(rows)
            _, _, z, base_z = self._multiply(rows, buffer)
            loss = self._arguments(rows, weights, (logprob, kl), not known_base_norm)
            student, base = native.rows(z), native.rows(base_z)
            gradient = None if weights is None else student
            native.call(
                *("rmx_gated_contrastive_loss", student, base, anchored, self.scale, n, self.head.V, loss, gradient)
            )
            self._back(z, rows, dx, du)
        return logprob, kl, dx, du

    def gradients(self, weights: tuple[Tensor, Tensor], need_x: bool, need_lora: bool) -> tuple[Tensor, Tensor]:
        """(d x [N, H], d lora_hidden [N, r]) from known norms; without elements where not needed."""
        dx, du = self._zeros(need_x, need_lora)
        if dx.numel() + du.numel() == 0:
            return dx, du
        buffer = self._buffer(self.head.row_chunk(), self.head.V)
        for rows in chunks(self.target.shape[0], self.head.row_chunk()):
            _, _, dz = self._tile_gradient(rows, buffer, slice(0, self.head.V), weights)
            self._back(dz, rows, dx, du)
        return dx, du

    def d_head(self, weights: tuple[Tensor, Tensor], sink: HeadGradient, upstream: Tensor | float = 1.0) -> None:
        """The gradients of the head from known norms, times ``upstream``, into the sink."""
        if not sink.wanted:
            return
        buffer = self._buffer(TILE_ROWS, TILE_COLUMNS)
        for cols in self.head.columns():
            sink.open(cols)
            for rows in chunks(self.target.shape[0], TILE_ROWS):
                n = rows.stop - rows.start
                x, u, dz = self._tile_gradient(rows, buffer, cols, weights)
                sink.add(dz[:n], x[:n], None if u is None else u[:n])
            sink.close(upstream)

    def _where(self, rows: slice) -> Tensor | slice:
        return rows if self.index is None else self.index[rows]

    def _split(self, rows: slice) -> tuple[int, int]:
        """(rows, rows with a base) of a chunk."""
        n = rows.stop - rows.start
        return n, min(max(self.anchored - rows.start, 0), n)

    def _zeros(self, need_x: bool, need_lora: bool) -> tuple[Tensor, Tensor]:
        """Room for d x and d lora_hidden, in the dtype of the product."""
        dx = torch.zeros(self.x.shape if need_x else 0, dtype=self.head.dtype)
        u = self.lora_hidden
        return dx, dx.new_zeros(u.shape if u is not None and need_lora else 0)

    def _back(self, dz: Tensor, rows: slice, dx: Tensor, du: Tensor) -> None:
        where, n = self._where(rows), rows.stop - rows.start
        if dx.numel():
            dx[where] = self.head.back(dz)[:n]
        if du.numel():
            du[where] = self.head.lora_back(dz)[:n]

    def _buffer(self, rows: int, columns: int) -> Tensor:
        return self.head.buffer(columns, *self._split(slice(0, min(rows, self.target.shape[0]))))

    def _multiply(
        self, rows: slice, buffer: Tensor, cols: slice | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """(student's rows of x and of lora_hidden, its logits, the base's) of a chunk of rows and columns, in fours."""
        n, anchored = self._split(rows)
        base_rows = slice(rows.start, rows.start + anchored)
        x = self.head.rows(self.x[self._where(rows)], self.base_x[self._where(base_rows)])
        u = self.head.lora_rows(self.lora_hidden, self._where(rows))
        z = self.head.logits(x, buffer, cols, u)
        fours = n + -n % 4
        return x[:fours], u, z[:fours], z[fours:]

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
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        n, anchored = self._split(rows)
        x, u, z, base_z = self._multiply(rows, buffer, cols)
        student, base, loss = native.rows(z), native.rows(base_z), self._arguments(rows, weights, None, False)
        native.call(
            *("rmx_gated_contrastive_loss_backward", student, base, anchored, self.scale, n),
            *(cols.start, cols.stop - cols.start, loss, student),
        )
        return x, u, z


def flat_rows(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    norms: Tensor | None = None,
    has_base: bool = True,
) -> Rows:
    """All rows, with a base or without."""
    head = Head(weight, bias, lora_weight)
    x, base_x = (h.reshape(-1, h.shape[-1]) for h in (hidden, base_hidden))
    ids = token_ids(target, head.V)
    assert ids is not None
    norms = torch.empty(4, x.shape[0], dtype=head.real) if norms is None else norms
    anchored = x.shape[0] if has_base else 0
    scale = native.scale(temperature, softcap)
    return Rows(head, scale, x, base_x, flat(lora_hidden), None, anchored, ids, norms)


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
    with torch.autocast("cpu", enabled=False):
        rows = flat_rows(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap)
        logprob, kl, _, _ = rows.terms(None)
    return logprob.view(target.shape), kl.view(target.shape), rows.norms


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
    zero = torch.zeros(norms.shape[1], dtype=norms.dtype)
    ce, kl_weight = (zero if g is None else g.reshape(-1).to(norms.dtype) for g in (g_logprob, g_kl))
    with torch.autocast("cpu", enabled=False):
        rows = flat_rows(
            *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap),
            *(norms, g_kl is not None),
        )
        sink = HeadGradient(rows.head, need_weight, need_bias, need_lora_weight)
        weights = -ce, kl_weight.contiguous()
        dx, du = (d.to(hidden.dtype) for d in rows.gradients(weights, need_hidden, need_lora_hidden))
        rows.d_head(weights, sink)
    dx = dx.view(hidden.shape) if need_hidden else dx
    du = du.view(lora_hidden.shape) if lora_hidden is not None and need_lora_hidden else du
    return dx, sink.weight, sink.bias, du, sink.lora_weight
