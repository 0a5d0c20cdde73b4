"""Schemas, fake kernels and autograd formulas of entropy_topk. The kernels themselves are loaded when they first run.

    rmx_kernels::entropy_topk           logits [B..., V] -> lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d
    rmx_kernels::entropy_topk_backward  -> d logits

m = max z and log_d = log sum exp(z - m), kept apart for the backward: log p = (z - m) - log_d. What was not asked for
has no elements.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rmx_kernels.registration import register
from rmx_kernels.results import VocabStats, named
from rmx_kernels.tiles import compute_dtype

SCALING = "float temperature, float? softcap"
STATS = "(Tensor lse, Tensor entropy, Tensor logprob, Tensor topk_logprobs, Tensor topk_ids, Tensor m, Tensor log_d)"
SAVED = "Tensor? target, Tensor topk_ids, Tensor m, Tensor log_d, Tensor entropy"
UPSTREAM = "Tensor? g_lse, Tensor? g_entropy, Tensor? g_logprob, Tensor? g_topk"


def fake_stats(x: Tensor, target: Tensor | None, k: int) -> tuple[Tensor, ...]:
    """The shapes and dtypes of the seven results for rows x [B..., columns]."""
    lead = x.shape[:-1]
    real = x.new_empty(lead, dtype=compute_dtype(x.dtype))
    logprob = real.new_empty(lead if target is not None else (0,))
    topk_ids = real.new_empty((*lead, k), dtype=torch.int64)
    others = (torch.empty_like(real) for _ in range(3))
    return real, next(others), logprob, real.new_empty((*lead, k)), topk_ids, *others


def _fake(logits: Tensor, target: Tensor | None, k: int, temperature: float, softcap: float | None) -> Any:
    return fake_stats(logits, target, k)


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    logits, target, ctx.k, ctx.temperature, ctx.softcap = inputs
    _, entropy, _, _, topk_ids, m, log_d = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, target, topk_ids, m, log_d, entropy)


def _backward(ctx: Any, *upstream: Any) -> Any:
    logits, target, *saved = ctx.saved_tensors
    g_lse, g_entropy, g_logprob, g_topk = upstream[:4]
    g_logprob = None if target is None else g_logprob
    dx = torch.ops.rmx_kernels.entropy_topk_backward(
        logits, target, *saved, g_lse, g_entropy, g_logprob, g_topk, ctx.temperature, ctx.softcap
    )
    return dx, None, None, None, None


register(
    "entropy_topk",
    f"(Tensor logits, Tensor? target, int k, {SCALING}) -> {STATS}",
    _fake,
    (_backward, _setup_context),
)
register(
    "entropy_topk",
    f"(Tensor logits, {SAVED}, {UPSTREAM}, {SCALING}) -> Tensor",
    _fake_backward,
    suffix="_backward",
)


def run(logits: Tensor, target: Tensor | None, *, k: int, temperature: float, softcap: float | None) -> VocabStats:
    """The registered operator, whose kernels the device chooses; arguments as checked by the public one."""
    return named(torch.ops.rmx_kernels.entropy_topk(logits, target, k, temperature, softcap), target, k)
