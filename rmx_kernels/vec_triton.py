"""What the Triton kernels share: where rows are, scaled logits, sortable keys, the terms of the KL, and launching."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_K = 128  # of the top-k in registers; above it the rows are sorted

LOWEST = tl.constexpr(-127.0)
NO_KEY = tl.constexpr(-(2**63))


@triton.jit
def place(pid, S, inner, outer_stride, stride):
    """(row, its segment, where the row begins) of a program; rows lie in groups of ``inner``."""
    row = (pid // S).to(tl.int64)
    return row, pid % S, (row // inner) * outer_stride + (row % inner) * stride


@triton.jit
def tanh(x):
    """Up to 0.625 x + x^3 P(x^2) / Q(x^2) (coefficients: Cephes mathematical library, S. Moshier, tanh.c)."""
    a = tl.abs(x)
    s = x * x
    P = (-9.64399179425052238628e-1 * s - 9.92877231001918586564e1) * s - 1.61468768441708447952e3
    Q = ((s + 1.12811678491632931402e2) * s + 2.23548839060100448583e3) * s + 4.84406305325125486048e3
    near = x + x * s * (P / Q)
    e = tl.exp(-2 * a)
    far = 1 - (e + e) / (1 + e)
    return tl.where(a < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def scaled(x, inside, per_temperature, softcap):
    """z in float32 of raw logits, -inf outside."""
    z = x.to(tl.float32)
    if softcap is not None:
        z = softcap * tanh(z / softcap)
    return tl.where(inside, z * per_temperature, float("-inf"))


@triton.jit
def unscaled(dz, z, per_temperature, softcap):
    """The gradient with respect to the raw logits: dcap(u) / du = 1 - (cap / softcap)^2."""
    if softcap is not None:
        ratio = z / (softcap * per_temperature)
        dz = dz * (1 - ratio * ratio)
    return dz * per_temperature


@triton.jit
def shifted_exp(z):
    """(m, u = z - m, e^u) of a block, where m = max z; of nothing but -inf, u = z."""
    m = tl.max(z)
    u = z - tl.where(m == float("-inf"), 0.0, m)
    return m, u, tl.exp(u)


@triton.jit
def bounded(log_p):
    """From below, where exp gives 0 anyway: 0 * -inf has no place in a sum. NaN stays NaN."""
    return tl.where(log_p < LOWEST, LOWEST, log_p)


@triton.jit
def merged(m, d):
    """(M, weights, steps, D): M = max m over the segments, D = sum weight d, weight = e^step, step = m - M."""
    M = tl.max(m)
    step = tl.where(m == float("-inf"), 0.0, m - tl.where(float("-inf") == M, 0.0, M))
    weight = tl.where(m == float("-inf"), 0.0, tl.exp(step))
    M = tl.where(tl.abs(M) < float("inf"), M, float("nan"))
    return M, weight, step, tl.sum(weight * d)


@triton.jit
def exact_log(x):
    """log in float64 of a float32, where float32 has too few digits left for x near 1."""
    return tl.log(x.to(tl.float64))


@triton.jit
def kl_terms(p_s, p_b, delta):
    """p_b (e^delta - 1 - delta) = p_s - p_b (1 + delta), without cancellation near 0 or overflow far from it.

    Near: x^2 times the minimax polynomial of (e^x - 1 - x) / x^2 on [-1/2, 1/2] (relative error 2.4e-8).
    """
    x = tl.where(tl.abs(delta) < 0.5, delta, 0.0)
    q = 1.9875631551258266e-4
    q = q * x + 1.3982001692056656e-3
    q = q * x + 8.333452045917511e-3
    q = q * x + 4.166579619050026e-2
    q = q * x + 1.666666567325592e-1
    q = q * x + 0.5
    near = p_b * (q * x * x)
    far = p_s - p_b * (1 + delta)
    return tl.where(p_b == 0, p_s, tl.where(tl.abs(delta) < 0.5, near, far))


@triton.jit
def key_of(z, index):
    """int64 that sorts as z does, and among equals by the lower index first; above NO_KEY."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 equals 0
    high = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (high.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def index_of(key):
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def value_of(key):
    high = (key >> 32).to(tl.int32)
    return (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


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


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int, **constants: Any) -> None:
    """Launch on the device of the tensors, which need not be the current one."""
    if programs == 0:
        return
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, num_warps=warps)
    else:
        kernel[(programs,)](*arguments, **constants, num_warps=warps)


def power_of_2(n: int) -> int:
    """The next one, at least 1."""
    return 1 << max(0, n - 1).bit_length()


def scaling(temperature: float, softcap: float | None) -> tuple[float, float | None]:
    """The two arguments of every kernel that scales logits."""
    return 1.0 / temperature, softcap
