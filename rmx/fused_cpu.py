"""Element-wise work of a decoder layer, and its products with frozen weights, by the native kernels of a CPU."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmx_kernels import native
from rmx_kernels.tiles import compute_dtype

PANEL = 16  # of csrc/product.cpp: columns in steps of


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


def pays(weight: Tensor) -> bool:
    """Whether the native product takes a weight [out, in], forward and backward, and is known to be the faster one.

    The kind of CPU alone decides, never a measurement: a training that goes on must find the same bits.
    """
    kind = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
    return kind and native.product() == 2 and fits(weight)


def fits(weight: Tensor) -> bool:
    """Whether the native product takes a weight [out, in]."""
    wide = all(size > 0 and size % PANEL == 0 for size in weight.shape)
    return native.product() > 0 and weight.dtype == torch.float32 and wide and weight.stride(-1) == 1


def product(a: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """a [M, K] w [K, N] in float32, or added to ``out``; w is a weight or its transposed view."""
    M, (K, N) = a.shape[0], w.shape
    a = a if a.stride(-1) == 1 else a.contiguous()
    add = out is not None
    out = a.new_empty(M, N) if out is None else out
    packed = torch.empty(K * N)
    pointers = [a.data_ptr(), w.data_ptr(), packed.data_ptr(), out.data_ptr()]
    sizes = [a.stride(0), *w.stride(), out.stride(0), M, N, K]
    native.call("rmx_product_f32", native.Product(*pointers, *sizes, add))
    return out


class Product(torch.autograd.Function):
    """x [..., in] W^T of a frozen weight W [out, in]; d x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x.flatten(0, -2), weight.T).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return product(g.flatten(0, -2), weight).view(*g.shape[:-1], -1), None
