"""Hidden states and a head of different dtypes, and torch.autocast: the dtype of the product, and of the gradients."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import cases
import oracles
import pytest
import torch
from cases import SCALED, assert_same_bits
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import rmx_kernels
from rmx_kernels import linear_cross_entropy, linear_kept_logprobs, linear_policy_loss
from rmx_kernels.dispatch import OPERATORS as ALL

OPERATORS = [op for op in ALL if op.startswith("linear")]
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
HEAD = ("weight", "teacher_weight")
KINDS = ("ours", "eager", "oracle")
# dtypes of hidden, of the head, and of all else (bias, LoRA pair, base); autocast's; the product's
MIXES = {
    "bf16 hidden, fp32 head": (BF16, FP32, FP32, None, FP32),
    "fp32 hidden, bf16 head": (FP32, BF16, BF16, None, FP32),
    "fp16 hidden, bf16 head": (FP16, BF16, FP16, None, FP32),
    "bf16 model, fp32 adapter": (BF16, BF16, FP32, None, BF16),
    "autocast, fp32": (FP32, FP32, FP32, BF16, BF16),
    "autocast, fp32 head": (BF16, FP32, FP32, BF16, BF16),
    "autocast, bf16 head": (FP32, BF16, FP16, BF16, BF16),
    "autocast to fp16": (FP32, BF16, FP32, FP16, FP16),
    "autocast, fp64": (FP64, FP64, FP64, BF16, FP64),
}
mixes = pytest.mark.parametrize("mix", MIXES)


def cast(arguments: cases.Arguments, of: Callable[[str], torch.dtype]) -> cases.Arguments:
    """The arguments with every operand in the dtype of its name (of the pair: "lora"); row weights as they are."""
    found = dict(arguments)
    for name, value in arguments.items():
        if name == "lora":
            found[name] = (*(x.to(of(name)) for x in value[:2]), value[2])
        elif isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_weight"):
            found[name] = value.to(of(name))
    return found | {name: arguments[name].to(of(name)) for name in HEAD if name in arguments}


def made(op: str, mix: str, device: str, seed: int = 0) -> cases.Arguments:
    hidden, head, rest, _, _ = MIXES[mix]
    arguments = cases.with_lora(cases.make(op, (5,), 97, 17, FP32, device, seed), seed=seed)
    return cast(
        arguments, lambda name: head if name in HEAD else hidden if name in ("hidden", "teacher_hidden") else rest
    )


def casting(mix: str, device: str) -> Any:
    low = MIXES[mix][3]
    return nullcontext() if low is None else torch.autocast(device, dtype=low)


def skip_unless_taken(mix: str, impl: str) -> None:
    if impl == "triton" and FP64 in MIXES[mix]:
        pytest.skip("computes in float32")


def gradients(fresh: cases.Arguments, inputs: list[Tensor], call: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    result = call()
    outputs = cases.differentiable(result)
    return result, [*outputs, *torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))]


@mixes
def test_the_bits_of_operands_that_were_cast(op: str, device: str, impl: str, mix: str) -> None:
    """To the dtype of the product; every gradient is in its operand's own dtype, also where autocast is left."""
    skip_unless_taken(mix, impl)
    arguments, product = made(op, mix, device), MIXES[mix][4]
    fresh, inputs = cases.leaves(op, arguments)
    with casting(mix, device):
        result = cases.call(op, fresh, impl=impl, **SCALED)
    _, got = gradients(fresh, inputs, lambda: result)
    assert [x.dtype for x in got[-len(inputs) :]] == [x.dtype for x in inputs]
    fresh, inputs = cases.leaves(op, arguments)
    _, expected = gradients(fresh, inputs, lambda: cases.call(op, cast(fresh, lambda _: product), impl=impl, **SCALED))
    assert_same_bits(got, expected)
    assert result[0].dtype == (FP64 if product == FP64 else FP32)


def eager(op: str, arguments: cases.Arguments, ids: Tensor | None, mix: str, device: str) -> list[Tensor]:
    """Full logits as torch's own linear makes them: under autocast from the operands as they are, else from casts."""
    fresh, inputs = cases.leaves(op, arguments)
    given = fresh if MIXES[mix][3] else cast(fresh, lambda _: MIXES[mix][4])
    head = given["weight"], given["bias"]
    teacher = [given.get(f"teacher_{name}", given[name]) for name in ("weight", "bias")]
    base_hidden = given.get("teacher_hidden", given.get("base_hidden"))
    with casting(mix, device):
        logits = oracles.linear(given["hidden"], *head, lora=given["lora"])
        base = None if base_hidden is None else oracles.linear(base_hidden, *teacher)
    outputs: Any
    if ids is not None:
        outputs = oracles.vocab_stats(logits, given["target"], ids)
    elif op == "linear_divergence":
        outputs = oracles.divergence(logits, base, given["kind"], given["beta"])
    elif op == "linear_logprob_kl":
        outputs = oracles.logprob_kl(logits, base, given["target"])
    else:
        weights = given["ce_weight"], given["kl_weight"]
        outputs = oracles.contrastive_loss(logits, base, given["target"], *weights)[:1]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))]


@mixes
def test_as_good_as_eager(op: str, device: str, impl: str, mix: str) -> None:
    """Against full logits in float64, of the operands before any cast."""
    skip_unless_taken(mix, impl)
    arguments = made(op, mix, device)
    fresh, inputs = cases.leaves(op, arguments)
    with casting(mix, device):
        result = cases.call(op, fresh, impl=impl)
    _, got = gradients(fresh, inputs, lambda: result)
    ids = result.topk_ids if op.endswith("topk") else None
    oracle = cases.full_logits(op, arguments, ids, FP64)
    own = cases.eager_ways(op, cast(arguments, lambda _: MIXES[mix][4]), ids)  # of which any may be lucky
    yardstick = [(*ways, way) for ways, way in zip(own, eager(op, arguments, ids, mix, device), strict=True)]
    for place, (value, of_eager, exact) in enumerate(zip(got, yardstick, oracle, strict=True)):
        size = exact.detach().abs().max() if exact.dim() else exact.detach().abs() + 10
        oracles.assert_as_good_as_eager(
            value, of_eager, exact, size=size, what=str(place), input_dtype=MIXES[mix][4], roundings=2
        )


@pytest.mark.parametrize("name", ["weight", "bias", "lora", "base_hidden", "teacher_hidden", "teacher_weight"])
@pytest.mark.parametrize("autocast", [False, True])
def test_float64_is_not_mixed(name: str, autocast: bool) -> None:
    op = "linear_divergence" if name.startswith("teacher") else "linear_logprob_kl"
    arguments = cases.with_lora(cases.make(op))
    arguments = cast(arguments, lambda of: FP64 if of == name else FP32)
    with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match=f"^{name}: expected .*float64"):
        cases.call(op, arguments)


@pytest.mark.parametrize("chosen", cases.available("cpu"))
def test_a_teacher_in_another_dtype(chosen: str) -> None:
    """Each model is multiplied in its own."""
    op = "linear_divergence"
    for low, high in ((BF16, FP32), (FP32, BF16)):
        arguments = cases.make(op, (5,), 97, 17, FP32)
        own = cast(arguments, lambda name, t=low, s=high: t if name.startswith("teacher") else s)
        fresh, inputs = cases.leaves(op, own)
        result, got = gradients(fresh, inputs, lambda f=fresh: cases.call(op, f, impl=chosen))
        oracle = cases.full_logits(op, own, None, FP64)
        rough = cases.full_logits(op, own, None, BF16)
        for value, of_eager, exact in zip(got, rough, oracle, strict=True):
            size = exact.detach().abs().max()
            oracles.assert_as_good_as_eager(value, of_eager, exact, size=size, what="", input_dtype=BF16, roundings=2)
        assert result.divergence.dtype == FP32


COMPOSED: dict[str, Callable[[cases.Arguments], Tensor]] = {
    "linear_cross_entropy": lambda a: linear_cross_entropy(
        a["hidden"], a["weight"], a["target"], linear_bias=a["bias"], lora=a["lora"], z_loss=0.1
    ),
    "linear_kept_logprobs": lambda a: linear_kept_logprobs(
        a["hidden"], a["weight"], a["target"][:, None], bias=a["bias"], lora=a["lora"]
    ).logprobs.sum() + linear_kept_logprobs(
        a["hidden"], a["weight"], torch.arange(4).expand(5, 4), bias=a["bias"], lora=a["lora"]
    ).entropy.sum(),
    "linear_policy_loss": lambda a: linear_policy_loss(
        a["hidden"][None], a["weight"], a["target"][None], torch.ones(1), base_hidden=a["base_hidden"][None],
        options=rmx_kernels.PolicyOptions(kl_coef=0.1, kl="full"), bias=a["bias"], lora=a["lora"],
    ).loss,
}  # fmt: skip


@mixes
@pytest.mark.parametrize("name", COMPOSED)
def test_what_is_made_of_the_operators(name: str, mix: str) -> None:
    op = "linear_logprob_kl"
    arguments = made(op, mix, "cpu")
    fresh, inputs = cases.leaves(op, arguments)
    with casting(mix, "cpu"):
        value = COMPOSED[name](fresh)
    got = [value, *torch.autograd.grad(value, inputs)]
    assert [x.dtype for x in got[1:]] == [x.dtype for x in inputs]
    fresh, inputs = cases.leaves(op, arguments)
    value = COMPOSED[name](cast(fresh, lambda _: MIXES[mix][4]))
    expected = [value, *torch.autograd.grad(value, inputs)]
    if name != "linear_policy_loss":
        assert_same_bits(got, expected)
        return
    for a, b in zip(got, expected, strict=True):  # two operators, whose gradients are cast and added, or added and cast
        step = max(torch.finfo(dtype).eps for dtype in (a.dtype, MIXES[mix][4]))
        assert (a - b).abs().max() <= 2 * step * b.abs().max()


def smoothed(of: str, mix: str, seed: int) -> list[Tensor]:
    """The cross-entropy with label smoothing and its gradients: ours, eager's, or the oracle's."""
    op, arguments = "linear_logprob_kl", made("linear_logprob_kl", mix, "cpu", seed=seed)
    fresh, inputs = cases.leaves(op, cast(arguments, lambda _: FP64) if of == "oracle" else arguments)
    given = fresh if MIXES[mix][3] or of != "eager" else cast(fresh, lambda _: MIXES[mix][4])
    head = {"linear_bias": given["bias"], "lora": given["lora"], "label_smoothing": 0.1}
    with casting(mix, "cpu") if of != "oracle" else nullcontext():
        if of == "ours":
            value = linear_cross_entropy(given["hidden"], given["weight"], given["target"], **head)
        else:
            logits = oracles.linear(given["hidden"], given["weight"], given["bias"], given["lora"])
            logits = logits if logits.dtype == FP64 else logits.float()
            value = torch.nn.functional.cross_entropy(logits, given["target"], label_smoothing=0.1)
    return [value, *torch.autograd.grad(value, inputs)]


@pytest.mark.thorough
@mixes
def test_label_smoothing(mix: str) -> None:
    """Its mean of the logits is made apart from their log-sum-exp. Of several draws, since eager may be lucky."""
    draws = [zip(*(smoothed(of, mix, seed) for seed in range(0, 500, 100)), strict=True) for of in KINDS]
    for parts in zip(*draws, strict=True):
        value, of_eager, exact = (torch.stack(part) for part in parts)
        size = exact.detach().abs().max()
        oracles.assert_as_good_as_eager(
            value, of_eager, exact, size=size, what="", input_dtype=MIXES[mix][4], roundings=2
        )


@pytest.mark.thorough
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_without_a_graph_break(op: str, inside: bool) -> None:
    """Under autocast, entered around the compiled function or in it: the bits of eager, and one compilation."""
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")

    def call(arguments: cases.Arguments) -> Any:
        with torch.autocast("cpu", dtype=BF16) if inside else nullcontext():
            return cases.call(op, arguments, **SCALED)

    function = torch.compile(call, fullgraph=True, backend=backend)
    for mix in ("autocast, fp32", "autocast, fp32"):
        found = []
        for run in (function, call):
            fresh, inputs = cases.leaves(op, made(op, mix, "cpu"))
            with nullcontext() if inside else torch.autocast("cpu", dtype=BF16):
                result = run(fresh)
            found.append(gradients(fresh, inputs, lambda r=result: r)[1])
        assert_same_bits(*found)
    assert backend.frame_count == 1


@pytest.mark.thorough
@pytest.mark.parametrize("op", OPERATORS)
def test_compiled_with_two_dtypes(op: str) -> None:
    torch._dynamo.reset()
    function = torch.compile(lambda a: cases.call(op, a, **SCALED), fullgraph=True, backend="aot_eager")
    found = []
    for run in (function, lambda a: cases.call(op, a, **SCALED)):
        fresh, inputs = cases.leaves(op, made(op, "bf16 hidden, fp32 head", "cpu"))
        found.append(gradients(fresh, inputs, lambda r=run, f=fresh: r(f))[1])
    assert_same_bits(*found)


@pytest.mark.parametrize("chosen", cases.available("cpu"))
@pytest.mark.parametrize("of", [op for op in ALL if op not in OPERATORS])
def test_logits_as_they_are_stay_so_under_autocast(of: str, chosen: str) -> None:
    """The cast is of products, and what is made of given logits has none."""
    arguments = cases.make(of)
    with torch.autocast("cpu", dtype=BF16):
        got = cases.forward_backward(of, arguments, impl=chosen)
    assert_same_bits(got, cases.forward_backward(of, arguments, impl=chosen))
