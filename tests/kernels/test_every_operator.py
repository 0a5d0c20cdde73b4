"""What all operators promise alike: exact repeats, row independence, layouts, autograd's corner cases."""

from itertools import combinations
from typing import Any

import cases
import oracles
import pytest
import torch
from cases import SCALED, assert_same_bits, forward_backward, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st

EACH = "of each row"
SCALINGS = st.sampled_from(
    [{}, SCALED, {"temperature": 2.5}, {"temperature": EACH}, {"temperature": EACH, "softcap": 5.0}]
)
FLOATING_ROWS = ("logits", "hidden", "base_logits", "base_hidden", "teacher_hidden")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    N=st.integers(0, 7),
    V=st.integers(1, 23),
    H=st.integers(1, 9),
    columns=st.integers(1, 9),
    rows=st.integers(1, 4),
    scaling=SCALINGS,
)
def test_any_shape_and_tiling(op, device, impl, fp64, N, V, H, columns, rows, scaling):
    """Values and gradients agree with the oracle to fp64 rounding, however rows and columns fall into tiles."""
    if op == "linear_divergence" and scaling.get("temperature") == EACH:
        scaling = {**scaling, "temperature": 0.4}  # it has one for all rows
    with tiny_tiles(columns, rows):
        cases.check(op, cases.make(op, (N,), V, H, fp64, device), impl, **of_rows(scaling, N, device))


@pytest.mark.thorough
@settings(max_examples=unless_interpreted(20, 12), deadline=None, derandomize=True)
@given(
    N=st.integers(0, 7),
    V=st.integers(1, 40),
    H=st.integers(1, 9),
    rows=st.integers(1, 4),
    scaling=st.sampled_from([{}, SCALED, {"temperature": 2.5}]),
)
def test_any_shape_and_tiling_in_float32(op, device, impl, N, V, H, rows, scaling):
    """As good as eager for implementations that take no float64."""
    with tiny_tiles(5, rows):
        cases.check(op, cases.make(op, (N,), V, H, torch.float32, device), impl, **scaling)


def test_two_runs_give_the_same_bits(op: str, device: str, impl: str) -> None:
    arguments = cases.make(op, (unless_interpreted(33, 5),), 1031, 17, torch.bfloat16, device)
    assert_same_bits(*(forward_backward(op, arguments, impl=impl, **SCALED) for _ in range(2)))


@pytest.mark.thorough
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_the_yardstick_is_not_luck(op: str, device: str, impl: str, lora: bool) -> None:
    """Few rows in many draws: their largest gradients are made of few logits, which bfloat16 rounds the most."""
    if lora and not op.startswith("linear"):
        pytest.skip("has no head")
    for seed in range(0, 100 * unless_interpreted(20, 7), 100):
        arguments = cases.make(op, (5,), 97, 33, torch.bfloat16, device, seed)
        cases.check(op, cases.with_lora(arguments, seed=seed) if lora else arguments, impl)


@pytest.mark.parametrize("tile", [(5, 3), (8192, 256)])
def test_nothing_unwritten_is_returned(op: str, device: str, impl: str, tile: tuple[int, int]) -> None:
    """Allocations that are not initialised come filled with NaN, or the largest integer, and change nothing."""
    arguments = cases.make(op, V=24, device=device)
    with tiny_tiles(*tile):
        expected = forward_backward(op, arguments, impl=impl, **SCALED)
        with poisoned_memory(device):
            assert_same_bits(forward_backward(op, arguments, impl=impl, **SCALED), expected)


def test_autocast_around_the_backward_changes_nothing(op: str, device: str, impl: str) -> None:
    """The backward takes the autocast state of its own moment, not that of the forward."""
    arguments = cases.make(op, device=device)
    expected = forward_backward(op, arguments, impl=impl)
    fresh, inputs = cases.leaves(op, arguments)
    result = cases.call(op, fresh, impl=impl)
    outputs = cases.differentiable(result)
    with torch.autocast(device, dtype=torch.bfloat16):
        gradients = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    assert_same_bits([v.detach() for v in result] + list(gradients), expected)


def test_retained_graph_gives_the_same_gradients_twice(op: str, device: str, impl: str) -> None:
    fresh, inputs = cases.leaves(op, cases.make(op, device=device))
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
    upstream = cases.cotangents(outputs)
    first = [g.clone() for g in torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)]
    other = torch.autograd.grad(outputs, inputs, [3 * g for g in upstream], retain_graph=True)
    for gradient in other:
        gradient.fill_(torch.nan)  # what the caller does with a gradient must not reach the retained graph
    assert_same_bits(torch.autograd.grad(outputs, inputs, upstream), first)


def test_gradients_accumulate_in_grad(op: str, device: str, impl: str) -> None:
    fresh, inputs = cases.leaves(op, cases.make(op, device=device))
    for _ in range(2):
        sum(o.sum() for o in cases.differentiable(cases.call(op, fresh, impl=impl))).backward()
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
    once = torch.autograd.grad(outputs, inputs, [torch.ones_like(o) for o in outputs])
    assert_same_bits([x.grad for x in inputs if x.grad is not None], [2 * g for g in once])


def test_double_backward_raises(op: str, device: str, impl: str) -> None:
    fresh, inputs = cases.leaves(op, cases.make(op, device=device))
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
    (gradient, *_) = torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_only_the_gradients_asked_for(op: str, device: str, impl: str) -> None:
    """A frozen head (or hidden, or bias) gets no gradient, and the others are what they are with all asked for."""
    names = cases.DIFFERENTIABLE[op]
    arguments = cases.make(op, device=device)
    fresh, inputs = cases.leaves(op, arguments)
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
    expected = dict(zip(names, torch.autograd.grad(outputs, inputs, cases.cotangents(outputs)), strict=True))
    for asked in (subset for size in range(1, len(names)) for subset in combinations(names, size)):
        fresh, _ = cases.leaves(op, arguments)
        for name in names:
            fresh[name].requires_grad_(name in asked)
        outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
        torch.autograd.backward(outputs, cases.cotangents(outputs))
        assert {name for name in names if fresh[name].grad is not None} == set(asked)
        assert_same_bits([fresh[name].grad for name in asked], [expected[name] for name in asked])


def test_no_gradient_asked_for(op: str, device: str, impl: str) -> None:
    result = cases.call(op, cases.make(op, device=device), impl=impl)
    assert cases.differentiable(result) == []


@pytest.mark.parametrize("pad", [1, 3])
def test_layout_of_the_inputs_does_not_matter(op: str, device: str, impl: str, pad: int) -> None:
    """Transposed, strided and offset tensors give what their contiguous copies give."""
    arguments = cases.make(op, (3, 4), device=device)
    strided = {n: scattered(v, pad) if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    assert all(not v.is_contiguous() for v in strided.values() if isinstance(v, torch.Tensor))
    got, expected = (
        torch.autograd.grad(outputs, inputs, cases.cotangents(outputs)) + tuple(outputs)
        for fresh in (strided, arguments)
        for inputs in [[fresh[n].requires_grad_() for n in cases.DIFFERENTIABLE[op]]]
        for outputs in [cases.differentiable(cases.call(op, fresh, impl=impl))]
    )
    torch.testing.assert_close(got, expected)


def test_expanded_and_strided_upstream_gradients(op: str, device: str, impl: str) -> None:
    fresh, inputs = cases.leaves(op, cases.make(op, device=device))
    outputs = cases.differentiable(cases.call(op, fresh, impl=impl))
    full = [o.new_full(o.shape, 1.5) for o in outputs]
    expected = torch.autograd.grad(outputs, inputs, full, retain_graph=True)
    for upstream in ([g.new_tensor(1.5).expand(g.shape) for g in full], [scattered(g, 2) for g in full]):
        assert_same_bits(torch.autograd.grad(outputs, inputs, upstream, retain_graph=True), expected)


def test_leading_dimensions_equal_flattened_rows(op: str, device: str, impl: str) -> None:
    arguments = cases.make(op, (2, 3), device=device)
    rows = [n for n in arguments if n in cases.PER_ROW]
    flat = arguments | {n: arguments[n].flatten(0, 1) for n in rows}
    got, expected = (cases.call(op, fresh, impl=impl) for fresh in (arguments, flat))
    for field in (n for n in got._fields if getattr(got, n) is not None and n != "loss"):
        assert getattr(got, field).shape[:2] == (2, 3)
        assert_same_bits([getattr(got, field).flatten(0, 1)], [getattr(expected, field)])


def test_one_row_without_leading_dimensions(op: str, device: str, impl: str) -> None:
    got, expected = (forward_backward(op, cases.make(op, lead, device=device), impl=impl) for lead in ((), (1,)))
    assert_same_bits(got, [e.reshape(g.shape) for g, e in zip(got, expected, strict=True)])


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_rows(op: str, device: str, impl: str, lead: tuple[int, ...]) -> None:
    fresh, inputs = cases.leaves(op, cases.make(op, lead, device=device))
    result = cases.call(op, fresh, impl=impl)
    assert all(value.numel() == 0 or value == 0 for value in result if value is not None)
    sum(o.sum() for o in cases.differentiable(result)).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape and not x.grad.any() for x in inputs)


def test_int32_targets(op: str, device: str, impl: str) -> None:
    if op not in cases.TARGETED:
        pytest.skip("takes no target")
    arguments = cases.make(op, device=device)
    narrow = arguments | {"target": arguments["target"].int()}
    assert_same_bits(*(forward_backward(op, fresh, impl=impl) for fresh in (narrow, arguments)))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_row_stays_alone(op: str, device: str, impl: str, poison: float) -> None:
    """NaN or +inf in a row of the student or the base: NaN in that row only, the other rows keep their bits."""
    arguments = cases.make(op, device=device)
    name = cases.DIFFERENTIABLE[op][0]
    clean = row_results(op, arguments, name, impl)
    for row, spoilt in ((0, n) for n in FLOATING_ROWS if n in arguments):
        bad = arguments | {spoilt: arguments[spoilt].clone()}
        bad[spoilt][row, 2] = poison
        others = torch.arange(len(bad[spoilt])) != row
        for field, (got, expected) in zip_fields(row_results(op, bad, name, impl), clean):
            assert_same_bits([got[others]], [expected[others]])
            if field in ("logprob", "entropy") and spoilt.startswith(("base", "teacher")):  # of the student alone
                assert_same_bits([got[row]], [expected[row]])
            elif field != "topk_ids":
                assert got[row].isnan().all(), field


def test_dtypes_and_devices_of_the_results(op: str, device: str, impl: str, dtype: torch.dtype) -> None:
    """Statistics are float32, or float64 for float64 inputs, never the low-precision dtype of the inputs."""
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    result = cases.call(op, cases.make(op, dtype=dtype, device=device), impl=impl)
    for field, value in result._asdict().items():
        assert value.dtype == (torch.int64 if field == "topk_ids" else expected), field
        assert value.device.type == device


def test_default_impl_runs(op: str, device: str, impl: str) -> None:
    arguments = cases.make(op, device=device)
    got, expected = (cases.call(op, arguments, impl=name) for name in (None, impl))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_temperature_and_softcap_equal_scaled_logits(op: str, device: str, impl: str, fp64: torch.dtype) -> None:
    """Scaling inside the operator is scaling the logits first; a linear one can be scaled by its temperature only."""
    arguments = cases.make(op, dtype=fp64, device=device)
    linear = op.startswith("linear")
    scaling = {"temperature": 0.7} if linear else SCALED
    before = {
        n: oracles.scaled(v, **scaling) if "logits" in n else v / 0.7 if linear and n != "weight" else v
        for n, v in arguments.items()
        if n in (*FLOATING_ROWS, "weight", "bias", "teacher_bias")
    }
    got = cases.call(op, arguments, impl=impl, **scaling)
    expected = cases.call(op, arguments | before, impl=impl)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-11, atol=1e-13, equal_nan=True)


def of_rows(scaling: dict[str, Any], N: int, device: str) -> dict[str, Any]:
    """The arguments that a draw of SCALINGS stands for, for N rows."""
    each = scaling.get("temperature") == EACH
    return scaling | ({"temperature": cases.temperatures(N, device=device)} if each else {})


def row_results(op: str, arguments: cases.Arguments, name: str, impl: str) -> dict[str, torch.Tensor]:
    """The results of each row and the gradient of the rows' own input, by name."""
    fresh = arguments | {name: arguments[name].clone().requires_grad_()}
    result = cases.call(op, fresh, impl=impl)
    outputs = cases.differentiable(result)
    (gradient,) = torch.autograd.grad(outputs, [fresh[name]], [torch.full_like(o, 1.5) for o in outputs])
    fields = {n: v.detach() for n, v in result._asdict().items() if v is not None and n != "loss"}
    return fields | {"gradient": gradient}


def zip_fields(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[tuple[str, tuple[torch.Tensor, ...]]]:
    return [(name, (a[name], b[name])) for name in a]


def scattered(x: torch.Tensor, pad: int) -> torch.Tensor:
    """The values of x in a tensor whose dimensions are reversed in memory and spaced by pad + 1, at an offset."""
    storage = x.new_zeros([s * (pad + 1) for s in reversed(x.shape)])
    view = storage.permute(tuple(reversed(range(x.dim()))))[tuple(slice(pad, None, pad + 1) for _ in x.shape)]
    return view.copy_(x)


class poisoned_memory:
    """torch.empty and its kin return NaN, or the largest integer, within this context."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert torch.utils.deterministic.fill_uninitialized_memory
        x = torch.empty(3, device=self.device)
        assert all(e.isnan().all() for e in (x, torch.empty_like(x), x.new_empty(5)))

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])
