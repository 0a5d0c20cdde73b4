"""Schemas, fake kernels and autograd formulas of linear_entropy_topk.

    rmx_kernels::linear_entropy_topk           hidden [B..., H], weight [V, H], bias [V] -> as entropy_topk
    rmx_kernels::linear_entropy_topk_backward  -> d hidden, d weight, d bias, d lora_hidden, d lora_weight;
                                               without elements where not needed

lora_hidden [B..., r] and lora_weight [V, r], both or neither, add lora_hidden @ lora_weight.T to hidden @ weight.T.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.ops import SAVED, SCALING, STATS, UPSTREAM, fake_stats
from rmx_kernels.registration import register
from rmx_kernels.results import VocabStats, named

HEADED = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight"
NEEDS = "bool need_hidden, bool need_weight, bool need_bias, bool need_lora_hidden, bool need_lora_weight"
GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"


def _fake(hidden: Tensor, *others: Any) -> Any:
    target, k = others[4:6]
    return fake_stats(hidden, target, k)


def fake_gradients(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Gradients of the inputs, the first of which is a tensor; without elements where not needed."""
    first = inputs[0]
    assert first is not None
    shapes = [x.shape if x is not None and need else (0,) for x, need in zip(inputs, needs, strict=True)]
    return tuple(first.new_empty(shape) for shape in shapes)


def asked(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return fake_gradients(arguments[:5], arguments[-5:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, _, ctx.temperature, ctx.softcap = inputs
    _, entropy, _, _, topk_ids, m, log_d = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, topk_ids, m, log_d, entropy)


def _backward(ctx: Any, *upstream: Any) -> Any:
    saved = ctx.saved_tensors  # read once, for non-reentrant checkpointing
    target = saved[5]
    g_lse, g_entropy, g_logprob, g_topk = upstream[:4]
    needs = ctx.needs_input_grad[:5]
    gradients = torch.ops.rmx_kernels.linear_entropy_topk_backward(
        *saved,
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
    f"({HEADED}, {SAVED}, {UPSTREAM}, {SCALING}, {NEEDS}) -> {GRADIENTS}",
    _fake_backward,
    suffix="_backward",
)


def run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
) -> VocabStats:
    """The registered operator, whose kernels the device chooses; arguments as checked by the public one."""
    stats = torch.ops.rmx_kernels.linear_entropy_topk(
        hidden, weight, bias, lora_hidden, lora_weight, target, k, temperature, softcap
    )
    return named(stats, target, k)
