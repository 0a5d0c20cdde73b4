"""Products of rows with the output head on a CPU, for the native kernels: in which dtype, how many at a time.

Every choice here depends on the head alone, never on the number of rows or threads, so that the bits of a row don't
either. BLAS libraries take other paths, with other bits, for row counts that are no multiple of 4: rows come in fours.
(Where H is odd, MKL's float32 and float64 products also depend on whether a row's place is even; no model has such H.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.tiles import chunks, compute_dtype

LOGIT_BYTES = 48 << 20  # of the whole rows of logits that are held at a time
TILE_COLUMNS = 8192  # of a [rows, columns] tile: 8 MiB in bfloat16; a multiple of the kernels' block
TILE_ROWS = 512
UPCAST_BYTES = 4 << 20  # of a slice of the head in float32, where the CPU has no product in its dtype


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else full precision; float16 lacks the range for gradients."""
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return compute_dtype(dtype)


class Head:
    """W [V, H] and bias [V] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.V, self.H = weight.shape
        self.dtype, self.real = product_dtype(weight.dtype), compute_dtype(weight.dtype)
        self.bias = None if bias is None else bias.to(self.dtype)

    def columns(self) -> Iterator[slice]:
        return chunks(self.V, TILE_COLUMNS)

    def row_chunk(self) -> int:
        """Rows of which two whole rows of logits each fit into LOGIT_BYTES; at least 4."""
        return max(4, LOGIT_BYTES // (2 * self.V * self.dtype.itemsize) // 4 * 4)

    def rows(self, *parts: Tensor) -> Tensor:
        """The rows of each part, followed by up to 3 rows of zeros, in the dtype of the product."""
        fours = [x for part in parts for x in (part, part.new_zeros(-part.shape[0] % 4, self.H))]
        return torch.cat(fours).to(self.dtype)

    def buffer(self, columns: int, *rows: int) -> Tensor:
        """Room for a tile of logits of parts of so many rows."""
        return native.scratch(sum(-(-n // 4) * 4 for n in rows) * min(columns, self.V), self.dtype)

    def _upcast(self, cols: slice) -> Iterator[tuple[slice, Tensor]]:
        width = max(256, UPCAST_BYTES // (4 * self.H)) if self.dtype != self.weight.dtype else self.V
        for part in chunks(cols.stop - cols.start, width):
            yield part, self.weight[cols.start + part.start : cols.start + part.stop].to(self.dtype)

    def logits(self, x: Tensor, buffer: Tensor, cols: slice | None = None) -> Tensor:
        """x [rows, H] @ weight[cols].T + bias[cols], [rows, columns], at the beginning of the buffer."""
        cols = slice(0, self.V) if cols is None else cols
        columns = cols.stop - cols.start
        out = buffer[: x.shape[0] * columns].view(x.shape[0], columns)
        for part, weight in self._upcast(cols):
            z = out if weight.shape[0] == columns else out[:, part]
            if self.bias is None:
                torch.mm(x, weight.T, out=z)
            else:  # added before the sum is rounded
                torch.addmm(self.bias[cols.start + part.start : cols.start + part.stop], x, weight.T, out=z)
        return out

    def back(self, dz: Tensor) -> Tensor:
        """dz [rows, V] @ weight, [rows, H]: one product, so that the sum over the vocabulary is rounded once."""
        if self.dtype == self.weight.dtype:
            return torch.mm(dz, self.weight)
        total = dz.new_zeros(dz.shape[0], self.H)
        for part, weight in self._upcast(slice(0, self.V)):
            total.addmm_(dz[:, part], weight)
        return total


class HeadGradient:
    """dW [V, H] and dbias [V], summed over rows in full precision, one slice of the vocabulary at a time."""

    def __init__(self, head: Head, weight: Tensor, bias: Tensor | None, need_weight: bool, need_bias: bool) -> None:
        self.head = head
        self.weight = torch.empty(weight.shape if need_weight else (0,), dtype=weight.dtype)
        self.bias = torch.empty(weight.shape[:1] if need_bias and bias is not None else (0,), dtype=weight.dtype)

    @property
    def wanted(self) -> bool:
        return self.weight.numel() + self.bias.numel() > 0

    def open(self, cols: slice) -> None:
        self.cols = cols
        self.dw = torch.zeros(cols.stop - cols.start, self.head.H, dtype=self.head.real)
        self.db = torch.zeros(cols.stop - cols.start, dtype=self.head.real)

    def add(self, dz: Tensor, x: Tensor) -> None:
        """dz [rows, columns] with respect to the raw logits of x [rows, H]."""
        if self.weight.numel():
            self.dw += dz.T @ x
        if self.bias.numel():
            self.db += dz.sum(0, dtype=self.head.real)

    def close(self, upstream: Tensor | float = 1.0) -> None:
        if self.weight.numel():
            self.weight[self.cols] = (self.dw * upstream).to(self.weight.dtype)
        if self.bias.numel():
            self.bias[self.cols] = (self.db * upstream).to(self.bias.dtype)
