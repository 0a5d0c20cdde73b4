"""Schemas, fake kernels and autograd formulas of the losses, for all implementations.

    rmx_kernels::contrastive_loss           student, base_x, target, weights, base_lse -> loss [], logprob [B...],
                                            kl [B...], norms [4, N], dx, d_lora_hidden
    rmx_kernels::contrastive_loss_backward  -> the gradients of logits.TENSORS that are asked for
    rmx_kernels::times                      a gradient that came with the value, times the upstream gradient
    rmx_kernels::logprob_kl                 student, base_x, target -> logprob [B...], kl [B...], norms [4, N]
    rmx_kernels::logprob_kl_backward        -> the gradients of logits.TENSORS that are asked for

norms: m and log d of the N flattened rows of the student, then of the base, where lse = m + log d; NaN where unused.
The weights of the rows are known before the loss is. So for hidden states dx and d_lora_hidden come with the value, for
an upstream gradient of 1, where ``gradient`` asks for them. The gradient of logits is as large as they are, and is
rounded only after it was multiplied by the upstream gradient, so it is made in the backward pass.

An implementation is a module of this folder with four functions:

    contrastive_loss(pair, weights, base_lse, gradient) -> LossForward
    contrastive_loss_backward(pair, weights, norms, g_loss, needs) -> Gradients
    logprob_kl(pair) -> (logprob, kl, norms)
    logprob_kl_backward(pair, norms, (g_logprob, g_kl), needs) -> Gradients
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmx_kernels import checks, dispatch, logits
from rmx_kernels.logits import OPERANDS, Logits, add_early, asked, fake_gradients, left_after, spread
from rmx_kernels.registration import register, without_autocast
from rmx_kernels.results import ContrastiveLoss, LogprobKL

BASE_MASS_TOLERANCE = 0.05  # of sum p_b around 1: bf16 hidden states scored in another batch stay within it
Weights = tuple[Tensor, Tensor]  # ce and kl of each row [B...]
Terms = tuple[Tensor, Tensor, Tensor]  # logprob [B...], kl [B...], norms [4, N]
LossForward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
PAIR = f"{logits.SCHEMA}, Tensor base_x, Tensor target"


class Pair(NamedTuple):
    """The logits of a student, those of a frozen base, and the token whose log-prob is taken."""

    student: Logits
    base_x: Tensor  # [B..., V] or [B..., H]; the base shares the student's head, without a LoRA pair
    target: Tensor  # [B...]

    @property
    def base(self) -> Logits:
        return self.student.of_base(self.base_x)

    def rows(self) -> "Pair":
        """With the leading dimensions in one."""
        return Pair(self.student.rows(), self.base_x.reshape(-1, self.base_x.shape[-1]), self.target.reshape(-1))


def _pair(arguments: Sequence[Any]) -> tuple[Pair, Sequence[Any]]:
    """(the pair, the arguments that follow it in a schema)."""
    return Pair(Logits(*arguments[:OPERANDS]), *arguments[OPERANDS : OPERANDS + 2]), arguments[OPERANDS + 2 :]


def _run(function: str, impl: str, pair: Pair, *arguments: Any) -> Any:
    with without_autocast(pair.base_x):
        return getattr(dispatch.kernels("losses", impl), function)(pair, *arguments)


def _loss(*arguments: Any) -> LossForward:
    pair, (ce_weight, kl_weight, base_lse, gradient, impl) = _pair(arguments)
    used = (ce_weight != 0) | (kl_weight != 0)
    checks.target_range(pair.target, pair.student.V, used)
    checks.temperature_range(pair.student.row_temperature, used)
    result: LossForward = _run("contrastive_loss", impl, pair, (ce_weight, kl_weight), base_lse, gradient)
    return result


def _fake_terms(student: Logits) -> Terms:
    row = student.x.new_empty(student.lead, dtype=student.real)
    return row, torch.empty_like(row), row.new_empty(4, row.numel())


def _fake_loss(*arguments: Any) -> LossForward:
    (student, _, _), (_, _, _, gradient, impl) = _pair(arguments)
    logprob, kl, norms = _fake_terms(student)
    dx, du = student.shaped(*student.empty_row_gradients(gradient, impl))
    return logprob.new_empty(()), logprob, kl, norms, dx, du


def _loss_backward(*arguments: Any) -> list[Tensor]:
    pair, (ce_weight, kl_weight, norms, g_loss, needs, impl) = _pair(arguments)
    weights = ce_weight, kl_weight
    return asked(_run("contrastive_loss_backward", impl, pair, weights, norms, g_loss, needs), needs)


def _setup_loss(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    (student, *of_pair), (*weights, _, gradient, ctx.impl) = _pair(inputs)
    constants = student.row_temperature, *of_pair, *weights, output[3]
    ctx.temperature, ctx.softcap, ctx.dtype = student.temperature, student.softcap, student.x.dtype
    ctx.needs = list(ctx.needs_input_grad[: len(logits.TENSORS)])
    ctx.early, ctx.late = gradient, left_after(gradient, ctx.needs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:6], *((*student.tensors, *constants) if any(ctx.late) else ()))


def _loss_formula(ctx: Any, g_loss: Tensor | None, *_: Any) -> Any:
    dx, du, *saved = ctx.saved_tensors  # read once, for non-reentrant checkpointing
    found: list[Tensor | None] = [None] * len(logits.TENSORS)
    if g_loss is not None:
        if any(ctx.late):
            count = len(logits.TENSORS)
            gradients = torch.ops.rmx_kernels.contrastive_loss_backward(
                *saved[:count], ctx.temperature, ctx.softcap, *saved[count:], g_loss, ctx.late, ctx.impl
            )
            found = spread(gradients, ctx.late)
        if ctx.early:
            found = add_early(found, (dx, du), g_loss, ctx.needs, ctx.dtype)
    return *found, *[None] * 10


register(
    "contrastive_loss",
    f"({PAIR}, Tensor ce_weight, Tensor kl_weight, Tensor? base_lse, bool gradient, str impl) -> "
    "(Tensor loss, Tensor logprob, Tensor kl, Tensor norms, Tensor dx, Tensor d_lora_hidden)",
    _loss,
    _fake_loss,
    (_loss_formula, _setup_loss),
)
register(
    "contrastive_loss_backward",
    f"({PAIR}, Tensor ce_weight, Tensor kl_weight, Tensor norms, Tensor g_loss, bool[] needs, str impl) -> "
    f"{logits.GRADIENTS}",
    _loss_backward,
    fake_gradients,
)
register(  # an operator, so that a second derivative is refused
    "times",
    "(Tensor gradient, Tensor upstream, ScalarType dtype) -> Tensor",
    lambda gradient, upstream, dtype: (gradient * upstream).to(dtype),
    lambda gradient, upstream, dtype: torch.empty_like(gradient, dtype=dtype),
)


def _logprob_kl(*arguments: Any) -> Terms:
    pair, (impl,) = _pair(arguments)
    checks.target_range(pair.target, pair.student.V)
    checks.temperature_range(pair.student.row_temperature)
    result: Terms = _run("logprob_kl", impl, pair)
    return result


def _fake_logprob_kl(*arguments: Any) -> Terms:
    return _fake_terms(Logits(*arguments[:OPERANDS]))


def _logprob_kl_backward(*arguments: Any) -> list[Tensor]:
    pair, (norms, g_logprob, g_kl, needs, impl) = _pair(arguments)
    return asked(_run("logprob_kl_backward", impl, pair, norms, (g_logprob, g_kl), needs), needs)


def _setup_logprob_kl(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    (student, *of_pair), (ctx.impl,) = _pair(inputs)
    ctx.temperature, ctx.softcap = student.temperature, student.softcap
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*student.tensors, student.row_temperature, *of_pair, output[2])


def _logprob_kl_formula(ctx: Any, g_logprob: Tensor | None, g_kl: Tensor | None, _: Any) -> Any:
    count, saved = len(logits.TENSORS), ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:count])
    gradients = torch.ops.rmx_kernels.logprob_kl_backward(
        *saved[:count], ctx.temperature, ctx.softcap, *saved[count:], g_logprob, g_kl, needs, ctx.impl
    )
    return *spread(gradients, needs), *[None] * 6


register(
    "logprob_kl",
    f"({PAIR}, str impl) -> (Tensor logprob, Tensor kl, Tensor norms)",
    _logprob_kl,
    _fake_logprob_kl,
    (_logprob_kl_formula, _setup_logprob_kl),
)
register(
    "logprob_kl_backward",
    f"({PAIR}, Tensor norms, Tensor? g_logprob, Tensor? g_kl, bool[] needs, str impl) -> {logits.GRADIENTS}",
    _logprob_kl_backward,
    fake_gradients,
)


def contrastive_loss(
    pair: Pair, ce_weight: Tensor, kl_weight: Tensor, base_lse: Tensor | None, impl: str
) -> ContrastiveLoss:
    """The registered operator; arguments as checked by the public ones."""
    student, base_x, target = pair
    gradient = student.rows_require_grad
    base_lse = None if base_lse is None else base_lse.detach()
    loss, logprob, kl, *_ = torch.ops.rmx_kernels.contrastive_loss(
        *student, base_x.detach(), target, ce_weight.detach(), kl_weight.detach(), base_lse, gradient, impl
    )
    return ContrastiveLoss(loss, logprob.detach(), kl.detach())


def logprob_kl(pair: Pair, impl: str) -> LogprobKL:
    """The registered operator; arguments as checked by the public one."""
    student, base_x, target = pair
    logprob, kl, _ = torch.ops.rmx_kernels.logprob_kl(*student, base_x.detach(), target, impl)
    return LogprobKL(logprob, kl)
