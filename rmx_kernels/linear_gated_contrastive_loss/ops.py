"""Schemas, fake kernels and autograd formulas of linear_gated_contrastive_loss.

    rmx_kernels::linear_gated_contrastive_loss           -> loss [], logprob [B...], kl [B...], norms [4, N], d_hidden
    rmx_kernels::linear_gated_contrastive_loss_d_hidden  -> d hidden
    rmx_kernels::linear_gated_contrastive_loss_backward  -> d weight, d bias; without elements where not needed

The weights of the rows are known before the loss is, so d_hidden for an upstream gradient of 1 comes with the value,
where ``gradient`` asks for it; backward only multiplies it. norms: as in gated_contrastive_loss.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.ops import SCALING
from rmx_kernels.gated_contrastive_loss.ops import LOSS, WEIGHTS, fake_loss
from rmx_kernels.head_cpu import product_dtype
from rmx_kernels.linear_entropy_topk.ops import fake_gradients
from rmx_kernels.linear_logprob_kl.ops import HEADED
from rmx_kernels.registration import register


def _fake(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    shape = hidden.shape if others[-1] else (0,)
    return *fake_loss(hidden), hidden.new_empty(shape, dtype=product_dtype(hidden.dtype))


def _fake_d_hidden(d_hidden: Tensor, g_loss: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(d_hidden, dtype=dtype)


def _fake_backward(hidden: Tensor, base_hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, (False, *others[-2:]))[1:]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, _, ctx.temperature, ctx.softcap, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[0].dtype
    ctx.head = any(ctx.needs_input_grad[2:4])
    ctx.save_for_backward(output[4], *((*tensors, output[3]) if ctx.head else ()))


def _backward(ctx: Any, g_loss: Tensor | None, *_: Any) -> Any:
    d_hidden, *saved = ctx.saved_tensors
    none = [None] * 7
    if g_loss is None:
        return None, None, None, None, *none
    d_weight = d_bias = None
    if ctx.head:
        needs = ctx.needs_input_grad[2:4]
        d_weight, d_bias = torch.ops.rmx_kernels.linear_gated_contrastive_loss_backward(
            *saved, g_loss, ctx.temperature, ctx.softcap, *needs
        )
        d_weight, d_bias = (d if need else None for d, need in zip((d_weight, d_bias), needs, strict=True))
    dx = None
    if ctx.needs_input_grad[0]:
        dx = torch.ops.rmx_kernels.linear_gated_contrastive_loss_d_hidden(d_hidden, g_loss, ctx.dtype)
    return dx, None, d_weight, d_bias, *none


register(
    "linear_gated_contrastive_loss",
    f"({HEADED}, {WEIGHTS}, Tensor? base_lse, {SCALING}, bool gradient) -> ({LOSS}, Tensor d_hidden)",
    _fake,
    (_backward, _setup_context),
)
register(
    "linear_gated_contrastive_loss",
    f"({HEADED}, {WEIGHTS}, Tensor norms, Tensor g_loss, {SCALING}, bool need_weight, bool need_bias) -> "
    "(Tensor, Tensor)",
    _fake_backward,
    suffix="_backward",
)
register(
    "linear_gated_contrastive_loss",
    "(Tensor d_hidden, Tensor g_loss, ScalarType dtype) -> Tensor",
    _fake_d_hidden,
    suffix="_d_hidden",
)
