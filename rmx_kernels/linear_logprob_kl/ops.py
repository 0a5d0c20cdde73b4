"""Schemas, fake kernels and autograd formulas of linear_logprob_kl.

    rmx_kernels::linear_logprob_kl           hidden, base_hidden [B..., H], weight [V, H], bias [V], target [B...]
                                             -> logprob [B...], kl [B...], norms [4, N]
    rmx_kernels::linear_logprob_kl_backward  -> d hidden, d weight, d bias, d lora_hidden, d lora_weight;
                                             without elements where not needed

lora_hidden [B..., r] and lora_weight [V, r], both or neither, add lora_hidden @ lora_weight.T to hidden @ weight.T.
norms: m and log d of the N flattened rows of the student, then of the base, where lse = m + log d.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.entropy_topk.ops import SCALING
from rmx_kernels.linear_entropy_topk.ops import GRADIENTS, NEEDS, asked, fake_gradients
from rmx_kernels.registration import register
from rmx_kernels.results import LogprobKL
from rmx_kernels.tiles import compute_dtype

HEADED = (
    "Tensor hidden, Tensor base_hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "Tensor target"
)


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, ...]:
    row = hidden.new_empty(hidden.shape[:-1], dtype=compute_dtype(hidden.dtype))
    return row, torch.empty_like(row), row.new_empty(4, row.numel())


def _fake_backward(hidden: Tensor, base_hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return fake_gradients((hidden, *others[:4]), others[-5:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, ctx.temperature, ctx.softcap = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _backward(ctx: Any, g_logprob: Tensor | None, g_kl: Tensor | None, _: Any) -> Any:
    needs = ctx.needs_input_grad[0], *ctx.needs_input_grad[2:6]
    gradients = torch.ops.rmx_kernels.linear_logprob_kl_backward(
        *ctx.saved_tensors, g_logprob, g_kl, ctx.temperature, ctx.softcap, *needs
    )
    d_hidden, *others = asked(gradients, needs)
    return d_hidden, None, *others, None, None, None


register(
    "linear_logprob_kl",
    f"({HEADED}, {SCALING}) -> (Tensor logprob, Tensor kl, Tensor norms)",
    _fake,
    (_backward, _setup_context),
)
register(
    "linear_logprob_kl",
    f"({HEADED}, Tensor norms, Tensor? g_logprob, Tensor? g_kl, {SCALING}, {NEEDS}) -> {GRADIENTS}",
    _fake_backward,
    suffix="_backward",
)


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
    """The registered operator, whose kernels the device chooses; arguments as checked by the public one."""
    logprob, kl, _ = torch.ops.rmx_kernels.linear_logprob_kl(
        hidden, base_hidden.detach(), weight, bias, lora_hidden, lora_weight, target, temperature, softcap
    )
    return LogprobKL(logprob, kl)
