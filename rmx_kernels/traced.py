"""The choice of an implementation as torch.compile sees it: a constant. Imported while it traces, and not before."""

import torch

from rmx_kernels import dispatch


def _choose(op: str, impl: str | None, device: str, dtype: torch.dtype) -> str:
    return dispatch.remembered(op, impl, device, dtype)


choose = torch.compiler.assume_constant_result(_choose)
