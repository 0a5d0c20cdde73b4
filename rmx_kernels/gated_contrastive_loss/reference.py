"""Eager PyTorch: the value and the gradient in the same sweep, since the weights are known before the loss is.

Products with the head, a row: 1 for the student's normaliser, 1 for the base's unless base_lse is given, then 2
recomputed and 1 for dhidden; rows without anchor skip the base's, rows without any weight skip all.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rmx_kernels.linear_logprob_kl.reference import normalisers, sweep
from rmx_kernels.results import ContrastiveLoss
from rmx_kernels.tiles import GradientSink, VocabTiles


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base_x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        ce_weight: Tensor,
        kl_weight: Tensor,
        temperature: float,
        softcap: float | None,
        base_lse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def tiles(of: Tensor, index: Tensor) -> VocabTiles:
            return VocabTiles(of, weight, bias, temperature=temperature, softcap=softcap, index=index)

        anchored = kl_weight != 0
        groups = anchored.nonzero().squeeze(1), (~anchored & (ce_weight != 0)).nonzero().squeeze(1)
        full = tiles(x, groups[0])
        ce, kl_w = ce_weight.to(full.dtype), kl_weight.to(full.dtype)
        sink = GradientSink(full, ctx.needs_input_grad[0], *ctx.needs_input_grad[2:4])
        logprob = ce.new_full((x.shape[0],), float("nan"))
        kl = torch.full_like(logprob, float("nan"))
        loss = ce.new_zeros(())
        for group, index in zip(("anchored", "unanchored"), groups, strict=True):
            if index.numel() == 0:
                continue
            student, ids = tiles(x, index), target[index]
            sink.tiles = student
            m, log_d, chosen = normalisers(student, ids)
            base = norm_b = None
            if group == "anchored":
                base = tiles(base_x, index)
                if base_lse is None:
                    norm_b = normalisers(base, None)[:2]
                else:
                    known = base_lse[index].to(full.dtype)
                    norm_b = known, torch.zeros_like(known)
            row_kl = sweep(student, base, (m, log_d), norm_b, ids, ce[index], kl_w[index], sink)
            logprob[index] = (chosen - m) - log_d
            live = ce[index] != 0  # 0 * -inf is not part of the sum
            loss = loss - (ce[index][live] * logprob[index][live]).sum()
            if row_kl is not None:
                kl[index] = row_kl
                loss = loss + (kl_w[index] * row_kl).sum()
        ctx.sink = sink
        ctx.mark_non_differentiable(logprob, kl)
        return loss, logprob, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_loss: Tensor, _logprob: Any, _kl: Any) -> Any:
        dx, dweight, dbias = ctx.sink.gradients(g_loss)
        return dx, None, dweight, dbias, None, None, None, None, None, None


def run(
    x: Tensor,
    base_x: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float,
    softcap: float | None,
    base_lse: Tensor | None = None,
) -> ContrastiveLoss:
    """x and base_x [..., V], or [..., H] with weight [V, H]; arguments as checked by the public operators."""
    lead, width = x.shape[:-1], x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        loss, logprob, kl = _ContrastiveLoss.apply(
            x.reshape(-1, width),
            base_x.detach().reshape(-1, width),
            weight,
            bias,
            target.reshape(-1).long(),
            ce_weight.detach().reshape(-1),
            kl_weight.detach().reshape(-1),
            temperature,
            softcap,
            None if base_lse is None else base_lse.detach().reshape(-1),
        )
    return ContrastiveLoss(loss, logprob.view(lead), kl.view(lead))
