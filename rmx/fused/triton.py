"""Element-wise work of a decoder layer as Triton kernels: RMSNorm, the gated activation, the rotation of heads.

Sizes are specialised, since a mask whose end is no multiple of 16 forbids loads of 16 bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmx_kernels.head.kernels import tanh
from rmx_kernels.head.launch import launch, power_of_2

BLOCK = 1024  # of the gated activation
GELU_SCALE = tl.constexpr((2 / torch.pi) ** 0.5)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def norm_forward(x, weight, y, rstd, H, eps, offset, ROUND: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < H
    value = tl.load(x + row * H + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / H + eps)
    unit = wide * scale
    if ROUND:
        unit = unit.to(value.dtype).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + row * H + column, (unit * w).to(value.dtype), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def norm_backward(g, x, weight, rstd, dx, H, offset, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < H
    value = tl.load(x + row * H + column, mask=inside, other=0.0)
    scale = tl.load(rstd + row)
    unit = value.to(tl.float32) * scale
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    along = tl.load(g + row * H + column, mask=inside, other=0.0).to(tl.float32) * w
    d = scale * (along - unit * (tl.sum(along * unit) / H))
    tl.store(dx + row * H + column, d.to(value.dtype), mask=inside)


@triton.jit
def activated(z, GELU: tl.constexpr):
    """(act(z), act'(z)) in float32: silu(z) = z sigmoid(z), or GELU with tanh."""
    if GELU:
        inner = GELU_SCALE * (z + GELU_CUBE * z * z * z)
        t = tanh(inner)
        a = 0.5 * z * (1 + t)
        d = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * z * z)
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
        a = z * s
        d = s * (1 + z * (1 - s))
    return a, d


@triton.jit
def gated_forward(gate, up, y, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(gate + at, mask=inside, other=0.0)
    a, _ = activated(z.to(tl.float32), GELU)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (a.to(z.dtype).to(tl.float32) * u).to(z.dtype), mask=inside)


@triton.jit
def gated_backward(g, gate, up, d_gate, d_up, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(gate + at, mask=inside, other=0.0)
    a, slope = activated(z.to(tl.float32), GELU)
    upstream = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gate + at, (upstream * u * slope).to(z.dtype), mask=inside)
    tl.store(d_up + at, (upstream * a).to(z.dtype), mask=inside)


@triton.jit(do_not_specialize=["T", "heads"])
def rotate(
    x, x_batch, x_head, x_token,  # [B, heads, T, 2 D], the last dimension without a stride
    cos, sin, table_batch,  # [B or 1, T, 2 D]
    y, y_batch, y_head, y_token,
    T, heads,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) of the two halves of a head, or that map transposed."""
    token, batch = tl.program_id(0).to(tl.int64) % T, tl.program_id(0).to(tl.int64) // T
    half, head = tl.arange(0, HALF)[None, :], tl.arange(0, HEADS)[:, None]
    known = half < D
    inside = (head < heads) & known
    table = batch * table_batch + token * (2 * D) + half
    cos1 = tl.load(cos + table, mask=known, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + table + D, mask=known, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + table, mask=known, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + table + D, mask=known, other=0.0).to(tl.float32)
    at = batch * x_batch + head * x_head + token * x_token + half
    x1 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + D, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    to = y + batch * y_batch + head * y_head + token * y_token + half
    tl.store(to, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(to + D, y2.to(y.dtype.element_ty), mask=inside)


def _warps(width: int) -> int:
    return min(16, max(1, width // 512))


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> tuple[Tensor, Tensor]:
    """(y, 1 / sqrt(mean(x^2) + eps)) of a contiguous x [..., H]."""
    H = x.shape[-1]
    rows, y = x.numel() // H, torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    width = power_of_2(H)
    constants = {"ROUND": rounded, "WIDTH": width}
    launch(norm_forward, rows, x.device, x, weight, y, rstd, H, eps, offset, warps=_warps(width), **constants)
    return y, rstd


def norm_gradient(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float) -> Tensor:
    H, dx = x.shape[-1], torch.empty_like(x)
    width = power_of_2(H)
    arguments = (g, x, weight, rstd, dx, H, offset)
    launch(norm_backward, rstd.numel(), x.device, *arguments, warps=_warps(width), WIDTH=width)
    return dx


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """act(gate) * up of contiguous tensors."""
    y, size = torch.empty_like(gate), gate.numel()
    launch(gated_forward, -(-size // BLOCK), y.device, gate, up, y, size, warps=4, GELU=gelu, BLOCK=BLOCK)
    return y


def gated_gradients(g: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    d_gate, d_up, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    arguments = (g, gate, up, d_gate, d_up, size)
    launch(gated_backward, -(-size // BLOCK), g.device, *arguments, warps=4, GELU=gelu, BLOCK=BLOCK)
    return d_gate, d_up


def rotated(x: Tensor, cos: Tensor, sin: Tensor, y: Tensor, *, inverse: bool) -> None:
    """Into y [B, heads, T, 2 D], strided as x may be but for the last dimension."""
    B, heads, T, width = x.shape
    table_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    constants: dict[str, Any] = {"INVERSE": inverse, "HEADS": power_of_2(heads), "D": width // 2}
    constants["HALF"] = power_of_2(width // 2)
    launch(
        *(rotate, B * T, x.device, x, *x.stride()[:3], cos, sin, table_batch, y, *y.stride()[:3], T, heads),
        warps=4,
        **constants,
    )
