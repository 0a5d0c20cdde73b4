"""Registration of operators with torch.library. An operator's implementation is an argument, looked up when it runs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Formula = tuple[Callable[..., Any], Callable[..., Any]]  # (backward, setup_context)
LIBRARY = torch.library.Library("rmx_kernels", "FRAGMENT")
# Of torch._C, what torch.library.register_autograd is made of. Without them that function is called.
PARTS = ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad")
DIRECT = all(hasattr(torch._C, part) for part in PARTS)


def register(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Formula | None = None
) -> None:
    """Define rmx_kernels::{name} for tensors on any device.

    kernel computes it, fake gives the shapes and dtypes of the results. Without a formula a differentiation is an
    error, not a silent zero: gradients are made tile by tile, and have no derivative of their own.
    """
    whole = f"rmx_kernels::{name}"
    torch.library.define(whole, schema)
    torch.library.impl(whole, "default", kernel)
    torch.library.register_fake(whole, fake)
    if autograd is None:
        torch.library.register_autograd(whole, refuse(whole))
    elif DIRECT:
        LIBRARY.impl(name, _differentiated(name, *autograd), "Autograd", with_keyset=True)
    else:
        torch.library.register_autograd(whole, autograd[0], setup_context=autograd[1])


def _differentiated(name: str, backward: Callable[..., Any], setup: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.library.register_autograd registers, for a schema without defaults and keyword-only arguments.

    Torch's own fills in defaults, in a time that is quadratic in the number of arguments: 41 us at 11 of them and 76 us
    at 15 (torch 2.13), which calls of few rows feel.
    """
    op = getattr(torch.ops.rmx_kernels, name).default

    def below(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def forward(ctx: Any, *given: Any) -> Any:
        *arguments, keyset = given
        output = below(keyset, tuple(arguments))
        setup(ctx=ctx, inputs=tuple(arguments), output=output)
        return output

    def gradients(ctx: Any, *upstream: Any) -> Any:
        return *backward(ctx, *upstream), None  # of the keyset

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function: Any = type(f"Differentiated_{name}", (torch.autograd.Function,), methods)

    def registered(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return function.apply(*arguments, keyset)
        return below(keyset, arguments)

    return registered


def without_autocast(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, products and sums have the dtype of their operands. Costs nothing where autocast is off."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def refuse(name: str) -> Callable[..., Any]:
    def refusal(*_: Any) -> None:
        raise RuntimeError(f"{name}: trying to differentiate twice a function that is once_differentiable")

    return refusal
