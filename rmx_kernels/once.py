"""Backward passes that are made of tiles, and so have no derivative of their own: a second one is refused.

torch's once_differentiable looks at the upstream gradients alone, which are constants in a gradient penalty; what
depends on the inputs would be dropped in silence.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.logits import Gradients
from rmx_kernels.registration import refuse


class _Refused(torch.autograd.Function):
    """The gradient as it is, whose differentiation is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        refuse(f"rmx_kernels, {ctx.name}")()


def differentiable_once(name: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Make a backward of a function (ctx, saved tensors, upstream gradients) -> gradients; saved tensors are read once.

    Non-reentrant checkpointing lets them be read no second time. All inputs that want a gradient have to be saved.
    """

    def decorate(function: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(function)
        def backward(ctx: Any, *upstream: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors
            with torch.no_grad():
                gradients = function(ctx, saved, *upstream)
            used = [x for x in (*saved, *upstream) if x is not None and x.requires_grad]
            if not (torch.is_grad_enabled() and used):  # without create_graph there is no second time
                return gradients
            return tuple(None if g is None else _Refused.apply(name, g, *used) for g in gradients)

        return backward

    return decorate
