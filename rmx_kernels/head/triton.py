"""Products of rows with the output head on a GPU, for the Triton kernels: the vendor's GEMM on whole rows of logits.

As many rows as fit into ``configs.scratch_bytes`` are multiplied at once; the row kernels then work on them, and a
gradient is multiplied back. Nothing is computed twice, and the sum over the vocabulary of a row's gradient is one
product, rounded once. The rows of a product are filled up to a multiple of 128, so that few sizes occur.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from rmx_kernels.head import configs
from rmx_kernels.head.gradient import HeadGradient
from rmx_kernels.logits import Logits, Needs, chunks

Index = Tensor | slice


def product(a: Tensor, b: Tensor, out: Tensor, add: Tensor | None = None) -> None:
    """out = a @ b (+ add), summed in float32; out is of a's dtype, rounded once, or in float32."""
    if not a.is_cuda:  # under the interpreter: as a GPU does it, which a CPU does not in float16
        out.copy_(a.float() @ b.float() if add is None else add.float() + a.float() @ b.float())
    elif out.dtype != a.dtype:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        if add is not None:
            out += add
    elif add is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(add, a, b, out=out)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


FP16_ROOM = 1024  # gradients of float16 logits reach so many times their rows' weights; the largest number is 65504


def row_sizes(*weights: Tensor | None) -> Tensor:
    """What the gradients of rows [N] of float16 logits are divided by, so that small ones keep their digits.

    The sum of the weights' magnitudes, 1 for 0, over FP16_ROOM.
    """
    given = [w.abs() if w.dim() == 1 else w.abs().sum(-1) for w in weights if w is not None]
    total = torch.stack(given).sum(0)
    return torch.where(total == 0, 1.0, total) / FP16_ROOM


class Head:
    """W [V, H], bias [V] or None, and the LoRA pair's B [V, r] or None; ``models`` whose rows are held together."""

    def __init__(self, z: Logits, models: int) -> None:
        assert z.weight is not None
        weight = z.weight
        self.weight, self.bias, self.lora_weight = weight, z.bias, z.lora_weight
        self.V, self.H = weight.shape
        self.logit_dtype = configs.logits_dtype(weight.dtype)
        self.narrow = weight.dtype == torch.float16  # whose gradients are divided by the rows' sizes
        self.apart = self.logit_dtype != weight.dtype  # a gradient has no place where the logits were
        size = models * self.logit_dtype.itemsize + (weight.element_size() if self.apart else 0)
        fit = configs.scratch_bytes(weight.device) // (self.V * size)
        step = configs.FULL_WAVES if fit >= configs.FULL_WAVES else configs.ROW_MULTIPLE
        self.chunk = max(1, fit // step) * step

    def buffer(self, rows: int, columns: int) -> Tensor:
        """Room for a tile of logits, whose rows begin at multiples of 64 bytes at least."""
        return self.weight.new_empty(rows, -(-columns // 32) * 32, dtype=self.logit_dtype)[:, :columns]

    def gradient_buffer(self, logits: Tensor) -> Tensor:
        """Where the gradient of a tile of logits goes: in their place, or beside them where the dtypes differ."""
        if not self.apart:
            return logits
        rows, columns = logits.shape
        return self.weight.new_empty(rows, -(-columns // 32) * 32)[:, :columns]

    def take(self, x: Tensor, rows: Index) -> Tensor:
        """The rows x[rows], followed by zeros up to a multiple of ROW_MULTIPLE; without a copy where none is needed."""
        taken = x[rows]
        missing = multiple(taken.shape[0]) - taken.shape[0]
        return torch.nn.functional.pad(taken, (0, 0, 0, missing)) if missing else taken

    def logits(self, x: Tensor, lora_hidden: Tensor | None, buffer: Tensor, cols: slice | None = None) -> Tensor:
        """x [rows, H] @ W[cols].T + bias[cols] (+ lora_hidden @ B[cols].T), [rows, columns], in the buffer."""
        cols = slice(0, self.V) if cols is None else cols
        z = buffer[: x.shape[0]]
        product(x, self.weight[cols].T, z, None if self.bias is None else self.bias[cols])
        if lora_hidden is not None and self.lora_weight is not None:
            product(lora_hidden.to(z.dtype), self.lora_weight[cols].T.to(z.dtype), z, z)
        return z

    def back(self, dz: Tensor, weight: Tensor, size: Tensor | None, out: Tensor) -> None:
        """out [n, H or r]: the first n rows of dz [rows, V] @ W or B; times ``size`` [n] where dz was divided by it."""
        n = out.shape[0]
        if size is not None:
            out.copy_(product_fp32(dz, weight)[:n] * size[:, None])
        elif n == dz.shape[0] and out.dtype == dz.dtype:
            product(dz, weight, out)
        else:
            total = dz.new_empty(dz.shape[0], weight.shape[1])
            product(dz, weight, total)
            out.copy_(total[:n])

    def back_into(self, dz: Tensor, size: Tensor | None, rows: slice, dx: Tensor, du: Tensor) -> None:
        """:meth:`back` of W into the rows of dx and of B into those of du, if these have elements."""
        for gradient, weight in ((dx, self.weight), (du, self.lora_weight)):
            if gradient.numel() and weight is not None:
                self.back(dz, weight, size, gradient[rows])

    def slices(self) -> Iterator[slice]:
        """Of the vocabulary, for the gradient of a trained head."""
        return chunks(self.V, max(1024, configs.HEAD_TILE_BYTES // (4 * self.H) // 1024 * 1024))

    def slice_rows(self, columns: int) -> int:
        return max(1, configs.HEAD_TILE_BYTES // (columns * self.logit_dtype.itemsize) // configs.ROW_MULTIPLE) * (
            configs.ROW_MULTIPLE
        )


def multiple(n: int) -> int:
    """n rows, filled up to a multiple of ROW_MULTIPLE."""
    return -(-n // configs.ROW_MULTIPLE) * configs.ROW_MULTIPLE


def head_gradient(z: Logits, needs: Needs) -> HeadGradient:
    """The sums of a trained head's gradient, whose products are summed in float32."""
    return HeadGradient(z, needs, product_fp32)
