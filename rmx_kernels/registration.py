"""Registration of operators with torch.library. An operator's implementation is an argument, looked up when it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Formula = tuple[Callable[..., Any], Callable[..., Any]]  # (backward, setup_context)


def register(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Formula | None = None
) -> None:
    """Define rmx_kernels::{name} for tensors on any device.

    kernel computes it, fake gives the shapes and dtypes of the results. Without a formula a differentiation is an
    error, not a silent zero: gradients are made tile by tile, and have no derivative of their own.
    """
    name = f"rmx_kernels::{name}"
    torch.library.define(name, schema)
    torch.library.impl(name, "default", kernel)
    torch.library.register_fake(name, fake)
    if autograd is None:
        torch.library.register_autograd(name, refuse(name))
    else:
        torch.library.register_autograd(name, autograd[0], setup_context=autograd[1])


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, products and sums have the dtype of their operands. Costs nothing where autocast is off."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def refuse(name: str) -> Callable[..., Any]:
    def refusal(*_: Any) -> None:
        raise RuntimeError(f"{name}: trying to differentiate twice a function that is once_differentiable")

    return refusal
