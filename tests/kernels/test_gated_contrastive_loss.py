"""gated_contrastive_loss against the fp64 oracle: sizes, excluded tokens, far and near distributions."""

import math

import cases
import oracles
import pytest
import torch
from cases import SCALED, randn, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st

from rmx_kernels import gated_contrastive_loss

OPERATOR = "gated_contrastive_loss"
INF = math.inf

SIZES = [  # N, V
    (1, 1),  # the smallest
    (5, 97),
    (6, 8191),  # around a tile of 8192
    (6, 8193),
    (5, 2 * 8192 + 3),
    (4, 50257),  # GPT-2: no multiple of any tile
    pytest.param(300, 257, marks=pytest.mark.heavy),  # more than one chunk of 256
]


@pytest.mark.parametrize(("N", "V"), SIZES)
def test_values_and_gradients(device: str, impl: str, dtype: torch.dtype, N: int, V: int) -> None:
    arguments = cases.make(OPERATOR, (N,), V, dtype=dtype, device=device)
    check_parts(arguments, cases.check(OPERATOR, arguments, impl))


@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 30.0}, SCALED])
def test_scaled_values_and_gradients(device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float]) -> None:
    arguments = cases.make(OPERATOR, (6,), 8200, dtype=dtype, device=device)
    check_parts(arguments, cases.check(OPERATOR, arguments, impl, **scaling), **scaling)


@pytest.mark.parametrize("weights", [(1.3, 0.0), (0.0, 0.7), (-1.3, 0.7), (0.5, -0.2)])
@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
def test_gradcheck(
    device: str, impl: str, fp64: torch.dtype, weights: tuple[float, float], scaling: dict[str, float]
) -> None:
    arguments = cases.make(OPERATOR, (3,), 11, dtype=fp64, device=device)
    arguments |= {
        n: torch.full((3,), w, device=device) for n, w in zip(("ce_weight", "kl_weight"), weights, strict=True)
    }
    with tiny_tiles(4, 2):
        assert torch.autograd.gradcheck(
            lambda z: cases.call(OPERATOR, arguments | {"logits": z}, impl=impl, **scaling).loss,
            arguments["logits"].requires_grad_(),
            rtol=1e-5,
            atol=1e-7,
        )


def plain(logits: torch.Tensor, base: torch.Tensor, impl: str) -> tuple[torch.Tensor, torch.Tensor]:
    """KL of each row and its gradient."""
    z = logits.clone().requires_grad_()
    N = len(z)
    one, target = torch.ones(N, device=z.device), torch.zeros(N, dtype=torch.int64, device=z.device)
    result = gated_contrastive_loss(z, base, target, 0 * one, one, impl=impl)
    return result.kl, torch.autograd.grad(result.loss, z)[0]


@settings(max_examples=unless_interpreted(80, 25), deadline=None, derandomize=True)
@given(
    N=st.integers(1, 5),
    V=st.integers(1, 40),
    columns=st.integers(1, 9),
    size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    apart=st.sampled_from([0.0, 1e-7, 1e-4, 1e-2, 1.0, 1e3]),
    masked=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_kl_is_never_negative(device, impl, dtype, N, V, columns, size, apart, masked, seed) -> None:
    """Nor NaN, at any size and distance, with tokens that one side or both exclude."""
    logits = (size * randn(N, V, seed=seed)).to(dtype).to(device)
    base = logits + (apart * randn(N, V, seed=seed + 1)).to(dtype).to(device)
    logits[:, 1 : 1 + masked] = -INF
    base[:, 2 : 2 + masked] = -INF
    with tiny_tiles(columns, 2):
        kl, gradient = plain(logits, base, impl)
    assert (kl >= 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_inputs_give_exactly_zero(
    device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], offset: float
) -> None:
    """KL, loss and gradient, with -inf in both, confident rows, a common offset."""
    arguments = cases.make(OPERATOR, (5,), 8200, dtype=dtype, device=device)
    arguments["logits"][3:] *= 20
    arguments["logits"] += offset
    arguments["logits"][1, :8192] = -INF
    arguments |= {"ce_weight": torch.zeros(5, device=device), "kl_weight": torch.full((5,), 2.0, device=device)}
    fresh, (logits,) = cases.leaves(OPERATOR, arguments | {"base_logits": arguments["logits"]})
    result = cases.call(OPERATOR, fresh, impl=impl, **scaling)
    (gradient,) = torch.autograd.grad(result.loss, logits)
    assert (result.kl == 0).all() and result.loss == 0 and not gradient.any()


@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3])
@pytest.mark.parametrize("V", [500, 20000])
def test_small_kl_keeps_its_relative_accuracy(device: str, impl: str, V: int, apart: float) -> None:
    """KL of about 1e-2, 1e-4 and 1e-6; the bound is the rounding of log-probs, a few 1e-6, over the distance."""
    N = unless_interpreted(20, 6)
    logits = randn(N, V, device=device) * 3
    base = logits + apart * randn(N, V, seed=1, device=device)
    kl, _ = plain(logits, base, impl)
    exact = oracles.kl_divergence(base.double().log_softmax(-1), logits.double().log_softmax(-1))
    assert apart**2 / 5 < exact.mean() < apart**2
    assert ((kl - exact) / exact).abs().max() <= 3e-6 / apart


def test_shifted_distributions_are_the_same(device: str, impl: str) -> None:
    """KL knows nothing of an offset between student and base that all tokens share."""
    logits = (randn(4, 8200, device=device) * 4).round()
    kl, gradient = plain(logits, logits + 1024, impl)
    assert (kl <= 1e-12).all() and gradient.abs().max() <= 1e-7


@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min])
def test_tokens_excluded_by_one_side_or_both(device: str, impl: str, mask: float) -> None:
    """By the base: no term. By both: no term. By the student alone: KL = +inf, and its gradient is still a number."""
    logits, base = randn(4, 12, device=device), randn(4, 12, seed=1, device=device)
    base[0, 3:6] = mask
    logits[1, :5] = base[1, :5] = mask
    base[2, :6] = mask
    logits[2, 2:5] = mask
    logits[3, 7] = mask
    with tiny_tiles():
        kl, gradient = plain(logits, base, impl)
    exact = oracles.kl_divergence(base.double().log_softmax(-1), logits.double().log_softmax(-1))
    torch.testing.assert_close(kl[:3].double(), exact[:3], rtol=1e-5, atol=0)
    assert kl[3] == INF if mask == -INF else kl[3] > 1e30
    p_s, p_b = (z.double().softmax(-1) for z in (logits, base))
    torch.testing.assert_close(gradient.double(), p_s - p_b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("apart", [1e-3, 1.0])
def test_parts_of_a_row_that_differ(device: str, impl: str, apart: float) -> None:
    """By an offset from part to part, small, large or beyond exp; masked in one model, or in both."""
    V = 3 * 1024 + 5
    base = randn(9, V, device=device) * 3
    logits = base + apart * randn(9, V, seed=1, device=device)
    for row, offset in enumerate((0.01, 3.0, -30.0, 100.0, -1e4)):
        logits[row, 1024:2048] += offset
    base[5, :1024] = logits[5, :1024] = -INF
    base[6, 1024:2048] = -INF
    base[7, :1024] = -INF
    logits[7, :1024] -= 20  # hardly any of the student's mass
    logits[8, 2048] = -INF
    kl, gradient = plain(logits, base, impl)
    exact = oracles.kl_divergence(base.double().log_softmax(-1), logits.double().log_softmax(-1))
    torch.testing.assert_close(kl.double(), exact, rtol=3e-6 / min(apart, 0.03), atol=0)
    p_s, p_b = (z.double().softmax(-1) for z in (logits, base))
    torch.testing.assert_close(gradient.double(), p_s - p_b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_blocks_on_both_sides_of_the_bound_of_the_short_sum(device: str, impl: str, temperature: float) -> None:
    """The CPU's forward pass sums a block from one exponential where all its deltas are within 2 of that of its top."""
    V = 5 * 1024
    base = 3 * randn(9, V, device=device)
    base[:, ::1024] = 12  # the top of each block, and of both models
    logits = base.clone()
    for row, largest in enumerate((1e-2, 0.5, 1.9, 1.999999, 2.0, 2.000001, 2.1, 5.0)):
        logits[row, 1::2] += largest * torch.linspace(-1, 1, V // 2, device=device)
    logits[8] += 0.1 * randn(V, seed=1, device=device)
    base[8, 2048:2060] = logits[8, 2048:2060] = -INF
    target = torch.full((9,), 7, device=device)
    result = gated_contrastive_loss(
        logits * temperature, base * temperature, target, torch.zeros(9, device=device),
        torch.ones(9, device=device), temperature=temperature, impl=impl,
    )  # fmt: skip
    log_s, log_b = ((z * temperature).double().div(temperature).log_softmax(-1) for z in (logits, base))
    torch.testing.assert_close(result.kl.double(), oracles.kl_divergence(log_b, log_s), rtol=2e-5, atol=2e-9)
    torch.testing.assert_close(result.logprob.double(), log_s[:, 7], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("distance", [100.0, 1e4, 1e30, 3e38])
def test_far_apart_distributions(device: str, impl: str, distance: float) -> None:
    """KL is linear in the distance there: no overflow of e^delta, no NaN."""
    logits, base = torch.zeros(2, 12, device=device), torch.zeros(2, 12, device=device)
    logits[0, 1] = base[0, 10] = base[1, 10] = distance
    with tiny_tiles():
        kl, gradient = plain(logits, base, impl)
    expected = torch.tensor([distance, math.log(12)], device=device)
    torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
    assert gradient.isfinite().all() and (gradient[:, 10] < -0.9).all()


@pytest.mark.parametrize("offset", [-1e4, -200.0, 1e4])
def test_common_offset(device: str, impl: str, dtype: torch.dtype, offset: float) -> None:
    arguments = cases.make(OPERATOR, (5,), 8200, dtype=dtype, device=device)
    arguments["logits"] += offset
    arguments["base_logits"] += offset
    check_parts(arguments, cases.check(OPERATOR, arguments, impl))


def test_confident_targets_keep_their_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    """p = 1 - 8e-4: the cross-entropy's gradient p - 1 is the little that is left."""
    logits = torch.zeros(3, 4096, dtype=dtype, device=device)
    logits[:, 5] = 15.5
    one = torch.ones(3, device=device)
    arguments = {"logits": logits, "base_logits": logits, "target": torch.full((3,), 5, device=device)}
    arguments |= {"ce_weight": one, "kl_weight": one}
    cases.check(OPERATOR, arguments, impl)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cases.call(OPERATOR, arguments | {"logits": z}, impl=impl).loss, z)
    d = 4095 * math.exp(-15.5)
    torch.testing.assert_close(
        gradient[:, 5].double(), torch.full((3,), -d / (1 + d)).double().to(device), rtol=5e-3, atol=0
    )


def check_parts(arguments: cases.Arguments, result: tuple, **scaling: float) -> None:
    """logprob and kl, which carry no gradient, against the oracle in the rows where they are promised."""
    names = ("logits", "base_logits", "target", "ce_weight", "kl_weight")
    fresh = [arguments[name] for name in names]
    dtype = fresh[0].dtype
    eager = oracles.contrastive_loss(*fresh, **scaling)
    oracle = oracles.contrastive_loss(*(v.double() if v.is_floating_point() else v for v in fresh), **scaling)
    ce, kl = fresh[3] != 0, fresh[4] != 0
    for field, rows in (("logprob", ce | kl), ("kl", kl)):
        values = [getattr(r, field)[rows] for r in (result, eager, oracle)]
        # both are made of terms of the size of a log-prob, which is that of the logits' spread
        oracles.assert_as_good_as_eager(*values, size=oracle.logprob[rows].abs() + 1, what=field, input_dtype=dtype)
        assert getattr(result, field)[~rows].isnan().all()
