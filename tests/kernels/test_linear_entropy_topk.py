"""linear_entropy_topk against the fp64 oracle: sizes, ties, masked and offset vocabularies, the head's gradient."""

import math
from typing import Any

import cases
import oracles
import pytest
import torch
from cases import SCALED, randint, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmx_kernels import entropy_topk, linear_entropy_topk

OPERATOR = "linear_entropy_topk"
INF = math.inf

SIZES = [  # N, V, H, k
    (1, 1, 1, 1),  # the smallest
    (5, 97, 33, 97),  # every token, odd H
    (3, 8191, 7, 0),  # one short of a tile
    (3, 8193, 16, 5),  # a last tile of one column, narrower than k
    (2, 2 * 8192 + 3, 5, 7),
    (2, 50257, 17, 8),  # GPT-2: no multiple of any tile
    pytest.param(300, 257, 9, 3, marks=pytest.mark.heavy),  # more than one chunk of 256
    (3, 601, 4099, 6),  # a head so wide that fewer columns fit a tile
]


@pytest.mark.parametrize(("N", "V", "H", "k"), SIZES)
def test_values_and_gradients(device: str, impl: str, dtype: torch.dtype, N: int, V: int, H: int, k: int) -> None:
    arguments = cases.make(OPERATOR, (N,), V, H, dtype, device) | {"k": k}
    result = cases.check(OPERATOR, arguments, impl)
    if k:
        check_chosen(arguments, result.topk_ids)


@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 30.0}, SCALED])
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_values_and_gradients(
    device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float], bias: bool
) -> None:
    arguments = cases.make(OPERATOR, (4,), 8200, 17, dtype, device)
    if not bias:
        del arguments["bias"]
    cases.check(OPERATOR, arguments, impl, **scaling)


def test_columns_far_narrower_than_the_head(device: str, impl: str) -> None:
    """At H = 10001 a tile of the head holds 256 columns only."""
    cases.check(OPERATOR, cases.make(OPERATOR, (2,), 300, 10001, device=device), impl)


@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("field", ["lse", "entropy", "logprob", "topk_logprobs"])
def test_gradcheck(device: str, impl: str, fp64: torch.dtype, field: str, scaling: dict[str, float]) -> None:
    """Of hidden, weight and bias together."""
    arguments, inputs = cases.leaves(OPERATOR, cases.make(OPERATOR, (3,), 7, 3, fp64, device, seed=5))

    def run(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fresh = arguments | {"hidden": hidden, "weight": weight, "bias": bias}
        return getattr(cases.call(OPERATOR, fresh, impl=impl, **scaling), field)

    with tiny_tiles(3, 2):
        assert torch.autograd.gradcheck(run, inputs, rtol=1e-5, atol=1e-7)


def test_equals_entropy_topk_of_the_logits(device: str, impl: str, fp64: torch.dtype) -> None:
    arguments = cases.make(OPERATOR, (2, 3), 41, 7, fp64, device)
    logits = oracles.linear(arguments["hidden"], arguments["weight"], arguments["bias"])
    got = cases.call(OPERATOR, arguments, impl=impl, **SCALED)
    expected = entropy_topk(logits, arguments["target"], k=arguments["k"], impl="reference", **SCALED)
    torch.testing.assert_close(tuple(got), tuple(expected), rtol=1e-12, atol=1e-12)


@settings(max_examples=unless_interpreted(60, 20), deadline=None, derandomize=True)
@given(
    N=st.integers(1, 5),
    V=st.integers(1, 40),
    H=st.integers(1, 5),
    share=st.floats(0, 1),
    columns=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_ties_go_to_the_lower_id(device, impl, dtype, N, V, H, share, columns, seed) -> None:
    """Products of small integers are exact in every dtype, so equal logits are equal bits."""
    hidden = (randint(3, N, H, seed=seed) - 1).to(dtype).to(device)
    weight = (randint(3, V, H, seed=seed + 1) - 1).to(dtype).to(device)
    k = round(share * V)
    with tiny_tiles(columns, 2):
        ids = linear_entropy_topk(hidden, weight, k=k, impl=impl).topk_ids
    assert k == 0 or torch.equal(ids, oracles.top_k(hidden.double() @ weight.double().T, k))


@pytest.mark.parametrize("V", [8193, 3 * 8192 + 2])
def test_ties_across_tiles_of_full_size(device: str, impl: str, V: int) -> None:
    hidden, weight = torch.ones(2, 1, device=device), randint(3, V, 1, device=device).float()
    hidden[1] = 0
    ids = linear_entropy_topk(hidden, weight, k=9, impl=impl).topk_ids
    assert torch.equal(ids, oracles.top_k(hidden @ weight.T, 9))


@pytest.mark.parametrize("offset", [-200.0, -1e4, 1e4])
def test_common_offset(device: str, impl: str, dtype: torch.dtype, offset: float) -> None:
    """Through the bias; no running maximum starts at 0."""
    arguments = cases.make(OPERATOR, (4,), 8200, 9, dtype, device)
    arguments["bias"] = torch.full_like(arguments["bias"], offset)
    cases.check(OPERATOR, arguments, impl)


@pytest.mark.parametrize("columns", [5, pytest.param(8192, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("where", ["first", "middle", "last", "scattered"])
@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.bfloat16).min])
def test_masked_tokens_have_probability_zero(device: str, impl: str, columns: int, where: str, mask: float) -> None:
    """A bias of -inf, or the lowest number, hides padding tokens wherever the tiles fall; no gradient is NaN."""
    V = 3 * columns + 2
    arguments = cases.make(OPERATOR, (4,), V, 3, device=device)
    tiles = {"first": slice(0, columns), "middle": slice(columns, 2 * columns), "last": slice(2 * columns, V)}
    hidden_ids = tiles[where] if where in tiles else torch.arange(0, V, 3, device=device)
    arguments["bias"][hidden_ids] = mask
    kept = (arguments["bias"] > -1e30).nonzero().squeeze(1)
    arguments["target"] = kept[:4]
    with tiny_tiles(columns):
        result = cases.check(OPERATOR, arguments, impl)
    assert torch.isin(result.topk_ids, kept).all()


def test_target_of_probability_zero(device: str, impl: str) -> None:
    arguments = cases.make(OPERATOR, (3,), 12, 3, device=device)
    arguments["bias"][4] = -INF
    arguments["target"] = torch.tensor([4, 0, 11], device=device)
    with tiny_tiles():
        result, *gradients = with_gradients(arguments, impl)
    assert (result.logprob == -INF).tolist() == [True, False, False]
    assert result.lse.isfinite().all() and result.entropy.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_no_token_left(device: str, impl: str) -> None:
    arguments = cases.make(OPERATOR, (3,), 12, 3, device=device)
    arguments["bias"].fill_(-INF)
    with tiny_tiles():
        result = cases.call(OPERATOR, arguments, impl=impl)
    assert all(v.isnan().all() for v in (result.lse, result.entropy, result.logprob, result.topk_logprobs))


def test_confident_targets_keep_their_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    """p = 1 - 8e-4: the gradient of the logprob is the little that is left."""
    weight = torch.zeros(4096, 2, dtype=dtype, device=device)
    weight[5, 0] = 15.5
    hidden = torch.tensor([[1.0, 0.5]] * 3, dtype=dtype, device=device)
    target = torch.full((3,), 5, device=device)
    result = cases.check(OPERATOR, {"hidden": hidden, "weight": weight, "target": target}, impl)
    h = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(linear_entropy_topk(h, weight, target, impl=impl).logprob.sum(), h)
    d = 4095 * math.exp(-15.5)
    torch.testing.assert_close(
        gradient[:, 0].double(), torch.full_like(gradient[:, 0].double(), 15.5 * d / (1 + d)), rtol=5e-3, atol=0
    )
    assert (result.logprob < 0).all()


@pytest.mark.heavy
def test_many_rows_add_up_in_the_head_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    """600 rows in three chunks, whose sum a low-precision accumulator would lose."""
    arguments = cases.make(OPERATOR, (600,), 29, 5, dtype, device)
    with tiny_tiles(8, 64):
        cases.check(OPERATOR, arguments, impl)


def check_chosen(arguments: cases.Arguments, ids: Tensor) -> None:
    """The ids are distinct, and no token left out is more probable by more than the rounding of two eager logits."""
    head = [arguments[n] for n in ("hidden", "weight", "bias")]
    exact = oracles.linear(*(x.double() for x in head))
    rounding = (oracles.linear(*head).double() - exact).abs().max()
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    best = exact.sort(-1, descending=True).values[:, : ids.shape[1]]
    assert (exact.gather(-1, ids) - best).abs().max() <= 2e-5 + 2 * rounding


def with_gradients(arguments: cases.Arguments, impl: str) -> tuple[Any, ...]:
    fresh, inputs = cases.leaves(OPERATOR, arguments)
    result = cases.call(OPERATOR, fresh, impl=impl)
    outputs = [result.lse, result.entropy, result.logprob]
    return result, *torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
