"""Which implementation runs, and the errors of the public door: each names the argument and what was expected."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

import rmx_kernels
from rmx_kernels import BackendUnavailable, backends, dispatch
from rmx_kernels.dispatch import IMPLS, OPERATORS

Change = Callable[[Any], Any]


def elsewhere(x: Tensor) -> Tensor:
    return x.to("meta")  # the device that no input is on


def trainable(x: Tensor) -> Tensor:
    return x.clone().requires_grad_()


def lora_with(index: int, change: Change) -> Change:
    """A change of A, B or scale."""
    return lambda lora: tuple(change(x) if i == index else x for i, x in enumerate(lora))


def replaced(index: int, value: float) -> Change:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[index] = value
        return x

    return change


ROWS: list[tuple[str, Change, type[Exception]]] = [
    ("no tensor", Tensor.tolist, TypeError),
    ("integers", Tensor.long, TypeError),
    ("complex", lambda x: x.to(torch.complex64), TypeError),
    ("no dimension", Tensor.sum, ValueError),
    ("nothing in a row", lambda x: x[..., :0], ValueError),
]
BASE: list[tuple[str, Change, type[Exception]]] = [
    ("no tensor", Tensor.tolist, TypeError),
    ("another dtype", Tensor.double, TypeError),
    ("fewer rows", lambda x: x[:-1], ValueError),
    ("a shape that would broadcast", lambda x: x[:1], ValueError),
    ("a trainable base", trainable, ValueError),
    ("another device", elsewhere, ValueError),
]
WEIGHTS: list[tuple[str, Change, type[Exception]]] = [
    ("no tensor", Tensor.tolist, TypeError),
    ("a number", lambda x: 1.0, TypeError),
    ("integers", Tensor.long, TypeError),
    ("bool", Tensor.bool, TypeError),
    ("fewer rows", lambda x: x[:-1], ValueError),
    ("one for all rows", lambda x: x[:1], ValueError),
    ("a column", lambda x: x[:, None], ValueError),
    ("trainable", trainable, ValueError),
    ("another device", elsewhere, ValueError),
]
SCALES: list[tuple[str, Change, type[Exception]]] = [
    *((repr(v), lambda _, v=v: v, ValueError) for v in (0, 0.0, -1.0, math.nan, math.inf, -math.inf)),
    *((repr(v), lambda _, v=v: v, TypeError) for v in (True, "1")),
]
BY_ROW: list[tuple[str, Change, type[Exception]]] = [
    ("integers", lambda _: torch.ones(6, dtype=torch.int64), TypeError),
    ("a list", lambda _: [1.0] * 6, TypeError),
    ("one for all rows", lambda _: torch.ones(1), ValueError),
    ("no dimension", lambda _: torch.tensor(1.0), ValueError),
    ("fewer rows", lambda _: torch.ones(5), ValueError),
    ("a column", lambda _: torch.ones(6, 1), ValueError),
    ("trainable", lambda _: torch.ones(6).requires_grad_(), ValueError),
    ("another device", lambda _: torch.ones(6, device="meta"), ValueError),
    *((f"{v} in a row", lambda _, v=v: replaced(0, v)(torch.ones(6)), ValueError) for v in (0, -1, math.nan, math.inf)),
]
WRONG: dict[str, list[tuple[str, Change, type[Exception]]]] = {
    "logits": ROWS,
    "hidden": ROWS,
    "base_logits": BASE,
    "base_hidden": BASE,
    "weight": [
        ("no tensor", Tensor.tolist, TypeError),
        ("integers", Tensor.long, TypeError),
        ("float64 among others", Tensor.double, TypeError),
        ("one dimension", lambda x: x[0], ValueError),
        ("three dimensions", lambda x: x[None], ValueError),
        ("another hidden size", lambda x: x[:, 1:], ValueError),
        ("no tokens", lambda x: x[:0], ValueError),
        ("another device", elsewhere, ValueError),
    ],
    "bias": [
        ("no tensor", Tensor.tolist, TypeError),
        ("integers", Tensor.long, TypeError),
        ("another dtype", Tensor.double, TypeError),
        ("fewer tokens", lambda x: x[1:], ValueError),
        ("a shape that would broadcast", lambda x: x[:1], ValueError),
        ("two dimensions", lambda x: x[None], ValueError),
        ("another device", elsewhere, ValueError),
    ],
    "lora": [
        ("a list", list, TypeError),
        ("a tensor", lambda lora: lora[0], TypeError),
        ("no scale", lambda lora: lora[:2], ValueError),
        ("a fourth value", lambda lora: (*lora, 1.0), ValueError),
        *(
            (f"{part}: {what}", lora_with(i, change), error)
            for i, part in enumerate(("A", "B"))
            for what, change, error in (
                ("no tensor", Tensor.tolist, TypeError),
                ("integers", Tensor.long, TypeError),
                ("float64 among others", Tensor.double, TypeError),
                ("another device", elsewhere, ValueError),
                ("one dimension", lambda x: x[0], ValueError),
                ("three dimensions", lambda x: x[None], ValueError),
                ("transposed", Tensor.t, ValueError),
                ("another rank", lambda x: x[:2] if x.shape[0] == 3 else x[:, :2], ValueError),
            )
        ),
        ("another hidden size", lora_with(0, lambda A: A[:, 1:]), ValueError),
        ("another vocabulary", lora_with(1, lambda B: B[1:]), ValueError),
        ("rank 0", lambda lora: (lora[0][:0], lora[1][:, :0], lora[2]), ValueError),
        *((f"scale {v}", lora_with(2, lambda _, v=v: v), ValueError) for v in (math.nan, math.inf, -math.inf)),
        *((f"scale {v}", lora_with(2, lambda _, v=v: v), TypeError) for v in (True, "1", None, torch.tensor(1.0))),
    ],
    "target": [
        ("no tensor", Tensor.tolist, TypeError),
        ("floats", Tensor.float, TypeError),
        ("bool", Tensor.bool, TypeError),
        ("int16", Tensor.short, TypeError),
        ("fewer rows", lambda x: x[:-1], ValueError),
        ("a column", lambda x: x[:, None], ValueError),
        ("below 0", replaced(0, -1), ValueError),
        ("the ignore index of other libraries", replaced(-1, -100), ValueError),
        ("V", replaced(0, 23), ValueError),
        ("another device", elsewhere, ValueError),
    ],
    "ce_weight": WEIGHTS,
    "kl_weight": WEIGHTS,
    "base_lse": [*WEIGHTS, ("low precision", Tensor.bfloat16, TypeError), ("low precision", Tensor.half, TypeError)],
    "k": [
        *((repr(v), lambda _, v=v: v, ValueError) for v in (-1, 24)),
        *((repr(v), lambda _, v=v: v, TypeError) for v in (True, 2.0, "3", None, torch.tensor(3))),
    ],
    "temperature": [*SCALES, *BY_ROW, ("None", lambda _: None, TypeError)],
    "softcap": [*SCALES, ("a tensor", lambda _: torch.tensor(1.0), TypeError)],
    "ignore_index": [(repr(v), lambda _, v=v: v, TypeError) for v in (True, 1.0, "a", torch.tensor(3))],
    "kind": [(repr(v), lambda _, v=v: v, ValueError) for v in ("kl", "", None, 3)],
    "beta": [
        *((repr(v), lambda _, v=v: v, ValueError) for v in (-0.1, 1.1, math.nan, math.inf)),
        *((repr(v), lambda _, v=v: v, TypeError) for v in (True, "1", None, torch.tensor(0.5))),
    ],
    "process_group": [(repr(v), lambda _, v=v: v, TypeError) for v in (3, "gloo", -100)],
    "reduce_hidden_grad": [],  # read with a process_group alone
    "early_gradient": [],  # any truth value
    "impl": [(repr(v), lambda _, v=v: v, ValueError) for v in ("cuda", "", "Reference", 3, True)],
}

WRONG |= {f"teacher_{name}": [*WRONG[name], ("trainable", trainable, ValueError)] for name in ("weight", "bias")}
WRONG |= {f"teacher_{name}": WRONG[name] for name in ("softcap",)} | {"teacher_temperature": [*SCALES, *BY_ROW]}
WRONG["teacher_hidden"] = [
    *ROWS,
    *(case for case in BASE if case[0] not in ("no tensor", "a shape that would broadcast")),
    ("one row", lambda x: x[:1], ValueError),
]


def good(op: str) -> cases.Arguments:
    """Valid arguments, every optional tensor among them: 6 rows, 23 tokens."""
    arguments = cases.make(op)
    if op == "linear_gated_contrastive_loss":
        arguments["base_lse"] = torch.zeros(6)
    return cases.with_lora(arguments) if op.startswith("linear") else arguments


TABLE = [
    pytest.param(op, name, change, error, id=f"{op}-{name}-{what}")
    for op in OPERATORS
    for name in inspect.signature(getattr(rmx_kernels, op)).parameters
    for what, change, error in WRONG[name]
    if not (name == "target" and what == "a column" and op.endswith("topk"))  # several targets a row
]


@pytest.mark.parametrize(("op", "name", "change", "error"), TABLE)
def test_wrong_argument_is_named(op: str, name: str, change: Change, error: type[Exception]) -> None:
    arguments = good(op)
    with pytest.raises(error, match=f"^{name}: expected ") as caught:
        cases.call(op, arguments | {name: change(arguments.get(name))})
    assert len(str(caught.value)) < 200  # a sentence, not a tensor


def test_error_says_what_was_expected_and_what_came() -> None:
    arguments = cases.make("linear_logprob_kl")
    with pytest.raises(ValueError, match=r"^weight: expected shape \[V, 7\], got \(23, 6\)$"):
        cases.call("linear_logprob_kl", arguments | {"weight": arguments["weight"][:, 1:]})
    with pytest.raises(ValueError, match=r"^target: expected ids in \[0, 23\), got -100$"):
        cases.call("linear_logprob_kl", arguments | {"target": arguments["target"] * 0 - 100})
    with pytest.raises(ValueError, match=r"^k: expected 0 <= k <= V = 23, got 24$"):
        rmx_kernels.entropy_topk(torch.zeros(2, 23), k=24)


@pytest.mark.parametrize("op", OPERATORS)
def test_good_arguments_pass(op: str) -> None:
    cases.call(op, good(op))
    cases.call(op, good(op), temperature=2, softcap=30, impl=None)
    cases.call(op, good(op), temperature=torch.ones(6))
    with torch.no_grad():
        cases.call(op, good(op), temperature=torch.ones(6, requires_grad=True))


@pytest.mark.parametrize("op", [op for op in OPERATORS if not op.endswith("entropy_topk")])
def test_constants_may_belong_to_a_graph_where_none_is_recorded(op: str) -> None:
    arguments = {
        n: v.requires_grad_() if n.startswith(("base", "teacher")) or "_weight" in n else v for n, v in good(op).items()
    }
    with torch.no_grad():
        cases.call(op, arguments)


@pytest.mark.parametrize("op", OPERATORS)
def test_inputs_are_left_as_they_were(op: str) -> None:
    arguments = good(op)
    copies = [v.clone() for v in cases.tensors(arguments)]
    cases.forward_backward(op, arguments)
    assert all(torch.equal(v, copy) for v, copy in zip(cases.tensors(arguments), copies, strict=True))


def test_backends_describe_each_implementation() -> None:
    described = backends()
    assert tuple(described) == IMPLS
    for name, backend in described.items():
        assert backend.name == name and set(backend.operators) <= set(OPERATORS) and backend.devices
        assert backend.available == (backend.reason == "")
    assert described["reference"].available and described["reference"].operators == OPERATORS


@pytest.mark.parametrize("name", IMPLS)
@pytest.mark.parametrize("op", OPERATORS)
def test_an_implementation_runs_or_says_why_not(op: str, name: str) -> None:
    """Never another one in its place."""
    backend = backends()[name]
    if backend.available and op in backend.operators and "cpu" in backend.devices:
        cases.call(op, good(op), impl=name)
        return
    with pytest.raises(BackendUnavailable, match=f"^impl='{name}' cannot run {op} here: .+") as caught:
        cases.call(op, good(op), impl=name)
    assert backend.reason in str(caught.value)


def test_best_implementation_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.choose("entropy_topk", None, "cpu", torch.float32) == "cpu"
    assert dispatch.choose("entropy_topk", None, "cuda", torch.float32) == "reference"
    assert dispatch.choose("linear_logprob_kl", None, "mps", torch.float32) == "reference"
    assert dispatch.choose("entropy_topk", "reference", "cpu", torch.float32) == "reference"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors elsewhere, and of a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailable, match="tensors are on 'cuda', but it runs on cpu"):
        dispatch.choose("entropy_topk", "cpu", "cuda", torch.float32)
    with pytest.raises(BackendUnavailable, match=r"CUDA|triton package"):
        dispatch.choose("entropy_topk", "triton", "cuda", torch.float32)


def test_float64_is_not_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    dispatch._warn_of_fallback.cache_clear()
    assert dispatch.choose("entropy_topk", None, "cuda", torch.float32) == "triton"
    with pytest.raises(BackendUnavailable, match="float64"):
        dispatch.choose("entropy_topk", "triton", "cuda", torch.float64)
    with pytest.warns(RuntimeWarning, match="float64"):
        assert dispatch.choose("entropy_topk", None, "cuda", torch.float64) == "reference"


@pytest.mark.parametrize("op", OPERATORS)
def test_the_choice_is_made_once(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda *which: asked.append(which) or choose(*which))
    dispatch.remembered.cache_clear()
    for _ in range(3):
        cases.call(op, good(op))
    cases.call(op, good(op), impl="reference")
    assert [impl for _, impl, _, _ in asked] == [None, "reference"]


def test_package_exports_what_it_names() -> None:
    assert set(OPERATORS) <= set(rmx_kernels.__all__)
    assert all(hasattr(rmx_kernels, name) for name in rmx_kernels.__all__)
