"""What both contrastive losses promise about their rows: dead ones, those without a base, and sums over them."""

import math
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from rmx_kernels import linear_logprob_kl

OPERATORS = ("gated_contrastive_loss", "linear_gated_contrastive_loss")
ROWS = ("logits", "base_logits", "hidden", "base_hidden", "target", "ce_weight", "kl_weight")


def run(op: str, arguments: cases.Arguments, impl: str, **options: float) -> tuple[Any, tuple[Tensor, ...]]:
    """The result and the gradients of the loss."""
    given, inputs = cases.leaves(op, arguments)
    result = cases.call(op, given, impl=impl, **options)
    return result, torch.autograd.grad(result.loss, inputs)


def rows_of(arguments: cases.Arguments, index: Tensor | list[int]) -> cases.Arguments:
    return {n: v[index] if n in ROWS else v for n, v in arguments.items()}


def student_and_base(arguments: cases.Arguments) -> tuple[str, str]:
    return ("hidden", "base_hidden") if "hidden" in arguments else ("logits", "base_logits")


@pytest.mark.parametrize("wrong", [-7, 10**6])
def test_dead_rows_are_not_read(op: str, device: str, impl: str, wrong: int) -> None:
    """Where both weights are zero: any input, any target, exactly zero gradient, NaN in the parts."""
    clean = cases.make(op, (8,), device=device)
    for name in ("ce_weight", "kl_weight"):
        clean[name][5:7] = 0  # row 3 is dead already
    arguments = {n: v.clone() if n in ROWS else v for n, v in clean.items()}
    dead = torch.tensor([3, 5, 6], device=device)
    live = torch.tensor([0, 1, 2, 4, 7], device=device)
    for name in student_and_base(arguments):
        arguments[name][dead] = math.nan
    arguments["target"][dead] = wrong
    result, gradients = run(op, arguments, impl)
    assert (gradients[0][dead] == 0).all()
    assert result.logprob[dead].isnan().all() and result.kl[dead].isnan().all()
    expected, expected_gradients = run(op, rows_of(clean, live), impl)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(result.logprob[live], expected.logprob)
    torch.testing.assert_close(result.kl[live], expected.kl, equal_nan=True)
    torch.testing.assert_close(gradients[0][live], expected_gradients[0])
    torch.testing.assert_close(gradients[1:], expected_gradients[1:])


def test_all_rows_dead(op: str, device: str, impl: str) -> None:
    arguments = cases.make(op, device=device)
    arguments |= {n: torch.zeros_like(arguments[n]) for n in ("ce_weight", "kl_weight")}
    for name in student_and_base(arguments):
        arguments[name].fill_(math.nan)
    result, gradients = run(op, arguments, impl)
    assert result.loss == 0 and result.loss.shape == ()
    assert all((g == 0).all() for g in gradients)
    assert result.logprob.isnan().all() and result.kl.isnan().all()


def test_rows_without_kl_weight_never_read_the_base(op: str, device: str, impl: str) -> None:
    arguments = cases.make(op, (7,), device=device)
    arguments["kl_weight"][::2] = 0
    spoilt = dict(arguments)
    _, base = student_and_base(arguments)
    spoilt[base] = torch.where(arguments["kl_weight"][:, None] == 0, math.nan, arguments[base])
    (got, gradients), (expected, expected_gradients) = (run(op, given, impl) for given in (spoilt, arguments))
    cases.assert_same_bits([*got, *gradients], [*expected, *expected_gradients])
    assert torch.equal(got.kl.isnan(), arguments["kl_weight"] == 0)
    dead = (arguments["kl_weight"] == 0) & (arguments["ce_weight"] == 0)
    assert torch.equal(got.logprob.isnan(), dead)


def test_target_of_an_anchored_row_without_ce_weight(op: str, device: str, impl: str) -> None:
    """Its log-prob is reported, though it is not part of the loss, even where it is -inf."""
    arguments = cases.make(op, (3,), device=device)
    arguments["ce_weight"].zero_()
    arguments["kl_weight"].fill_(0.5)
    if "bias" in arguments:
        arguments["bias"][4] = -math.inf
    else:
        arguments["logits"][:, 4] = arguments["base_logits"][:, 4] = -math.inf
    arguments["target"][1] = 4
    arguments["target"][::2] = 3
    result, gradients = run(op, arguments, impl)
    assert result.loss.isfinite() and all(g.isfinite().all() for g in gradients)
    assert (result.logprob == -math.inf).tolist() == [False, True, False]


def test_impossible_target_with_ce_weight(op: str, device: str, impl: str) -> None:
    """The loss is +inf, as it should be; the KL and the gradients are still numbers."""
    arguments = cases.make(op, (2,), device=device)
    arguments |= {n: torch.ones_like(arguments[n]) for n in ("ce_weight", "kl_weight")}
    if "bias" in arguments:
        arguments["bias"][4] = -math.inf
    else:
        arguments["logits"][:, 4] = arguments["base_logits"][:, 4] = -math.inf
    arguments["target"][:] = torch.tensor([4, 5], device=device)
    result, gradients = run(op, arguments, impl)
    assert result.loss == math.inf and result.kl.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_loss_is_the_sum_over_its_rows(op: str, device: str, impl: str, fp64: torch.dtype) -> None:
    """However rows are permuted and split into calls, since all means are in the weights."""
    arguments = cases.make(op, (13,), dtype=fp64, device=device)
    whole, gradients = run(op, arguments, impl, **cases.SCALED)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0)).to(device)
    parts = [run(op, rows_of(arguments, index), impl, **cases.SCALED) for index in order.split([1, 5, 0, 7])]
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(sum(r.loss for r, _ in parts), whole.loss, **close)
    torch.testing.assert_close(torch.cat([r.logprob for r, _ in parts]), whole.logprob[order], equal_nan=True, **close)
    torch.testing.assert_close(torch.cat([r.kl for r, _ in parts]), whole.kl[order], equal_nan=True, **close)
    torch.testing.assert_close(torch.cat([g[0] for _, g in parts]), gradients[0][order], **close)
    for i in range(1, len(gradients)):
        torch.testing.assert_close(sum(g[i] for _, g in parts), gradients[i], **close)


def test_gradients_scale_with_the_upstream_gradient(op: str, device: str, impl: str, fp64: torch.dtype) -> None:
    arguments = cases.make(op, dtype=fp64, device=device)
    _, expected = run(op, arguments, impl)
    given, inputs = cases.leaves(op, arguments)
    (-2.5 * cases.call(op, given, impl=impl).loss / 3).backward()
    torch.testing.assert_close([x.grad for x in inputs], [g * (-2.5 / 3) for g in expected], rtol=1e-12, atol=1e-14)


def test_small_weights_survive_low_precision(op: str, device: str, impl: str) -> None:
    """With fp16 the loss is scaled up before its backward; a gradient kept in fp16 before that would be all zero."""
    arguments = cases.make(op, dtype=torch.float16, device=device)
    expected = scaled_gradients(op, arguments, 1.0, impl)
    small = arguments | {n: arguments[n] / 2**20 for n in ("ce_weight", "kl_weight")}
    torch.testing.assert_close(scaled_gradients(op, small, 2.0**20, impl), expected, rtol=2e-3, atol=1e-6)


def scaled_gradients(op: str, arguments: cases.Arguments, scale: float, impl: str) -> tuple[Tensor, ...]:
    given, inputs = cases.leaves(op, arguments)
    return torch.autograd.grad(cases.call(op, given, impl=impl).loss * scale, inputs)


@pytest.mark.parametrize("dtype_of_weights", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_any_floating_dtype(op: str, device: str, impl: str, dtype_of_weights: torch.dtype) -> None:
    arguments = cases.make(op, device=device)
    rounded = {n: (arguments[n] * 8).round() / 8 for n in ("ce_weight", "kl_weight")}
    got, gradients = run(op, arguments | {n: w.to(dtype_of_weights) for n, w in rounded.items()}, impl)
    expected, expected_gradients = run(op, arguments | rounded, impl)
    cases.assert_same_bits([*got, *gradients], [*expected, *expected_gradients])


def test_parts_are_detached(op: str, device: str, impl: str) -> None:
    result, _ = run(op, cases.make(op, (2, 3), device=device), impl)
    assert result.loss.requires_grad and result.loss.shape == ()
    assert not result.logprob.requires_grad and not result.kl.requires_grad
    assert result.logprob.shape == result.kl.shape == (2, 3)


def test_equals_the_weighted_sum_of_linear_logprob_kl(op: str, device: str, impl: str, fp64: torch.dtype) -> None:
    """Values and gradients; for the logits form with a head of ones on the diagonal."""
    arguments = cases.make(op, (7,), dtype=fp64, device=device)
    got, gradients = run(op, arguments, impl, **cases.SCALED)
    given, inputs = cases.leaves(op, arguments)
    student, base = (given[name] for name in student_and_base(given))
    weight = given.get("weight", torch.eye(student.shape[-1], dtype=fp64, device=device))
    row = linear_logprob_kl(
        student, base, weight, given["target"], bias=given.get("bias"), impl="reference", **cases.SCALED
    )
    loss = (given["kl_weight"] * row.kl - given["ce_weight"] * row.logprob).sum()
    torch.testing.assert_close(got.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss, inputs), rtol=1e-11, atol=1e-12)
    live = (given["ce_weight"] != 0) | (given["kl_weight"] != 0)
    torch.testing.assert_close(got.logprob[live], row.logprob[live].detach(), rtol=1e-12, atol=1e-12)
