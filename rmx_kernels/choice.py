"""The choice of an implementation at the public doors."""

import torch
from torch import Tensor

from rmx_kernels import dispatch


def chosen(op: str, impl: str | None, x: Tensor) -> str:
    """:func:`dispatch.choose` for the device and dtype of x, asked once in a process for each.

    Compiled functions see a constant. The name travels through the schema of the registered operators, which look the
    module up.
    """
    if torch.compiler.is_compiling():
        from rmx_kernels import traced  # takes seconds, unless torch.compile is at work already

        return traced.choose(op, impl, x.device.type, x.dtype)
    return dispatch.remembered(op, impl, x.device.type, x.dtype)
