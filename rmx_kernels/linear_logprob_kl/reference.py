"""Eager PyTorch: log-probs and KL of a student against a frozen base, tile by tile; serves all three loss operators.

With delta = log p_s - log p_b, KL(p_b || p_s) = sum p_b (e^delta - 1 - delta), because both sum to one. No term is
negative, identical inputs give exactly 0, and an error eps in either normaliser moves the sum by eps^2 / 2 only.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmx_kernels.results import LogprobKL
from rmx_kernels.tiles import GradientSink, RowSums, VocabTiles, add_at, pick

BASE_MASS_TOLERANCE = 0.05  # of sum p_b around 1: bf16 hidden states scored in another batch stay within it


def normalisers(tiles: VocabTiles, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(m, log d, z[target]) of each row; z[target] is NaN without a target. One product with the head."""
    sums = RowSums(tiles.N, tiles.dtype, tiles.x.device)
    chosen = sums.m.new_full((tiles.N,), float("nan"))
    for cols in tiles.columns():
        head = tiles.head(cols)
        for rows in tiles.rows():
            z = tiles(rows, cols, head)
            if target is not None:
                pick(chosen, z, target, rows, cols)
            sums.fold(rows, z, entropy=False)
    return *sums.finish(), chosen


def kl_terms(p_s: Tensor, p_b: Tensor, delta: Tensor) -> Tensor:
    """p_b (e^delta - 1 - delta) = p_s - p_b (1 + delta), without cancellation near 0 or overflow far from it."""
    d = delta.clamp(-0.5, 0.5)
    series = torch.full_like(d, 1 / 6227020800)  # Horner over 1/n!, n = 13 .. 2: 5e-15 of the sum at |delta| = 0.5
    for n in (479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2):
        series.mul_(d).add_(1 / n)
    near = series.mul_(d).mul_(d).mul_(p_b)
    far = p_s - p_b * (1 + delta)
    return torch.where(p_b == 0, p_s, torch.where(delta.abs() < 0.5, near, far))


def sweep(
    student: VocabTiles,
    base: VocabTiles | None,
    norm_s: tuple[Tensor, Tensor],
    norm_b: tuple[Tensor, Tensor] | None,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    sink: GradientSink,
) -> Tensor | None:
    """KL of each row (None without a base); adds (ce + kl) p_s - ce onehot - kl p_b to the sink, if it is active."""
    kl = None if base is None else torch.zeros_like(norm_s[0])
    mass = None if base is None else torch.zeros_like(norm_s[0])
    both = ce_weight + kl_weight if base is not None else ce_weight
    for cols in student.columns():
        head = student.head(cols)
        sink.open(cols, head)
        for rows in student.rows():
            z = student(rows, cols, head)
            log_s = (z - norm_s[0][rows, None]) - norm_s[1][rows, None]
            p_s = log_s.exp()
            dz = p_s * both[rows, None] if sink.active else None
            if base is not None:
                assert norm_b is not None and kl is not None and mass is not None
                log_b = (base(rows, cols, head) - norm_b[0][rows, None]) - norm_b[1][rows, None]
                p_b = log_b.exp()
                delta = log_s.sub_(log_b)
                kl[rows] += kl_terms(p_s, p_b, delta).sum(-1)
                mass[rows] += p_b.sum(-1)
                if dz is not None:
                    dz.addcmul_(p_b, kl_weight[rows, None], value=-1)
            if dz is not None:
                add_at(dz, -ce_weight[rows], target[rows], cols)
                sink.add(rows, dz, z)
        sink.close()
    if kl is not None and mass is not None:
        kl[(mass - 1).abs() > BASE_MASS_TOLERANCE] = float("nan")  # base_lse belongs to other logits
    return kl


class _LogprobKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        student = VocabTiles(x, weight, bias, temperature=temperature, softcap=softcap)
        base = VocabTiles(base_x, weight, bias, temperature=temperature, softcap=softcap)
        m, log_d, chosen = normalisers(student, target)
        base_m, base_log_d, _ = normalisers(base, None)
        zero = torch.zeros_like(m)
        off = GradientSink(student, False, False, False)
        kl = sweep(student, base, (m, log_d), (base_m, base_log_d), target, zero, zero, off)
        assert kl is not None
        ctx.save_for_backward(x, base_x, weight, bias, target, m, log_d, base_m, base_log_d)
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        return (chosen - m) - log_d, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logprob: Tensor | None, g_kl: Tensor | None) -> Any:
        x, base_x, weight, bias, target, m, log_d, base_m, base_log_d = ctx.saved_tensors
        scaling = {"temperature": ctx.temperature, "softcap": ctx.softcap}
        student = VocabTiles(x, weight, bias, **scaling)
        base = VocabTiles(base_x, weight, bias, **scaling) if g_kl is not None else None
        sink = GradientSink(student, ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        zero = torch.zeros_like(m)
        ce = zero if g_logprob is None else -g_logprob
        sweep(student, base, (m, log_d), (base_m, base_log_d), target, ce, zero if g_kl is None else g_kl, sink)
        dx, dweight, dbias = sink.gradients()
        return dx, None, dweight, dbias, None, None, None


def run(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> LogprobKL:
    """Arguments as checked by the public operator."""
    lead, H = hidden.shape[:-1], hidden.shape[-1]
    with torch.autocast(hidden.device.type, enabled=False):
        logprob, kl = _LogprobKL.apply(
            hidden.reshape(-1, H),
            base_hidden.detach().reshape(-1, H),
            weight,
            bias,
            target.reshape(-1).long(),
            temperature,
            softcap,
        )
    return LogprobKL(logprob.view(lead), kl.view(lead))
