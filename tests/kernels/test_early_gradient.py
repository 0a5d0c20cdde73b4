"""The gradient of log-probs for hidden states that is made with their values: the same, in two products."""

from typing import Any

import cases
import oracles
import pytest
import torch
from cases import tiny_tiles
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from rmx_kernels import PolicyOptions, linear_entropy_topk, linear_policy_loss
from rmx_kernels.head import cpu as head_cpu

OPERATOR = "linear_entropy_topk"
SCALINGS: list[dict[str, Any]] = [{}, cases.SCALED, {"temperature": cases.temperatures(2, 3)}]
FROZEN = ("weight", "bias")


def given(dtype: torch.dtype, device: str, lora: bool, trained: bool) -> tuple[cases.Arguments, list[Tensor]]:
    """Arguments, and their leaves: hidden, weight and bias where they are trained, A and B."""
    arguments = cases.make(OPERATOR, (2, 3), 1031, 17, dtype, device)
    arguments, inputs = cases.leaves(OPERATOR, cases.with_lora(arguments) if lora else arguments)
    if not trained:
        arguments |= {name: arguments[name].detach() for name in FROZEN}
        inputs = [inputs[0], *inputs[3:]]
    return arguments, inputs


def on(device: str, scaling: dict[str, Any]) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in scaling.items()}


def log_probs(arguments: cases.Arguments, dtype: torch.dtype, scaling: Any) -> tuple[Tensor, list[Tensor]]:
    """Of eager PyTorch in a dtype, with the leaves."""
    cast = {n: v.detach().to(dtype) if isinstance(v, Tensor) and n != "target" else v for n, v in arguments.items()}
    if "lora" in arguments:
        A, B, scale = arguments["lora"]
        cast["lora"] = A.detach().to(dtype), B.detach().to(dtype), scale
    fresh, inputs = cases.leaves(OPERATOR, cast)
    logits = oracles.linear(fresh["hidden"], fresh["weight"], fresh["bias"], lora=fresh.get("lora"))
    none = fresh["target"][..., None][..., :0]
    return oracles.vocab_stats(logits, fresh["target"], none, **scaling)[2], inputs


@pytest.mark.parametrize("scaling", SCALINGS, ids=["plain", "scaled", "by row"])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_as_good_as_eager(device: str, impl: str, dtype: torch.dtype, trained: bool, lora: bool, scaling: Any) -> None:
    scaling = on(device, scaling)
    arguments, inputs = given(dtype, device, lora, trained)
    up = cases.randn(2, 3, seed=11, device=device).to(torch.float64 if dtype == torch.float64 else torch.float32)
    ways = []
    for early in (True, False):
        stats = linear_entropy_topk(**arguments, **scaling, impl=impl, early_gradient=early)
        ways.append((stats, torch.autograd.grad(stats.logprob, inputs, up)))
    (stats, got), (plain, late) = ways
    torch.testing.assert_close(list(stats), list(plain))
    exact, eager = (log_probs(arguments, d, scaling) for d in (torch.float64, dtype))
    exact, eager = (torch.autograd.grad(y, x, up.to(y.dtype)) for y, x in (exact, eager))
    if not trained:
        exact, eager = ((g[0], *g[3:]) for g in (exact, eager))
    extra = 0.0  # of float64, where eager is no yardstick
    if dtype == torch.float64:
        extra = max(1.0, float(arguments["hidden"].detach().abs().max())) ** 2
    for name, one, other, plainly, oracle in zip("xwbAB", got, late, eager, exact, strict=False):
        assert one.dtype == dtype
        oracles.assert_as_good_as_eager(
            *(one, (plainly, other), oracle),
            size=oracle.abs() + extra,
            what=f"d {name}",
            input_dtype=dtype,
            roundings=2,
        )


@pytest.mark.parametrize("scaling", [{}, cases.SCALED], ids=["plain", "scaled"])
def test_gradcheck(device: str, impl: str, fp64: torch.dtype, scaling: Any) -> None:
    arguments = cases.with_lora(cases.make(OPERATOR, (5,), V=9, H=4, dtype=fp64, device=device))
    fresh, inputs = cases.leaves(OPERATOR, arguments)

    def function(*_: Tensor) -> Tensor:
        logprob = linear_entropy_topk(**fresh, **scaling, impl=impl, early_gradient=True).logprob
        assert logprob is not None
        return logprob

    with tiny_tiles():
        assert torch.autograd.gradcheck(function, inputs)


@settings(max_examples=40, deadline=None, derandomize=True)
@drawn(
    lead=st.lists(st.integers(0, 4), max_size=2),
    V=st.integers(1, 23),
    H=st.integers(1, 9),
    r=st.integers(1, 3),
    tile=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    scaling=st.sampled_from([{}, cases.SCALED]),
)
def test_any_shape_and_tiling(device, impl, fp64, lead, V, H, r, tile, scaling) -> None:
    """The gradients that are made in the backward pass, whose own tests know the exact ones."""
    arguments = cases.with_lora(cases.make(OPERATOR, tuple(lead), V, H, fp64, device), r)
    found = []
    for early in (True, False):
        fresh, inputs = cases.leaves(OPERATOR, arguments)
        with tiny_tiles(*tile):
            logprob = linear_entropy_topk(**fresh, **scaling, impl=impl, early_gradient=early).logprob
            found.append(torch.autograd.grad(logprob, inputs, cases.cotangents([logprob])))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lse", "entropy", "topk_logprobs"])
def test_another_result_with_a_gradient(device: str, impl: str, name: str) -> None:
    """All gradients are made in the backward pass then, as without."""
    arguments, inputs = given(torch.float32, device, True, False)
    found = []
    for early in (True, False):
        stats = linear_entropy_topk(**arguments, impl=impl, early_gradient=early)
        assert stats.logprob is not None
        for outputs in ([getattr(stats, name)], [stats.logprob, getattr(stats, name)]):
            found.append(torch.autograd.grad(outputs, inputs, cases.cotangents(outputs), retain_graph=True))
    torch.testing.assert_close(found[:2], found[2:])


def test_rows_without_a_distribution(device: str, impl: str) -> None:
    """NaN in their own gradients alone, those of -inf and of the lowest number as ever."""
    arguments, inputs = given(torch.float32, device, False, False)
    arguments["bias"][::3], arguments["bias"][1] = -torch.inf, torch.finfo(torch.float32).min
    arguments["target"].fill_(2)
    with torch.no_grad():
        arguments["hidden"][0, 1] = torch.nan
    ways = []
    for early in (True, False):
        stats = linear_entropy_topk(**arguments, impl=impl, early_gradient=early)
        assert stats.logprob is not None
        ways.append(torch.autograd.grad(stats.logprob.sum(), inputs)[0])
    assert ways[0][0, 1].isnan().all() and ways[0].isnan().sum() == 17
    torch.testing.assert_close(*ways, equal_nan=True)


def test_ignored_and_several_targets_and_no_rows(device: str, impl: str) -> None:
    arguments, (hidden, *_) = given(torch.float32, device, False, False)
    del arguments["target"]
    options: dict[str, Any] = {"impl": impl, "early_gradient": True}
    target = cases.randint(1031, 2, 3, device=device)
    target[0, 1] = -100
    stats = linear_entropy_topk(target=target, ignore_index=-100, **arguments, **options)
    assert stats.logprob is not None
    (g,) = torch.autograd.grad(stats.logprob.sum(), hidden)
    assert g[0, 1].count_nonzero() == 0 and g.abs().sum(-1).count_nonzero() == 5
    several = linear_entropy_topk(target=target.abs()[..., None].expand(2, 3, 4), **arguments, **options)
    assert several.logprob is not None
    assert torch.autograd.grad(several.logprob.sum(), hidden)[0].isfinite().all()
    assert linear_entropy_topk(**arguments, **options).logprob is None
    arguments["hidden"] = arguments["hidden"].detach()[:0].requires_grad_()
    nothing = linear_entropy_topk(target=target[:0], **arguments, **options)
    assert nothing.logprob is not None
    assert torch.autograd.grad(nothing.logprob.sum(), arguments["hidden"])[0].shape == (0, 3, 17)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the products with whole rows that the native implementation makes."""
    made: list[str] = []
    for name in ("logits", "back"):
        method = getattr(head_cpu.Head, name)

        def counted(*arguments: Any, name: str = name, method: Any = method) -> Any:
            made.append(name)
            return method(*arguments)

        monkeypatch.setattr(head_cpu.Head, name, counted)
    return made


@pytest.mark.skipif("cpu" not in cases.available("cpu"), reason="no native kernels run here")
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_products_of_a_policy_loss(products: list[str], entropy_coef: float) -> None:
    """Two, and no gradient where nothing asks for one; with an entropy bonus three."""
    arguments, (hidden, *_) = given(torch.float32, "cpu", False, False)
    del arguments["k"]
    call = {"advantage": torch.tensor([1.0, -0.5]), "impl": "cpu", "options": PolicyOptions(entropy_coef=entropy_coef)}
    loss = linear_policy_loss(**arguments, **call).loss
    loss.backward()
    assert hidden.grad is not None and hidden.grad.count_nonzero() > 0
    assert products == (["logits", "logits", "back"] if entropy_coef else ["logits", "back"])
    products.clear()
    with torch.no_grad():
        linear_policy_loss(**arguments, **call)
    assert products == ["logits"]


def test_compiled(device: str, impl: str) -> None:
    arguments, inputs = given(torch.float32, device, True, False)

    def function(hidden: Tensor) -> Tensor:
        stats = linear_entropy_topk(**arguments | {"hidden": hidden}, impl=impl, early_gradient=True)
        assert stats.logprob is not None
        return stats.logprob.sum()

    expected = torch.autograd.grad(function(inputs[0]), inputs[0])
    got = torch.autograd.grad(torch.compile(function, backend="aot_eager", fullgraph=True)(inputs[0]), inputs[0])
    torch.testing.assert_close(got, expected)
