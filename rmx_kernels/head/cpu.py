"""Products of rows with the output head on a CPU, for the native kernels: in which dtype, how many at a time.

Every choice here depends on the head alone, never on the number of rows or threads, so that the bits of a row don't
either. BLAS libraries take other paths, with other bits, for row counts that are no multiple of 4: rows come in fours.
(Where H is odd, MKL's float32 and float64 products also depend on whether a row's place is even; no model has such H.)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.logits import Logits, chunks, product_dtype

LOGIT_BYTES = 48 << 20  # of the whole rows of logits that are held at a time
TILE_COLUMNS = 8192  # of a [rows, columns] tile: 8 MiB in bfloat16; a multiple of the kernels' block
TILE_ROWS = 512
UPCAST_BYTES = 4 << 20  # of a slice of the head in float32, where the CPU has no product in its dtype


def scale_of(z: Logits, rows: Tensor | slice = slice(None)) -> native.Scale:
    """Of some of the flattened rows."""
    return native.scale(z.temperature, z.softcap, z.temperatures(rows))


class Head:
    """W [V, H], bias [V] or None, and B [V, r] of a LoRA pair or None."""

    def __init__(self, z: Logits) -> None:
        assert z.weight is not None
        self.weight, self.lora_weight = z.weight, z.lora_weight
        self.V, self.H = z.weight.shape
        self.dtype = product_dtype(z.weight.dtype)
        self.bias = None if z.bias is None else z.bias.to(self.dtype)

    def columns(self) -> Iterator[slice]:
        return chunks(self.V, TILE_COLUMNS)

    def row_chunk(self) -> int:
        """Rows of which two whole rows of logits each fit into LOGIT_BYTES; at least 4."""
        return max(4, LOGIT_BYTES // (2 * self.V * self.dtype.itemsize) // 4 * 4)

    def rows(self, *parts: Tensor) -> Tensor:
        """The rows of each part, followed by up to 3 rows of zeros, in the dtype of the product."""
        fours = [x for part in parts for x in (part, part.new_zeros(-part.shape[0] % 4, part.shape[1]))]
        return torch.cat(fours).to(self.dtype)

    def lora_rows(self, lora_hidden: Tensor | None, where: Tensor | slice) -> Tensor | None:
        """:meth:`rows` of lora_hidden [N, r], where there is one."""
        return None if lora_hidden is None else self.rows(lora_hidden[where])

    def buffer(self, columns: int, *rows: int) -> Tensor:
        """Room for a tile of logits of parts of so many rows."""
        return native.scratch(sum(-(-n // 4) * 4 for n in rows) * min(columns, self.V), self.dtype)

    def _upcast(self, matrix: Tensor, cols: slice) -> Iterator[tuple[slice, Tensor]]:
        """Slices of ``cols``, counted from its beginning, and those rows of W or B in the dtype of the product."""
        width = max(256, UPCAST_BYTES // (4 * matrix.shape[1])) if self.dtype != matrix.dtype else self.V
        for part in chunks(cols.stop - cols.start, width):
            yield part, matrix[cols.start + part.start : cols.start + part.stop].to(self.dtype)

    def logits(self, x: Tensor, buffer: Tensor, cols: slice | None = None, lora_hidden: Tensor | None = None) -> Tensor:
        """x [rows, H] @ weight[cols].T + bias[cols], [rows, columns], at the beginning of the buffer.

        Plus lora_hidden [n, r] @ lora_weight[cols].T in the first n rows.
        """
        cols = slice(0, self.V) if cols is None else cols
        columns = cols.stop - cols.start
        out = buffer[: x.shape[0] * columns].view(x.shape[0], columns)
        for part, weight in self._upcast(self.weight, cols):
            z = out if weight.shape[0] == columns else out[:, part]
            if self.bias is None:
                torch.mm(x, weight.T, out=z)
            else:  # added before the sum is rounded
                torch.addmm(self.bias[cols.start + part.start : cols.start + part.stop], x, weight.T, out=z)
        if lora_hidden is not None and self.lora_weight is not None:
            student = out[: lora_hidden.shape[0]]
            for part, lora_weight in self._upcast(self.lora_weight, cols):
                student[:, part].addmm_(lora_hidden, lora_weight.T)
        return out

    def back(self, dz: Tensor) -> Tensor:
        """dz [rows, V] @ weight, [rows, H]: one product, so that the sum over the vocabulary is rounded once."""
        return self._back(dz, self.weight)

    def lora_back(self, dz: Tensor) -> Tensor:
        """dz [rows, V] @ lora_weight, [rows, r]."""
        assert self.lora_weight is not None
        return self._back(dz, self.lora_weight)

    def back_into(self, dz: Tensor, where: Tensor | slice, n: int, dx: Tensor, du: Tensor) -> None:
        """The first n rows of :meth:`back` into dx[where] and of :meth:`lora_back` into du[where], if there are any."""
        if dx.numel():
            dx[where] = self.back(dz)[:n]
        if du.numel():
            du[where] = self.lora_back(dz)[:n]

    def _back(self, dz: Tensor, matrix: Tensor) -> Tensor:
        if self.dtype == matrix.dtype:
            return torch.mm(dz, matrix)
        total = dz.new_zeros(dz.shape[0], matrix.shape[1])
        for part, upcast in self._upcast(matrix, slice(0, self.V)):
            total.addmm_(dz[:, part], upcast)
        return total
