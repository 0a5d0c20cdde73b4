"""The operators as torch sees them: schemas, fake kernels, autograd and torch.compile."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import SCALED
from torch import Tensor

import rmx_kernels
from rmx_kernels import backends, registration
from rmx_kernels.divergences.op import ARGUMENTS
from rmx_kernels.logits import OPERANDS, Logits

ALL, LOGITS_ALONE = (True,) * 5, (True, False, False, False, False)
NEEDS = [ALL, LOGITS_ALONE, (False, True, False, True, False), (False, False, True, False, True)]
HEAD_NEEDS = [(False, True, True, False, True), (False, True, False, False, False), (False, False, True, False, True)]
STATIC = ("test_schema", "test_autograd_registration", "test_faketensor")
UTILS = (*STATIC, "test_aot_dispatch_dynamic")  # which compares results with eager's, and takes NaN for a difference
Call = tuple[Any, ...]


def packet(name: str) -> Any:
    return getattr(torch.ops.rmx_kernels, name)


def detached(*arguments: Any) -> Call:
    return tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)


def logits(dtype: torch.dtype, **scaling: Any) -> Logits:
    return Logits(cases.randn(2, 3, 9, dtype=dtype).requires_grad_(), **scaling)


def headed(dtype: torch.dtype) -> tuple[Logits, Tensor, Tensor]:
    """(the student's with a LoRA pair, base_hidden, target) of 2 x 3 rows, 11 tokens, H = 8 and r = 3; all trained."""
    a = cases.make("linear_gated_contrastive_loss", (2, 3), 11, 8, dtype)
    hidden, weight, bias = (a[name].requires_grad_() for name in ("hidden", "weight", "bias"))
    lora_hidden, lora_weight = (cases.randn(*shape, 3, seed=7, dtype=dtype) for shape in ((2, 3), (11,)))
    pair = lora_hidden.requires_grad_(), lora_weight.requires_grad_()
    return Logits(hidden, weight, bias, *pair, **SCALED), a["base_hidden"], a["target"]


def plain(z: Logits) -> Logits:
    """Without LoRA, and without scaling."""
    return Logits(*z.tensors[:3])


def by_row(z: Logits) -> Logits:
    """With a temperature for each row."""
    return z._replace(temperature=1.0, row_temperature=cases.temperatures(*z.lead))


def frozen(z: Logits, *names: str) -> Logits:
    return z._replace(**{name: getattr(z, name).detach() for name in names})


def wanted(inputs: Call, needs: tuple[bool, ...]) -> list[bool]:
    """Those of the gradients that there are."""
    return [need and x is not None for need, x in zip(needs, inputs[:5], strict=True)]


def vocab_stats(dtype: torch.dtype, impl: str) -> dict[str, list[Call]]:
    z, (head, _, target) = logits(dtype), headed(dtype)
    ids = cases.randint(9, 2, 3)
    calls: list[Call] = [
        (*z, ids, 2, False, impl),
        (*logits(dtype, **SCALED), ids.int(), 9, False, impl),
        (*z, None, 0, False, impl),
        (*z._replace(x=z.x.detach()[0]), None, 1, False, impl),
        (*plain(head), target, 2, False, impl),
        (*frozen(head._replace(bias=None), "weight"), target.int(), 11, False, impl),
        (*frozen(plain(head)._replace(bias=None), "x"), None, 0, False, impl),
        (*head, target, 2, False, impl),
        (*frozen(head, "x", "weight", "lora_hidden"), target, 0, False, impl),
        (*frozen(plain(head), "weight", "bias"), target, 0, True, impl),
        (*frozen(head, "weight", "bias", "lora_weight"), target.int(), 2, True, impl),
        (*head, target, 2, True, impl),
        (*by_row(z), ids, 2, False, impl),
        (*by_row(head), target, 2, False, impl),
    ]
    backward = []
    for call in calls:
        inputs, (ids, k, gradient, _) = detached(*call[:OPERANDS]), call[OPERANDS:]
        _, entropy, _, _, topk_ids, m, log_d, *made = packet("vocab_stats")(*detached(*call))
        assert [x.numel() > 0 for x in made] == [gradient, gradient and inputs[3] is not None]
        up = cases.randn(*m.shape)
        gradients = (up, up, None if ids is None else up, cases.randn(*m.shape, k))
        for needs in [LOGITS_ALONE] if inputs[1] is None else NEEDS if inputs[3] is not None else [ALL]:
            backward.append((*inputs, ids, topk_ids, m, log_d, entropy, *gradients, wanted(inputs, needs), impl))
        backward.append(
            (*inputs, ids, topk_ids, m, log_d, entropy, None, up, None, None, wanted(inputs, LOGITS_ALONE), impl)
        )
    return {"vocab_stats": calls, "vocab_stats_backward": backward}


def weights(dead: float = 0.5) -> tuple[Tensor, Tensor]:
    """Of 2 x 3 rows; where ``dead`` is 0, one row is, and another has no anchor, and there the results are NaN."""
    return torch.tensor([[1.0, dead, -0.5], [0.3, 2.0, 0.0]]), torch.tensor([[0.5, dead, dead], [1.0, 0.1, 0.2]])


def contrastive_loss(dtype: torch.dtype, impl: str) -> dict[str, list[Call]]:
    z, (head, base, target) = logits(dtype, **SCALED), headed(dtype)
    of_logits = cases.randn(2, 3, 9, seed=1, dtype=dtype), cases.randint(9, 2, 3)
    base_lse = rmx_kernels.linear_entropy_topk(base, *detached(head.weight), bias=head.bias.detach(), **SCALED).lse
    calls: list[Call] = [
        (*z, *of_logits, *weights(), None, False, impl),
        (*logits(dtype), *of_logits, *weights(dead=0), None, False, impl),
        (*frozen(z, "x"), *of_logits, *weights(), None, False, impl),
        (*plain(head), base, target, *weights(), None, True, impl),
        (*frozen(head, "weight", "bias"), base, target, *weights(), base_lse, True, impl),
        (*frozen(plain(head)._replace(bias=None), "x"), base, target.int(), *weights(dead=0), None, False, impl),
        (*head, base, target, *weights(), None, True, impl),
        (*frozen(head, "weight", "bias", "lora_weight"), base, target, *weights(), base_lse, True, impl),
        (*frozen(head, "x", "weight", "bias", "lora_hidden"), base, target, *weights(), None, False, impl),
        (*by_row(z), *of_logits, *weights(), None, False, impl),
        (*by_row(head), base, target, *weights(), None, True, impl),
    ]
    backward, products = [], []
    for call in calls:
        *results, dx, d_lora_hidden = packet("contrastive_loss")(*detached(*call))
        inputs, gradient = detached(*call[: OPERANDS + 4]), call[OPERANDS + 5]
        for needs in [LOGITS_ALONE] if call[1] is None else HEAD_NEEDS if call[3] is not None else HEAD_NEEDS[:1]:
            backward.append((*inputs, results[3], torch.tensor(0.7), wanted(inputs, needs), impl))
        assert [x.numel() > 0 for x in (dx, d_lora_hidden)] == [gradient, gradient and call[3] is not None]
        products += [(x, torch.tensor(0.7), dtype) for x in (dx, d_lora_hidden) if x.numel()]
    return {"contrastive_loss": calls, "contrastive_loss_backward": backward, "times": products}


def logprob_kl(dtype: torch.dtype, impl: str) -> dict[str, list[Call]]:
    head, base, target = headed(dtype)
    calls: list[Call] = [
        (*plain(head), base, target, impl),
        (*frozen(plain(head)._replace(bias=None), "weight"), base, target.int(), impl),
        (*frozen(plain(head)._replace(bias=None), "x"), base, target, impl),
        (*head, base, target, impl),
        (*frozen(head._replace(bias=None), "weight", "lora_hidden"), base, target.int(), impl),
        (*by_row(head), base, target, impl),
    ]
    backward: list[Call] = []
    upstream = cases.randn(2, 3)
    for call in calls:
        inputs = detached(*call[: OPERANDS + 2])
        norms = packet("logprob_kl")(*inputs, impl)[2]
        asked = NEEDS if inputs[3] is not None else [ALL]
        backward += [(*inputs, norms, upstream, upstream, wanted(inputs, needs), impl) for needs in asked]
        backward += [(*inputs, norms, *g, wanted(inputs, asked[0]), impl) for g in ((upstream, None), (None, upstream))]
    return {"logprob_kl": calls, "logprob_kl_backward": backward}


def divergence(dtype: torch.dtype, impl: str) -> dict[str, list[Call]]:
    head = headed(dtype)[0]
    a = cases.make("linear_divergence", (2, 3), 11, 8, dtype)
    teacher = *(a[f"teacher_{name}"] for name in ("hidden", "weight", "bias")), 1.5, None, None
    calls: list[Call] = [
        (*plain(head), *teacher, "forward_kl", 0.5, True, impl),
        (*head, *teacher, "jsd", 0.3, True, impl),
        (*by_row(head), *teacher[:-1], cases.temperatures(2, 3), "jsd", 0.3, True, impl),
        (*frozen(head._replace(bias=None), "weight"), *teacher, "reverse_kl", 0.5, True, impl),
        (*frozen(head, "x", "lora_hidden"), *teacher[:2], None, 1.0, 30.0, None, "jsd", 0.9, False, impl),
        (*frozen(head, "weight", "bias", "lora_weight"), *teacher, "alpha", 0.3, True, impl),
    ]
    backward: list[Call] = []
    g = cases.randn(2, 3)
    for call in calls:
        inputs, gradient = detached(*call[:ARGUMENTS]), call[ARGUMENTS]
        *_, norms, dx, du = packet("divergence")(*inputs, gradient, impl)
        assert [x.numel() > 0 for x in (dx, du)] == [gradient, gradient and inputs[3] is not None]
        asked = NEEDS if inputs[3] is not None else [ALL]
        backward += [(*inputs, norms, g, g, wanted(inputs, needs), impl) for needs in asked]
        backward += [(*inputs, norms, *up, wanted(inputs, asked[0]), impl) for up in ((g, None), (None, g))]
    return {"divergence": calls, "divergence_backward": backward}


SAMPLES: list[Callable[[torch.dtype, str], dict[str, list[Call]]]] = [
    vocab_stats,
    contrastive_loss,
    logprob_kl,
    divergence,
]


# Traced, and interpreted, an operator takes minutes; that it traces does not depend on the implementation.
OPCHECKS = [
    pytest.param(b.name, dtype, marks=pytest.mark.slow if (b.name, dtype) == ("triton", torch.float32) else ())
    for b in backends().values()
    if b.available and "cpu" in b.devices
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.thorough
@pytest.mark.parametrize("samples", SAMPLES, ids=lambda samples: samples.__name__)
@pytest.mark.parametrize(("chosen", "dtype"), OPCHECKS, ids=str)
def test_opcheck(chosen: str, samples: Callable[[torch.dtype, str], dict[str, list[Call]]], dtype: torch.dtype) -> None:
    """Schemas tell the truth about mutation and aliases, fakes about shapes and dtypes, and gradients trace."""
    for name, calls in samples(dtype, chosen).items():
        for call in calls:
            operator = packet(name).default
            results = operator(*detached(*call))
            nan = any(x.isnan().any() for x in ([results] if isinstance(results, Tensor) else results))
            traced = dtype == torch.float32 and not nan
            torch.library.opcheck(operator, call, test_utils=UTILS if traced else STATIC)


def test_every_registered_operator_is_checked() -> None:
    checked = {name for samples in SAMPLES for name in samples(torch.float32, "reference")}
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("rmx_kernels::") and "probe" not in n}
    assert {f"rmx_kernels::{name}" for name in checked} == names


FAKES_ALONE = """
import sys
from pathlib import Path
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import rmx_kernels
from rmx_kernels import native
native.LIBRARY = Path("nowhere")
ops = torch.ops.rmx_kernels
for name in ("vocab_stats", "contrastive_loss", "logprob_kl", "divergence"):
    assert getattr(ops, name).default and getattr(ops, f"{name}_backward").default
with FakeTensorMode():
    h, W, ids, w = torch.empty(3, 8), torch.empty(11, 8), torch.empty(3, dtype=torch.int64), torch.empty(3)
    scaling, plain = (1.0, None, None), (None,) * 4
    assert [tuple(x.shape) for x in ops.vocab_stats(h, *plain, *scaling, ids, 2, False, "cpu")] == [
        (3,), (3,), (3,), (3, 2), (3, 2), (3,), (3,), (0,), (0,)
    ]
    for u, B, shape in ((None, None, (0,)), (torch.empty(3, 2), torch.empty(11, 2), (3, 2))):
        stats = ops.vocab_stats(h, W, None, u, B, *scaling, ids, 0, True, "cpu")
        assert [tuple(x.shape) for x in stats[-2:]] == [(3, 8), shape]
        loss = ops.contrastive_loss(h, W, None, u, B, *scaling, h, ids, w, w, None, True, "cpu")
        assert [tuple(x.shape) for x in loss] == [(), (3,), (3,), (4, 3), (3, 8), shape]
        assert ops.logprob_kl(h, W, None, u, B, *scaling, h, ids, "cpu")[1].shape == (3,)
        rows = ops.divergence(h, W, None, u, B, *scaling, h, W, None, *scaling, "jsd", 0.5, True, "cpu")
        assert [tuple(x.shape) for x in rows] == [(3,), (3,), (6, 3), (3, 8), shape]
loaded = {m for m in sys.modules if m.startswith("rmx_kernels.") and m.split(".")[-1] in ("cpu", "triton", "reference")}
assert not loaded, loaded
assert native._open.cache_info().currsize == 0
"""


@pytest.mark.thorough
def test_schemas_and_fakes_need_no_kernel() -> None:
    """import rmx_kernels registers all operators, and loads neither their kernels nor the native library."""
    subprocess.run([sys.executable, "-c", FAKES_ALONE], check=True)


@pytest.mark.parametrize("direct", [True, False])
def test_both_ways_of_registering_a_formula(direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that leaves out torch's filling of defaults, and torch's own, which takes its place where it has to."""
    assert registration.DIRECT  # of the torch that is installed
    monkeypatch.setattr(registration, "DIRECT", direct)
    name = f"probe_{direct}".lower()

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor, ctx.needs = inputs[2], ctx.needs_input_grad[:2]

    def formula(ctx: Any, g: Tensor) -> Any:
        assert list(ctx.needs) == [True, False]
        return 2 * ctx.factor * ctx.saved_tensors[0] * g, None, None

    registration.register(
        name,
        "(Tensor x, Tensor? y, float factor) -> Tensor",
        lambda x, y, factor: factor * x * x,
        lambda x, y, factor: torch.empty_like(x),
        (formula, setup),
    )
    op, x = getattr(torch.ops.rmx_kernels, name), torch.tensor([3.0, 4.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(op(x, None, 0.5).sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([3.0, 4.0]))
    with torch.no_grad():
        assert not op(x, y=None, factor=0.5).requires_grad
    compiled = torch.compile(lambda x: op(x, None, 0.5), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x)[0], gradient)
    torch.library.opcheck(op.default, (x, None, 0.5))
