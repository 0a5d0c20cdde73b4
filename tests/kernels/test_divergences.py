"""linear_divergence against the fp64 oracle and TRL: four kinds, heads of different widths, and the hard inputs."""

import math
from decimal import Decimal, localcontext
from typing import Any

import cases
import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import randn, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmx_kernels import linear_divergence
from rmx_kernels.divergences.reference import excess_of_log, kl_terms, mixture_terms

OPERATOR = "linear_divergence"
INF = math.inf
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.1), ("alpha", 0.1)]
MORE_KINDS = [("jsd", 0.5), ("jsd", 0.97), ("alpha", 0.5)]
SCALINGS: list[dict[str, float]] = [
    {"temperature": 0.3},
    {"softcap": 30.0, "teacher_softcap": 5.0},
    {"temperature": 0.7, "softcap": 5.0, "teacher_temperature": 1.9},
]
kinds = pytest.mark.parametrize(
    ("kind", "beta"), [*KINDS, *(pytest.param(*more, marks=pytest.mark.thorough) for more in MORE_KINDS)]
)


def make(kind: str, beta: float, *shape: Any, **options: Any) -> cases.Arguments:
    return cases.make(OPERATOR, *shape, **options) | {"kind": kind, "beta": beta}


def of_logits(z: Tensor, teacher_z: Tensor, **options: Any) -> Any:
    """The operator on given logits [N, V]: of an identity for a head, whose products are exact."""
    one = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return linear_divergence(z, one, teacher_z, one, **options)


def with_bias(z: Tensor, teacher_z: Tensor, **options: Any) -> Any:
    """One row of given logits [V], which may be -inf: the biases of heads of zeros."""
    place: Any = {"dtype": z.dtype, "device": z.device}
    zero, weight = torch.zeros(1, 2, **place), torch.zeros(z.shape[0], 2, **place)
    return linear_divergence(zero, weight, zero, weight, bias=z, teacher_bias=teacher_z, **options)


@kinds
@pytest.mark.parametrize(
    ("N", "V", "H"), [(1, 1, 1), (5, 97, 33), (3, 8193, 16), pytest.param(2, 2 * 8192 + 3, 5, marks=pytest.mark.heavy)]
)
def test_values_and_gradients(
    device: str, impl: str, dtype: torch.dtype, N: int, V: int, H: int, kind: str, beta: float
) -> None:
    """Of divergence and entropy together, for hidden, weight and bias."""
    cases.check(OPERATOR, make(kind, beta, (N,), V, H, dtype, device), impl)


@kinds
@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
def test_scaled_values_and_gradients(
    device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], kind: str, beta: float
) -> None:
    arguments = make(kind, beta, (24,), 1100, 17, dtype, device)
    if "softcap" not in scaling:
        del arguments["bias"], arguments["teacher_bias"]
    cases.check(OPERATOR, arguments, impl, **scaling)


@kinds
def test_with_lora(device: str, impl: str, dtype: torch.dtype, kind: str, beta: float) -> None:
    cases.check(OPERATOR, cases.with_lora(make(kind, beta, (5,), 97, 33, dtype, device)), impl, temperature=0.7)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lead=st.lists(st.integers(0, 4), max_size=2),
    V=st.integers(1, 23),
    H=st.integers(1, 9),
    columns=st.integers(1, 9),
    rows=st.integers(1, 4),
    chosen=st.sampled_from(KINDS + MORE_KINDS),
    scaling=st.sampled_from([{}, *SCALINGS]),
)
def test_any_shape_and_tiling(device, impl, fp64, lead, V, H, columns, rows, chosen, scaling) -> None:
    with tiny_tiles(columns, rows):
        cases.check(OPERATOR, make(*chosen, tuple(lead), V, H, fp64, device), impl, **scaling)


@pytest.mark.thorough
@kinds
@pytest.mark.parametrize("asked", ["divergence", "entropy", "both"])
def test_gradcheck(device: str, impl: str, fp64: torch.dtype, kind: str, beta: float, asked: str) -> None:
    """The gradient that is made with the value, and those that are made later."""
    arguments = make(kind, beta, (3,), 7, 3, fp64, device)
    scaling = {"temperature": 0.7, "softcap": 5.0}

    def function(*moved: Tensor) -> Any:
        fresh = arguments | dict(zip(("hidden", "weight", "bias"), moved, strict=True))
        result = cases.call(OPERATOR, fresh, impl=impl, **scaling)
        return tuple(result) if asked == "both" else getattr(result, asked)

    inputs = [arguments[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    with tiny_tiles(3, 2):
        assert torch.autograd.gradcheck(function, inputs, rtol=1e-5, atol=1e-7)


@kinds
def test_the_early_gradient_is_the_late_one(device: str, impl: str, kind: str, beta: float) -> None:
    """That of the divergence alone, where the entropy's is zero, and with weights of rows."""
    arguments = cases.with_lora(make(kind, beta, (5,), 97, 33, device=device))
    weights = randn(5, device=device)
    found = []
    for late in (False, True):
        fresh, inputs = cases.leaves(OPERATOR, arguments)
        result = cases.call(OPERATOR, fresh, impl=impl)
        loss = (weights * result.divergence).sum() + (0 * result.entropy.sum() if late else 0)
        found.append(torch.autograd.grad(loss, inputs))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_gradient_of_one_result_alone(device: str, impl: str) -> None:
    """The entropy's needs no teacher: one of NaN does not matter."""
    arguments = cases.make(OPERATOR, device=device)
    expected, got = [], []
    for teacher, found in ((0.0, expected), (math.nan, got)):
        fresh, inputs = cases.leaves(OPERATOR, arguments)
        fresh["teacher_hidden"] = torch.full_like(fresh["teacher_hidden"], teacher)
        entropy = cases.call(OPERATOR, fresh, impl=impl).entropy
        found += [entropy.detach(), *torch.autograd.grad(entropy.sum(), inputs)]
    cases.assert_same_bits(got, expected)


@kinds
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_equal_inputs_give_exactly_zero(
    device: str, impl: str, dtype: torch.dtype, size: float, kind: str, beta: float
) -> None:
    """Value and gradient, at any size of the logits: also of confident rows."""
    a = make(kind, beta, (5,), 1100, 9, dtype, device)
    teacher = {"teacher_hidden": a["hidden"], "teacher_weight": a["weight"] * size, "teacher_bias": a["bias"]}
    fresh, inputs = cases.leaves(OPERATOR, a | teacher | {"weight": a["weight"] * size})
    divergence = cases.call(OPERATOR, fresh, impl=impl, temperature=0.7).divergence
    assert (divergence == 0).all()
    assert all(not g.any() for g in torch.autograd.grad(divergence.sum(), inputs))


@settings(max_examples=unless_interpreted(80, 8), deadline=None, derandomize=True)
@given(
    V=st.integers(1, 40),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    apart=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0, 1e3]),
    chosen=st.sampled_from(
        [*KINDS, *MORE_KINDS, ("jsd", 1e-6), ("jsd", 1 - 1e-6), ("alpha", 1e-3), ("alpha", 1 - 1e-3)]
    ),
    seed=st.integers(0, 99),
)
def test_never_negative(device, impl, dtype, V, size, apart, chosen, seed) -> None:
    """Nor NaN, at any size of the logits and any distance between the two distributions; and a JSD is bounded."""
    kind, beta = chosen
    hidden = randn(4, 3, seed=seed, dtype=dtype, device=device)
    teacher = hidden + apart * randn(4, 3, seed=seed + 1, dtype=dtype, device=device)
    weight = (size * randn(V, 3, seed=seed + 2)).to(dtype).to(device)
    hidden.requires_grad_()
    with tiny_tiles(5, 2):
        result = linear_divergence(hidden, weight, teacher, weight, kind=kind, beta=beta, impl=impl)
        (gradient,) = torch.autograd.grad(result.divergence.sum(), hidden)
    assert (result.divergence >= 0).all() and (result.entropy >= 0).all()
    assert gradient.isfinite().all()
    if kind == "jsd":
        most = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
        assert (result.divergence <= most * (1 + 1e-5) + 1e-9).all()
    if kind == "alpha":
        assert (result.divergence <= (1 + 1e-5) / (beta * (1 - beta))).all()


@pytest.mark.parametrize(("kind", "beta"), [*KINDS, *MORE_KINDS, ("jsd", 1e-6), ("jsd", 1 - 1e-6)])
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
def test_small_divergences_keep_their_relative_accuracy(
    device: str, impl: str, apart: float, kind: str, beta: float
) -> None:
    """About apart^2 / 2 nats: the bound is the rounding of the logits, a few 1e-6, over the distance of the two."""
    N, V = unless_interpreted(20, 6), 2000
    hidden, weight = randn(N, 12, device=device), randn(V, 12, seed=2, device=device)
    teacher = hidden + apart / 3 * randn(N, 12, seed=1, device=device)
    got = linear_divergence(hidden, weight, teacher, weight, kind=kind, beta=beta, impl=impl).divergence
    z, teacher_z = hidden.double() @ weight.double().T, teacher.double() @ weight.double().T
    exact = oracles.divergence(z, teacher_z, kind, beta)[0]
    assert ((got - exact) / exact).abs().max() <= 6e-6 / apart


def with_digits(z: list[float], teacher_z: list[float], kind: str, beta: float) -> Decimal:
    """The divergence of one row in 80 digits, of which the formula may lose fifty."""
    with localcontext(prec=80):
        q, p = ([Decimal(x).exp() for x in row] for row in (z, teacher_z))
        q, p = ([x / sum(row) for x in row] for row in (q, p))
        of_p = Decimal(beta)
        m = [of_p * a + (1 - of_p) * b for a, b in zip(p, q, strict=True)]

        def kl(a: list[Decimal], b: list[Decimal]) -> Decimal:
            return sum((x * (x.ln() - y.ln()) for x, y in zip(a, b, strict=True)), Decimal(0))

        if kind == "jsd":
            return of_p * kl(p, m) + (1 - of_p) * kl(q, m)
        if kind == "alpha":
            powers = (x**of_p * y ** (1 - of_p) for x, y in zip(p, q, strict=True))
            return (1 - sum(powers, Decimal(0))) / (of_p * (1 - of_p))
        return kl(p, q) if kind == "forward_kl" else kl(q, p)


@kinds
def test_confident_rows(device: str, impl: str, fp64: torch.dtype, kind: str, beta: float) -> None:
    """Student and teacher sure of the same token, or of different ones."""
    z = randn(3, 30, dtype=fp64, device=device)
    teacher_z = randn(3, 30, seed=1, dtype=fp64, device=device)
    z[:, 3] += 60
    teacher_z[0, 3] += 60
    teacher_z[1, 4] += 60
    got = of_logits(z, teacher_z, kind=kind, beta=beta, impl=impl).divergence
    exact = [float(with_digits(*rows, kind, beta)) for rows in zip(z.tolist(), teacher_z.tolist(), strict=True)]
    torch.testing.assert_close(got.cpu(), torch.tensor(exact, dtype=fp64), rtol=1e-9, atol=0)


MASKED = [(slice(0, 9), slice(0, 9)), (slice(0, 0), slice(3, 20, 2)), (slice(3, 20, 2), slice(0, 0))]
MASKED += [(slice(0, 12), slice(6, 18))]  # some both lack, some one of them


@kinds
@pytest.mark.parametrize(("own", "others"), MASKED, ids=["both", "teacher", "student", "partly"])
@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min])
def test_masked_tokens(device: str, impl: str, own: slice, others: slice, mask: float, kind: str, beta: float) -> None:
    """The limits of the formulas for -inf. By a mask that is finite the logits are only far apart."""
    z, teacher_z = randn(23, device=device), randn(23, seed=1, device=device)
    z[own], teacher_z[others] = mask, mask
    z.requires_grad_()
    with tiny_tiles():
        result = with_bias(z, teacher_z, kind=kind, beta=beta, impl=impl)
        (gradient,) = torch.autograd.grad(result.divergence.sum(), z)
    exact = z.detach().double().requires_grad_()
    log_q, log_p = exact.log_softmax(-1), teacher_z.double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    mixture = beta * p + (1 - beta) * q
    log_m = torch.where(mixture > 0, mixture, 1.0).log()
    shared = (p > 0) & (q.detach() > 0)

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        kept = a.detach() > 0
        return (a[kept] * (log_a[kept] - log_b[kept])).sum()

    expected = {
        "forward_kl": lambda: kl(p, log_p, log_q),
        "reverse_kl": lambda: kl(q, log_q, log_p),
        "jsd": lambda: beta * kl(p, log_p, log_m) + (1 - beta) * kl(q, log_q, log_m),
        "alpha": lambda: (1 - (p[shared] ** beta * q[shared] ** (1 - beta)).sum()) / (beta * (1 - beta)),
    }[kind]()
    lacking = {"forward_kl": (p > 0) & (q == 0), "reverse_kl": (q > 0) & (p == 0)}.get(kind, p < 0)
    if lacking.any() and mask == -INF:
        assert result.divergence.item() == INF
        assert gradient.isnan().any() == (kind == "reverse_kl")
        return
    torch.testing.assert_close(result.divergence[0].double(), expected.detach(), rtol=1e-5, atol=1e-7)
    if expected < 1e30:  # where a gradient has digits
        (want,) = torch.autograd.grad(expected, exact)
        torch.testing.assert_close(gradient.double(), want, rtol=1e-4, atol=1e-6)


@kinds
def test_rows_without_a_distribution_are_nan(device: str, impl: str, kind: str, beta: float) -> None:
    """NaN, +inf, or nothing but -inf, on either side; the student's entropy is its own."""
    good = randn(23, device=device)
    for bad in (good.clone().fill_(-INF), good.clone().index_fill_(0, torch.tensor(4).to(device), math.nan)):
        for z, teacher_z in ((bad, good), (good, bad)):
            result = with_bias(z, teacher_z, kind=kind, beta=beta, impl=impl)
            assert result.divergence.isnan().all()
            assert result.entropy.isnan().all() == (z is bad)
    plus = good.clone()
    plus[7] = INF
    assert with_bias(plus, good, kind=kind, beta=beta, impl=impl).divergence.isnan().all()
    assert with_bias(good, plus, kind=kind, beta=beta, impl=impl).divergence.isnan().all()


@kinds
def test_rows_do_not_depend_on_their_number(device: str, impl: str, kind: str, beta: float) -> None:
    arguments = make(kind, beta, (40,), 1100, 16, torch.bfloat16, device)
    whole = cases.call(OPERATOR, arguments, impl=impl)
    for rows in (slice(0, 1), slice(3, 8), slice(33, 40)):
        part = {n: v[rows] if n in cases.PER_ROW else v for n, v in arguments.items()}
        got = cases.call(OPERATOR, part, impl=impl)
        cases.assert_same_bits(got, [x[rows] for x in whole])


ENDS = [("jsd", 0, "forward_kl"), ("jsd", 1.0, "reverse_kl"), ("alpha", 0, "reverse_kl"), ("alpha", 1.0, "forward_kl")]


@pytest.mark.parametrize(("of", "beta", "kind"), ENDS)
def test_ends_of_beta(device: str, impl: str, of: str, beta: float, kind: str) -> None:
    arguments = cases.make(OPERATOR, device=device)
    end, kl = (
        cases.forward_backward(OPERATOR, arguments | options, impl=impl)
        for options in ({"kind": of, "beta": beta}, {"kind": kind})
    )
    cases.assert_same_bits(end, kl)


@pytest.mark.parametrize(("beta", "kind"), [(0, "reverse_kl"), (1.0, "forward_kl")])
def test_orders_close_to_the_ends(device: str, impl: str, fp64: torch.dtype, beta: float, kind: str) -> None:
    arguments = cases.make(OPERATOR, dtype=fp64, device=device)
    close, kl = (
        cases.forward_backward(OPERATOR, arguments | options, impl=impl)
        for options in ({"kind": "alpha", "beta": abs(beta - 1e-5)}, {"kind": kind})
    )
    torch.testing.assert_close(close, kl, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", [0.3, 0.5, 0.9])
def test_the_renyi_divergence_by_its_formula(device: str, impl: str, order: float) -> None:
    """Value and gradient of what the docstring says, against log sum p^a q^(1 - a)."""
    fresh, inputs = cases.leaves(OPERATOR, cases.make(OPERATOR, device=device) | {"kind": "alpha", "beta": order})
    alpha = cases.call(OPERATOR, fresh, impl=impl).divergence
    renyi = -torch.log1p(-order * (1 - order) * alpha) / (1 - order)
    log_q = F.linear(fresh["hidden"], fresh["weight"], fresh["bias"]).log_softmax(-1)
    log_p = F.linear(fresh["teacher_hidden"], fresh["teacher_weight"], fresh["teacher_bias"]).log_softmax(-1)
    expected = -(order * log_p + (1 - order) * log_q).logsumexp(-1) / (1 - order)
    torch.testing.assert_close(renyi, expected, rtol=1e-4, atol=1e-5)
    got, want = (torch.autograd.grad(x.sum(), inputs) for x in (renyi, expected))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])
def test_equals_trl(device: str, impl: str, beta: float) -> None:
    """GKDTrainer's loss, its convention of beta and its ends, from full logits: value and gradients."""
    trainer = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    a = cases.make(OPERATOR, (3, 5), 97, 12, device=device) | {"kind": "jsd", "beta": beta}
    fresh, inputs = cases.leaves(OPERATOR, a)
    ours = cases.call(OPERATOR, fresh, impl=impl, temperature=0.7).divergence.mean()
    logits = F.linear(fresh["hidden"], fresh["weight"], fresh["bias"])
    teacher = F.linear(a["teacher_hidden"], a["teacher_weight"], a["teacher_bias"])
    labels = torch.zeros(3, 5, dtype=torch.int64, device=device)
    theirs = trainer.generalized_jsd_loss(logits, teacher, labels, beta=beta, temperature=0.7)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    got, expected = (torch.autograd.grad(loss, inputs) for loss in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_terms_near_and_far_meet() -> None:
    """The series at its bound against the logarithm, and 0 at 0."""
    y = torch.linspace(-0.3, 0.3, 4001, dtype=torch.float64)
    exact = y - torch.special.log1p(y)
    torch.testing.assert_close(excess_of_log(y), exact, rtol=1e-12, atol=1e-19)
    p = torch.full_like(y, 0.25)
    wide = torch.linspace(-0.99, 3, 4001, dtype=torch.float64)
    terms = mixture_terms(p, p * (1 + wide), wide)
    torch.testing.assert_close(terms, kl_terms(p * (1 + wide), p, wide.log1p()), rtol=1e-9, atol=1e-15)
    assert (terms >= 0).all() and mixture_terms(p, p, 0 * y).eq(0).all()
