"""The eager core that every ``reference`` implementation shares: logits one [rows, columns] tile at a time.

Scratch memory is bounded by a few tiles of TILE_BYTES each, whatever N and V; only what is returned (gradients,
row statistics) grows with the input. Arithmetic is fp32, or fp64 for fp64 inputs: low-precision products are
computed from upcast operands, so the logits are never rounded to bf16.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE_COLUMNS = 8192  # fixed, so that the order of summation in a row never depends on the number of rows
TILE_BYTES = 4 << 20  # of one fp32 tile; about ten are alive at once


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. Under 4 rows BLAS takes another path, with other bits and larger errors, so there are always 4."""
    n = a.shape[0]
    return a @ b if n >= 4 else (torch.nn.functional.pad(a, (0, 0, 0, 4 - n)) @ b)[:n].clone()


def flat(x: Tensor | None) -> Tensor | None:
    """The rows of x [B..., columns], [N, columns]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``size``, the last one shorter, that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class HeadSlice(NamedTuple):
    """What a tile of columns needs of the head and of the LoRA pair, in the compute dtype."""

    weight: Tensor  # [columns, H]
    lora_weight: Tensor | None  # [columns, r]


class VocabTiles:
    """Scaled logits z = cap(x) / temperature (or of x @ weight.T + bias), for the rows in ``index`` only.

    x [N, V] without a weight, [N, H] with weight [V, H] and bias [V]; cap(u) = softcap * tanh(u / softcap).
    A LoRA pair, lora_hidden [N, r] and lora_weight [V, r], adds lora_hidden @ lora_weight.T to the product.
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        lora_hidden: Tensor | None = None,
        lora_weight: Tensor | None = None,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        index: Tensor | None = None,
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.lora_hidden, self.lora_weight = lora_hidden, lora_weight
        self.temperature, self.softcap = float(temperature), softcap
        self.index = index
        self.dtype = compute_dtype(x.dtype)
        self.N = x.shape[0] if index is None else index.shape[0]
        self.V = x.shape[1] if weight is None else weight.shape[0]

    def columns(self) -> Iterator[slice]:
        width = TILE_COLUMNS
        if self.weight is not None:  # the upcast slice of the head is scratch as well
            width = min(width, max(256, TILE_BYTES // (4 * self.weight.shape[1])))
        return chunks(self.V, width)

    def rows(self) -> Iterator[slice]:
        width = TILE_COLUMNS if self.weight is None else max(TILE_COLUMNS, self.weight.shape[1])
        step = max(1, TILE_BYTES // (4 * width))
        return chunks(self.N, step)

    def head(self, cols: slice) -> HeadSlice | None:
        """The slice of the head that a tile needs, upcast once for all row chunks."""
        if self.weight is None:
            return None
        lora_weight = None if self.lora_weight is None else self.lora_weight[cols].to(self.dtype)
        return HeadSlice(self.weight[cols].to(self.dtype), lora_weight)

    def take(self, rows: slice) -> Tensor | slice:
        """Positions in x of a chunk of (selected) rows."""
        return rows if self.index is None else self.index[rows]

    def __call__(self, rows: slice, cols: slice, head: HeadSlice | None) -> Tensor:
        """z [rows, cols] in the compute dtype."""
        if head is None:
            x = self.x[rows, cols] if self.index is None else self.x[:, cols].index_select(0, self.index[rows])
            z = x.to(self.dtype, copy=True)
        else:
            z = product(self.x[self.take(rows)].to(self.dtype), head.weight.T)
            if self.lora_hidden is not None and head.lora_weight is not None:
                z += product(self.lora_hidden[self.take(rows)].to(self.dtype), head.lora_weight.T)
            if self.bias is not None:
                z += self.bias[cols].to(self.dtype)
        if self.softcap is not None:
            z = z.div_(self.softcap).tanh_().mul_(self.softcap)
        return z.div_(self.temperature) if self.temperature != 1.0 else z

    def unscale(self, dz: Tensor, z: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, in place: dz * (1 - (cap / softcap)^2) / temperature."""
        if self.softcap is not None:
            dz *= 1 - (z * (self.temperature / self.softcap)).square_()
        return dz.div_(self.temperature) if self.temperature != 1.0 else dz


class GradientSink:
    """Adds up d loss / d (x, weight, bias, lora_hidden, lora_weight) from gradient tiles; holds only those asked for.

    ``scale``, an upstream gradient, multiplies the finished sums before they are rounded to the dtype of the inputs.
    """

    def __init__(
        self,
        like: VocabTiles,
        need_x: bool = False,
        need_weight: bool = False,
        need_bias: bool = False,
        need_lora_hidden: bool = False,
        need_lora_weight: bool = False,
        *,
        scale: Tensor | None = None,
    ) -> None:
        def zeros(x: Tensor | None, wanted: bool, dtype: torch.dtype) -> Tensor | None:
            if x is None or not wanted:
                return None
            return torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)

        self.scale, self.dtype, self.rounded = scale, like.dtype, like.x.dtype
        self.linear = like.weight is not None
        held = self.dtype if self.linear else self.rounded  # a linear dx is a sum over tiles
        self.x, self.lora_hidden = zeros(like.x, need_x, held), zeros(like.lora_hidden, need_lora_hidden, held)
        self.weight = zeros(like.weight, need_weight, self.rounded)
        self.bias = zeros(like.bias, need_bias, self.rounded)
        self.lora_weight = zeros(like.lora_weight, need_lora_weight, self.rounded)

    def scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.scale is None else gradient * self.scale

    @property
    def of_head(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.weight, self.bias, self.lora_weight

    @property
    def active(self) -> bool:
        return any(total is not None for total in (self.x, self.lora_hidden, *self.of_head))

    def open(self, cols: slice, head: HeadSlice | None) -> None:
        self.cols, self.head = cols, head
        self.sums = [
            None if whole is None else torch.zeros_like(whole[cols], dtype=self.dtype) for whole in self.of_head
        ]

    def add(self, tiles: VocabTiles, rows: slice, dz: Tensor, z: Tensor) -> None:
        """Consumes dz [rows, cols], the gradient with respect to the scaled logits z of a tile."""
        raw = tiles.unscale(dz, z)
        where = tiles.take(rows)
        if self.head is None:
            if self.x is not None:
                self.x[where, self.cols] = self.scaled(raw).to(self.x.dtype)
            return
        if self.x is not None:
            self.x[where] += product(raw, self.head.weight)
        if self.lora_hidden is not None and self.head.lora_weight is not None:
            self.lora_hidden[where] += product(raw, self.head.lora_weight)
        dw, db, d_lora = self.sums
        if dw is not None:
            dw += raw.T @ tiles.x[where].to(tiles.dtype)
        if db is not None:
            db += raw.sum(0)
        if d_lora is not None and tiles.lora_hidden is not None:
            d_lora += raw.T @ tiles.lora_hidden[where].to(tiles.dtype)

    def close(self) -> None:
        """Rounds the finished slice, once: over rows it added up in the compute dtype."""
        for whole, total in zip(self.of_head, self.sums, strict=True):
            if whole is not None and total is not None:
                whole[self.cols] = self.scaled(total).to(whole.dtype)

    def poison(self, tiles: VocabTiles, bad: Tensor) -> None:
        """NaN for the rows of ``tiles`` that ``bad`` marks, and for every sum that they are part of."""
        if not bool(bad.any()):
            return
        rows = bad.nonzero().squeeze(1)
        for total in (self.x, self.lora_hidden):
            if total is not None:
                total[rows if tiles.index is None else tiles.index[rows]] = float("nan")
        for total in self.of_head:
            if total is not None:
                total.fill_(float("nan"))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight, dbias, dlora_hidden, dlora_weight) in the dtype of the inputs."""
        x, lora_hidden = (
            self.scaled(total).to(self.rounded) if total is not None and self.linear else total
            for total in (self.x, self.lora_hidden)
        )
        return x, *self.of_head[:2], lora_hidden, self.lora_weight


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
    """values[row] = z[row, target] for the rows whose target lies in this tile."""
    ids = target[rows] - cols.start
    inside = (ids >= 0) & (ids < z.shape[1])
    got = z.gather(1, ids.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
    values[rows] = torch.where(inside, got, values[rows])


def add_at(dz: Tensor, amount: Tensor, ids: Tensor, cols: slice) -> None:
    """dz[row, ids - cols.start] += amount where that lies in the tile. amount and ids: [rows] or [rows, K]."""
    if ids.dim() == 1:
        amount, ids = amount.unsqueeze(1), ids.unsqueeze(1)
    local = ids - cols.start
    inside = (local >= 0) & (local < dz.shape[1])
    dz.scatter_add_(1, local.clamp(0, dz.shape[1] - 1), torch.where(inside, amount, torch.zeros_like(amount)))
