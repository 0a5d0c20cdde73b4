"""The vocabulary-parallel operators on two and on three gloo processes, against the plain ones in this process."""

import re
from itertools import pairwise
from typing import Any

import cases
import oracles
import pytest
import torch
from cases import randint, randn
from vocab_ranks import (
    CASES,
    ERRORS,
    INF,
    LONG,
    LOSS,
    PARALLEL,
    SHARDS,
    STATS,
    arguments_of,
    calls,
    natively,
    near_arguments,
    offset_arguments,
)

from rmx_kernels import entropy_topk
from rmx_kernels.dispatch import INTERPRETED
from rmx_kernels.vocab_parallel import merge, vocab_parallel_entropy_topk


@pytest.fixture(scope="module", params=[2] if INTERPRETED else [2, pytest.param(3, marks=pytest.mark.thorough)])
def world(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def ranks(world: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank of a group of ``world`` found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(calls, (world, str(folder)), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)).replace("torch.", "") for case in CASES])
def test_values_and_gradients(ranks: list[dict[Any, Any]], world: int, case: tuple[str, str, torch.dtype, str]) -> None:
    """Ranks agree to the bit; a result or gradient is off the truth at most twice as far as the plain operator's."""
    op, variant, dtype, impl = case
    arguments, scaling = arguments_of(op, variant, dtype, (LONG if variant == "long" else SHARDS)[world])
    single = cases.forward_backward(op, arguments, impl=impl, **scaling)
    found = [rank[case] for rank in ranks]
    names = ["lse", "entropy", "logprob", "topk_logprobs", "topk_ids"] if op == STATS else ["loss", "logprob", "kl"]
    names += [
        "hidden",
        "weight",
        *(["bias"] if "bias" in arguments else []),
        *(["A", "B"] if "lora" in arguments else []),
    ]
    whole = {
        n: torch.cat(x) if n in ("weight", "bias", "B") else x[0]
        for n, x in zip(names, zip(*found, strict=True), strict=True)
    }
    for name, *own in zip(names, *found, strict=True):
        if name not in ("weight", "bias", "B"):
            assert all(torch.equal(cases.integers(x), cases.integers(own[0])) for x in own), name
    expected = dict(zip(names, single, strict=True))
    ids = expected.get("topk_ids")
    if ids is not None:
        assert torch.equal(whole.pop("topk_ids"), ids)
    exact = cases.full_logits(op, arguments, ids, torch.float64, **scaling)
    exact_names = [n for n in names if n != "topk_ids" and (op == STATS or n not in ("logprob", "kl"))]
    truth = dict(zip(exact_names, exact, strict=True))
    for name, got in whole.items():
        oracle = truth[name].detach() if name in truth else expected[name].double()
        assert torch.equal(got.isfinite(), expected[name].isfinite()), name
        where = got.isfinite()
        oracles.assert_as_good_as_eager(
            got[where], expected[name][where], oracle[where], size=oracle[where].abs() + 1, what=name, input_dtype=dtype
        )
        assert torch.equal(got[~where].nan_to_num(), expected[name][~where].nan_to_num()), name


@natively
def test_a_group_of_one_is_the_plain_operator(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks:
        for got, plain in zip(*[iter(found["alone"])] * 2, strict=True):
            cases.assert_same_bits(got, plain)


@natively
def test_without_the_check_and_again_the_same_bits(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks:
        for checked, unchecked in zip(*[iter(found["unchecked"])] * 2, strict=True):
            cases.assert_same_bits(checked, unchecked)


@natively
def test_gradients_of_what_asks_for_one(ranks: list[dict[Any, Any]], world: int) -> None:
    for i, op in enumerate(PARALLEL):
        arguments, _ = arguments_of(op, "plain", torch.float32, SHARDS[world])
        fresh, (hidden, weight, _) = cases.leaves(op, arguments)
        d_hidden, d_weight = torch.autograd.grad(cases.call(op, fresh)[0].sum(), [hidden, weight])
        for found in ranks:
            first, again, _ = found["frozen head"][3 * i : 3 * i + 3]
            assert torch.equal(first, again)
            torch.testing.assert_close(first, d_hidden, rtol=1e-5, atol=1e-5)
        got = torch.cat([found["frozen head"][3 * i + 2] for found in ranks])
        torch.testing.assert_close(got, d_weight, rtol=1e-5, atol=1e-5)


@natively
def test_no_rows_and_rows_without_weight(ranks: list[dict[Any, Any]]) -> None:
    for found in ranks:
        lse, none, loss, logprob, kl, gradient = found["nothing"]
        assert lse.shape == (2, 0) and none.shape == (2, 0, 7) and loss == 0
        assert logprob.isnan().all() and kl.isnan().all() and not gradient.any()


@natively
def test_a_common_offset_costs_no_accuracy(ranks: list[dict[Any, Any]], world: int) -> None:
    arguments = offset_arguments(SHARDS[world][-1])
    single = cases.forward_backward(STATS, arguments)
    for got, expected in zip(ranks[0]["offset"][:6], single[:6], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@natively
def test_a_nan_stays_in_its_row(ranks: list[dict[Any, Any]]) -> None:
    for value in ranks[0]["nan row"]:
        bad = value.isnan().reshape(12, -1)
        assert bad[1].all() and bad.sum() == bad.shape[1]


@natively
def test_equal_states_have_no_divergence(ranks: list[dict[Any, Any]], world: int) -> None:
    anchored = arguments_of(LOSS, "plain", torch.float32, SHARDS[world])[0]["kl_weight"] != 0
    for found in ranks:
        kl, gradient = found["equal states"]
        assert (kl[anchored] == 0).all() and kl[~anchored].isnan().all() and not gradient.any()


@natively
def test_a_small_divergence_keeps_its_relative_accuracy(ranks: list[dict[Any, Any]], world: int) -> None:
    arguments = near_arguments(LONG[world][-1])
    logits, base = (arguments[n].double() @ arguments["weight"].double().T for n in ("hidden", "base_hidden"))
    exact = oracles.logprob_kl(logits, base, arguments["target"])[1]
    (kl,) = ranks[0]["near states"]
    assert exact.mean() < 1e-5
    assert ((kl - exact) / exact).abs().max() <= 3e-6 / 1e-3


@natively
@pytest.mark.parametrize("name", ERRORS)
def test_a_difference_is_an_error_on_every_rank(ranks: list[dict[Any, Any]], world: int, name: str) -> None:
    if name == "lora" and world != 2:
        pytest.skip("written for the shards of two")
    _, at_1, elsewhere = ERRORS[name]
    for rank, found in enumerate(ranks):
        pattern = at_1 if rank == 1 else elsewhere
        assert re.search(pattern, found["errors"][name]), (rank, found["errors"][name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_top_k_of_parts_is_that_of_the_whole(seed: int, dtype: torch.dtype) -> None:
    """Of coarse logits, full of ties and of -inf, at any cut of the vocabulary and any size of its parts."""
    V, k, world = 40, 1 + 2 * seed, 2 + seed % 3
    logits = (randn(50, V, seed=seed) * (1 + seed % 4)).round() / 3
    logits[randn(50, V, seed=seed + 1) > 1] = -INF
    logits[:, : V // 8] = 0.0  # finite ones in the first part, and in the last
    logits[:, -1] = 0.0
    logits = logits.to(dtype)
    cuts = [0, *sorted(1 + int(c) for c in randint(V - 2, world - 1, seed=seed)), V]
    cuts = sorted(set(cuts))
    parts = [entropy_topk(logits[:, a:b], k=min(k, b - a), temperature=0.7) for a, b in pairwise(cuts)]
    whole = entropy_topk(logits, k=k, temperature=0.7)
    live = torch.stack([part.lse for part in parts]).isfinite().all(0)  # others have a part of nothing but -inf
    pad = torch.nn.functional.pad
    lse, log_d = (torch.stack(x) for x in zip(*((p.lse, -p.topk_logprobs[:, 0]) for p in parts), strict=True))
    values = torch.stack([pad(p.topk_logprobs, (0, k - p.topk_logprobs.shape[1]), value=-INF) for p in parts])
    ids = [pad(p.topk_ids + a, (0, k - p.topk_ids.shape[1]), value=V) for p, a in zip(parts, cuts, strict=False)]
    shares = merge.shares(lse - log_d, log_d)
    got, got_ids = merge.top_k(shares, values, torch.stack(ids), k, V)
    assert live.sum() > 10
    assert torch.equal(got_ids[live], whole.topk_ids[live])
    torch.testing.assert_close(got[live].to(whole.lse.dtype), whole.topk_logprobs[live], rtol=2e-6, atol=2e-6)


def test_outside_of_torch_distributed() -> None:
    with pytest.raises(RuntimeError, match=r"group: expected torch\.distributed to be initialised"):
        vocab_parallel_entropy_topk(randn(1, 2), randn(3, 2), start=0)
