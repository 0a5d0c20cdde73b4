"""linear_gated_contrastive_loss against the fp64 oracle, its known base normaliser, and the logits form."""

import math
from typing import Any

import cases
import oracles
import pytest
import torch
from cases import SCALED, tiny_tiles

from rmx_kernels import gated_contrastive_loss, linear_entropy_topk

OPERATOR = "linear_gated_contrastive_loss"
WEIGHTS = ("ce_weight", "kl_weight")
INF = math.inf

SIZES = [  # N, V, H
    (1, 1, 1),  # the smallest
    (5, 97, 33),
    (6, 8191, 7),  # around a tile of 8192
    (6, 8193, 16),
    (5, 2 * 8192 + 3, 5),
    (4, 50257, 17),  # GPT-2: no multiple of any tile
    pytest.param(300, 257, 9, marks=pytest.mark.heavy),  # more than one chunk of 256
    (6, 601, 4099),  # a head so wide that fewer columns fit a tile
]


@pytest.mark.parametrize(("N", "V", "H"), SIZES)
def test_values_and_gradients(device: str, impl: str, dtype: torch.dtype, N: int, V: int, H: int) -> None:
    cases.check(OPERATOR, cases.make(OPERATOR, (N,), V, H, dtype, device), impl)


@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 30.0}, SCALED])
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_values_and_gradients(
    device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], bias: bool
) -> None:
    arguments = cases.make(OPERATOR, (6,), 8200, 17, dtype, device)
    if not bias:
        del arguments["bias"]
    cases.check(OPERATOR, arguments, impl, **scaling)


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize(
    ("moved", "kl_weight"),
    [
        (("hidden",), 0.7),
        (("weight",), 0.7),  # p_b knows only the bias, since base_hidden is 0 below
        (("hidden", "weight", "bias"), 0.0),
    ],
)
def test_gradcheck(
    device: str, impl: str, fp64: torch.dtype, moved: tuple[str, ...], kl_weight: float, scaling: dict[str, float]
) -> None:
    """The base is a constant to the gradients, so what is moved must not move it."""
    arguments = cases.make(OPERATOR, (3,), 7, 3, fp64, device)
    arguments["base_hidden"].zero_()
    arguments["kl_weight"].fill_(kl_weight)
    with tiny_tiles(3, 2):
        assert torch.autograd.gradcheck(
            lambda *x: cases.call(OPERATOR, arguments | dict(zip(moved, x, strict=True)), impl=impl, **scaling).loss,
            [arguments[name].requires_grad_() for name in moved],
            rtol=1e-5,
            atol=1e-7,
        )


def test_equals_the_loss_of_the_logits(device: str, impl: str, fp64: torch.dtype) -> None:
    arguments = cases.make(OPERATOR, (2, 4), 41, 7, fp64, device)
    head = arguments["weight"], arguments["bias"]
    logits, base = (oracles.linear(arguments[n], *head) for n in ("hidden", "base_hidden"))
    rest = (arguments[n] for n in ("target", "ce_weight", "kl_weight"))
    expected = gated_contrastive_loss(logits, base, *rest, impl="reference", **SCALED)
    got = cases.call(OPERATOR, arguments, impl=impl, **SCALED)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-12, atol=1e-12, equal_nan=True)


def base_lse(arguments: cases.Arguments, impl: str, **scaling: float) -> torch.Tensor:
    head = {"bias": arguments["bias"], "impl": impl} | scaling
    return linear_entropy_topk(arguments["base_hidden"], arguments["weight"], **head).lse


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_known_base_lse(device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], offset: float) -> None:
    """A normaliser that scoring has found gives what computing it again gives."""
    arguments = cases.make(OPERATOR, (7,), 8200, 9, dtype, device)
    arguments["bias"] += offset
    lse = base_lse(arguments, impl, **scaling)
    known, computed = (
        cases.forward_backward(OPERATOR, arguments | extra, impl=impl, **scaling) for extra in ({"base_lse": lse}, {})
    )
    # lse is a number of the size of the offset, so p_b moves by its rounding, and a bf16 gradient by one of its own
    step = (torch.finfo(lse.dtype).eps if offset == 0 else 2 * torch.finfo(lse.dtype).eps * offset) * 8
    for got, expected in zip(known, computed, strict=True):
        rounding = torch.finfo(got.dtype).eps
        scale = expected.nan_to_num(0).abs().max()
        assert torch.equal(got.isnan(), expected.isnan())
        assert (got - expected).nan_to_num(0).abs().max() <= (step + 2 * rounding) * (1 + scale)


def test_known_base_lse_of_identical_hidden_states(device: str, impl: str) -> None:
    """The KL then is of the order of the square of the normaliser's rounding, and still not negative."""
    arguments = cases.make(OPERATOR, (7,), 8200, 9, device=device)
    arguments["base_hidden"] = arguments["hidden"]
    kl = cases.call(OPERATOR, arguments | {"base_lse": base_lse(arguments, impl)}, impl=impl).kl
    assert ((kl >= 0) & (kl < 1e-10))[arguments["kl_weight"] != 0].all()


@pytest.mark.parametrize("off", [0.06, -0.06, 1.0, -5.0, 50.0, -300.0, INF, -INF, math.nan])
def test_base_lse_that_does_not_fit_is_nan(device: str, impl: str, off: float) -> None:
    """KL and loss are NaN, never a plausible number; the other rows are untouched."""
    (got, gradient), (expected, expected_gradient) = with_wrong_base_lse(4, off, device, impl)
    assert got.kl[4].isnan() and got.loss.isnan()
    others = torch.arange(6, device=device) != 4
    for value, untouched in ((got.kl, expected.kl), (got.logprob, expected.logprob), (gradient, expected_gradient)):
        cases.assert_same_bits([value[others]], [untouched[others]])


@pytest.mark.parametrize("off", [0.06, -0.06, 1.0, -5.0, 50.0, INF, math.nan])
def test_base_lse_that_does_not_fit_trains_nothing(device: str, impl: str, off: float) -> None:
    """The gradient is made in the same sweep: it is NaN where the loss is, not the pull of some other base."""
    (_, gradient), _ = with_wrong_base_lse(4, off, device, impl)
    assert gradient[4].isnan().all()


def test_base_lse_of_rows_without_kl_weight_is_not_read(device: str, impl: str) -> None:
    arguments = cases.make(OPERATOR, (6,), 23, 5, device=device)
    lse = base_lse(arguments, impl)
    spoilt = torch.where(arguments["kl_weight"] == 0, math.nan, lse)
    cases.assert_same_bits(
        *(cases.forward_backward(OPERATOR, arguments | {"base_lse": known}, impl=impl) for known in (spoilt, lse))
    )


@pytest.mark.parametrize("masked", [slice(0, 5), slice(5, 10), slice(3, 11, 2)])
def test_masked_tokens_have_probability_zero(device: str, impl: str, masked: slice) -> None:
    """A bias of -inf takes a token out of both distributions; a whole tile of it, too."""
    arguments = cases.make(OPERATOR, (6,), 13, 3, device=device)
    arguments["bias"][masked] = -INF
    arguments["target"][:] = 11 + arguments["target"] % 2
    with tiny_tiles():
        cases.check(OPERATOR, arguments, impl)


@pytest.mark.parametrize("offset", [-1e4, -200.0, 1e4])
def test_common_offset(device: str, impl: str, dtype: torch.dtype, offset: float) -> None:
    arguments = cases.make(OPERATOR, (5,), 8200, 9, dtype, device)
    arguments["bias"] = torch.full_like(arguments["bias"], offset)
    cases.check(OPERATOR, arguments, impl)


@pytest.mark.heavy
def test_many_rows_add_up_in_the_head_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    """600 rows in ten chunks, anchored or not, whose sum a low-precision accumulator would lose."""
    arguments = cases.make(OPERATOR, (600,), 29, 5, dtype, device)
    arguments["kl_weight"][::2] = 0
    with tiny_tiles(8, 64):
        cases.check(OPERATOR, arguments, impl)


def test_a_live_row_among_dead_ones_is_as_accurate(device: str, impl: str) -> None:
    """BLAS sums products of fewer than 4 rows in another order, with 5 times the error."""
    arguments = cases.make(OPERATOR, (24,), 8193, 16, device=device)
    arguments |= {n: torch.ones(24, device=device) for n in WEIGHTS}
    eager, oracle = (cases.full_logits(OPERATOR, arguments, None, d)[1] for d in (torch.float32, torch.float64))
    upstream = cases.cotangents([torch.zeros((), device=device)])[0]
    got = torch.zeros_like(arguments["hidden"])
    for row in range(24):
        alone = {
            n: torch.zeros(24, device=device).index_fill_(0, torch.tensor(row, device=device), 1.0) for n in WEIGHTS
        }
        got += loss_and_gradient(arguments | alone, impl)[1] * upstream
    assert (got - oracle).abs().mean() <= 2 * (eager - oracle).abs().mean()


def test_confident_targets_keep_their_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    """p = 1 - 8e-4: the gradient of the loss is the little that is left."""
    weight = torch.zeros(4096, 2, dtype=dtype, device=device)
    weight[5, 0] = 15.5
    hidden = torch.tensor([[1.0, 0.5]] * 3, dtype=dtype, device=device)
    one = torch.ones(3, device=device)
    arguments = {"hidden": hidden, "base_hidden": hidden, "weight": weight, "ce_weight": one, "kl_weight": one}
    arguments |= {"target": torch.full((3,), 5, device=device)}
    cases.check(OPERATOR, arguments, impl)
    result, gradient = loss_and_gradient(arguments, impl)
    d = 4095 * math.exp(-15.5)
    expected = torch.full_like(gradient[:, 0].double(), -15.5 * d / (1 + d))
    torch.testing.assert_close(gradient[:, 0].double(), expected, rtol=5e-3, atol=0)
    assert (result.logprob < 0).all() and (result.kl == 0).all()


def with_wrong_base_lse(row: int, off: float, device: str, impl: str) -> list[tuple[Any, torch.Tensor]]:
    """Result and gradient where base_lse of one row is off, and where it is right."""
    arguments = cases.make(OPERATOR, (6,), 8200, 5, device=device)
    lse = base_lse(arguments, impl)
    wrong = lse.clone()
    wrong[row] += off
    return [loss_and_gradient(arguments | {"base_lse": known}, impl) for known in (wrong, lse)]


def loss_and_gradient(arguments: cases.Arguments, impl: str) -> tuple[Any, torch.Tensor]:
    hidden = arguments["hidden"].clone().requires_grad_()
    result = cases.call(OPERATOR, arguments | {"hidden": hidden}, impl=impl)
    return result, torch.autograd.grad(result.loss, hidden)[0]
