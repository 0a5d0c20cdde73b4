"""entropy_topk against the fp64 oracle: sizes, ties, offsets, -inf, NaN."""

import math

import cases
import oracles
import pytest
import torch
from cases import SCALED, randint, randn, tiny_tiles, unless_interpreted
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rmx_kernels
from rmx_kernels import entropy_topk

OPERATOR = "entropy_topk"
INF = math.inf

SIZES = [  # N, V, k
    (1, 1, 1),  # the smallest
    (5, 97, 97),  # every token, in a tile that is not full
    (3, 8191, 0),  # one short of a tile of 8192
    (3, 8192, 8),
    (3, 8193, 5),  # a last tile of one column, narrower than k
    (2, 2 * 8192 + 3, 7),
    (2, 50257, 8),  # GPT-2: no multiple of any tile
    pytest.param(300, 257, 3, marks=pytest.mark.heavy),  # more than one chunk of 256
]


def given_logits(logits: Tensor, k: int = 0, seed: int = 4) -> cases.Arguments:
    return {
        "logits": logits,
        "target": randint(logits.shape[-1], *logits.shape[:-1], seed=seed).to(logits.device),
        "k": k,
    }


@pytest.mark.parametrize(("N", "V", "k"), SIZES)
def test_values_and_gradients(device: str, impl: str, dtype: torch.dtype, N: int, V: int, k: int) -> None:
    logits = randn(N, V, dtype=dtype, device=device) * 4
    result = cases.check(OPERATOR, given_logits(logits, k), impl)
    if k:
        assert torch.equal(result.topk_ids, oracles.top_k(logits, k))
        assert (result.topk_logprobs.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("scaling", [{"temperature": 0.3}, {"softcap": 30.0}, SCALED])
def test_scaled_values_and_gradients(device: str, impl: str, dtype: torch.dtype, scaling: dict[str, float]) -> None:
    cases.check(OPERATOR, given_logits(randn(4, 8200, dtype=dtype, device=device) * 10, k=5), impl, **scaling)


@pytest.mark.parametrize("field", ["lse", "entropy", "logprob", "topk_logprobs"])
@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain", "scaled"])
def test_gradcheck(device: str, impl: str, fp64: torch.dtype, field: str, scaling: dict[str, float]) -> None:
    logits = randn(3, 11, dtype=fp64, device=device).mul_(2).requires_grad_()
    target = torch.tensor([0, 10, 7], device=device)
    with tiny_tiles(4, 2):
        assert torch.autograd.gradcheck(
            lambda z: getattr(entropy_topk(z, target, k=6, impl=impl, **scaling), field), logits, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("field", ["lse", "entropy", "logprob", "topk_logprobs"])
def test_gradient_of_one_result_alone(device: str, impl: str, field: str) -> None:
    """A result whose gradient nobody asked for adds nothing."""
    logits = randn(3, 31, device=device).requires_grad_()
    target = randint(31, 3, device=device)
    got = getattr(entropy_topk(logits, target, k=2, impl=impl), field)
    reference = oracles.vocab_stats(logits.double(), target, oracles.top_k(logits, 2))
    upstream = randn(*got.shape, device=device)
    expected = torch.autograd.grad(getattr(reference, field), logits, upstream.double())
    torch.testing.assert_close(torch.autograd.grad(got, logits, upstream), expected, rtol=1e-5, atol=1e-6)


def test_results_that_were_not_asked_for_are_none(device: str, impl: str) -> None:
    bare = entropy_topk(randn(2, 9, device=device), impl=impl)
    assert [field for field, value in bare._asdict().items() if value is None] == [
        "logprob",
        "topk_logprobs",
        "topk_ids",
    ]
    assert bare.lse.shape == bare.entropy.shape == (2,)
    full = entropy_topk(randn(2, 5, 9, device=device), randint(9, 2, 5, device=device), k=9, impl=impl)
    assert full.topk_logprobs.shape == full.topk_ids.shape == (2, 5, 9)


@settings(max_examples=unless_interpreted(80, 25), deadline=None, derandomize=True)
@given(
    N=st.integers(1, 5),
    V=st.integers(1, 40),
    share=st.floats(0, 1),
    columns=st.integers(1, 9),
    distinct=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_ties_go_to_the_lower_id(device, impl, N, V, share, columns, distinct, seed) -> None:
    """Few distinct values, -inf among them, within tiles and across them, k on both sides of the tile's width."""
    k = round(share * V)
    values = torch.tensor([-INF, 1.0, -2.5, 7.0])[:distinct].to(device)
    logits = values[randint(distinct, N, V, seed=seed, device=device)]
    with tiny_tiles(columns, 2):
        ids = entropy_topk(logits, k=k, impl=impl).topk_ids
    assert k == 0 or torch.equal(ids, oracles.top_k(logits, k))


def test_last_column_of_every_size(device: str, impl: str) -> None:
    """Whatever part of a tile, a chunk and a segment it is in, the largest logit is found."""
    with tiny_tiles():
        for V in range(1, 70):
            logits = randn(2, V, device=device)
            logits[0, V - 1] = 9
            ids = entropy_topk(logits, k=min(3, V), impl=impl).topk_ids
            assert torch.equal(ids, oracles.top_k(logits, min(3, V))), V


@pytest.mark.parametrize("k", [1, 7, 300])
def test_ties_across_tiles_of_full_size(device: str, impl: str, k: int) -> None:
    """Rounded bf16 logits tie by the hundred; V leaves three columns to the last tile."""
    logits = randn(3, 2 * 8192 + 3, dtype=torch.bfloat16, device=device)
    logits[1] = 0
    logits[2, 8190:8195] = 100
    assert torch.equal(entropy_topk(logits, k=k, impl=impl).topk_ids, oracles.top_k(logits, k))


@pytest.mark.parametrize("offset", [-200.0, -1e4, 1e4])
@pytest.mark.parametrize("V", [97, 8200])
def test_common_offset(device: str, impl: str, dtype: torch.dtype, offset: float, V: int) -> None:
    """The entropy knows nothing of an offset, and no running maximum starts at 0."""
    logits = (randn(3, V) * 2 - 10 + offset).to(dtype).to(device)
    result = cases.check(OPERATOR, given_logits(logits, k=3), impl)
    moved = entropy_topk((logits.double() - offset).float(), impl=impl)  # exact: both are on the coarser grid
    if dtype != torch.float64:
        torch.testing.assert_close(result.entropy, moved.entropy, rtol=2e-6, atol=0)


def test_entropy_of_confident_and_uniform_rows(device: str, impl: str) -> None:
    """Never negative, log V for equal logits, and small in a confident row."""
    logits = torch.zeros(4, 50257, device=device)
    logits[1, 50256] = 30
    logits[2, 0] = 200
    logits[3] = 1e4
    entropy = entropy_topk(logits, impl=impl).entropy
    exact = oracles.vocab_stats(logits.double(), torch.zeros(4, dtype=torch.int64, device=device), logits[:, :0].long())
    assert (entropy >= 0).all()
    torch.testing.assert_close(entropy, exact.entropy.float(), rtol=2e-6, atol=1.2e-7)


def test_confident_targets_keep_their_gradient(device: str, impl: str, dtype: torch.dtype) -> None:
    """At p = 1 - 1e-3 the gradient p - 1 is all there is: a bf16 p would be 1, or off by 0.4 %."""
    logits = torch.zeros(4, 8192, dtype=dtype, device=device)
    logits[:, 5] = 15.5
    target = torch.full((4,), 5, device=device)
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(entropy_topk(z, target, impl=impl).logprob.sum(), z)
    d = 8191 * math.exp(-15.5)
    exact = d / (1 + d)
    assert gradient[:, 5].double().sub(exact).abs().max() <= exact * max(torch.finfo(dtype).eps, 2e-3)
    cases.check(OPERATOR, {"logits": logits, "target": target, "k": 2}, impl)


@pytest.mark.parametrize("columns", [5, pytest.param(8192, marks=pytest.mark.heavy)])
@pytest.mark.parametrize("mask", [-INF, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min])
def test_masked_entries_have_probability_zero(device: str, impl: str, columns: int, mask: float) -> None:
    """Scattered, and whole tiles of them before, between and after the others."""
    V = 3 * columns + 2
    logits = randn(5, V, device=device)
    logits[0, randint(V, V // 2, device=device)] = mask
    logits[1, :columns] = mask
    logits[2, columns : 2 * columns] = mask
    logits[3, columns:] = mask
    logits[4, : V - 1] = mask
    target = torch.full((5,), V - 1, device=device)
    target[3] = 0
    logits[0, V - 1] = 1.0
    arguments = {"logits": logits, "target": target, "k": 1}
    with tiny_tiles(columns):
        result = cases.check(OPERATOR, arguments, impl)
    assert result.entropy[4] == 0 and result.logprob[4] == 0


def test_target_of_probability_zero(device: str, impl: str) -> None:
    """Its log-prob is -inf, and nothing else in its row or in its gradient is NaN."""
    logits = randn(2, 12, device=device)
    logits[0, 3:6] = -INF
    logits.requires_grad_()
    with tiny_tiles():
        result = entropy_topk(logits, torch.tensor([4, 4], device=device), k=12, impl=impl)
        (gradient,) = torch.autograd.grad(result.lse.sum() + result.entropy.sum() + result.logprob.sum(), logits)
    assert result.logprob[0] == -INF and result.logprob[1].isfinite()
    assert result.lse.isfinite().all() and result.entropy.isfinite().all() and gradient.isfinite().all()
    assert (result.topk_logprobs[0, 9:] == -INF).all() and result.topk_ids[0, 9:].tolist() == [3, 4, 5]


@pytest.mark.parametrize("bad", [-INF, INF, math.nan])
@pytest.mark.parametrize("where", [slice(None), slice(0, 1), slice(11, 12)])
def test_rows_without_a_distribution_are_nan(device: str, impl: str, bad: float, where: slice) -> None:
    """A row of only -inf, or with a NaN or a +inf in any tile; its neighbours keep their bits."""
    if bad == -INF and where != slice(None):
        where = slice(None)
    clean = randn(3, 12, device=device)
    logits = clean.clone()
    logits[1, where] = bad
    target = randint(12, 3, device=device)
    with tiny_tiles():
        got, expected = (
            cases.call(OPERATOR, {"logits": z, "target": target, "k": 3}, impl=impl) for z in (logits, clean)
        )
    for field in ("lse", "entropy", "logprob", "topk_logprobs"):
        assert getattr(got, field)[1].isnan().all(), field
    assert ((got.topk_ids >= 0) & (got.topk_ids < 12)).all()  # arbitrary, but safe to index with
    cases.assert_same_bits([v[::2] for v in got], [v[::2] for v in expected])


@pytest.mark.parametrize(("V", "columns"), [(37, 8), pytest.param(8200, 8192, marks=pytest.mark.heavy)])
def test_rows_do_not_depend_on_their_number(device: str, impl: str, V: int, columns: int) -> None:
    """Bit for bit, forward and backward: one row alone, a few, or more than a chunk of 256."""
    N = unless_interpreted(300, 9)
    logits = randn(N, V, device=device) * 3
    target = randint(V, N, device=device)

    def run(count: int) -> list[Tensor]:
        z = logits[:count].clone().requires_grad_()
        result = entropy_topk(z, target[:count], k=5, impl=impl, **SCALED)
        outputs = cases.differentiable(result)
        gradients = torch.autograd.grad(outputs, z, [torch.full_like(o, 0.3) for o in outputs])
        return [v[:1].detach() for v in (*result, *gradients)]

    with tiny_tiles(columns, 256):
        whole = run(N)
        for count in (1, 2, 7):
            cases.assert_same_bits(run(count), whole)


def test_ids_stay_differentiable_constants(device: str, impl: str) -> None:
    result = entropy_topk(randn(2, 9, device=device).requires_grad_(), randint(9, 2, device=device), k=2, impl=impl)
    assert not result.topk_ids.requires_grad
    assert all(v.requires_grad for v in result if v.is_floating_point())
    assert isinstance(result, rmx_kernels.VocabStats)
