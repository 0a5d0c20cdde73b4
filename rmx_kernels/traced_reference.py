"""The references as torch.compile sees them: operators, since their branches depend on the numbers.

rmx_kernels::reference_{name}           the forward of one of their autograd functions
rmx_kernels::reference_{name}_backward  its gradients, for which the forward runs again; without elements where not
                                        needed
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.registration import refuse

LINEAR = "Tensor? weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight"
Fake = Callable[..., tuple[Tensor, ...]]


class _Context:
    """Stands for autograd's, which an operator's kernel has none of."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs_input_grad = needs
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_: Tensor) -> None:
        pass

    def set_materialize_grads(self, _: bool) -> None:
        pass


def apply(name: str, function: Any, *arguments: Any) -> Any:
    """function.apply, or the operator that is registered in its place inside a compiled function."""
    if not torch.compiler.is_compiling():
        return function.apply(*arguments)
    return getattr(torch.ops.rmx_kernels, f"reference_{name}")(*arguments)


def register(name: str, schema: str, fake: Fake, wanted: Sequence[int], upstream: int) -> Callable[[Any], Any]:
    """Register the autograd function that is decorated, for :func:`apply`.

    Args:
        schema: its arguments and results. fake: the results for fake arguments.
        wanted: which arguments are differentiable. upstream: how many results are.
    """
    forward_name, backward_name = f"rmx_kernels::reference_{name}", f"rmx_kernels::reference_{name}_backward"
    inputs, _ = schema.split(" -> ")
    given = ", ".join(f"Tensor? g{i}" for i in range(upstream))

    def decorate(function: Any) -> Any:
        count = inputs.count(",") + 1

        def forward(*arguments: Any) -> Any:
            with torch.no_grad():
                return function.forward(_Context([False] * count), *arguments)

        def gradients(*everything: Any) -> list[Tensor]:
            arguments, gs, needs = everything[:count], everything[count:-1], everything[-1]
            context = _Context([i in wanted and needs[wanted.index(i)] for i in range(count)])
            with torch.no_grad():
                outputs = function.forward(context, *arguments)
                found = function.backward(context, *gs, *[None] * (len(outputs) - upstream))
            return [arguments[0].new_empty(0) if found[i] is None else found[i].clone() for i in wanted]

        def fake_gradients(*everything: Any) -> list[Tensor]:
            x, needs = everything[0], everything[-1]
            whole = [everything[i] for i in wanted]
            shapes = [t.shape if t is not None and need else (0,) for t, need in zip(whole, needs, strict=True)]
            return [x.new_empty(shape) for shape in shapes]

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
            ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*(inputs[i] for i in ctx.places))

        def backward(ctx: Any, *gs: Any) -> Any:
            arguments = list(ctx.others)
            for i, value in zip(ctx.places, ctx.saved_tensors, strict=True):
                arguments[i] = value
            results: list[Tensor | None] = [None] * count
            if all(g is None for g in gs[:upstream]):
                return tuple(results)
            needs = [bool(ctx.needs_input_grad[i]) for i in wanted]
            found = getattr(torch.ops.rmx_kernels, f"reference_{name}_backward")(*arguments, *gs[:upstream], needs)
            for i, need, gradient in zip(wanted, needs, found, strict=True):
                results[i] = gradient if need else None
            return tuple(results)

        torch.library.define(forward_name, schema)
        torch.library.impl(forward_name, "default", forward)
        torch.library.register_fake(forward_name, fake)
        torch.library.register_autograd(forward_name, backward, setup_context=setup_context)
        torch.library.define(backward_name, f"{inputs[:-1]}, {given}, bool[] needs) -> Tensor[]")
        torch.library.impl(backward_name, "default", gradients)
        torch.library.register_fake(backward_name, fake_gradients)
        torch.library.register_autograd(backward_name, refuse(backward_name))
        return function

    return decorate
