"""Schemas, fake kernels and autograd formulas of linear_entropy_topk.

rmx_kernels::linear_entropy_topk           hidden [B..., H], weight [V, H], bias [V] -> as entropy_topk
rmx_kernels::linear_entropy_topk_backward  -> d hidden, d weight, d bias; without elements where not needed
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.ops import SAVED, SCALING, STATS, UPSTREAM, fake_stats
from rmx_kernels.registration import register

HEADED = "Tensor hidden, Tensor weight, Tensor? bias"
NEEDS = "bool need_hidden, bool need_weight, bool need_bias"


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None, k: int, *_: Any) -> Any:
    return fake_stats(hidden, target, k)


def fake_gradients(hidden: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """(d hidden, d weight, d bias), without elements where not needed."""
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def asked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _fake_backward(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, others[-3:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, target, ctx.k, ctx.temperature, ctx.softcap = inputs
    _, entropy, _, _, topk_ids, m, log_d = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, target, topk_ids, m, log_d, entropy)


def _backward(ctx: Any, *upstream: Any) -> Any:
    hidden, weight, bias, target, *saved = ctx.saved_tensors
    g_lse, g_entropy, g_logprob, g_topk = upstream[:4]
    needs = ctx.needs_input_grad[:3]
    gradients = torch.ops.rmx_kernels.linear_entropy_topk_backward(
        *(hidden, weight, bias, target, *saved),
        *(g_lse, g_entropy, None if target is None else g_logprob, g_topk),
        *(ctx.temperature, ctx.softcap, *needs),
    )
    return *asked(gradients, needs), None, None, None, None


register(
    "linear_entropy_topk",
    f"({HEADED}, Tensor? target, int k, {SCALING}) -> {STATS}",
    _fake,
    (_backward, _setup_context),
)
register(
    "linear_entropy_topk",
    f"({HEADED}, {SAVED}, {UPSTREAM}, {SCALING}, {NEEDS}) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    suffix="_backward",
)
