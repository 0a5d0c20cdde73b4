"""The LoRA pair on the head of the linear operators: z = cap(hidden (W + scale B A)^T + b) / temperature."""

import math
from itertools import combinations
from typing import Any

import cases
import pytest
import torch
from cases import SCALED, assert_same_bits, forward_backward, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmx_kernels.dispatch import INTERPRETED

OPERATORS = ("linear_entropy_topk", "linear_gated_contrastive_loss", "linear_logprob_kl")
OPERATOR = "linear_gated_contrastive_loss"  # of the tests that take no op: those of weights
BASED = ("linear_gated_contrastive_loss", "linear_logprob_kl")
PER_ROW = ("hidden", "base_hidden", "target", "ce_weight", "kl_weight")
NAMES = ("hidden", "weight", "bias", "A", "B")  # in the order of cases.leaves

SIZES = [  # N, V, H, r
    (1, 1, 1, 1),  # the smallest
    (5, 97, 33, 4),
    (6, 8193, 16, 8),  # a last tile of one column
    (6, 8191, 7, 16),  # a rank above H
    (4, 50257, 17, 2),  # GPT-2: no multiple of any tile
    pytest.param(300, 257, 9, 3, marks=pytest.mark.heavy),  # more than one chunk of 256
    (6, 601, 4099, 5),  # a head so wide that fewer columns fit a tile
    (5, 4999, 64, 257),  # B so wide that not all of it is upcast at once
]


def make(op: str, *sizes: Any, r: int = 3, seed: int = 0, **options: Any) -> cases.Arguments:
    return cases.with_lora(cases.make(op, *sizes, seed=seed, **options), r, seed=seed)


def check(op: str, impl: str, *sizes: Any, r: int = 3, scale: float = 0.5, **scaling: float) -> None:
    arguments = make(op, *sizes, r=r)
    arguments["lora"] = *arguments["lora"][:2], scale
    cases.check(op, arguments, impl, **scaling)


def gradients(op: str, arguments: cases.Arguments, impl: str, **scaling: float) -> dict[str, Tensor]:
    fresh, inputs = cases.leaves(op, arguments)
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl, **scaling))
    found = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    return dict(zip(NAMES, found, strict=True))


# ---- values and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "V", "H", "r"), SIZES)
def test_values_and_gradients(
    op: str, device: str, impl: str, dtype: torch.dtype, N: int, V: int, H: int, r: int
) -> None:
    check(op, impl, (N,), V, H, dtype, device, r=r)


@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 30.0}, SCALED])
@pytest.mark.parametrize("scale", [0.7, *(pytest.param(scale, marks=pytest.mark.heavy) for scale in (-1.5, 0, 2))])
def test_scaled_values_and_gradients(
    op: str, device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], scale: float
) -> None:
    check(op, impl, (6,), 1031, 17, dtype, device, scale=scale, **scaling)


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
def test_head_without_bias(op: str, device: str, impl: str, fp64: torch.dtype, scaling: dict[str, float]) -> None:
    arguments = make(op, (6,), 8200, 17, fp64, device)
    del arguments["bias"]
    cases.check(op, arguments, impl, **scaling)


@pytest.mark.thorough
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 7),
    V=st.integers(1, 23),
    H=st.integers(1, 9),
    r=st.integers(1, 5),
    columns=st.integers(1, 9),
    rows=st.integers(1, 4),
    scaling=st.sampled_from([{}, SCALED, {"temperature": 2.5}]),
)
def test_any_shape_and_tiling(op, device, impl, fp64, N, V, H, r, columns, rows, scaling):
    """Agreement with the oracle to fp64 rounding, however rows and columns fall into tiles."""
    with tiny_tiles(columns, rows):
        cases.check(op, make(op, (N,), V, H, fp64, device, r=r), impl, **scaling)


@pytest.mark.heavy
def test_many_rows_add_up_in_the_gradients_of_the_pair(op: str, device: str, impl: str, dtype: torch.dtype) -> None:
    """600 rows in ten chunks, whose sum a low-precision accumulator would lose."""
    with tiny_tiles(8, 64):
        check(op, impl, (600,), 29, 5, dtype, device)


@pytest.mark.thorough
@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
def test_gradcheck(op: str, device: str, impl: str, fp64: torch.dtype, scaling: dict[str, float]) -> None:
    """Of hidden, weight, A and B together, where base_hidden is 0, so that moving the weight leaves p_b alone."""
    arguments = make(op, (3,), 7, 3, fp64, device, r=2, seed=5)
    if op in BASED:
        arguments["base_hidden"].zero_()
    arguments["bias"] = arguments["bias"].detach()
    *pair, scale = arguments["lora"]
    inputs = [x.requires_grad_() for x in (arguments["hidden"], arguments["weight"], *pair)]

    def run(hidden: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        fresh = arguments | {"hidden": hidden, "weight": weight, "lora": (A, B, scale)}
        return tuple(cases.differentiable(cases.call(op, fresh, impl=impl, **scaling)))

    with tiny_tiles(3, 2):
        assert torch.autograd.gradcheck(run, inputs, rtol=1e-5, atol=1e-7)


# ---- what it equals ----------------------------------------------------------------------------------------------


def test_equals_the_merged_head(op: str, device: str, impl: str, fp64: torch.dtype) -> None:
    """W + scale B A for the student; base_hidden is 0, since the base keeps W. Values and all gradients."""
    arguments = make(op, (2, 3), 41, 7, dtype=fp64, device=device)
    if op in BASED:
        arguments["base_hidden"].zero_()
    (given, inputs), (merged, parts) = (cases.leaves(op, arguments) for _ in range(2))
    A, B, scale = merged.pop("lora")
    merged["weight"] = merged["weight"] + scale * B @ A
    close = {"rtol": 1e-11, "atol": 1e-12}
    got, expected = (cases.call(op, fresh, impl=impl, **SCALED) for fresh in (given, merged))
    torch.testing.assert_close(tuple(got), tuple(expected), equal_nan=True, **close)
    outputs, wanted = cases.differentiable(got), cases.differentiable(expected)
    upstream = cases.cotangents(outputs)
    torch.testing.assert_close(
        torch.autograd.grad(outputs, inputs, upstream), torch.autograd.grad(wanted, parts, upstream), **close
    )


def test_fresh_adapter_changes_nothing(op: str, device: str, impl: str) -> None:
    """B = 0, as training begins: the bits of a call without lora, no gradient of A, and one of B."""
    arguments = cases.make(op, (33,), 1031, 17, device=device)
    A, B, scale = cases.with_lora(arguments)["lora"]
    expected = forward_backward(op, arguments, impl=impl, **SCALED)
    *got, d_A, d_B = forward_backward(op, arguments | {"lora": (A, B * 0, scale)}, impl=impl, **SCALED)
    assert_same_bits(got, expected)
    assert not d_A.any() and d_B.any()


def test_base_has_no_lora(device: str, impl: str) -> None:
    """KL of equal hidden states is that of the adapter alone: nothing where B is 0, and only there."""
    for op in BASED:
        arguments = make(op, (5,), 97, 9, device=device)
        arguments["base_hidden"] = arguments["hidden"]
        arguments |= {n: torch.ones(5, device=device) for n in ("ce_weight", "kl_weight") if n in arguments}
        A, B, scale = arguments["lora"]
        assert (cases.call(op, arguments, impl=impl).kl > 1e-3).all()
        assert (cases.call(op, arguments | {"lora": (A, B * 0, scale)}, impl=impl).kl == 0).all()


def test_known_base_normaliser_is_that_without_lora(device: str, impl: str) -> None:
    arguments = make(OPERATOR, (8,), device=device)
    base = {"hidden": arguments["base_hidden"], "weight": arguments["weight"], "bias": arguments["bias"]}
    lse = cases.call("linear_entropy_topk", base, impl=impl).lse
    got, expected = (forward_backward(OPERATOR, arguments | known, impl=impl) for known in ({"base_lse": lse}, {}))
    torch.testing.assert_close(got, expected, equal_nan=True)


# ---- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [-7, 10**6])
def test_dead_rows(device: str, impl: str, wrong: int) -> None:
    """Where both weights are zero: any base and target, and any finite hidden; as if the rows were not there."""
    clean = make(OPERATOR, (8,), device=device)
    dead, live = (torch.tensor(rows, device=device) for rows in ([3, 5, 6], [0, 1, 2, 4, 7]))
    for name in ("ce_weight", "kl_weight"):
        clean[name][dead] = 0
    spoilt = {n: v.clone() if n in PER_ROW else v for n, v in clean.items()}
    spoilt["hidden"][dead], spoilt["base_hidden"][dead], spoilt["target"][dead] = 1e30, math.nan, wrong
    alone = {n: v[live] if n in PER_ROW else v for n, v in clean.items()}
    got, expected = (gradients(OPERATOR, given, impl) for given in (spoilt, alone))
    assert not got["hidden"][dead].any()
    torch.testing.assert_close(got | {"hidden": got["hidden"][live]}, expected)
    spoilt["hidden"][dead] = math.nan  # of which 0 times is not 0, in the gradient of A
    got = gradients(OPERATOR, spoilt, impl)
    assert not got["hidden"][dead].any()
    torch.testing.assert_close(got | {"hidden": got["hidden"][live], "A": expected["A"]}, expected)


def test_all_rows_dead(device: str, impl: str) -> None:
    arguments = make(OPERATOR, device=device)
    arguments |= {n: torch.zeros_like(arguments[n]) for n in ("ce_weight", "kl_weight")}
    assert all(not g.any() for g in gradients(OPERATOR, arguments, impl).values())


def test_small_weights_survive_low_precision(device: str, impl: str) -> None:
    """With fp16 the loss is scaled up before its backward; gradients kept in fp16 before that would be all zero."""
    arguments = make(OPERATOR, dtype=torch.float16, device=device)
    small = arguments | {n: arguments[n] / 2**20 for n in ("ce_weight", "kl_weight")}
    got, expected = (
        torch.autograd.grad(cases.call(OPERATOR, fresh, impl=impl).loss * scale, inputs)
        for given, scale in ((small, 2.0**20), (arguments, 1.0))
        for fresh, inputs in [cases.leaves(OPERATOR, given)]
    )
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("r", [4, pytest.param(8, marks=pytest.mark.heavy)])
def test_rows_do_not_depend_on_their_number_or_place(
    op: str, device: str, impl: str, dtype: torch.dtype, r: int
) -> None:
    """Values and gradients of hidden, at sizes and counts for which BLAS libraries change their way of multiplying."""
    if impl == "reference":
        pytest.skip("leaves the order of its sums to the libraries, with or without lora")
    arguments = make(op, (unless_interpreted(107, 13),), 5003, 64, dtype, device, r=r)
    whole = of_rows(op, arguments, impl)
    counts, starts = ((1, 9), (6,)) if INTERPRETED else ((1, 2, 3, 5, 7, 16, 33, 64, 100), (1, 6, 50, 100))
    for rows in [slice(0, n) for n in counts] + [slice(n, n + 7) for n in starts]:
        part = of_rows(op, {n: v[rows] if n in PER_ROW else v for n, v in arguments.items()}, impl)
        assert_same_bits(part, [value[rows] for value in whole])


def of_rows(op: str, arguments: cases.Arguments, impl: str) -> list[Tensor]:
    fresh = arguments | {"hidden": arguments["hidden"].clone().requires_grad_()}
    result = cases.call(op, fresh, impl=impl, **SCALED)
    outputs = cases.differentiable(result)
    (gradient,) = torch.autograd.grad(outputs, [fresh["hidden"]], [torch.full_like(o, 1.5) for o in outputs])
    return [*(v.detach() for n, v in result._asdict().items() if v is not None and n != "loss"), gradient]


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_rows(op: str, device: str, impl: str, lead: tuple[int, ...]) -> None:
    fresh, inputs = cases.leaves(op, make(op, lead, device=device))
    sum(o.sum() for o in cases.differentiable(cases.call(op, fresh, impl=impl))).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in inputs)


def test_leading_dimensions_equal_flattened_rows(op: str, device: str, impl: str) -> None:
    arguments = make(op, (2, 4), device=device)
    flat = arguments | {n: arguments[n].flatten(0, 1) for n in PER_ROW if n in arguments}
    got, expected = (gradients(op, given, impl) for given in (arguments, flat))
    got["hidden"] = got["hidden"].flatten(0, 1)
    torch.testing.assert_close(got, expected)


def test_one_row_without_leading_dimensions(op: str, device: str, impl: str) -> None:
    got, expected = (forward_backward(op, make(op, lead, device=device), impl=impl) for lead in ((), (1,)))
    assert_same_bits(got, [e.reshape(g.shape) for g, e in zip(got, expected, strict=True)])


# ---- autograd ----------------------------------------------------------------------------------------------------


def test_two_runs_give_the_same_bits(op: str, device: str, impl: str, dtype: torch.dtype) -> None:
    arguments = make(op, (unless_interpreted(33, 5),), 1031, 17, dtype, device)
    assert_same_bits(*(forward_backward(op, arguments, impl=impl, **SCALED) for _ in range(2)))


def test_only_the_gradients_asked_for(op: str, device: str, impl: str) -> None:
    """Each of the five may be frozen alone or with others; the rest is what it is with all asked for."""
    arguments = make(op, device=device)
    expected = gradients(op, arguments, impl)
    for asked in (subset for size in range(1, 5) for subset in combinations(NAMES, size)):
        fresh, inputs = cases.leaves(op, arguments)
        trained = dict(zip(NAMES, inputs, strict=True))
        for name, x in trained.items():
            x.requires_grad_(name in asked)
        outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
        torch.autograd.backward(outputs, cases.cotangents(outputs))
        assert {name for name, x in trained.items() if x.grad is not None} == set(asked)
        assert_same_bits([trained[name].grad for name in asked], [expected[name] for name in asked])


def test_without_grad_mode_nothing_is_recorded(op: str, device: str, impl: str) -> None:
    fresh, _ = cases.leaves(op, make(op, device=device))
    with torch.no_grad():
        result = cases.call(op, fresh, impl=impl)
    assert cases.differentiable(result) == []


def test_retained_graph_gives_the_same_gradients_twice(op: str, device: str, impl: str) -> None:
    fresh, inputs = cases.leaves(op, make(op, device=device))
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
    upstream = cases.cotangents(outputs)
    first = [g.clone() for g in torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)]
    for gradient in torch.autograd.grad(outputs, inputs, [3 * g for g in upstream], retain_graph=True):
        gradient.fill_(torch.nan)
    assert_same_bits(torch.autograd.grad(outputs, inputs, upstream), first)


def test_double_backward_raises(op: str, device: str, impl: str) -> None:
    for i in range(len(NAMES)):
        fresh, inputs = cases.leaves(op, make(op, device=device))
        outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
        found = torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            found[i].sum().backward()


def test_layout_of_the_pair_does_not_matter(op: str, device: str, impl: str) -> None:
    """A and B transposed in memory, as slices of larger tensors."""
    arguments = make(op, (3, 4), device=device)
    *pair, scale = arguments["lora"]
    strided = [x.new_zeros(x.shape[1] + 1, x.shape[0] + 2).t()[1:-1, 1:].copy_(x) for x in pair]
    assert not any(x.is_contiguous() for x in strided)
    found = []
    for A, B in (strided, pair):
        inputs = [x.detach().requires_grad_() for x in (A, B)]
        outputs = cases.differentiable(cases.call(op, arguments | {"lora": (*inputs, scale)}, impl=impl))
        found.append([*outputs, *torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))])
    torch.testing.assert_close(*found)


# ---- the public door ---------------------------------------------------------------------------------------------


def test_errors_say_what_was_expected_and_what_came(op: str, device: str, impl: str) -> None:
    """The table of all wrong arguments is in test_dispatch_and_checks.py."""
    arguments = make(op, device=device)
    A, B, scale = arguments["lora"]
    for wrong, message in (
        ([A, B, scale], r"a tuple \(A, B, scale\) or None, got list"),
        ((A, B), r"a tuple \(A, B, scale\), got 2 value\(s\)"),
        ((A.tolist(), B, scale), "A to be a torch.Tensor, got list"),
        ((A[:, 1:], B, scale), r"A of shape \[r, 7\] with r >= 1, got \(3, 6\)"),
        ((A, B[:, :2], scale), r"B of shape \[23, 3\], r as in A, got \(23, 2\)"),
        (
            (A, B.double(), scale),
            r"B of bfloat16, float16 or float32, since hidden has torch\.float32, got torch\.float64",
        ),
        ((A, B.to("meta"), scale), rf"B on the device of hidden, {A.device}, got meta"),
        ((A, B, True), "scale to be a number, got bool"),
        ((A, B, math.inf), "scale to be a finite number, got inf"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^lora: expected {message}$"):
            cases.call(op, arguments | {"lora": wrong}, impl=impl)
