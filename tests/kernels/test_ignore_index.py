"""``ignore_index`` of the operators that take targets: as if those targets were not there; and refusals."""

from typing import Any
from unittest import mock

import cases
import pytest
import torch
from torch import Tensor

import rmx_kernels
from rmx_kernels import checks, dispatch, linear_kept_logprobs, linear_policy_loss

OPERATORS = cases.TARGETED
OPERATOR = "linear_entropy_topk"  # of the tests of one
IGNORED = -100


def some_ignored(op: str, **place: Any) -> tuple[cases.Arguments, Tensor]:
    """(the arguments with every other target ignored, which)."""
    arguments = cases.make(op, (2, 6), **place)
    ignored = (torch.arange(12, device=arguments["target"].device) % 2 == 1).view(2, 6)
    return arguments | {"target": arguments["target"].masked_fill(ignored, IGNORED)}, ignored


def expected_of(op: str, arguments: cases.Arguments, ignored: Tensor, impl: str) -> tuple[list[Tensor], list[Tensor]]:
    """(results, gradients) of a call with token 0, whose log-prob or weight counts for nothing where it is ignored."""
    other = arguments | {"target": arguments["target"].masked_fill(ignored, 0)}
    if "loss" in op:
        other["ce_weight"] = other["ce_weight"].masked_fill(ignored, 0)
    fresh, inputs = cases.leaves(op, other)
    result = cases.call(op, fresh, impl=impl)
    logprob = result.logprob * ~ignored if "loss" not in op else result.logprob.masked_fill(ignored, torch.nan)
    result = result._replace(logprob=logprob)
    outputs = cases.differentiable(result)
    return list(result), list(torch.autograd.grad(outputs, inputs, cases.cotangents(outputs)))


def test_ignored_targets_do_not_count(op: str, device: str, impl: str, dtype: torch.dtype) -> None:
    arguments, ignored = some_ignored(op, dtype=dtype, device=device)
    fresh, inputs = cases.leaves(op, arguments)
    result = cases.call(op, fresh, impl=impl, ignore_index=IGNORED)
    outputs = cases.differentiable(result)
    gradients = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    values, expected = expected_of(op, arguments, ignored, impl)
    cases.assert_same_bits([*result, *gradients], [*values, *expected])
    own = result.logprob[ignored]
    assert bool((own == 0).all() if "loss" not in op else own.isnan().all())


def test_an_id_that_does_not_occur_changes_nothing(op: str, device: str, impl: str) -> None:
    arguments = cases.make(op, (5,), device=device)
    one, other = (cases.call(op, arguments, impl=impl, ignore_index=id_) for id_ in (None, IGNORED))
    assert_equal(one, other)


def assert_equal(one: Any, other: Any) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_several_targets_a_row(device: str, impl: str) -> None:
    arguments = cases.make(OPERATOR, (4,), device=device)
    target = torch.tensor([[1, -1], [2, 3], [-1, -1], [0, 5]], device=device)
    own = cases.call(OPERATOR, arguments | {"target": target}, impl=impl, ignore_index=-1).logprob
    plain = cases.call(OPERATOR, arguments | {"target": target.clamp(min=0)}, impl=impl).logprob
    assert torch.equal(own, torch.where(target < 0, 0.0, plain))


@pytest.mark.parametrize("wrong", [1.0, True, "a"])
def test_what_is_no_id_is_refused(op: str, device: str, impl: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"ignore_index: expected an int or None, got {type(wrong).__name__}"):
        cases.call(op, cases.make(op, (5,), device=device), impl=impl, ignore_index=wrong)


def test_other_targets_are_still_looked_at(op: str, device: str, impl: str) -> None:
    if device != "cpu":
        pytest.skip("a GPU is not waited for")
    arguments, _ = some_ignored(op, device=device)
    with pytest.raises(ValueError, match="target"):
        cases.call(op, arguments, impl=impl, ignore_index=IGNORED - 1)


def test_the_other_functions() -> None:
    hidden, weight = cases.randn(1, 4, 7), cases.randn(9, 7, seed=1)
    target = torch.tensor([[2, IGNORED, 0, IGNORED]])
    kept = torch.tensor([2, 0, 5, -1]).expand(1, 4, 4)
    got = linear_kept_logprobs(hidden, weight, kept, target, ignore_index=IGNORED)
    plain = linear_kept_logprobs(hidden, weight, kept, target.clamp(min=0))
    assert got.logprob is not None and plain.logprob is not None
    assert torch.equal(got.logprob, plain.logprob * (target >= 0)) and torch.equal(got.entropy, plain.entropy)
    advantage = torch.ones(1)
    for more in ({}, {"mask": torch.tensor([[1, 1, 0, 1]])}):
        mask = (target >= 0) & (more.get("mask", torch.ones(1)) != 0)
        own = linear_policy_loss(hidden, weight, target, advantage, ignore_index=IGNORED, **more)
        assert_equal(own, linear_policy_loss(hidden, weight, target.clamp(min=0), advantage, mask=mask))


@pytest.mark.parametrize("op", ["linear_entropy_topk", "linear_gated_contrastive_loss"])
def test_with_a_process_group(op: str) -> None:
    """The form over ranks gets targets that all exist, and the weights that count."""
    arguments, ignored = some_ignored(op)
    whole = getattr(rmx_kernels, op)

    def over_ranks(*rows: Any, group: Any, reduce_hidden_grad: bool, **head: Any) -> Any:
        return whole(*rows, **head)

    with mock.patch.object(dispatch, "sharded", return_value=over_ranks), mock.patch.object(checks, "process_group"):
        got = cases.call(op, arguments, ignore_index=IGNORED, process_group="a group")
    impl = dispatch.choose(op, None, "cpu", torch.float32)
    torch.testing.assert_close(list(got), expected_of(op, arguments, ignored, impl)[0], equal_nan=True)


def test_it_compiles_to_one_graph() -> None:
    def function(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logprob = rmx_kernels.linear_entropy_topk(
            hidden, weight, target, ignore_index=IGNORED, impl="reference"
        ).logprob
        assert logprob is not None
        return logprob.sum()

    given = cases.randn(4, 7), cases.randn(9, 7, seed=1), torch.tensor([2, IGNORED, 0, IGNORED])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), function(*given))
