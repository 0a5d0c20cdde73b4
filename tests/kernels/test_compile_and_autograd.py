"""Every operator under torch.compile, torch.export, activation checkpointing, and derivatives that it refuses."""

import io
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import SCALED, assert_same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import rmx_kernels
from rmx_kernels.dispatch import OPERATORS


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(op: str, backend: Any, **options: Any) -> Callable[[cases.Arguments], Any]:
    return torch.compile(lambda arguments: cases.call(op, arguments, **options), fullgraph=True, backend=backend)


def forward_backward(op: str, function: Callable[[cases.Arguments], Any], arguments: cases.Arguments) -> list[Tensor]:
    """As that of cases, by way of a function of the arguments, whose number of rows is not to be specialised."""
    fresh, inputs = cases.leaves(op, arguments)
    for name in (n for n in (*cases.PER_ROW, "temperature") if n in fresh):
        torch._dynamo.mark_dynamic(fresh[name], 0)
    result = function(fresh)
    outputs = cases.differentiable(result)
    gradients = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    return [v.detach() for v in result if v is not None] + list(gradients)


@pytest.mark.thorough
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("chosen", [pytest.param(None, marks=pytest.mark.interpreted), "cpu", "reference"])
@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_without_a_graph_break(op: str, chosen: str | None) -> None:
    """The bits of eager, forward and backward, and one compilation for any number of rows."""
    backend = CompileCounterWithBackend("aot_eager")
    function = compiled(op, backend, impl=chosen, **SCALED)
    for N in (6, 9, 33):
        arguments = cases.make(op, (N,))
        expected = cases.forward_backward(op, arguments, impl=chosen, **SCALED)
        assert_same_bits(forward_backward(op, function, arguments), expected)
    assert backend.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", [op for op in OPERATORS if op.startswith("linear")])
def test_compiled_with_lora(op: str) -> None:
    """Its small product is part of the graph; still the bits of eager, and one compilation."""
    backend = CompileCounterWithBackend("aot_eager")
    function = compiled(op, backend, **SCALED)
    for N in (6, 9, 32):
        arguments = cases.with_lora(cases.make(op, (N,)))
        expected = cases.forward_backward(op, arguments, **SCALED)
        assert_same_bits(forward_backward(op, function, arguments), expected)
    assert backend.frame_count == 1


@pytest.mark.parametrize("op", OPERATORS)
def test_export_saves_and_loads_results(op: str) -> None:
    """The named tuples of results are known to torch.export, which writes them by name."""
    arguments = cases.make(op)
    named = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in arguments.items() if name not in named}

    class Module(torch.nn.Module):
        def forward(self, given: dict[str, Tensor]) -> Any:
            return cases.call(op, given | others, impl="cpu")

    file = io.BytesIO()
    torch.export.save(torch.export.export(Module(), (named,)), file)
    file.seek(0)
    got, expected = torch.export.load(file).module()(named), Module()(named)
    assert type(got) is type(expected)
    assert_same_bits([x for x in got if x is not None], [x for x in expected if x is not None])


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize("op", OPERATORS)
def test_non_reentrant_checkpointing(op: str, chosen: str) -> None:
    """The bits without it; saved tensors are read once."""
    arguments = cases.make(op) if op == "entropy_topk" or "linear" not in op else cases.with_lora(cases.make(op))
    for frozen in (False, True):  # with a frozen head the loss makes its gradient early
        results = []
        for checkpointed in (False, True):
            fresh, inputs = cases.leaves(op, arguments)
            if frozen:
                fresh |= {name: fresh[name].detach() for name in ("weight", "bias") if name in fresh}
                inputs = [x for x in inputs if any(x is value for value in cases.tensors(fresh))]

            def run(*tensors: Tensor, fresh: cases.Arguments = fresh) -> tuple[Tensor, ...]:
                return tuple(cases.differentiable(cases.call(op, fresh, impl=chosen)))

            outputs = checkpoint(run, *inputs, use_reentrant=False) if checkpointed else run(*inputs)
            results.append(torch.autograd.grad(outputs, inputs, cases.cotangents(outputs)))
        assert_same_bits(*results)


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize("op", OPERATORS)
def test_a_second_derivative_is_refused(op: str, chosen: str) -> None:
    """A gradient penalty: its upstream gradients are constants, and it depends on the inputs all the same."""
    for frozen in (False, True):
        fresh, inputs = cases.leaves(op, cases.make(op))
        if frozen:
            fresh |= {name: fresh[name].detach() for name in ("weight", "bias") if name in fresh}
            inputs = inputs[:1]
        outputs = cases.differentiable(cases.call(op, fresh, impl=chosen))
        gradients = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs), create_graph=True)
        assert all(g.requires_grad for g in gradients)
        penalty = sum((g.square().sum() for g in gradients), inputs[0].sum())
        with pytest.raises(RuntimeError, match="trying to differentiate twice a function that is once_differentiable"):
            torch.autograd.grad(penalty, inputs)


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize("op", OPERATORS)
def test_forward_mode_is_refused(op: str, chosen: str) -> None:
    """By way of dual numbers and of torch.func, for each tensor that may carry a tangent."""
    arguments = cases.make(op)
    for name in cases.DIFFERENTIABLE[op]:
        x = arguments[name]

        def function(value: Tensor, name: str = name) -> Tensor:
            return cases.call(op, arguments | {name: value}, impl=chosen)[0].sum()

        with pytest.raises(NotImplementedError, match=f"^{name}: expected a tensor without a tangent"):
            torch.func.jvp(function, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match=f"^{name}: expected a tensor without a tangent"):
                function(forward_ad.make_dual(x, torch.ones_like(x)))
            assert function(x).isfinite()  # no tangent, no error
    if op.startswith("linear"):
        A, B, scale = cases.with_lora(arguments)["lora"]
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"^lora: B: expected a tensor without"):
            cases.call(op, arguments | {"lora": (A, forward_ad.make_dual(B, B), scale)}, impl=chosen)


@pytest.mark.thorough
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_by_inductor() -> None:
    """With code around the operator, which is compiled, and leaves the operator's bits alone."""
    op = "linear_gated_contrastive_loss"
    arguments = cases.make(op, (9,), dtype=torch.bfloat16)

    def step(given: cases.Arguments) -> tuple[Tensor, ...]:
        result = cases.call(op, given | {"hidden": given["hidden"] * 2}, impl="cpu")
        return result.loss * 3, result.logprob, result.kl

    got, expected = (
        forward_backward(op, function, arguments)
        for function in (torch.compile(step, fullgraph=True, backend="inductor"), step)
    )
    assert_same_bits(got, expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", cases.TARGETED)
def test_compiled_code_still_checks_its_inputs(op: str) -> None:
    """Shapes while it is traced; the values of targets, which nobody knows then, when it runs."""
    function, arguments = compiled(op, "aot_eager", impl="cpu"), cases.make(op)
    function(arguments)
    target = arguments["target"].clone()
    target[0] = 23
    with pytest.raises(ValueError, match=r"^target: expected ids in \[0, 23\), got 23$"):
        function(arguments | {"target": target})
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"ValueError\('target: expected one id per row, shape \(6,\)"
    ):
        function(arguments | {"target": target[1:]})


@pytest.mark.thorough
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_with_a_temperature_for_each_row(op: str) -> None:
    """The bits of eager, one compilation, and the check of the values, which nobody knows while it is traced."""
    backend = CompileCounterWithBackend("aot_eager")
    function = compiled(op, backend, impl="cpu", softcap=5.0)
    for N in (6, 9, 33):
        arguments = cases.make(op, (N,)) | {"temperature": cases.temperatures(N)}
        expected = cases.forward_backward(op, arguments, impl="cpu", softcap=5.0)
        assert_same_bits(forward_backward(op, function, arguments), expected)
    assert backend.frame_count == 1
    arguments["temperature"][0] = 0
    with pytest.raises(ValueError, match=r"^temperature: expected finite numbers above 0, got 0\.0$"):
        function(arguments)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_a_temperature_that_varies() -> None:
    """From its second value on, torch.compile takes a Python float for a symbol."""
    logits = cases.randn(6, 23)
    function = torch.compile(
        lambda temperature: rmx_kernels.entropy_topk(logits, k=2, temperature=temperature, impl="cpu").lse,
        fullgraph=True,
        backend="aot_eager",
    )
    for temperature in (1.0, 0.7, 0.5):
        expected = rmx_kernels.entropy_topk(logits, k=2, temperature=temperature, impl="cpu").lse
        assert_same_bits([function(temperature)], [expected])
