"""Schemas, fake kernels and the autograd formula of the statistics, for all implementations.

    rmx_kernels::vocab_stats           logits, target, k -> lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d,
                                       dx, d_lora_hidden
    rmx_kernels::vocab_stats_backward  -> the gradients of logits.TENSORS that are asked for

logprob has the shape of the target, [B...] or [B..., K]. Several targets a row join the ids of the top-k for the
backward: the gradients of both are added to the logits at their ids.

m = max z and log_d = log sum exp(z - m), kept apart for the backward: log p = (z - m) - log_d. The Triton kernels keep
m before it is divided by the temperature: its own backward and the sharded forms know. What was not asked for is empty.

The gradient of a row's log-prob is a row times its upstream gradient. So dx and d_lora_hidden can come with the values,
for upstream gradients of 1, where ``gradient`` asks for them (of hidden states, with a target a row): 2 products with a
frozen head, not 3. Where another result has a gradient too, they are made in the backward pass after all, and those of
a head always are.

An implementation is a module of this folder with two functions:

    forward(z: Logits, target, k, gradient) -> Forward
    backward(z: Logits, saved: Saved, upstream: Upstream, needs) -> Gradients
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmx_kernels import checks, dispatch, logits
from rmx_kernels.logits import OPERANDS, Logits, add_early, asked, fake_gradients, left_after, spread
from rmx_kernels.registration import register, without_autocast
from rmx_kernels.results import VocabStats, named

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
STATS = (
    "(Tensor lse, Tensor entropy, Tensor logprob, Tensor topk_logprobs, Tensor topk_ids, Tensor m, Tensor log_d, "
    "Tensor dx, Tensor d_lora_hidden)"
)
SAVED = "Tensor? target, Tensor topk_ids, Tensor m, Tensor log_d, Tensor entropy"
UNTRAINED = OPERANDS - len(logits.TENSORS) + 4  # arguments without a gradient
UPSTREAM = "Tensor? g_lse, Tensor? g_entropy, Tensor? g_logprob, Tensor? g_topk"


class Saved(NamedTuple):
    """What the backward takes besides the logits."""

    target: Tensor | None  # [B...]
    topk_ids: Tensor  # [B..., K], and those of several targets a row
    m: Tensor  # [B...]
    log_d: Tensor  # [B...]
    entropy: Tensor  # [B...]


class Upstream(NamedTuple):
    """The gradients of the results that are differentiable; None is zero."""

    lse: Tensor | None  # [B...]
    entropy: Tensor | None  # [B...]
    logprob: Tensor | None  # [B...]
    topk: Tensor | None  # [B..., K]


def _forward(*arguments: Any) -> Forward:
    z, (target, k, gradient, impl) = Logits(*arguments[:OPERANDS]), arguments[OPERANDS:]
    if target is not None:
        checks.target_range(target, z.V)
    checks.temperature_range(z.row_temperature)
    with without_autocast(z.x):
        result: Forward = dispatch.kernels("statistics", impl).forward(z, target, k, gradient)
    return result


def _fake(*arguments: Any) -> Forward:
    z, (target, k, gradient, impl) = Logits(*arguments[:OPERANDS]), arguments[OPERANDS:]
    real = z.x.new_empty(z.lead, dtype=z.real)
    logprob = real.new_empty(target.shape if target is not None else (0,))
    topk_ids = real.new_empty((*z.lead, k), dtype=torch.int64)
    entropy, m, log_d = (torch.empty_like(real) for _ in range(3))
    dx, du = z.shaped(*z.empty_row_gradients(gradient, impl))
    return real, entropy, logprob, real.new_empty((*z.lead, k)), topk_ids, m, log_d, dx, du


def _backward(*arguments: Any) -> list[Tensor]:
    z, others, (needs, impl) = Logits(*arguments[:OPERANDS]), arguments[OPERANDS:-2], arguments[-2:]
    saved, upstream = Saved(*others[:5]), Upstream(*others[5:])
    with without_autocast(z.x):
        return asked(dispatch.kernels("statistics", impl).backward(z, saved, upstream, needs), needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    *tensors, ctx.temperature, ctx.softcap, row_temperature = inputs[:OPERANDS]
    target, _, ctx.early, ctx.impl = inputs[OPERANDS:]
    _, entropy, _, _, topk_ids, m, log_d, dx, du = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, row_temperature, target, topk_ids, m, log_d, entropy, dx, du)


def _formula(ctx: Any, *upstream: Tensor | None) -> Any:
    *saved, dx, du = ctx.saved_tensors  # read once, for non-reentrant checkpointing
    count = len(logits.TENSORS)
    needs = list(ctx.needs_input_grad[:count])
    if ctx.early and upstream[2] is not None and all(g is None for g in (*upstream[:2], upstream[3])):
        return *_early(ctx, saved, (dx, du), upstream[2], needs), *[None] * UNTRAINED
    of_rows, given = Saved(*saved[count + 1 :]), Upstream(*upstream[:4])
    if of_rows.target is None:
        given = given._replace(logprob=None)
    elif of_rows.target.dim() > of_rows.m.dim():
        of_rows, given = _joined(of_rows, given)
    return *_late(ctx, saved[: count + 1], of_rows, given, needs), *[None] * UNTRAINED


def _late(ctx: Any, tensors: Sequence[Any], saved: Saved, upstream: Upstream, needs: list[bool]) -> list[Tensor | None]:
    """The gradients of logits.TENSORS, from those and row_temperature."""
    gradients = torch.ops.rmx_kernels.vocab_stats_backward(
        *tensors[:-1], ctx.temperature, ctx.softcap, tensors[-1], *saved, *upstream, needs, ctx.impl
    )
    return spread(gradients, needs)


def _early(
    ctx: Any, saved: Sequence[Any], made: tuple[Tensor, Tensor], g_logprob: Tensor, needs: list[bool]
) -> list[Tensor | None]:
    """The same where the log-probs alone have a gradient: those of x and lora_hidden are made already."""
    count = len(logits.TENSORS)
    late = left_after(True, needs)
    found: list[Tensor | None] = [None] * count
    if any(late):
        upstream = Upstream(None, None, g_logprob, None)
        found = _late(ctx, saved[: count + 1], Saved(*saved[count + 1 :]), upstream, late)
    return add_early(found, made, g_logprob.unsqueeze(-1), needs, saved[0].dtype)


def _joined(saved: Saved, upstream: Upstream) -> tuple[Saved, Upstream]:
    """Several targets a row, [B..., K], as further ids of the top-k."""
    target, topk_ids, m, _, _ = saved
    assert target is not None
    parts = (upstream.topk, topk_ids), (upstream.logprob, target)
    given = [m.new_zeros(ids.shape) if g is None else g for g, ids in parts]
    ids = torch.cat([topk_ids, target.long()], -1)
    return saved._replace(target=None, topk_ids=ids), upstream._replace(logprob=None, topk=torch.cat(given, -1))


register(
    "vocab_stats",
    f"({logits.SCHEMA}, Tensor? target, int k, bool gradient, str impl) -> {STATS}",
    _forward,
    _fake,
    (_formula, _setup_context),
)
register(
    "vocab_stats_backward",
    f"({logits.SCHEMA}, {SAVED}, {UPSTREAM}, bool[] needs, str impl) -> {logits.GRADIENTS}",
    _backward,
    fake_gradients,
)


def statistics(z: Logits, target: Tensor | None, k: int, impl: str, early: bool = False) -> VocabStats:
    """The registered operator; arguments as checked by the public ones.

    early: the gradient of the log-probs for hidden states comes with them, where there is one.
    """
    gradient = early and target is not None and target.dim() == len(z.lead) and z.rows_require_grad
    return named(torch.ops.rmx_kernels.vocab_stats(*z, target, k, gradient, impl), target, k)
