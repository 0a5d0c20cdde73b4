"""Eager PyTorch: log-probs and KL of a student against a frozen base, tile by tile; serves all three loss operators.

With delta = log p_s - log p_b, KL(p_b || p_s) = sum p_b (e^delta - 1 - delta), because both sum to one. No term is
negative, identical inputs give exactly 0, and an error eps in either normaliser moves the sum by eps^2 / 2 only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmx_kernels import traced_reference
from rmx_kernels.once import differentiable_once
from rmx_kernels.results import LogprobKL
from rmx_kernels.tiles import GradientSink, RowSums, VocabTiles, add_at, compute_dtype, flat, pick

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


@dataclass(frozen=True)
class RowGroup:
    """Rows that are treated alike, with their normalisers (m, log d); without a base there is no KL."""

    student: VocabTiles
    target: Tensor
    norm: tuple[Tensor, Tensor]
    base: VocabTiles | None = None
    base_norm: tuple[Tensor, Tensor] | None = None


def sweep(
    groups: Sequence[RowGroup], weights: Sequence[tuple[Tensor, Tensor]], sink: GradientSink
) -> list[Tensor | None]:
    """KL of each row of each group; adds ce (p_s - onehot) + kl (p_s - p_b) to the sink, if it is active.

    weights: (ce_weight, kl_weight) of each group's rows. Rows whose base normaliser belongs to other logits, so that
    p_b does not sum to one, get NaN everywhere.
    """
    kls = [None if group.base is None else torch.zeros_like(group.norm[0]) for group in groups]
    masses = [None if kl is None else torch.zeros_like(kl) for kl in kls]
    for cols in groups[0].student.columns() if groups else ():
        head = groups[0].student.head(cols)
        sink.open(cols, head)
        for group, (ce, kl_weight), kl, mass in zip(groups, weights, kls, masses, strict=True):
            m, log_d = group.norm
            for rows in group.student.rows():
                z = group.student(rows, cols, head)
                log_s = (z - m[rows, None]) - log_d[rows, None]
                p_s = log_s.exp()
                dz = p_s * ce[rows, None] if sink.active else None
                if group.base is not None and group.base_norm is not None and kl is not None and mass is not None:
                    base_m, base_log_d = group.base_norm
                    log_b = (group.base(rows, cols, head) - base_m[rows, None]) - base_log_d[rows, None]
                    p_b = log_b.exp()
                    delta = log_s.sub_(log_b)
                    kl[rows] += kl_terms(p_s, p_b, delta).sum(-1)
                    mass[rows] += p_b.sum(-1)
                    if dz is not None:  # p_s - p_b first: it is exact where they are close
                        dz.addcmul_(p_s.sub_(p_b), kl_weight[rows, None])
                if dz is not None:
                    add_at(dz, -ce[rows], group.target[rows], cols)
                    sink.add(group.student, rows, dz, z)
        sink.close()
    for group, kl, mass in zip(groups, kls, masses, strict=True):
        if kl is not None and mass is not None:
            bad = (mass - 1).abs() > BASE_MASS_TOLERANCE
            kl[bad] = float("nan")
            sink.poison(group.student, bad)
    return kls


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    row = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return row, torch.empty_like(row)


@traced_reference.register(
    "logprob_kl",
    f"(Tensor x, Tensor base_x, {traced_reference.LINEAR}, Tensor target, float temperature, float? softcap) -> "
    "(Tensor, Tensor)",
    _fake,
    (0, 2, 3, 4, 5),
    upstream=2,
)
class _LogprobKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
        target: Tensor,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
        student = VocabTiles(x, weight, bias, lora_hidden, lora_weight, **scaling)
        base = VocabTiles(base_x, weight, bias, **scaling)
        m, log_d, chosen = normalisers(student, target)
        base_m, base_log_d, _ = normalisers(base, None)
        zero = torch.zeros_like(m)
        group = RowGroup(student, target, (m, log_d), base, (base_m, base_log_d))
        (kl,) = sweep([group], [(zero, zero)], GradientSink(student))
        assert kl is not None
        tensors = x, base_x, weight, bias, lora_hidden, lora_weight, target
        ctx.save_for_backward(*tensors, m, log_d, base_m, base_log_d)
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return (chosen - m) - log_d, kl

    @staticmethod
    @differentiable_once("linear_logprob_kl")
    def backward(ctx: Any, saved: Any, g_logprob: Tensor | None, g_kl: Tensor | None) -> Any:
        x, base_x, weight, bias, *lora, target, m, log_d, base_m, base_log_d = saved
        student = VocabTiles(x, weight, bias, *lora, **ctx.scaling)
        base = None if g_kl is None else VocabTiles(base_x, weight, bias, **ctx.scaling)
        sink = GradientSink(student, ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6])
        zero = torch.zeros_like(m)
        weights = zero if g_logprob is None else -g_logprob, zero if g_kl is None else g_kl
        with torch.autocast(x.device.type, enabled=False):
            sweep([RowGroup(student, target, (m, log_d), base, (base_m, base_log_d))], [weights], sink)
        dx, *others = sink.gradients()
        return dx, None, *others, None, None, None


def run(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
) -> LogprobKL:
    """Arguments as checked by the public operator."""
    lead, H = hidden.shape[:-1], hidden.shape[-1]
    with torch.autocast(hidden.device.type, enabled=False):
        logprob, kl = traced_reference.apply(
            "logprob_kl",
            _LogprobKL,
            hidden.reshape(-1, H),
            base_hidden.detach().reshape(-1, H),
            weight,
            bias,
            flat(lora_hidden),
            lora_weight,
            target.reshape(-1).long(),
            temperature,
            softcap,
        )
    return LogprobKL(logprob.view(lead), kl.view(lead))
