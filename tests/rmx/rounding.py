"""Functions of tensors and their gradients, held against float64 by the error of eager PyTorch."""

from collections.abc import Callable

import torch
from torch import Tensor


def with_gradients(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = call(*inputs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, g)]


def assert_as_good(
    call: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    *inputs: Tensor,
    steps: int = 1,
    least: float = 0.0,
) -> None:
    """At most twice the error of eager PyTorch in the same precision, and ``steps`` roundings of the largest entry.

    least: what the largest entry counts as at least, where terms of that size may cancel.
    """
    found, plain = with_gradients(call, *inputs), with_gradients(eager, *inputs)
    oracle = with_gradients(eager, *(x.double() for x in inputs))
    for own, other, exact in zip(found, plain, oracle, strict=True):
        assert own.dtype == other.dtype and own.shape == other.shape
        slack = steps * torch.finfo(own.dtype).eps * exact.abs().max().clamp(min=least)
        assert (own.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max() + slack
