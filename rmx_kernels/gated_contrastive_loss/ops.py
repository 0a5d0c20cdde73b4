"""Schemas, fake kernels and autograd formulas of gated_contrastive_loss.

    rmx_kernels::gated_contrastive_loss           logits, base_logits [B..., V], target, ce_weight, kl_weight [B...]
                                                  -> loss [], logprob [B...], kl [B...], norms [4, N]
    rmx_kernels::gated_contrastive_loss_backward  -> d logits

norms: m and log d of the N flattened rows of the student, then of the base, where lse = m + log d; NaN where unused.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.ops import SCALING
from rmx_kernels.registration import register
from rmx_kernels.results import ContrastiveLoss
from rmx_kernels.tiles import compute_dtype

WEIGHTS = "Tensor ce_weight, Tensor kl_weight"
INPUTS = f"Tensor logits, Tensor base_logits, Tensor target, {WEIGHTS}"
LOSS = "Tensor loss, Tensor logprob, Tensor kl, Tensor norms"


def fake_loss(x: Tensor) -> tuple[Tensor, ...]:
    row = x.new_empty(x.shape[:-1], dtype=compute_dtype(x.dtype))
    return row.new_empty(()), row, torch.empty_like(row), row.new_empty(4, row.numel())


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return fake_loss(logits)


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, ctx.temperature, ctx.softcap = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[3])


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> Any:
    dx = None
    if g_loss is not None:
        dx = torch.ops.rmx_kernels.gated_contrastive_loss_backward(
            *ctx.saved_tensors, g_loss, ctx.temperature, ctx.softcap
        )
    return dx, None, None, None, None, None, None


register("gated_contrastive_loss", f"({INPUTS}, {SCALING}) -> ({LOSS})", _fake, (_backward, _setup_context))
register(
    "gated_contrastive_loss",
    f"({INPUTS}, Tensor norms, Tensor g_loss, {SCALING}) -> Tensor",
    _fake_backward,
    suffix="_backward",
)


def run(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    temperature: float,
    softcap: float | None,
) -> ContrastiveLoss:
    """The registered operator, whose kernels the device chooses; arguments as checked by the public one."""
    loss, logprob, kl, _ = torch.ops.rmx_kernels.gated_contrastive_loss(
        logits, base_logits.detach(), target, ce_weight.detach(), kl_weight.detach(), temperature, softcap
    )
    return ContrastiveLoss(loss, logprob.detach(), kl.detach())
