"""Attention of packed sequences on a CPU in float32, by a native kernel: twice as fast as products of padded groups.

It reads the sequences where they lie, without padding or a copy, and leaves out the keys that no query of a block sees.
"""

from typing import Any

import torch
from torch import Tensor

from rmx.attention.packing import Frame, Packing
from rmx_kernels import native

COLUMNS, ROWS, QUERIES = 16, 4, 64  # of csrc/packed_attention.cpp: widths in steps of, and rows of its scratch


def fits(q: Tensor, k: Tensor, v: Tensor, cap: float | None) -> bool:
    """Whether the native kernel is there and takes these: float32 on a CPU, no softcap, heads of one width."""
    D = q.shape[-1]
    cpu = q.device.type == "cpu" and cap is None and not native.missing()
    same = all(x.dtype == torch.float32 and x.shape[-1] == D for x in (q, k, v))
    return cpu and same and D % COLUMNS == 0 and q.shape[1] % k.shape[1] == 0


def forward(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(the result, its norms [T, Hq, 2]: the largest score of a row, and 1 / sum exp(score - it))."""
    q, k, v = (_dense(x) for x in (q, k, v))
    out, norms = q.new_empty(q.shape), q.new_empty(*q.shape[:2], 2)
    _call((q, k, v), packing, scale, window, out, norms)
    return out, norms


def backward(
    gradient: Tensor, kept: tuple[Tensor, ...], packing: Packing | Frame, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``kept``: q, k, v and the two results."""
    *inputs, out, norms = kept
    q, k, v = (_dense(x) for x in inputs)
    found = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _call((q, k, v), packing, scale, window, out, norms, gradient.contiguous(), found)
    return found


def _dense(x: Tensor) -> Tensor:
    """With the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(
    inputs: tuple[Tensor, Tensor, Tensor],
    packing: Packing | Frame,
    scale: float,
    window: int | None,
    out: Tensor,
    norms: Tensor,
    gradient: Tensor | None = None,
    found: tuple[Tensor, ...] = (),
) -> None:
    q, k, _ = inputs
    Hq, Hk, D, ends = q.shape[1], k.shape[1], q.shape[2], packing.ends
    N, width = len(ends) - 1, -(-packing.longest // COLUMNS) * COLUMNS
    slots = min(N * Hk, torch.get_num_threads())
    scratch = native.scratch(slots * width * ((D + ROWS) if gradient is None else 2 * (D + QUERIES)), q.dtype)
    pointers: list[Any] = [x.data_ptr() for x in inputs]
    pointers += [native.address(x) for x in (gradient, out, norms, *(found or [None] * 3), scratch)]
    strides = [stride for x in inputs for stride in x.stride()[:2]]
    sizes = N, Hk, Hq // Hk, D, packing.longest, window or packing.longest, slots
    arguments = native.Packed(*pointers, native.address(ends), *strides, *sizes, scale)
    native.call("rmx_packed_attention", arguments)
