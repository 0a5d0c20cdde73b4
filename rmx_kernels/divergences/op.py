"""Schemas, fake kernels and autograd formulas of the divergences between two heads, for all implementations.

    rmx_kernels::divergence           student, teacher, kind, beta -> divergence [B...], entropy [B...], norms [6, N],
                                      dx, d_lora_hidden
    rmx_kernels::divergence_backward  -> the gradients of logits.TENSORS that are asked for

norms: of the N flattened rows m and log d of the student, then of the teacher, where lse = m + log d; a mean over the
student's distribution that the gradient needs (reference.py), 0 for forward_kl; and the student's entropy.

The gradient of a row's divergence is a row times its upstream gradient. So dx and d_lora_hidden come with the value,
for upstream gradients of 1, where ``gradient`` asks for them: 3 products with frozen heads, not 5. They are made in the
backward pass where the entropy has a gradient too, and those of a head always are.

An implementation is a module of this folder with two functions:

    divergence(pair, gradient) -> DivergenceForward
    divergence_backward(pair, norms, (g_divergence, g_entropy), needs) -> Gradients
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmx_kernels import checks, dispatch, logits
from rmx_kernels.logits import OPERANDS, Logits, add_early, asked, fake_gradients, left_after, spread
from rmx_kernels.registration import register, without_autocast
from rmx_kernels.results import DivergenceStats

FORWARD_KL, REVERSE_KL, JSD, ALPHA = KINDS = ("forward_kl", "reverse_kl", "jsd", "alpha")
NORMS = 6
DivergenceForward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Upstream = tuple[Tensor | None, Tensor | None]  # of the divergence and of the entropy [B...]
PAIR = (
    f"{logits.SCHEMA}, Tensor teacher_x, Tensor teacher_weight, Tensor? teacher_bias, float teacher_temperature, "
    "float? teacher_softcap, Tensor? teacher_row_temperature, str kind, float beta"
)
ARGUMENTS = OPERANDS + 8  # of PAIR


class HeadPair(NamedTuple):
    """The logits of a student and those of a teacher, each of a head of its own, and how they are compared."""

    student: Logits
    teacher: Logits  # without a LoRA pair
    kind: str  # of KINDS
    beta: float  # of jsd and alpha

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of PAIR."""
        x, weight, bias, _, _, *scaling = self.teacher
        return *self.student, x, weight, bias, *scaling, self.kind, self.beta

    def rows(self) -> "HeadPair":
        """With the leading dimensions in one."""
        return self._replace(student=self.student.rows(), teacher=self.teacher.rows())


def _pair(arguments: Sequence[Any]) -> tuple[HeadPair, Sequence[Any]]:
    """(the pair, the arguments that follow it in a schema)."""
    x, weight, bias, *scaling, kind, beta = arguments[OPERANDS:ARGUMENTS]
    pair = HeadPair(Logits(*arguments[:OPERANDS]), Logits(x, weight, bias, None, None, *scaling), kind, beta)
    return pair, arguments[ARGUMENTS:]


def _run(function: str, impl: str, pair: HeadPair, *arguments: Any) -> Any:
    with without_autocast(pair.student.x):
        return getattr(dispatch.kernels("divergences", impl), function)(pair, *arguments)


def _divergence(*arguments: Any) -> DivergenceForward:
    pair, (gradient, impl) = _pair(arguments)
    checks.temperature_range(pair.student.row_temperature)
    checks.temperature_range(pair.teacher.row_temperature, of="teacher_")
    result: DivergenceForward = _run("divergence", impl, pair, gradient)
    return result


def _fake_divergence(*arguments: Any) -> DivergenceForward:
    (student, *_), (gradient, impl) = _pair(arguments)
    row = student.x.new_empty(student.lead, dtype=student.real)
    dx, du = student.shaped(*student.empty_row_gradients(gradient, impl))
    return row, torch.empty_like(row), row.new_empty(NORMS, row.numel()), dx, du


def _divergence_backward(*arguments: Any) -> list[Tensor]:
    pair, (norms, g_divergence, g_entropy, needs, impl) = _pair(arguments)
    return asked(_run("divergence_backward", impl, pair, norms, (g_divergence, g_entropy), needs), needs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    pair, (ctx.early, ctx.impl) = _pair(inputs)
    given = pair.arguments
    ctx.tensors = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) else x for x in given]
    ctx.dtype, ctx.needs = pair.student.x.dtype, list(ctx.needs_input_grad[: len(logits.TENSORS)])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:5], *(given[i] for i in ctx.tensors))


def _formula(ctx: Any, g_divergence: Tensor | None, g_entropy: Tensor | None, *_: Any) -> Any:
    norms, dx, du, *saved = ctx.saved_tensors  # read once, for non-reentrant checkpointing
    early = ctx.early and g_entropy is None and g_divergence is not None
    late = left_after(early, ctx.needs)
    found: list[Tensor | None] = [None] * len(logits.TENSORS)
    if any(late):
        given = list(ctx.others)
        for place, tensor in zip(ctx.tensors, saved, strict=True):
            given[place] = tensor
        gradients = torch.ops.rmx_kernels.divergence_backward(*given, norms, g_divergence, g_entropy, late, ctx.impl)
        found = spread(gradients, late)
    if early and g_divergence is not None:
        found = add_early(found, (dx, du), g_divergence.unsqueeze(-1), ctx.needs, ctx.dtype)
    return *found, *[None] * (ARGUMENTS + 2 - len(logits.TENSORS))


register(
    "divergence",
    f"({PAIR}, bool gradient, str impl) -> "
    "(Tensor divergence, Tensor entropy, Tensor norms, Tensor dx, Tensor d_lora_hidden)",
    _divergence,
    _fake_divergence,
    (_formula, _setup),
)
register(
    "divergence_backward",
    f"({PAIR}, Tensor norms, Tensor? g_divergence, Tensor? g_entropy, bool[] needs, str impl) -> {logits.GRADIENTS}",
    _divergence_backward,
    fake_gradients,
)


def divergence(pair: HeadPair, impl: str) -> DivergenceStats:
    """The registered operator; arguments as checked by the public one."""
    found, entropy, *_ = torch.ops.rmx_kernels.divergence(*pair.arguments, pair.student.rows_require_grad, impl)
    return DivergenceStats(found, entropy)
