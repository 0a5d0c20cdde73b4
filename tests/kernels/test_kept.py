"""Log-probs renormalised over a set of kept tokens, and the sets that sampling keeps."""

from typing import Any

import cases
import oracles
import pytest
import torch
from torch import Tensor

from rmx_kernels import KeptStats, entropy_topk, kept_set, linear_kept_logprobs

N, V, H, K = 6, 23, 7, 5


def given(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """With sets of 5 to 1 tokens, of which the target is one except in the last row."""
    arguments = cases.with_lora(cases.make("linear_entropy_topk", (2, N // 2), V, H, dtype))
    kept = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(i))[:K] for i in range(N)])
    for row in range(1, N):
        kept[row, max(1, K - row) :] = -1
    target = kept[:, 0].clone()
    target[-1] = (kept[-1, 0] + 1) % V
    rows = {"kept": kept.view(2, N // 2, K), "target": target.view(2, N // 2)}
    named = {n: arguments[n].requires_grad_() for n in ("hidden", "weight", "bias")}
    A, B, scale = arguments["lora"]
    return named | rows | {"lora": (A.requires_grad_(), B.requires_grad_(), scale)}


def eager(a: dict[str, Any], temperature: float = 1.0, softcap: float | None = None) -> KeptStats:
    """By way of masked full logits."""
    z = oracles.linear(a["hidden"], a["weight"], a["bias"], lora=a.get("lora"))
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    kept, ids = a["kept"] >= 0, a["kept"].clamp(min=0)
    inside = torch.zeros(z.shape, dtype=torch.int64).scatter_add(-1, ids, kept.long()) > 0
    log_q = z.masked_fill(~inside, -torch.inf).log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=z.masked_fill(~inside, -1e30)).entropy()
    logprob = log_q.gather(-1, a["target"][..., None])[..., 0]
    return KeptStats(logprob, entropy, log_q.gather(-1, ids).masked_fill(~kept, -torch.inf))


def trained(a: dict[str, Any]) -> list[Tensor]:
    return [a["hidden"], a["weight"], a["bias"], *a["lora"][:2]]


@pytest.mark.parametrize("scaling", [{}, cases.SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("gathered", [1, 64 << 20])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, gathered: int, scaling: dict[str, Any]) -> None:
    monkeypatch.setattr("rmx_kernels.statistics.kept.GATHER_BYTES", gathered)
    a = given()
    results = []
    for stats in (linear_kept_logprobs(**a, **scaling), eager(a, **scaling)):
        live = stats.logprobs > -torch.inf
        outputs = [stats.logprob[stats.logprob > -torch.inf], stats.entropy, stats.logprobs[live]]
        results.append([*outputs, *torch.autograd.grad(outputs, trained(a), cases.cotangents(outputs)), live])
    assert results[0][-1].sum() == (a["kept"] >= 0).sum()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_eager(dtype: torch.dtype) -> None:
    a = given(dtype)
    exact = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in a.items()}
    exact["lora"] = (*(x.double() for x in a["lora"][:2]), a["lora"][2])
    for ours, theirs, right in zip(linear_kept_logprobs(**a), eager(a), eager(exact), strict=True):
        live = right > -torch.inf
        assert ours.dtype == torch.float32 and torch.equal(live, ours > -torch.inf)
        error, limit = ((x.double() - right)[live].abs().max() for x in (ours, theirs))
        assert error <= 2 * limit + 2e-6


def test_gradcheck() -> None:
    a = given()
    rows, scale = {n: a[n] for n in ("kept", "target")}, a["lora"][2]

    def function(hidden: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        stats = linear_kept_logprobs(hidden, weight, **rows, bias=bias, lora=(A, B, scale), softcap=5.0)
        return stats.entropy

    assert torch.autograd.gradcheck(function, trained(a))


def test_a_target_outside_and_a_single_token() -> None:
    stats = linear_kept_logprobs(**given())
    assert stats.logprob.flatten()[-1] == -torch.inf
    assert stats.logprob.flatten()[-2] == 0 and stats.entropy.flatten()[-2] == 0  # one token: certain


def test_a_row_without_tokens_is_nan() -> None:
    a = given()
    a["kept"][0, 0] = -1
    stats = linear_kept_logprobs(**a)
    assert stats.entropy[0, 0].isnan() and stats.logprobs[0, 0].isnan().all()
    assert stats.entropy.flatten()[1:].isfinite().all()


def test_a_second_derivative_is_refused() -> None:
    a = given()
    (gradient,) = torch.autograd.grad(linear_kept_logprobs(**a).entropy.sum(), [a["hidden"]], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_two_runs_have_the_same_bits() -> None:
    a = given(torch.bfloat16)
    first, second = (torch.autograd.grad(linear_kept_logprobs(**a).entropy.sum(), trained(a)) for _ in range(2))
    cases.assert_same_bits(first, second)


SETS: list[dict[str, Any]] = [
    {"top_p": 0.9},
    {"top_p": 0.5, "top_k": 4},
    {"top_k": 3},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_p": 0.7, "top_k": 6, "min_p": 0.1},
    {"top_p": 1e-6},
]


@pytest.mark.parametrize("options", SETS, ids=str)
def test_sets_are_those_of_transformers(options: dict[str, Any]) -> None:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    logits = cases.randn(40, V, dtype=torch.float64) * 2
    scores = logits
    if "top_k" in options:
        scores = warpers.TopKLogitsWarper(options["top_k"])(None, scores)
    if "top_p" in options:
        scores = warpers.TopPLogitsWarper(options["top_p"])(None, scores)
    if "min_p" in options:
        scores = warpers.MinPLogitsWarper(options["min_p"])(None, scores)
    kept = kept_set(entropy_topk(logits, k=V), **options)
    found = torch.zeros(40, V + 1, dtype=torch.bool).scatter(1, torch.where(kept < 0, V, kept), True)[:, :V]
    assert torch.equal(found, scores > -torch.inf)


def test_a_list_that_is_too_short_is_an_error() -> None:
    stats = entropy_topk(torch.zeros(2, 100), k=10)
    with pytest.raises(ValueError, match=r"^stats: expected a top-k with 0.5 of the probability mass"):
        kept_set(stats, top_p=0.5)
    assert (kept_set(stats, top_p=0.5, top_k=10) >= 0).sum(-1).tolist() == [5, 5]  # of 10 equal ones
    assert (kept_set(stats, top_p=0.045) >= 0).sum(-1).tolist() == [5, 5]  # of 100


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"min_p": -0.1}, ValueError, r"min_p: expected a number in \[0, 1\], got -0.1"),
        ({"min_p": True}, TypeError, "min_p: expected a number, got bool"),
        ({"top_k": 0}, ValueError, "top_k: expected None or a number of at least 1, got 0"),
        ({"top_k": 11}, ValueError, "k: expected 0 <= k <= V = 10, got 11"),
    ],
    ids=str,
)
def test_wrong_settings_of_a_set(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        kept_set(entropy_topk(torch.zeros(2, 100), k=10), **options)


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (torch.zeros(2, N // 2, dtype=torch.int64), ValueError, "kept: expected the ids of each row"),
        (torch.zeros(2, N // 2, K), TypeError, "kept: expected int64 or int32"),
        (torch.full((2, N // 2, 1), V), ValueError, r"kept: expected ids in \[0, 23\), or -1 for none, got 23"),
        (torch.full((2, N // 2, 1), -2), ValueError, r"kept: expected ids in \[0, 23\), or -1 for none, got -2"),
        (torch.ones(2, N // 2, 2, dtype=torch.int64), ValueError, "kept: expected distinct ids"),
        (torch.zeros(2, N // 2, 0, dtype=torch.int64), ValueError, "kept: expected the ids of each row"),
    ],
    ids=str,
)
def test_wrong_sets(kept: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        linear_kept_logprobs(**given() | {"kept": kept})
