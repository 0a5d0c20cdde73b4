"""The eager core that every reference implementation shares: logits one [rows, columns] tile at a time.

Scratch memory is bounded by a few tiles of TILE_BYTES each, whatever N and V; only what is returned (gradients,
row statistics) grows with the input. Arithmetic is fp32, or fp64 for fp64 inputs: low-precision products are
computed from upcast operands, so the logits are never rounded to bf16.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.logits import Gradients, Logits, Needs, chunks

TILE_COLUMNS = 8192  # fixed, so that the order of summation in a row never depends on the number of rows
TILE_BYTES = 4 << 20  # of one fp32 tile; about ten are alive at once


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. Under 4 rows BLAS takes another path, with other bits and larger errors, so there are always 4."""
    n = a.shape[0]
    return a @ b if n >= 4 else (torch.nn.functional.pad(a, (0, 0, 0, 4 - n)) @ b)[:n].clone()


class HeadSlice(NamedTuple):
    """What a tile of columns needs of the head and of the LoRA pair, in the compute dtype."""

    weight: Tensor  # [columns, H]
    lora_weight: Tensor | None  # [columns, r]


class VocabTiles:
    """The scaled logits z of rows [N, columns], a tile at a time; of the rows in ``index`` only, where it is given."""

    def __init__(self, z: Logits, index: Tensor | None = None) -> None:
        self.z, self.index, self.dtype, self.V = z, index, z.real, z.V
        self.N = z.x.shape[0] if index is None else index.shape[0]
        self.divisors = z.divisors(slice(None) if index is None else index)  # [N, 1], or None for one temperature

    def columns(self) -> Iterator[slice]:
        width = TILE_COLUMNS
        if self.z.weight is not None:  # the upcast slice of the head is scratch as well
            width = min(width, max(256, TILE_BYTES // (4 * self.z.weight.shape[1])))
        return chunks(self.V, width)

    def rows(self) -> Iterator[slice]:
        width = TILE_COLUMNS if self.z.weight is None else max(TILE_COLUMNS, self.z.weight.shape[1])
        step = max(1, TILE_BYTES // (4 * width))
        return chunks(self.N, step)

    def head(self, cols: slice) -> HeadSlice | None:
        """The slice of the head that a tile needs, upcast once for all row chunks."""
        weight, lora_weight = self.z.weight, self.z.lora_weight
        if weight is None:
            return None
        return HeadSlice(weight[cols].to(self.dtype), None if lora_weight is None else lora_weight[cols].to(self.dtype))

    def take(self, rows: slice) -> Tensor | slice:
        """Positions in x of a chunk of (selected) rows."""
        return rows if self.index is None else self.index[rows]

    def __call__(self, rows: slice, cols: slice, head: HeadSlice | None) -> Tensor:
        """z [rows, cols] in the compute dtype."""
        x, _, bias, lora_hidden, _, temperature, softcap, _ = self.z
        if head is None:
            taken = x[rows, cols] if self.index is None else x[:, cols].index_select(0, self.index[rows])
            z = taken.to(self.dtype, copy=True)
        else:
            z = product(x[self.take(rows)].to(self.dtype), head.weight.T)
            if lora_hidden is not None and head.lora_weight is not None:
                z += product(lora_hidden[self.take(rows)].to(self.dtype), head.lora_weight.T)
            if bias is not None:
                z += bias[cols].to(self.dtype)
        if softcap is not None:
            z = z.div_(softcap).tanh_().mul_(softcap)
        if self.divisors is not None:
            return z.div_(self.divisors[rows])
        return z.div_(temperature) if temperature != 1.0 else z

    def unscale(self, rows: slice, dz: Tensor, z: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, in place: dz * (1 - (cap / softcap)^2) / temperature."""
        temperature, softcap = self.z.temperature, self.z.softcap
        own = None if self.divisors is None else self.divisors[rows]
        if softcap is not None:  # the quotient is rounded once, as that of two Python floats is
            ratio = temperature / softcap if own is None else (own.double() / softcap).to(own.dtype)
            dz *= 1 - (z * ratio).square_()
        if own is not None:
            return dz.div_(own)
        return dz.div_(temperature) if temperature != 1.0 else dz


class GradientSink:
    """Adds up the gradients of a Logits' tensors from gradient tiles; holds only those asked for.

    ``upstream``, a gradient, multiplies the finished sums before they are rounded to the dtype of the inputs.
    """

    def __init__(self, z: Logits, needs: Needs, upstream: Tensor | None = None) -> None:
        self.z, self.needs, self.upstream, self.of_head = z, needs, upstream, HeadGradient(z, needs)
        held = z.x.dtype if z.weight is None else z.real  # a linear dx is a sum over tiles
        self.x, self.lora_hidden = (
            torch.zeros_like(x, dtype=held, memory_format=torch.contiguous_format)
            if x is not None and need
            else z.x.new_empty(0, dtype=held)
            for x, need in ((z.x, needs[0]), (z.lora_hidden, needs[3]))
        )

    @property
    def active(self) -> bool:
        return self.of_head.wanted or self.x.numel() + self.lora_hidden.numel() > 0

    def open(self, cols: slice, head: HeadSlice | None) -> None:
        self.cols, self.head = cols, head
        self.of_head.open(cols)

    def add(self, tiles: VocabTiles, rows: slice, dz: Tensor, z: Tensor) -> None:
        """Consumes dz [rows, cols], the gradient with respect to the scaled logits z of a tile."""
        raw = tiles.unscale(rows, dz, z)
        where = tiles.take(rows)
        if self.head is None:
            if self.x.numel():
                self.x[where, self.cols] = self._scaled(raw).to(self.x.dtype)
            return
        for total, weight in ((self.x, self.head.weight), (self.lora_hidden, self.head.lora_weight)):
            if total.numel() and weight is not None:
                total[where] += product(raw, weight)
        if self.of_head.wanted:
            lora_hidden = None if self.z.lora_hidden is None else self.z.lora_hidden[where].to(tiles.dtype)
            self.of_head.add(raw, self.z.x[where].to(tiles.dtype), lora_hidden)

    def close(self) -> None:
        self.of_head.close(1.0 if self.upstream is None else self.upstream)

    def poison(self, tiles: VocabTiles, bad: Tensor) -> None:
        """NaN for the gradients of x and lora_hidden in the rows of ``tiles`` that ``bad`` marks."""
        rows = bad.nonzero().squeeze(1)
        for total in (self.x, self.lora_hidden):
            if total.numel():
                total[rows if tiles.index is None else tiles.index[rows]] = float("nan")

    def gradients(self, z: Logits) -> Gradients:
        """In the dtype and shape of the tensors of z."""
        x, lora_hidden = (
            z.x.new_empty(0)
            if like is None or not need
            else (self._scaled(total) if z.weight is not None else total).to(like.dtype).view(like.shape)
            for total, like, need in ((self.x, z.x, self.needs[0]), (self.lora_hidden, z.lora_hidden, self.needs[3]))
        )
        return x, self.of_head.weight, self.of_head.bias, lora_hidden, self.of_head.lora_weight

    def _scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.upstream is None else gradient * self.upstream


class RowSums:
    """Running m = max z, d = sum exp(z - m), T = sum exp(z - m)(z - m) of each row, folded tile by tile.

    T moves with the shift, so the entropy log d - T / d stays accurate at common offsets of 1e4. Entries of -inf
    have probability 0. A row with a NaN, a +inf, or nothing but -inf comes out as NaN.
    """

    def __init__(self, N: int, dtype: torch.dtype, device: torch.device) -> None:
        self.m = torch.full((N,), float("-inf"), dtype=dtype, device=device)
        self.d = torch.zeros(N, dtype=dtype, device=device)
        self.T = torch.zeros(N, dtype=dtype, device=device)

    def fold(self, rows: slice, z: Tensor, entropy: bool = True) -> None:
        m, d, T = self.m[rows], self.d[rows], self.T[rows]
        top = torch.maximum(m, z.amax(-1))
        shift = torch.where(top == float("-inf"), torch.zeros_like(top), top)  # no -inf - -inf
        step = torch.where(d == 0, torch.zeros_like(d), shift - m)
        decay = torch.exp(-step)  # step * decay stays finite where step * d would not (finfo.min as a mask)
        u = z - shift.unsqueeze(-1)
        e = u.exp()
        if entropy:
            T = decay * T - (step * decay) * d + (e * u.masked_fill_(e == 0, 0)).sum(-1)
            self.T[rows] = T
        self.d[rows] = decay * d + e.sum(-1)
        self.m[rows] = top

    def finish(self) -> tuple[Tensor, Tensor]:
        """(m, log d): log p = (z - m) - log d keeps full precision where z - (m + log d) does not."""
        bad = ~torch.isfinite(self.m)
        return self.m.masked_fill(bad, float("nan")), self.d.log()

    def entropy(self) -> Tensor:
        """Entropy in nats; NaN where :meth:`finish` says so."""
        H = self.d.log() - self.T / self.d
        return H.clamp_(min=0).masked_fill_(~torch.isfinite(self.m), float("nan"))


def pick(values: Tensor, z: Tensor, target: Tensor, rows: slice, cols: slice) -> None:
    """values[row] = z[row, target] for the targets that lie in this tile. values and target: [N] or [N, K]."""
    ids = target[rows] - cols.start
    inside = (ids >= 0) & (ids < z.shape[1])
    local = ids.clamp(0, z.shape[1] - 1)
    got = z.gather(1, local) if local.dim() == 2 else z.gather(1, local.unsqueeze(1)).squeeze(1)
    values[rows] = torch.where(inside, got.to(values.dtype), values[rows])


def add_at(dz: Tensor, amount: Tensor, ids: Tensor, cols: slice) -> None:
    """dz[row, ids - cols.start] += amount where that lies in the tile. amount and ids: [rows] or [rows, K]."""
    if ids.dim() == 1:
        amount, ids = amount.unsqueeze(1), ids.unsqueeze(1)
    local = ids - cols.start
    inside = (local >= 0) & (local < dz.shape[1])
    dz.scatter_add_(1, local.clamp(0, dz.shape[1] - 1), torch.where(inside, amount, torch.zeros_like(amount)))
