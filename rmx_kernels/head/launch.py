"""Launching Triton kernels: where the rows of a tensor are, and each compilation found once."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.logits import Logits

Scaling = tuple[float, float, float | None, Tensor | None]


class Rows:
    """The rows of x [B..., columns] as (tensor, inner, outer stride, stride): without a copy where two strides do."""

    def __init__(self, x: Tensor) -> None:
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            x = x.contiguous()
        if x.dim() > 2:
            try:
                x = x.view(-1, *x.shape[-2:])
            except RuntimeError:
                x = x.reshape(-1, x.shape[-1])
        while x.dim() < 3:
            x = x.unsqueeze(0)
        self.x = x
        self.N, self.columns = x.shape[0] * x.shape[1], x.shape[2]

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.x, max(1, self.x.shape[1]), self.x.stride(0), self.x.stride(1)


_compiled: dict[Any, Any] = {}  # what Triton compiled, by all that it was compiled for


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int, **constants: Any) -> None:
    """Launch on the device of the tensors, which need not be the current one.

    Triton finds the compilation that fits the arguments anew at every launch, which takes longer than a small kernel
    runs. So it is asked once for each kind of arguments.
    """
    if programs == 0:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, programs, device, *arguments, warps=warps, **constants)
        return
    if device.type != "cuda":
        kernel[(programs,)](*arguments, **constants, num_warps=warps)
        return
    key = (kernel, device.index, warps, *constants.items(), *_kinds(arguments))
    found = _compiled.get(key)
    if found is None:
        _compiled[key] = kernel[(programs,)](*arguments, **constants, num_warps=warps)
    else:
        found[(programs, 1, 1)](*arguments, *[constants[name] for name in kernel.arg_names[len(arguments) :]])


def _kinds(arguments: tuple[Any, ...]) -> list[Any]:
    """All of the arguments that Triton compiles for: types, and of integers and addresses what follows below."""
    kinds: list[Any] = []
    addresses = 0
    for argument in arguments:
        of = argument.__class__
        if of is int:
            kinds.append(_kind_of_int(argument))
        elif of is Tensor or isinstance(argument, Tensor):
            kinds.append(argument.dtype)
            addresses |= argument.data_ptr()
        else:
            kinds.append(of)
    if addresses % 16:  # of which tensors
        kinds += [argument.data_ptr() % 16 == 0 for argument in arguments if isinstance(argument, Tensor)]
    return kinds


@functools.lru_cache(1 << 16)
def _kind_of_int(argument: int) -> tuple[bool, bool, bool]:
    return argument % 16 == 0, argument == 1, -(2**31) <= argument < 2**31


def power_of_2(n: int) -> int:
    """The next one, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def scaling(z: Logits, rows: Tensor | slice = slice(None)) -> Scaling:
    """(c, 1 / temperature, softcap, row_temperature [n] or None): the arguments of every kernel that scales logits.

    A kernel computes the first two itself where it is given the last, of some of the flattened rows.
    """
    return math.log2(math.e) / z.temperature, 1.0 / z.temperature, z.softcap, z.temperatures(rows)
