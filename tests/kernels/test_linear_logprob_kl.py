"""linear_logprob_kl against the fp64 oracle, and the KL: never negative, 0 when equal, accurate when small."""

import math

import cases
import oracles
import pytest
import torch
from cases import SCALED, randint, randn, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmx_kernels import linear_logprob_kl

OPERATOR = "linear_logprob_kl"
INF = math.inf

SIZES = [  # N, V, H
    (1, 1, 1),  # the smallest: both distributions are certain
    (5, 97, 33),
    (3, 8191, 7),  # around a tile of 8192
    (3, 8193, 16),
    (2, 2 * 8192 + 3, 5),
    (2, 50257, 17),  # GPT-2: no multiple of any tile
    pytest.param(300, 257, 9, marks=pytest.mark.heavy),  # more than one chunk of 256
]


@pytest.mark.parametrize(("N", "V", "H"), SIZES)
def test_values_and_gradients(device: str, impl: str, dtype: torch.dtype, N: int, V: int, H: int) -> None:
    cases.check(OPERATOR, cases.make(OPERATOR, (N,), V, H, dtype, device), impl)


@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 30.0}, SCALED])
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_values_and_gradients(
    device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], bias: bool
) -> None:
    arguments = cases.make(OPERATOR, (4,), 8200, 17, dtype, device)
    if not bias:
        del arguments["bias"]
    cases.check(OPERATOR, arguments, impl, **scaling)


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("field", ["logprob", "kl"])
def test_gradcheck_of_hidden(device: str, impl: str, fp64: torch.dtype, field: str, scaling: dict[str, float]) -> None:
    arguments = cases.make(OPERATOR, (3,), 7, 3, fp64, device)
    hidden = arguments["hidden"].requires_grad_()
    with tiny_tiles(3, 2):
        assert torch.autograd.gradcheck(
            lambda h: getattr(cases.call(OPERATOR, arguments | {"hidden": h}, impl=impl, **scaling), field),
            hidden,
            rtol=1e-5,
            atol=1e-7,
        )


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("field", ["logprob", "kl"])
def test_gradcheck_of_the_head(
    device: str, impl: str, fp64: torch.dtype, field: str, scaling: dict[str, float]
) -> None:
    """Of the student alone: where base_hidden is 0, p_b knows only the bias, so moving the weight leaves it fixed."""
    arguments = cases.make(OPERATOR, (3,), 7, 3, fp64, device)
    arguments["base_hidden"].zero_()
    moved = ("weight", "bias") if field == "logprob" else ("weight",)
    with tiny_tiles(3, 2):
        assert torch.autograd.gradcheck(
            lambda *head: getattr(
                cases.call(OPERATOR, arguments | dict(zip(moved, head, strict=True)), impl=impl, **scaling), field
            ),
            [arguments[name].requires_grad_() for name in moved],
            rtol=1e-5,
            atol=1e-7,
        )


@pytest.mark.parametrize("asked", ["logprob", "kl"])
def test_gradient_of_one_result_alone(device: str, impl: str, asked: str) -> None:
    """A result whose gradient nobody asked for adds nothing; without the KL's, a NaN base does not matter."""
    fresh, inputs = cases.leaves(OPERATOR, cases.make(OPERATOR, device=device))
    if asked == "logprob":
        fresh["base_hidden"].fill_(math.nan)
    got = getattr(cases.call(OPERATOR, fresh, impl=impl), asked)
    upstream = randn(*got.shape, device=device)
    gradients = torch.autograd.grad(got, inputs, upstream)
    logits, base = (
        oracles.linear(h.double(), fresh["weight"].double(), fresh["bias"].double())
        for h in (fresh["hidden"], fresh["base_hidden"])
    )
    expected = oracles.logprob_kl(logits, base, fresh["target"])[asked == "kl"]
    torch.testing.assert_close(
        gradients, torch.autograd.grad(expected, inputs, upstream.double()), rtol=1e-4, atol=1e-5
    )


@settings(max_examples=unless_interpreted(60, 20), deadline=None, derandomize=True)
@given(
    N=st.integers(1, 5),
    V=st.integers(1, 40),
    columns=st.integers(1, 9),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    apart=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_kl_is_never_negative(device, impl, dtype, N, V, columns, size, apart, seed) -> None:
    """Nor NaN, at any size of the logits and any distance between the two distributions."""
    hidden = randn(N, 3, seed=seed, dtype=dtype, device=device)
    base = hidden + apart * randn(N, 3, seed=seed + 1, dtype=dtype, device=device)
    weight = (size * randn(V, 3, seed=seed + 2)).to(dtype).to(device)
    hidden.requires_grad_()
    with tiny_tiles(columns, 2):
        result = linear_logprob_kl(hidden, base, weight, randint(V, N, device=device), impl=impl)
        (gradient,) = torch.autograd.grad(result.kl.sum(), hidden)
    assert (result.kl >= 0).all() and (result.logprob <= 1e-5).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_inputs_give_exactly_zero(
    device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], offset: float
) -> None:
    """Value and gradient, also at a common offset and for confident rows."""
    arguments = cases.make(OPERATOR, (5,), 8200, 9, dtype, device)
    arguments["hidden"][3:] *= 20
    arguments["bias"] += offset
    fresh, inputs = cases.leaves(OPERATOR, arguments | {"base_hidden": arguments["hidden"]})
    kl = cases.call(OPERATOR, fresh, impl=impl, **scaling).kl
    assert (kl == 0).all()
    assert all(not g.any() for g in torch.autograd.grad(kl.sum(), inputs))


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("V", [500, 20000])
def test_small_kl_keeps_its_relative_accuracy(device: str, impl: str, V: int, apart: float) -> None:
    """KL of about 1e-2, 1e-4 and 1e-6, where sum p_b (log p_b - log p_s) in fp32 has no correct digit left.

    The bound is the rounding of the logits themselves, a few 1e-6, over the distance of the two.
    """
    N = unless_interpreted(20, 6)
    hidden = randn(N, 12, device=device)
    base = hidden + apart / 3 * randn(N, 12, seed=1, device=device)
    weight, target = randn(V, 12, seed=2, device=device), randint(V, N, device=device)
    kl = linear_logprob_kl(hidden, base, weight, target, impl=impl).kl
    exact = oracles.logprob_kl(hidden.double() @ weight.double().T, base.double() @ weight.double().T, target)[1]
    assert apart**2 / 10 < exact.mean() < apart**2
    assert ((kl - exact) / exact).abs().max() <= 3e-6 / apart


@pytest.mark.parametrize("masked", [slice(0, 5), slice(5, 10), slice(3, 11, 2)])
def test_masked_tokens_have_probability_zero(device: str, impl: str, masked: slice) -> None:
    """-inf in the bias takes a token out of both distributions; a whole tile of it, too."""
    arguments = cases.make(OPERATOR, (4,), 13, 3, device=device)
    arguments["bias"][masked] = -INF
    arguments["target"] = torch.tensor([11, 12, 11, 12], device=device)
    with tiny_tiles():
        cases.check(OPERATOR, arguments, impl)


def test_token_that_one_side_excludes(device: str, impl: str) -> None:
    """Excluded by the base only: nothing. By the student only: KL = +inf. Neither is NaN, nor any gradient."""
    weight = randn(9, 3, device=device)
    weight[4, 0] = -3e38  # times 10 overflows to -inf, times 1e-38 does not
    hidden, base = randn(2, 3, device=device), randn(2, 3, seed=1, device=device)
    hidden[:, 0] = torch.tensor([1e-38, 10.0], device=device)
    base[:, 0] = torch.tensor([10.0, 1e-38], device=device)
    hidden.requires_grad_()
    with tiny_tiles():
        result = linear_logprob_kl(hidden, base, weight, torch.tensor([0, 4], device=device), impl=impl)
    z = torch.where(weight[:, 0] < -1e30, torch.tensor(-INF, device=device), base[0].double() @ weight.double().T)
    expected = oracles.logprob_kl(
        hidden[:1].detach().double() @ weight.double().T, z[None], torch.tensor([0]).to(device)
    )
    torch.testing.assert_close(result.kl[0].double(), expected[1][0], rtol=1e-5, atol=0)
    assert result.kl[1] == INF and result.logprob[1] == -INF
    (gradient,) = torch.autograd.grad(result.kl.sum(), hidden)
    assert not gradient.isnan().any()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_common_offset(device: str, impl: str, dtype: torch.dtype, offset: float) -> None:
    arguments = cases.make(OPERATOR, (4,), 8200, 9, dtype, device)
    arguments["bias"] = torch.full_like(arguments["bias"], offset)
    cases.check(OPERATOR, arguments, impl)


def test_head_gradient_leaves_the_base_out(device: str, impl: str, fp64: torch.dtype) -> None:
    """The weight's gradient is that of the student's product, though the base goes through the same weight."""
    arguments = cases.make(OPERATOR, (4,), 11, 3, fp64, device)
    fresh, inputs = cases.leaves(OPERATOR, arguments)
    got = torch.autograd.grad(cases.call(OPERATOR, fresh, impl=impl).kl.sum(), inputs)
    fresh, inputs = cases.leaves(OPERATOR, arguments)
    logits = oracles.linear(fresh["hidden"], fresh["weight"], fresh["bias"])
    base = oracles.linear(fresh["base_hidden"], fresh["weight"].detach(), fresh["bias"].detach())
    p_s, p_b = logits.softmax(-1).detach(), base.softmax(-1)
    dz: Tensor = p_s - p_b
    expected = dz @ arguments["weight"], dz.T @ arguments["hidden"], dz.sum(0)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
