"""Element-wise work of a decoder layer by the native kernels of a CPU: RMSNorm, the gated activation, the rotation."""

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.logits import compute_dtype


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean(x^2) + eps)) of a contiguous x [..., H]."""
    H = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(x.numel() // H, dtype=compute_dtype(x.dtype))
    weight = weight.to(x.dtype).contiguous()  # pointers keep nothing alive
    pointers = [native.address(t) for t in (x, weight, None, y, rstd)]
    arguments = native.Norm(*pointers, rstd.numel(), H, eps, offset, native.DTYPES[x.dtype], rounded)
    native.call("rmx_rms_norm", arguments)
    return y, rstd


def norm_gradient(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    dx, weight = torch.empty_like(x), weight.to(x.dtype).contiguous()
    pointers = [native.address(t) for t in (x, weight, g, dx, rstd)]
    arguments = native.Norm(*pointers, rstd.numel(), x.shape[-1], 0.0, offset, native.DTYPES[x.dtype], 0)
    native.call("rmx_rms_norm", arguments)
    return dx


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) * up of contiguous tensors."""
    y = torch.empty_like(gate)
    pointers = [native.address(t) for t in (gate, up, None, y, None)]
    native.call("rmx_gated_activation", native.Gated(*pointers, gate.numel(), native.DTYPES[gate.dtype], gelu))
    return y


def gated_gradients(g: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    pointers = [native.address(t) for t in (gate, up, g, d_gate, d_up)]
    native.call("rmx_gated_activation", native.Gated(*pointers, gate.numel(), native.DTYPES[gate.dtype], gelu))
    return d_gate, d_up


def rotated(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, inverse: bool) -> None:
    """Into y [B, heads, T, 2 D], strided as x may be but for the last dimension."""
    B, heads, T, width = x.shape
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    pointers = [x.data_ptr(), native.address(cos), native.address(sin), y.data_ptr()]
    strides = [*x.stride()[:3], *y.stride()[:3], 0 if cos.shape[0] == 1 else cos.stride(0)]
    dtype = native.DTYPES[x.dtype]
    native.call("rmx_rotate", native.Rotation(*pointers, *strides, B, T, heads, width // 2, dtype, inverse))
