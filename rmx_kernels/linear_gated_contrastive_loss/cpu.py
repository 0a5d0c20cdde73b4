"""Native kernels: the rows of linear_logprob_kl that carry a weight, those with an anchor first; no others are read."""

import torch
from torch import Tensor

from rmx_kernels import native
from rmx_kernels.gated_contrastive_loss.cpu import flat_weights, spread, weighted_sum
from rmx_kernels.gated_contrastive_loss.reference import live_rows
from rmx_kernels.head_cpu import Head, HeadGradient
from rmx_kernels.linear_gated_contrastive_loss.ops import run as run
from rmx_kernels.linear_logprob_kl.cpu import Rows
from rmx_kernels.tiles import flat


def _live(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Rows, Tensor, tuple[Tensor, Tensor]]:
    """(the live rows, their positions, their weights)"""
    head = Head(weight, bias, lora_weight)
    ids, ce, kl_w = flat_weights(target, ce_weight, kl_weight, head.V, head.real)
    index, anchored = live_rows(ce, kl_w)
    x, base_x = (h.reshape(-1, head.H) for h in (hidden, base_hidden))
    norms = torch.full((4, index.shape[0]), float("nan"), dtype=head.real)
    scale = native.scale(temperature, softcap)
    rows = Rows(head, scale, x, base_x, flat(lora_hidden), index, anchored, ids[index], norms)
    return rows, index, (ce[index], kl_w[index])


def forward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    base_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_gated_contrastive_loss."""
    with torch.autocast("cpu", enabled=False):
        rows, index, weights = _live(
            *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, ce_weight, kl_weight),
            *(temperature, softcap),
        )
        if base_lse is not None:
            rows.norms[2] = base_lse.reshape(-1)[index]
            rows.norms[3] = 0
        logprob, kl, dx, du = rows.terms(weights if gradient else None, base_lse is not None)
        loss = weighted_sum(*weights, logprob, kl)
    parts = spread(index, rows.norms, torch.stack([logprob, kl]), target.shape)
    dx = dx.view(hidden.shape) if gradient else dx
    du = du.view(lora_hidden.shape) if lora_hidden is not None and gradient else du
    return loss, *parts, dx, du


def backward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    norms: Tensor,
    g_loss: Tensor,
    temperature: float,
    softcap: float | None,
    need_weight: bool,
    need_bias: bool,
    need_lora_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_gated_contrastive_loss_backward."""
    with torch.autocast("cpu", enabled=False):
        rows, index, weights = _live(
            *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, ce_weight, kl_weight),
            *(temperature, softcap),
        )
        rows.norms.copy_(norms[:, index])
        sink = HeadGradient(rows.head, need_weight, need_bias, need_lora_weight)
        rows.d_head(weights, sink, g_loss)
    return sink.weight, sink.bias, sink.lora_weight


def d_hidden(d_hidden: Tensor, g_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that came with the value, times the upstream gradient: an operator, so as to refuse a second one."""
    return (d_hidden * g_loss).to(dtype)
