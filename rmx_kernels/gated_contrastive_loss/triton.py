"""Triton kernels: one read of student and base for all values, one more with the gradient's write. Also serve the
linear losses, on whole rows of logits.

``fold`` takes a segment of a row a program: its m and d for student and base, and the KL of the two distributions
restricted to the segment, in registers. By the chain rule the KL of the row is sum pi_g KL_g + KL(pi || rho), where pi
and rho are the masses that base and student give to segment g: ``finish`` adds it up. No term is negative, and equal
rows give exactly 0, from a single read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rmx_kernels import configs
from rmx_kernels.gated_contrastive_loss.ops import run as run
from rmx_kernels.linear_logprob_kl.reference import BASE_MASS_TOLERANCE
from rmx_kernels.vec_triton import (
    Rows,
    exact_log,
    kl_terms,
    launch,
    merged,
    place,
    power_of_2,
    scaled,
    scaling,
    shifted_exp,
    unscaled,
)


@triton.jit
def row_weights(ce_weight, kl_weight, row):
    """(ce, kl) of a row; without weights, 1 and 1."""
    ce, kl = 1.0, 1.0
    if ce_weight is not None:
        ce, kl = tl.load(ce_weight + row), tl.load(kl_weight + row)
    return ce, kl


@triton.jit
def fold(
    x, inner, outer_stride, stride,  # the student's logits [N, V]
    base_x, base_inner, base_outer_stride, base_stride,  # the base's, read where kl is not 0
    ce_weight, kl_weight,  # [N], or None for all rows
    m, d, base_m, base_d, part_kl,  # [N, S]
    V, S, per_temperature, softcap,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    ce, kl = row_weights(ce_weight, kl_weight, row)
    if (ce != 0) | (kl != 0):
        column = segment * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < V
        z = scaled(tl.load(x + start + column, mask=inside, other=0.0), inside, per_temperature, softcap)
        block_m, u, e = shifted_exp(z)
        block_d = tl.sum(e)
        part = row * S + segment
        tl.store(m + part, block_m)
        tl.store(d + part, block_d)
        if kl != 0:
            _, _, start = place(tl.program_id(0), S, base_inner, base_outer_stride, base_stride)
            base_z = tl.load(base_x + start + column, mask=inside, other=0.0)
            base_z = scaled(base_z, inside, per_temperature, softcap)
            block_base_m, base_u, base_e = shifted_exp(base_z)
            block_base_d = tl.sum(base_e)
            delta = (u - base_u) - (tl.log(block_d) - tl.log(block_base_d))  # log p_s - log p_b within the segment
            terms = kl_terms(e / block_d, base_e / block_base_d, delta)
            tl.store(base_m + part, block_base_m)
            tl.store(base_d + part, block_base_d)
            tl.store(part_kl + part, tl.sum(terms))


@triton.jit
def finish(
    x, inner, outer_stride, stride,  # the student's logits [N, V]
    target, ce_weight, kl_weight,  # [N]; the weights may be None
    base_lse,  # [N] or None: as the caller knows it
    m, d, base_m, base_d, part_kl,  # [N, S]
    row_logprob, row_kl,  # [N], NaN where not computed
    row_m, row_log_d, row_base_m, row_base_log_d,  # [N], likewise
    V, S, tolerance, per_temperature, softcap,
    SEGMENTS: tl.constexpr,
):  # fmt: skip
    row, _, start = place(tl.program_id(0), 1, inner, outer_stride, stride)
    ce, kl = row_weights(ce_weight, kl_weight, row)
    if (ce != 0) | (kl != 0):
        segment = tl.arange(0, SEGMENTS)
        part, known = row * S + segment, segment < S
        segment_m = tl.load(m + part, mask=known, other=float("-inf"))
        segment_d = tl.load(d + part, mask=known, other=0.0)
        M, weight, _step, D = merged(segment_m, segment_d)
        log_d = exact_log(D).to(tl.float32)
        at = tl.load(target + row)
        valid = (at >= 0) & (at < V)
        z = scaled(tl.load(x + start + at, mask=valid, other=0.0), valid, per_temperature, softcap)
        tl.store(row_logprob + row, tl.where(valid, (z - M) - log_d, float("nan")))
        tl.store(row_m + row, M)
        tl.store(row_log_d + row, log_d)
        if kl != 0:
            segment_base_m = tl.load(base_m + part, mask=known, other=float("-inf"))
            segment_base_d = tl.load(base_d + part, mask=known, other=0.0)
            base_M, base_weight, _base_step, base_D = merged(segment_base_m, segment_base_d)
            base_log_d = exact_log(base_D).to(tl.float32)
            rho, pi = weight * segment_d / D, base_weight * segment_base_d / base_D
            moved = (segment_m - M) - (segment_base_m - base_M)
            delta = moved + (tl.log(segment_d) - tl.log(segment_base_d)) - (log_d - base_log_d)
            within = tl.load(part_kl + part, mask=known, other=0.0)
            # A segment without mass of the base adds nothing; one without the student's is infinite below.
            within = tl.where((pi == 0) | (segment_d == 0), 0.0, pi * within)
            total = tl.sum(within + kl_terms(rho, pi, delta)) + (M - M) + (base_M - base_M)
            if base_lse is not None:
                mass = tl.exp((base_M - tl.load(base_lse + row).to(tl.float32)) + base_log_d)
                fits = tl.abs(mass - 1) <= tolerance
                total = tl.where(fits, total, float("nan"))
                base_M = tl.where(fits, base_M, float("nan"))
            tl.store(row_kl + row, total)
            tl.store(row_base_m + row, base_M)
            tl.store(row_base_log_d + row, base_log_d)


@triton.jit
def gradient(
    x, inner, outer_stride, stride,  # the student's logits [N, columns], the columns from ``first`` on
    base_x, base_inner, base_outer_stride, base_stride,  # the base's, read where kl is not 0
    dx, dx_stride,  # [N, columns]; may be x
    target, ce_weight, kl_weight,  # [N]
    upstream,  # a scalar, or None for 1
    m, log_d, base_m, base_log_d,  # [N]
    first, columns, V, S, per_temperature, softcap,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row, segment, start = place(tl.program_id(0), S, inner, outer_stride, stride)
    at = segment * COLUMNS + tl.arange(0, COLUMNS)
    inside = at < columns
    to = dx + row * dx_stride + at
    ce, kl = tl.load(ce_weight + row), tl.load(kl_weight + row)
    if (ce != 0) | (kl != 0):
        z = scaled(tl.load(x + start + at, mask=inside, other=0.0), inside, per_temperature, softcap)
        p = tl.exp((z - tl.load(m + row)) - tl.load(log_d + row))
        chosen = tl.load(target + row)
        dz = tl.where(first + at == chosen, (p - 1) * ce, p * ce)
        if kl != 0:
            _, _, start = place(tl.program_id(0), S, base_inner, base_outer_stride, base_stride)
            base_z = tl.load(base_x + start + at, mask=inside, other=0.0)
            base_z = scaled(base_z, inside, per_temperature, softcap)
            base_p = tl.exp((base_z - tl.load(base_m + row)) - tl.load(base_log_d + row))
            dz += kl * (p - base_p)  # exact where they are close
        if (chosen < 0) | (chosen >= V):
            dz += float("nan")
        if upstream is not None:
            dz *= tl.load(upstream)
        dz = unscaled(dz, z, per_temperature, softcap)
        tl.store(to, dz.to(dx.dtype.element_ty), mask=inside)
    else:
        tl.store(to, tl.zeros([COLUMNS], dx.dtype.element_ty), mask=inside)


def row_terms(
    x: Rows,
    base_x: Rows,
    n: int,
    target: Tensor,
    weights: tuple[Tensor, Tensor] | tuple[None, None],
    base_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [n], kl [n], norms [4, n]) of the first n rows; NaN where not computed."""
    V, device = x.columns, target.device
    setting = configs.config(device)
    S = -(-V // setting.loss.columns)
    like = torch.empty(0, dtype=torch.float32, device=device)
    parts = [like.new_empty(n, S) for _ in range(5)]
    terms = like.new_full((6, n), float("nan"))
    scale = scaling(temperature, softcap)
    rows = (*x.arguments, *base_x.arguments)
    launch(
        *(fold, n * S, device, *rows, *weights, *parts, V, S, *scale),
        warps=setting.loss.warps,
        COLUMNS=setting.loss.columns,
    )
    launch(
        *(finish, n, device, *x.arguments, target, *weights, base_lse, *parts, *terms),
        *(V, S, BASE_MASS_TOLERANCE, *scale),
        warps=1,
        SEGMENTS=power_of_2(S),
    )
    return terms[0], terms[1], terms[2:]


def row_gradient(
    x: Rows,
    base_x: Rows,
    n: int,
    dx: Tensor,
    target: Tensor,
    weights: tuple[Tensor, Tensor],
    norms: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    upstream: Tensor | None = None,
    first: int = 0,
    V: int | None = None,
) -> None:
    """dx [n, columns] of the first n rows, columns from ``first`` on of V; in place if dx holds x."""
    sweep = configs.config(dx.device).loss_gradient
    S = -(-x.columns // sweep.columns)
    launch(
        *(gradient, n * S, dx.device, *x.arguments, *base_x.arguments, dx, dx.stride(0), target, *weights, upstream),
        *(*norms, first, x.columns, x.columns if V is None else V, S, *scaling(temperature, softcap)),
        warps=sweep.warps,
        COLUMNS=sweep.columns,
    )


def weighted_sum(ce: Tensor, kl_weight: Tensor, logprob: Tensor, kl: Tensor) -> Tensor:
    """The loss; an impossible target or an infinite KL counts only where it has a weight. Waits for no device."""
    terms = [(-ce, logprob), (kl_weight, kl)]
    parts = (torch.where(weight != 0, weight.double() * term.double(), 0.0).sum() for weight, term in terms)
    return sum(parts, start=torch.zeros((), dtype=torch.float64, device=ce.device)).to(torch.float32)


def flat(ce_weight: Tensor, kl_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B...] as float32 [N], without strides."""
    ce, kl = (x.reshape(-1).to(torch.float32).contiguous() for x in (ce_weight, kl_weight))
    return ce, kl


def forward(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::gated_contrastive_loss."""
    x, base_x, weights = Rows(logits), Rows(base_logits), flat(ce_weight, kl_weight)
    ids = target.reshape(-1).contiguous()
    logprob, kl, norms = row_terms(x, base_x, x.N, ids, weights, None, temperature, softcap)
    loss = weighted_sum(*weights, logprob, kl)
    return loss, logprob.view(target.shape).clone(), kl.view(target.shape).clone(), norms.clone()


def backward(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    norms: Tensor,
    g_loss: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """The kernel of rmx_kernels::gated_contrastive_loss_backward."""
    x, base_x, weights = Rows(logits), Rows(base_logits), flat(ce_weight, kl_weight)
    ids, upstream = target.reshape(-1).contiguous(), g_loss.to(torch.float32)
    dx = torch.empty_like(logits, memory_format=torch.contiguous_format)
    to = dx.view(-1, x.columns)
    row_gradient(x, base_x, x.N, to, ids, weights, norms, temperature, softcap, upstream=upstream)
    return dx
