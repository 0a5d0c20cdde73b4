"""The operators as torch sees them: schemas, fake kernels, autograd and torch.compile."""

import importlib
import io
import subprocess
import sys
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

PLAIN = (1.0, None)
SCALING = tuple(SCALED.values())
ALL, HEAD_NEEDS = (True,) * 5, [(True, False, False), (False, True, False), (False, False, True), (True, True, True)]
NEEDS = [ALL, *(tuple(i == j for j in range(5)) for i in range(5))]
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = (*STATIC, "test_aot_dispatch_dynamic")  # which compares results with eager's, and takes NaN for a difference
Call = tuple[Any, ...]


def packet(name: str) -> Any:
    return getattr(torch.ops.rmx_kernels, name)


def detached(*arguments: Any) -> Call:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def entropy_topk(dtype: torch.dtype) -> dict[str, list[Call]]:
    x = cases.randn(2, 3, 9, dtype=dtype).requires_grad_()
    target, upstream = cases.randint(9, 2, 3), cases.randn(2, 3)
    calls: list[Call] = [
        (x, target, 2, *PLAIN),
        (x, target.int(), 9, *SCALING),
        (x, None, 0, *PLAIN),
        (x.detach()[0], None, 1, *SCALING),
    ]
    backward = []
    for _, ids, k, *scaling in calls[:3]:
        _, entropy, _, _, topk_ids, m, log_d = packet("entropy_topk")(x.detach(), ids, k, *scaling)
        saved = (x.detach(), ids, topk_ids, m, log_d, entropy)
        g_logprob = None if ids is None else upstream
        backward += [
            (*saved, upstream, upstream, g_logprob, cases.randn(2, 3, k), *scaling),
            (*saved, None, upstream, None, None, *scaling),
        ]
    return {"entropy_topk": calls, "entropy_topk_backward": backward}


def headed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(hidden, base_hidden, weight, bias, target) of 2 x 3 rows, 11 tokens and H = 8."""
    a = cases.make("linear_gated_contrastive_loss", (2, 3), 11, 8, dtype)
    hidden, weight, bias = (a[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    return hidden, a["base_hidden"], weight, bias, a["target"]


def lora_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(lora_hidden, lora_weight) for the rows and tokens of :func:`headed`; r = 3."""
    lora_hidden, lora_weight = (cases.randn(*shape, 3, seed=7, dtype=dtype) for shape in ((2, 3), (11,)))
    return lora_hidden.requires_grad_(), lora_weight.requires_grad_()


def linear_entropy_topk(dtype: torch.dtype) -> dict[str, list[Call]]:
    hidden, _, weight, bias, target = headed(dtype)
    u, B = lora_pair(dtype)
    upstream = cases.randn(2, 3)
    calls: list[Call] = [
        (hidden, weight, bias, None, None, target, 2, *PLAIN),
        (hidden, weight.detach(), None, u, B, target.int(), 11, *SCALING),
        (hidden.detach(), weight, None, None, None, None, 0, *PLAIN),
        (hidden, weight, bias, u, B, target, 2, *SCALING),
        (hidden.detach(), weight.detach(), None, u.detach(), B, target, 0, *PLAIN),
    ]
    backward = []
    for *tensors, ids, k, temperature, softcap in calls:
        inputs, scaling = detached(hidden, weight, *tensors[2:], ids), (temperature, softcap)
        _, entropy, _, _, topk_ids, m, log_d = packet("linear_entropy_topk")(*inputs, k, *scaling)
        g_logprob = None if ids is None else upstream
        gradients = (upstream, upstream, g_logprob, cases.randn(2, 3, k))
        for needs in NEEDS:
            backward.append((*inputs, topk_ids, m, log_d, entropy, *gradients, *scaling, *needs))
    return {"linear_entropy_topk": calls, "linear_entropy_topk_backward": backward}


def weights(dead: float = 0.5) -> tuple[Tensor, Tensor]:
    """Of 2 x 3 rows; where ``dead`` is 0, one row is, and another has no anchor, and there the results are NaN."""
    return torch.tensor([[1.0, dead, -0.5], [0.3, 2.0, 0.0]]), torch.tensor([[0.5, dead, dead], [1.0, 0.1, 0.2]])


def gated_contrastive_loss(dtype: torch.dtype) -> dict[str, list[Call]]:
    x, base = (cases.randn(2, 3, 9, seed=seed, dtype=dtype) for seed in (0, 1))
    x.requires_grad_()
    rows = (base, cases.randint(9, 2, 3))
    calls: list[Call] = [
        (x, *rows, *weights(), *SCALING),
        (x, *rows, *weights(dead=0), *PLAIN),
        (x.detach(), *rows, *weights(), *PLAIN),
    ]
    backward: list[Call] = []
    for call in calls:
        inputs, scaling = detached(*call[:5]), call[5:]
        norms = packet("gated_contrastive_loss")(*inputs, *scaling)[3]
        backward.append((*inputs, norms, torch.tensor(0.7), *scaling))
    return {"gated_contrastive_loss": calls, "gated_contrastive_loss_backward": backward}


def linear_gated_contrastive_loss(dtype: torch.dtype) -> dict[str, list[Call]]:
    name = "linear_gated_contrastive_loss"
    hidden, base_hidden, weight, bias, target = headed(dtype)
    u, B = lora_pair(dtype)
    base_lse = rmx_kernels.linear_entropy_topk(*detached(base_hidden, weight), bias=bias.detach()).lse
    calls: list[Call] = [
        (hidden, base_hidden, weight, bias, None, None, target, *weights(), None, *SCALING, True),
        (hidden, base_hidden, *detached(weight, bias), None, None, target, *weights(), base_lse, *PLAIN, True),
        (hidden.detach(), base_hidden, weight, None, None, None, target.int(), *weights(dead=0), None, *PLAIN, False),
        (hidden, base_hidden, weight, bias, u, B, target, *weights(), None, *SCALING, True),
        (hidden, base_hidden, *detached(weight, bias), u, B.detach(), target, *weights(), base_lse, *PLAIN, True),
        (hidden.detach(), base_hidden, weight.detach(), None, u.detach(), B, target, *weights(), None, *PLAIN, False),
    ]
    backward, products = [], []
    for call in calls:
        _, _, _, norms, *early = packet(name)(*detached(*call))
        for needs in HEAD_NEEDS:
            backward.append((*detached(*call[:9]), norms, torch.tensor(0.7), *call[10:12], *needs))
        assert [x.numel() > 0 for x in early] == [call[-1], call[-1] and call[4] is not None]
        products += [(x, torch.tensor(0.7), dtype) for x in early if x.numel()]
    return {name: calls, f"{name}_backward": backward, f"{name}_d_hidden": products}


def linear_logprob_kl(dtype: torch.dtype) -> dict[str, list[Call]]:
    hidden, base_hidden, weight, bias, target = headed(dtype)
    u, B = lora_pair(dtype)
    calls: list[Call] = [
        (hidden, base_hidden, weight, bias, None, None, target, *SCALING),
        (hidden, base_hidden, weight.detach(), None, None, None, target.int(), *PLAIN),
        (hidden.detach(), base_hidden, weight, None, None, None, target, *PLAIN),
        (hidden, base_hidden, weight, bias, u, B, target, *SCALING),
        (hidden, base_hidden, weight.detach(), None, u.detach(), B, target.int(), *PLAIN),
    ]
    backward: list[Call] = []
    upstream = cases.randn(2, 3)
    for call in calls:
        inputs, scaling = detached(*call[:7]), call[7:]
        norms = packet("linear_logprob_kl")(*inputs, *scaling)[2]
        for needs in NEEDS:
            backward.append((*inputs, norms, upstream, upstream, *scaling, *needs))
        backward.append((*inputs, norms, upstream, None, *scaling, *ALL))
        backward.append((*inputs, norms, None, upstream, *scaling, *ALL))
    return {"linear_logprob_kl": calls, "linear_logprob_kl_backward": backward}


SAMPLES: list[Callable[[torch.dtype], dict[str, list[Call]]]] = [
    entropy_topk,
    linear_entropy_topk,
    gated_contrastive_loss,
    linear_gated_contrastive_loss,
    linear_logprob_kl,
]


@pytest.mark.thorough
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.__name__)
def test_opcheck(samples: Callable[[torch.dtype], dict[str, list[Call]]], dtype: torch.dtype) -> None:
    """Schemas tell the truth about mutation and aliases, fakes about shapes and dtypes, and gradients trace."""
    for name, calls in samples(dtype).items():
        for call in calls:
            operator = packet(name).default
            results = operator(*detached(*call))
            nan = any(x.isnan().any() for x in ([results] if isinstance(results, Tensor) else results))
            torch.library.opcheck(operator, call, test_utils=STATIC if nan else UTILS)


def test_every_registered_operator_is_checked() -> None:
    checked = {name for samples in SAMPLES for name in samples(torch.float32)}
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rmx_kernels::"))
    registered = {n for n in names if not n.startswith("rmx_kernels::reference_")}  # these below
    assert {f"rmx_kernels::{name}" for name in checked} == registered


PER_ROW = ("logits", "base_logits", "hidden", "base_hidden", "target", "ce_weight", "kl_weight")


@pytest.fixture
def fresh_compiler() -> None:
    torch._dynamo.reset()


def compiled(op: str, backend: Any, **options: Any) -> Callable[[cases.Arguments], Any]:
    return torch.compile(lambda arguments: cases.call(op, arguments, **options), fullgraph=True, backend=backend)


def forward_backward(op: str, function: Callable[[cases.Arguments], Any], arguments: cases.Arguments) -> list[Tensor]:
    """As that of cases, by way of a function of the arguments, whose number of rows is not to be specialised."""
    fresh, inputs = cases.leaves(op, arguments)
    for name in (n for n in PER_ROW if n in fresh):
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


@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["stats", "logprob_kl", "contrastive_loss"])
def test_opcheck_of_the_references(name: str) -> None:
    """Loaded with the references; they run in their place inside of compiled functions."""
    for op in OPERATORS:
        importlib.import_module(f"rmx_kernels.{op}.reference")
    hidden, base_hidden, weight, bias, target = headed(torch.float32)
    pair = cases.randn(6, 2).requires_grad_(), cases.randn(11, 2).requires_grad_()
    x, base, ids, row = hidden.detach().flatten(0, 1), base_hidden.flatten(0, 1), target.flatten(), cases.randn(6)
    head, norms = (weight, bias, *pair), (row, row.abs(), 0.7, 5.0, None, False)
    calls: dict[str, tuple[Call, int]] = {
        "stats": ((x.requires_grad_(), *head, ids, 2, 0.7, 5.0), 4),
        "logprob_kl": ((x, base, *head, ids, 0.7, 5.0), 2),
        "contrastive_loss": ((x, base, *head, ids, *norms), 1),
    }
    arguments, upstream = calls[name]
    op = packet(f"reference_{name}")
    torch.library.opcheck(op, arguments, test_utils=UTILS)
    gradients = [g.detach() for g in op(*arguments)[:upstream]]
    for needs in ([True] * 5, [True, False, False, True, False]):
        torch.library.opcheck(
            packet(f"reference_{name}_backward"), (*detached(*arguments), *gradients, needs), test_utils=STATIC
        )


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
@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_code_still_checks_its_inputs(op: str) -> None:
    """Shapes while it is traced; the values of targets, which nobody knows then, when it runs."""
    function, arguments = compiled(op, "aot_eager", impl="cpu"), cases.make(op)
    function(arguments)
    target = arguments["target"].clone()
    target[0] = 23
    with pytest.raises(ValueError, match=r"^target: expected ids in \[0, 23\), got 23$"):
        function(arguments | {"target": target})
    with pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"ValueError\('target: expected one id a row, shape \(6,\)"
    ):
        function(arguments | {"target": target[1:]})


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


FAKES_ALONE = """
import sys
from pathlib import Path
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import rmx_kernels
from rmx_kernels import native
native.LIBRARY = Path("nowhere")
ops = torch.ops.rmx_kernels
for name in ("entropy_topk", "gated_contrastive_loss", "linear_logprob_kl"):
    assert getattr(ops, name).default and getattr(ops, f"{name}_backward").default
with FakeTensorMode():
    h, W, ids, w = torch.empty(3, 8), torch.empty(11, 8), torch.empty(3, dtype=torch.int64), torch.empty(3)
    assert [tuple(x.shape) for x in ops.entropy_topk(h, ids, 2, 1.0, None)] == [
        (3,), (3,), (3,), (3, 2), (3, 2), (3,), (3,)
    ]
    for u, B, shape in ((None, None, (0,)), (torch.empty(3, 2), torch.empty(11, 2), (3, 2))):
        loss = ops.linear_gated_contrastive_loss(h, h, W, None, u, B, ids, w, w, None, 1.0, None, True)
        assert [tuple(x.shape) for x in loss] == [(), (3,), (3,), (4, 3), (3, 8), shape]
        assert ops.linear_logprob_kl(h, h, W, None, u, B, ids, 1.0, None)[1].shape == (3,)
loaded = {m for m in sys.modules if m.startswith("rmx_kernels.") and m.split(".")[-1] in ("cpu", "triton", "reference")}
assert not loaded, loaded
assert native._open.cache_info().currsize == 0
"""


@pytest.mark.thorough
def test_schemas_and_fakes_need_no_kernel() -> None:
    """import rmx_kernels registers all operators, and loads neither their kernels nor the native library."""
    subprocess.run([sys.executable, "-c", FAKES_ALONE], check=True)
