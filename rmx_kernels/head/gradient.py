"""The gradient of an output head, for all implementations."""

from collections.abc import Callable

import torch
from torch import Tensor

from rmx_kernels.logits import Logits, Needs


class HeadGradient:
    """dW [V, H], dbias [V] and dB [V, r], summed over rows in full precision, one slice of the vocabulary at a time.

    multiply: the product of two matrices, in the implementation's arithmetic.
    """

    def __init__(self, z: Logits, needs: Needs, multiply: Callable[[Tensor, Tensor], Tensor] = torch.mm) -> None:
        self.real, self.multiply = z.real, multiply
        _, weight, bias, _, lora_weight = z.empty_gradients((False, *needs[1:3], False, needs[4]))
        self.weight, self.bias, self.lora_weight = weight, bias, lora_weight

    @property
    def wanted(self) -> bool:
        return self.weight.numel() + self.bias.numel() + self.lora_weight.numel() > 0

    def open(self, cols: slice) -> None:
        self.cols = cols
        wholes = self.weight, self.bias, self.lora_weight  # no rows of those without elements
        self.dw, self.db, self.d_lora = (torch.zeros_like(whole[cols], dtype=self.real) for whole in wholes)

    def add(self, dz: Tensor, x: Tensor, lora_hidden: Tensor | None, size: Tensor | None = None) -> None:
        """dz [n, columns] of the raw logits of x [n, H] and lora_hidden [n, r]; divided by size [n], where given."""
        if self.db.numel():
            self.db += dz.sum(0, dtype=self.real) if size is None else (dz.to(self.real) * size[:, None]).sum(0)
        for total, part in ((self.dw, x), (self.d_lora, lora_hidden)):
            if total.numel() and part is not None:
                if size is None:
                    total += self.multiply(dz.T, part)
                else:
                    total += dz.T.to(self.real) @ (part.to(self.real) * size[:, None])

    def close(self, upstream: Tensor | float = 1.0) -> None:
        """Rounds the finished slice, once, times the upstream gradient."""
        totals = (self.weight, self.dw), (self.bias, self.db), (self.lora_weight, self.d_lora)
        for whole, total in totals:
            whole[self.cols] = (total * upstream).to(whole.dtype)
