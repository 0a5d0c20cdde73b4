"""Eager PyTorch. With a frozen head the gradient comes with the value, since the weights are known before the loss is.

Products with the head, a row: 1 for the student's normaliser, 1 for the base's unless base_lse is given, then 2
recomputed and 1 for dhidden; rows without anchor skip the base's, rows without any weight skip all. Logits, and heads
that are trained, are swept again in backward instead: their gradient is as large as they are, and is rounded only
after it was multiplied by the upstream gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels import traced_reference
from rmx_kernels.gated_contrastive_loss.ops import fake_loss
from rmx_kernels.linear_logprob_kl.reference import RowGroup, normalisers, sweep
from rmx_kernels.once import differentiable_once
from rmx_kernels.results import ContrastiveLoss
from rmx_kernels.tiles import GradientSink, VocabTiles, flat


def live_rows(ce_weight: Tensor, kl_weight: Tensor) -> tuple[Tensor, int]:
    """(positions of the rows with a weight, those with an anchor first; how many have one). Waits for a GPU once."""
    anchored = kl_weight != 0
    live = anchored | (ce_weight != 0)
    order = torch.argsort(2 - live.int() - anchored.int(), stable=True)
    rows, with_base = torch.stack([live.sum(), anchored.sum()]).tolist()
    return order[:rows], with_base


def split_rows(ce_weight: Tensor, kl_weight: Tensor) -> list[tuple[Tensor, bool]]:
    """(rows, anchored?) of the rows with an anchor and of those with a decision alone; empty groups left out."""
    index, with_base = live_rows(ce_weight, kl_weight)
    return [(rows, anchored) for rows, anchored in ((index[:with_base], True), (index[with_base:], False)) if len(rows)]


def _fake(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_loss(x)[:3]


@traced_reference.register(
    "contrastive_loss",
    f"(Tensor x, Tensor base_x, {traced_reference.LINEAR}, Tensor target, Tensor ce_weight, Tensor kl_weight, "
    "float temperature, float? softcap, Tensor? base_lse, bool recorded) -> (Tensor, Tensor, Tensor)",
    _fake,
    (0, 2, 3, 4, 5),
    upstream=1,
)
class _ContrastiveLoss(torch.autograd.Function):
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
        ce_weight: Tensor,
        kl_weight: Tensor,
        temperature: float,
        softcap: float | None,
        base_lse: Tensor | None,
        recorded: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
        student = x, weight, bias, lora_hidden, lora_weight
        whole = VocabTiles(*student, **scaling)
        ce, kl_w = ce_weight.to(whole.dtype), kl_weight.to(whole.dtype)
        need_x, _, need_weight, need_bias, need_lora_hidden, need_lora_weight = ctx.needs_input_grad[:6]
        need_head = need_weight or need_bias or need_lora_weight
        early = recorded and (need_x or need_lora_hidden) and weight is not None and not need_head
        sink = GradientSink(whole, early and need_x, need_lora_hidden=early and need_lora_hidden)
        logprob = ce.new_full((x.shape[0],), float("nan"))
        kl = torch.full_like(logprob, float("nan"))
        norms: list[Tensor] = []
        rows = split_rows(ce, kl_w)
        for index, with_base in rows:
            m, log_d, chosen = normalisers(VocabTiles(*student, index=index, **scaling), target[index])
            logprob[index] = (chosen - m) - log_d
            norms += [m, log_d]
            if not with_base:
                continue
            if base_lse is not None:
                known = base_lse[index].to(whole.dtype)
                norms += [known, torch.zeros_like(known)]
            else:
                norms += normalisers(VocabTiles(base_x, weight, bias, index=index, **scaling), None)[:2]
        groups = _groups(student, base_x, target, rows, norms, scaling)
        row_kls = sweep(groups, [(ce[index], kl_w[index]) for index, _ in rows], sink)
        loss = ce.new_zeros(())
        for (index, _), row_kl in zip(rows, row_kls, strict=True):
            live = ce[index] != 0  # 0 * -inf is not part of the sum
            loss = loss - (ce[index][live] * logprob[index][live]).sum()
            if row_kl is not None:
                kl[index] = row_kl
                loss = loss + (kl_w[index] * row_kl).sum()
        ctx.scaling, ctx.early = scaling, early
        if early:
            ctx.dtype = x.dtype
            ctx.save_for_backward(sink.x, sink.lora_hidden, x, lora_hidden)
        else:
            ctx.save_for_backward(*student, base_x, target, ce, kl_w, *norms)
        ctx.mark_non_differentiable(logprob, kl)
        return loss, logprob, kl

    @staticmethod
    @differentiable_once("gated_contrastive_loss")
    def backward(ctx: Any, saved: Any, g_loss: Tensor, _logprob: Any, _kl: Any) -> Any:
        if ctx.early:
            dx, d_lora = (None if d is None else (d * g_loss).to(ctx.dtype) for d in saved[:2])
            return dx, None, None, None, d_lora, *[None] * 8
        *student, base_x, target, ce, kl_w = saved[:9]
        norms, rows = saved[9:], split_rows(ce, kl_w)
        needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6]
        sink = GradientSink(VocabTiles(*student, **ctx.scaling), *needs, scale=g_loss)
        with torch.autocast(base_x.device.type, enabled=False):
            groups = _groups(student, base_x, target, rows, norms, ctx.scaling)
            sweep(groups, [(ce[index], kl_w[index]) for index, _ in rows], sink)
        dx, *others = sink.gradients()
        return dx, None, *others, *[None] * 7


def _groups(
    student: Sequence[Any],
    base_x: Tensor,
    target: Tensor,
    rows: Sequence[tuple[Tensor, bool]],
    norms: Sequence[Tensor],
    scaling: dict[str, Any],
) -> list[RowGroup]:
    """student: (x, weight, bias, lora_hidden, lora_weight), whose head the base shares, without the LoRA pair.

    norms: (m, log d) of each group's student, followed by the base's where there is one.
    """
    groups, left = [], iter(norms)
    for index, with_base in rows:
        tiles, norm = VocabTiles(*student, index=index, **scaling), (next(left), next(left))
        if with_base:
            base = VocabTiles(base_x, *student[1:3], index=index, **scaling)
            groups.append(RowGroup(tiles, target[index], norm, base, (next(left), next(left))))
        else:
            groups.append(RowGroup(tiles, target[index], norm))
    return groups


def run(
    x: Tensor,
    base_x: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    temperature: float,
    softcap: float | None,
    base_lse: Tensor | None = None,
) -> ContrastiveLoss:
    """x and base_x [..., V], or [..., H] with weight [V, H]; arguments as checked by the public operators."""
    lead, width = x.shape[:-1], x.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        loss, logprob, kl = traced_reference.apply(
            "contrastive_loss",
            _ContrastiveLoss,
            x.reshape(-1, width),
            base_x.detach().reshape(-1, width),
            weight,
            bias,
            flat(lora_hidden),
            lora_weight,
            target.reshape(-1).long(),
            ce_weight.detach().reshape(-1),
            kl_weight.detach().reshape(-1),
            temperature,
            softcap,
            None if base_lse is None else base_lse.detach().reshape(-1),
            torch.is_grad_enabled(),
        )
    return ContrastiveLoss(loss, logprob.detach().view(lead), kl.detach().view(lead))
