"""Loads, stores, exp, log and tanh of the native kernels, as the public operators show them.

Where a row has one column, m is its scaled logit and log d is 0, so that the public operator shows a single load, tanh
or store; two columns show exp and log.
"""

import math

import cases
import numpy as np
import pytest
import torch
from torch import Tensor

from rmx_kernels import entropy_topk

INF = math.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_all_low_precision_numbers_are_read_exactly(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    lse = entropy_topk(x[:, None], impl="cpu").lse
    assert torch.equal(lse[x.isfinite()], x[x.isfinite()].float())
    assert lse[~x.isfinite()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_gradients_are_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Every float32 exponent and all ties: subnormals, the largest numbers, infinities and NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    between = (values[1:].double() + values[:-1].double()).div(2).float()
    beside = (between.nextafter(torch.tensor(end)) for end in (INF, -INF))
    upstream = torch.cat([every, values, between, *beside]) + 0.0  # which makes 0 of -0, as sums of gradients do
    logits = torch.zeros(upstream.shape[0], 1, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(entropy_topk(logits, impl="cpu").lse, logits, upstream)
    assert torch.equal(cases.integers(gradient[:, 0]), cases.integers(upstream.to(dtype)))


def relative_error(got: Tensor, exact: np.ndarray) -> np.ndarray:
    assert exact.dtype == np.longdouble
    return np.abs(got.detach().numpy().astype(np.longdouble) / exact - 1)


@pytest.mark.parametrize(
    ("dtype", "lowest", "base", "slope"),
    [(torch.float32, 87.0, 2.2e-7, 1.2e-7), (torch.float64, 100.0, 4.4e-16, 2.2e-16)],
    ids=str,
)
def test_probabilities_are_accurate(dtype: torch.dtype, lowest: float, base: float, slope: float) -> None:
    """p = exp(log p) of two columns [0, -x], to the errors that csrc/vec_math.h states for exp, 1e-7 + 6e-8 |log p|
    in float32, and one rounding of log p and one of log d, half an ulp each. Below e^-87.3 float32 flushes to zero."""
    x = torch.linspace(0, 100, 40001, dtype=torch.float64).to(dtype)
    logits = torch.stack([torch.zeros_like(x), -x], -1).requires_grad_()
    (p,) = torch.autograd.grad(entropy_topk(logits, impl="cpu").lse.sum(), logits)
    e = np.exp(-x.numpy().astype(np.longdouble))
    size = x.numpy()
    kept = size <= lowest
    assert (relative_error(p[:, 1], e / (1 + e)) <= base + slope * size)[kept].all()
    assert (relative_error(p[:, 0], 1 / (1 + e)) <= base + slope * np.log1p(e)).all()
    assert (p[:, 1].detach().numpy()[~kept] <= 1.7e-38).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_statistics_of_two_columns_are_accurate(dtype: torch.dtype) -> None:
    """Log-sum-exp, log-prob and entropy of [0, -x], within a few roundings of numbers of the size of log 2 or x."""
    x = torch.linspace(0, 100, 40001, dtype=torch.float64).to(dtype)
    logits = torch.stack([torch.zeros_like(x), -x], -1)
    stats = entropy_topk(logits, torch.ones(len(x), dtype=torch.int64), impl="cpu")
    eps = torch.finfo(dtype).eps
    big = x.numpy().astype(np.longdouble)
    e = np.exp(-big)
    for got, exact, size in (
        (stats.lse, np.log1p(e), 1),
        (stats.logprob, -big - np.log1p(e), 1 + big),
        (stats.entropy, np.log1p(e) + big * e / (1 + e), 1),
    ):
        assert (np.abs(got.numpy().astype(np.longdouble) - exact) <= eps * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_is_rounded_once(dtype: torch.dtype) -> None:
    """n equal logits among masked ones sum to n exactly, so that lse is log n: correctly rounded in float32, to an ulp
    in float64."""
    n = torch.arange(1, 2049)
    logits = torch.zeros(2048, 2048, dtype=dtype).masked_fill(torch.arange(2048) >= n[:, None], -INF)
    lse = entropy_topk(logits, impl="cpu").lse
    exact = n.double().log()
    if dtype == torch.float32:
        assert torch.equal(lse, exact.float())
    else:
        assert ((lse - exact).abs() <= torch.finfo(dtype).eps * exact).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcap_is_accurate(dtype: torch.dtype) -> None:
    """16 tanh(x / 16), whose divisions are exact, within 2 eps relative from subnormal to saturated x, and odd."""
    eps = torch.finfo(dtype).eps
    grid = torch.cat(
        [torch.linspace(0, 400, 20001, dtype=torch.float64)[1:], torch.logspace(-30, 1, 5001, dtype=torch.float64)]
    )
    x = grid.to(dtype)
    up, down = (entropy_topk(sign * x[:, None], softcap=16.0, impl="cpu").lse for sign in (1, -1))
    assert torch.equal(up, -down)
    assert (relative_error(up, 16 * np.tanh(x.numpy().astype(np.longdouble) / 16)) <= 2 * eps).all()
    torch.testing.assert_close(up.double(), 16 * torch.tanh(x.double() / 16), rtol=2 * eps, atol=0)
