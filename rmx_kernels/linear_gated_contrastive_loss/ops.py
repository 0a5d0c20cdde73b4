"""Schemas, fake kernels and autograd formulas of linear_gated_contrastive_loss.

    rmx_kernels::linear_gated_contrastive_loss           -> loss [], logprob [B...], kl [B...], norms [4, N], d_hidden,
                                                         d_lora_hidden
    rmx_kernels::linear_gated_contrastive_loss_d_hidden  -> d hidden, or d lora_hidden
    rmx_kernels::linear_gated_contrastive_loss_backward  -> d weight, d bias, d lora_weight; without elements where not
                                                         needed

The weights of the rows are known before the loss is, so d_hidden and d_lora_hidden for an upstream gradient of 1 come
with the value, where ``gradient`` asks for them; backward only multiplies them. norms: as in gated_contrastive_loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.ops import SCALING
from rmx_kernels.gated_contrastive_loss.ops import LOSS, WEIGHTS, fake_loss
from rmx_kernels.head_cpu import gradient_dtype
from rmx_kernels.linear_entropy_topk.ops import asked, fake_gradients
from rmx_kernels.linear_logprob_kl.ops import HEADED
from rmx_kernels.registration import register
from rmx_kernels.results import ContrastiveLoss


def _fake(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    lora_hidden, gradient = others[3], others[-1]
    d_hidden, d_lora_hidden = (
        hidden.new_empty(x.shape if x is not None and gradient else (0,), dtype=gradient_dtype(hidden))
        for x in (hidden, lora_hidden)
    )
    return *fake_loss(hidden), d_hidden, d_lora_hidden


def _fake_d_hidden(d_hidden: Tensor, g_loss: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(d_hidden, dtype=dtype)


def _fake_backward(hidden: Tensor, base_hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    weight, bias, _, lora_weight = others[:4]
    return fake_gradients((weight, bias, lora_weight), others[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, _, ctx.temperature, ctx.softcap, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.needs_head = *ctx.needs_input_grad[2:4], ctx.needs_input_grad[5]
    ctx.save_for_backward(*output[4:6], *((*tensors, output[3]) if any(ctx.needs_head) else ()))


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> Any:
    d_hidden, d_lora_hidden, *saved = ctx.saved_tensors  # read once, for non-reentrant checkpointing
    early = d_hidden, d_lora_hidden
    if g_loss is None:
        return (None,) * 13
    of_head: list[Tensor | None] = [None] * 3
    if any(ctx.needs_head):
        gradients = torch.ops.rmx_kernels.linear_gated_contrastive_loss_backward(
            *saved, g_loss, ctx.temperature, ctx.softcap, *ctx.needs_head
        )
        of_head = asked(gradients, ctx.needs_head)
    multiply = torch.ops.rmx_kernels.linear_gated_contrastive_loss_d_hidden
    needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    dx, du = (multiply(d, g_loss, ctx.dtype) if need else None for d, need in zip(early, needs, strict=True))
    return dx, None, *of_head[:2], du, of_head[2], *[None] * 7


register(
    "linear_gated_contrastive_loss",
    f"({HEADED}, {WEIGHTS}, Tensor? base_lse, {SCALING}, bool gradient) -> "
    f"({LOSS}, Tensor d_hidden, Tensor d_lora_hidden)",
    _fake,
    (_backward, _setup_context),
)
register(
    "linear_gated_contrastive_loss",
    f"({HEADED}, {WEIGHTS}, Tensor norms, Tensor g_loss, {SCALING}, "
    "bool need_weight, bool need_bias, bool need_lora_weight) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    suffix="_backward",
)
register(
    "linear_gated_contrastive_loss",
    "(Tensor d_hidden, Tensor g_loss, ScalarType dtype) -> Tensor",
    _fake_d_hidden,
    suffix="_d_hidden",
)


def run(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    base_lse: Tensor | None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
) -> ContrastiveLoss:
    """The registered operator, whose kernels the device chooses; arguments as checked by the public one."""
    wanted = hidden.requires_grad or (lora_hidden is not None and lora_hidden.requires_grad)
    loss, logprob, kl, _, _, _ = torch.ops.rmx_kernels.linear_gated_contrastive_loss(
        *(hidden, base_hidden.detach(), weight, bias, lora_hidden, lora_weight, target),
        *(ce_weight.detach(), kl_weight.detach(), None if base_lse is None else base_lse.detach()),
        *(temperature, softcap, torch.is_grad_enabled() and wanted),
    )
    return ContrastiveLoss(loss, logprob.detach(), kl.detach())
