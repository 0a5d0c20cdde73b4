"""linear_cross_entropy against torch's cross_entropy of full logits, in float64 and in the dtypes of models."""

from typing import Any

import cases
import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rmx_kernels import CrossEntropy, LinearCrossEntropyLoss, linear_cross_entropy

IMPLS = cases.available("cpu")
N, V, H = 7, 23, 5


def inputs(dtype: torch.dtype = torch.float64, ignored: int = -100) -> dict[str, Any]:
    arguments = cases.with_lora(cases.make("linear_entropy_topk", (N,), V, H, dtype))
    target = arguments["target"].clone()
    target[2], target[5] = ignored, ignored
    return {
        "input": arguments["hidden"].requires_grad_(),
        "linear_weight": arguments["weight"].requires_grad_(),
        "linear_bias": arguments["bias"].requires_grad_(),
        "target": target,
        "lora": arguments["lora"],
    }


def eager(
    given: dict[str, Any], temperature: float = 1.0, softcap: float | None = None, z_loss: float = 0.0, **options: Any
) -> Tensor:
    """With logits, as a trainer writes it."""
    logits = oracles.linear(given["input"], given["linear_weight"], given["linear_bias"], lora=given.get("lora"))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits, target = logits / temperature, given["target"]
    if options.pop("shift", False):
        logits, target = logits[..., :-1, :], target[..., 1:]
    loss = F.cross_entropy(logits, target, **options)
    if z_loss:
        ignored, weight = options.get("ignore_index", -100), options.get("weight")
        live = target != ignored
        own = torch.ones_like(logits[:, 0]) if weight is None else weight[torch.where(live, target, 0)]
        terms = torch.where(live, z_loss * own * logits.logsumexp(-1).square(), 0.0)
        reduction = options.get("reduction", "mean")
        loss = loss + {"none": terms, "sum": terms.sum(), "mean": terms.sum() / own[live].sum()}[reduction]
    return loss


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum", "temperature": 0.7, "softcap": 5.0},
    {"reduction": "none"},
    {"reduction": "none", "label_smoothing": 0.3, "weight": True},
    {"weight": True},
    {"weight": True, "reduction": "sum", "label_smoothing": 1.0},
    {"label_smoothing": 0.1, "temperature": 1.7},
    {"z_loss": 0.01, "weight": True},
    {"z_loss": 0.01, "softcap": 5.0, "reduction": "none"},
    {"ignore_index": 3},
    {"shift": True},
    {"shift": True, "label_smoothing": 0.2, "z_loss": 0.1, "reduction": "sum"},
]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("chosen", [name for name in IMPLS if name != "triton"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_gradients_are_those_of_full_logits(options: dict[str, Any], chosen: str, lora: bool) -> None:
    if "weight" in options:
        options = options | {"weight": cases.randn(V, seed=9, dtype=torch.float64).abs()}
    given = inputs(ignored=options.get("ignore_index", -100))
    trained = [given["input"], given["linear_weight"], given["linear_bias"]]
    if lora:
        trained += [x.requires_grad_() for x in given["lora"][:2]]
    else:
        del given["lora"]
    results = []
    for value in (linear_cross_entropy(**given, **options, impl=chosen), eager(given, **options)):
        results.append([value, *torch.autograd.grad(value, trained, cases.cotangents([value]))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chosen", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_eager_in_the_dtypes_of_models(dtype: torch.dtype, chosen: str) -> None:
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.01, "reduction": "none"}):
        given = inputs(dtype)
        del given["lora"]
        wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}
        ours = linear_cross_entropy(**given, **options, impl=chosen)
        narrow, exact = eager(given, **options), eager(wide, **options)
        assert ours.dtype == torch.float32
        error, theirs = ((x.double() - exact).abs().max() for x in (ours, narrow))
        assert error <= 2 * theirs + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}], ids=str)
def test_rows_that_are_ignored_are_not_read(options: dict[str, Any]) -> None:
    given = inputs(torch.float32) | {"lora": None}
    expected = linear_cross_entropy(**given, **options)
    x = given["input"].detach().clone()
    x[2] = torch.nan
    value = linear_cross_entropy(**given | {"input": x.requires_grad_()}, **options)
    (gradient,) = torch.autograd.grad(value, [x])
    assert value == expected
    assert gradient.isfinite().all() and (gradient[2] == 0).all()


def test_a_mean_over_no_rows_is_nan_as_torchs() -> None:
    given = inputs(torch.float32)
    given["target"].fill_(-100)
    assert linear_cross_entropy(**given).isnan() and linear_cross_entropy(**given, z_loss=0.1).isnan()
    assert linear_cross_entropy(**given, reduction="sum") == 0


def test_statistics() -> None:
    given = inputs()
    logits = oracles.linear(given["input"], given["linear_weight"], given["linear_bias"], lora=given["lora"])
    found = linear_cross_entropy(**given, statistics=True)
    assert isinstance(found, CrossEntropy)
    loss, lse, prediction, accuracy = found
    torch.testing.assert_close(loss, F.cross_entropy(logits, given["target"]))
    live = given["target"] != -100
    torch.testing.assert_close(lse[live], logits.logsumexp(-1)[live])
    assert lse[~live].isnan().all() and (prediction[~live] == -100).all()
    assert torch.equal(prediction[live], logits.argmax(-1)[live])
    assert accuracy == (logits.argmax(-1) == given["target"])[live].double().mean()


def test_a_batch_of_sequences() -> None:
    given = inputs()
    batch = {n: given[n].reshape(1, N, *given[n].shape[1:]) for n in ("input", "target")}
    for reduction in ("none", "mean"):
        one = linear_cross_entropy(**given, reduction=reduction)
        assert torch.equal(linear_cross_entropy(**given | batch, reduction=reduction).flatten(), one.flatten())


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy")
def test_in_the_place_of_torchs_own() -> None:
    given = inputs()
    del given["lora"]
    arguments = given.pop("input"), given.pop("linear_weight"), given.pop("target")
    for options in ({}, {"reduction": "sum"}, {"label_smoothing": 0.2}, {"ignore_index": 5}):
        arguments[2][2:6:3] = options.get("ignore_index", -100)
        ours, theirs = (f(*arguments, **given, **options) for f in (linear_cross_entropy, F.linear_cross_entropy))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [False, True])
def test_module(bias: bool) -> None:
    loss = LinearCrossEntropyLoss(H, V, bias=bias, dtype=torch.float64, reduction="sum", label_smoothing=0.1)
    x, target = inputs()["input"], inputs()["target"]
    expected = F.cross_entropy(loss.linear(x), target, reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss(x, target), expected)
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        loss.load_state_dict(torch.nn.LinearCrossEntropyLoss(H, V, bias=bias, dtype=torch.float64).state_dict())


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduction": "max"}, ValueError, "reduction: expected one of mean, sum, none, got 'max'"),
    ({"label_smoothing": 1.5}, ValueError, "label_smoothing: expected a number of at least 0 and at most 1, got 1.5"),
    ({"label_smoothing": 0.1, "softcap": 5.0}, ValueError, "label_smoothing: expected 0 with a softcap"),
    ({"z_loss": -1.0}, ValueError, "z_loss: expected a number of at least 0, got -1.0"),
    ({"z_loss": True}, TypeError, "z_loss: expected a number, got bool"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index: expected an int or None, got float"),
    ({"weight": torch.ones(3)}, ValueError, r"weight: expected a floating-point tensor of shape \[23\]"),
    ({"weight": torch.ones(V).requires_grad_()}, ValueError, "weight: expected a tensor that requires no gradient"),
    ({"target": torch.full((N,), V)}, ValueError, r"target: expected ids in \[0, 23\), got 23"),
    ({"target": torch.rand(N, V)}, TypeError, "target: expected int64 or int32 token ids"),
    ({"shift": True, "input": torch.ones(H)}, ValueError, "input: expected at least 2 dimension"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[m[:25] for _, _, m in WRONG])
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        linear_cross_entropy(**inputs(torch.float32) | options)
