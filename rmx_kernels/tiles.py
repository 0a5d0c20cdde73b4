"""The eager core that every ``reference`` implementation shares: logits one [rows, columns] tile at a time.

Scratch memory is bounded by a few tiles of TILE_BYTES each, whatever N and V; only what is returned (gradients,
row statistics) grows with the input. Arithmetic is fp32, or fp64 for fp64 inputs: low-precision products are
computed from upcast operands, so the logits are never rounded to bf16.
"""

from collections.abc import Iterator

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


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``size``, the last one shorter, that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class VocabTiles:
    """Scaled logits z = cap(x) / temperature (or of x @ weight.T + bias), for the rows in ``index`` only.

    x [N, V] without a weight, [N, H] with weight [V, H] and bias [V]; cap(u) = softcap * tanh(u / softcap).
    """

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        temperature: float = 1.0,
        softcap: float | None = None,
        index: Tensor | None = None,
    ) -> None:
        self.x, self.weight, self.bias = x, weight, bias
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

    def head(self, cols: slice) -> Tensor | None:
        """The slice of the head that a tile needs, upcast once for all row chunks."""
        return None if self.weight is None else self.weight[cols].to(self.dtype)

    def take(self, rows: slice) -> Tensor | slice:
        """Positions in x of a chunk of (selected) rows."""
        return rows if self.index is None else self.index[rows]

    def __call__(self, rows: slice, cols: slice, head: Tensor | None) -> Tensor:
        """z [rows, cols] in the compute dtype."""
        if head is None:
            x = self.x[rows, cols] if self.index is None else self.x[:, cols].index_select(0, self.index[rows])
            z = x.to(self.dtype, copy=True)
        else:
            z = product(self.x[self.take(rows)].to(self.dtype), head.T)
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
    """Adds up d loss / d (x, weight, bias) from gradient tiles; holds only the gradients that were asked for.

    ``scale``, an upstream gradient, multiplies the finished sums before they are rounded to the dtypes of the inputs.
    """

    def __init__(
        self, like: VocabTiles, need_x: bool, need_weight: bool, need_bias: bool, scale: Tensor | None = None
    ) -> None:
        self.scale = scale
        x, weight, bias = like.x, like.weight, like.bias
        self.dtypes = x.dtype, None if weight is None else weight.dtype, None if bias is None else bias.dtype
        self.x = self.weight = self.bias = None
        if need_x:  # a linear dx is a sum over tiles, so it is held in the compute dtype
            held = x.dtype if weight is None else like.dtype
            self.x = torch.zeros_like(x, dtype=held, memory_format=torch.contiguous_format)
        if need_weight and weight is not None:
            self.weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
        if need_bias and bias is not None:
            self.bias = torch.zeros_like(bias)

    def scaled(self, gradient: Tensor) -> Tensor:
        return gradient if self.scale is None else gradient * self.scale

    @property
    def active(self) -> bool:
        return self.x is not None or self.weight is not None or self.bias is not None

    def open(self, cols: slice, head: Tensor | None) -> None:
        self.cols, self.head = cols, head
        dtype = compute_dtype(self.dtypes[0])
        if self.weight is not None:
            self.dw = torch.zeros_like(self.weight[cols], dtype=dtype)
        if self.bias is not None:
            self.db = torch.zeros_like(self.bias[cols], dtype=dtype)

    def add(self, tiles: VocabTiles, rows: slice, dz: Tensor, z: Tensor) -> None:
        """Consumes dz [rows, cols], the gradient with respect to the scaled logits z of a tile."""
        raw = tiles.unscale(dz, z)
        where = tiles.take(rows)
        if self.x is not None:
            if self.head is None:
                self.x[where, self.cols] = self.scaled(raw).to(self.x.dtype)
            else:
                self.x[where] += product(raw, self.head)
        if self.weight is not None:
            self.dw += raw.T @ tiles.x[where].to(tiles.dtype)
        if self.bias is not None:
            self.db += raw.sum(0)

    def close(self) -> None:
        """Rounds the finished slice, once: over rows it added up in the compute dtype."""
        if self.weight is not None:
            self.weight[self.cols] = self.scaled(self.dw).to(self.weight.dtype)
        if self.bias is not None:
            self.bias[self.cols] = self.scaled(self.db).to(self.bias.dtype)

    def poison(self, tiles: VocabTiles, bad: Tensor) -> None:
        """NaN for the rows of ``tiles`` that ``bad`` marks, and for every sum that they are part of."""
        if not bool(bad.any()):
            return
        rows = bad.nonzero().squeeze(1)
        if self.x is not None:
            self.x[rows if tiles.index is None else tiles.index[rows]] = float("nan")
        for total in (self.weight, self.bias):
            if total is not None:
                total.fill_(float("nan"))

    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(dx, dweight, dbias) in the dtypes of their inputs."""
        x = self.x
        if x is not None and self.dtypes[1] is not None:  # linear: held in the compute dtype, not scaled yet
            x = self.scaled(x).to(self.dtypes[0])
        return x, self.weight, self.bias


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
