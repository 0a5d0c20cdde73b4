"""Exact nucleus sampling, and generation that agrees with transformers and does not depend on the batch."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rmx.config import ModelConfig, PromptConfig, RolloutsConfig
from rmx.models import model
from rmx.models.model import CausalLM, ModelError
from rmx.models.prompts import PromptError, Renderer
from rmx.records import Problem, Rollout
from rmx.sampling import engines
from rmx.sampling import nucleus as sampling
from rmx.sampling.nucleus import SamplingParams, sample_tokens
from rmx.sampling.rollouts import generate_rollouts
from rmx_kernels import linear_entropy_topk

PROBLEMS = [Problem(f"p{i}", "sum of " + " and ".join("123456789"[: i + 1]), "1") for i in range(5)]


def naive_nucleus(logits: Tensor, uniform: float, params: SamplingParams) -> int:
    """Sort the whole vocabulary of one row, cut, renormalise, invert."""
    p, ids = (logits.double() / params.temperature).softmax(-1).sort(descending=True, stable=True)
    if params.top_k is not None:
        p[params.top_k :] = 0
    before = (logits.double() / params.temperature).softmax(-1).sort(descending=True).values.cumsum(-1) - p
    p[before >= params.top_p * (1.0 if params.top_k is None else p.sum())] = 0
    kept = p.cumsum(-1)
    return int(ids[min(int((kept <= uniform * kept[-1]).sum()), int((p > 0).sum()) - 1)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    top_p=st.sampled_from([0.1, 0.7, 0.95, 1.0]),
    top_k=st.sampled_from([None, 1, 5, 90]),
    temperature=st.sampled_from([0.6, 1.0, 1.7]),
)
def test_the_nucleus_is_exact_however_wide(
    seed: int, spread: float, top_p: float, top_k: int | None, temperature: float
) -> None:
    """V = 2000 with a nucleus from one token to all of them: each width is needed somewhere."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(2000, 8, generator=generator) * spread
    hidden = torch.randn(6, 8, generator=generator)
    uniforms = torch.rand(6, dtype=torch.float64, generator=generator)
    params = SamplingParams(temperature, top_p, top_k)
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset(), adapted=False)  # type: ignore[arg-type]
    got, logprobs = sample_tokens(lm, hidden, uniforms, params)
    logits = hidden @ head.T
    assert got.tolist() == [naive_nucleus(z, float(u), params) for z, u in zip(logits, uniforms, strict=True)]
    uncut = (logits.double() / temperature).log_softmax(-1).gather(1, got[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, uncut, atol=1e-4, rtol=1e-5)  # float32 logits up to 50


def test_draws_follow_the_distribution() -> None:
    head = torch.tensor([[0.0], [1.0], [2.0], [-9.0]])
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset(), adapted=False)  # type: ignore[arg-type]
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn, _ = sample_tokens(lm, torch.ones(4000, 1), uniforms, SamplingParams(top_p=0.99))
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4)[:3] / 4000, p, atol=5e-4, rtol=0)
    assert not (drawn == 3).any()


@pytest.mark.thorough
def test_greedy_equals_transformers(demo_lm: CausalLM) -> None:
    renderer = Renderer(demo_lm.tokenizer, PromptConfig())
    problems = [Problem("a", "What is 2 + 3?", "5"), Problem("b", "Name the capital of France.", "")]
    settings = RolloutsConfig(samples=1, temperature=0.0, max_new_tokens=12)
    for rollout in generate_rollouts(demo_lm, renderer, problems, settings, seed=0):
        ids = torch.tensor([rollout.prompt_ids])
        theirs = demo_lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert rollout.completion_ids == theirs[0, ids.shape[1] :].tolist()


class Killed(Exception):
    pass


def sampled(
    lm: CausalLM,
    problems: list[Problem],
    seed: int = 3,
    known: list[Rollout] | None = None,
    on_unit: Callable[[list[Rollout]], None] = lambda _: None,
    **more: object,
) -> list[Rollout]:
    settings = RolloutsConfig.model_validate({"samples": 6, "temperature": 1.3, "max_new_tokens": 12, **more})
    renderer = Renderer(lm.tokenizer, PromptConfig())
    return generate_rollouts(lm, renderer, problems, settings, seed, known=known or [], on_unit=on_unit)


@pytest.mark.thorough
def test_a_rollout_depends_on_its_seed_and_problem_alone(tiny: CausalLM) -> None:
    together = sampled(tiny, PROBLEMS)
    apart = [rollout for problem in PROBLEMS for rollout in sampled(tiny, [problem])]
    assert ids(together) == ids(apart)  # other padding, other neighbours that finish earlier
    assert ids(together) == ids(sampled(tiny, PROBLEMS, batch_size=7))
    assert ids(together) == ids(sampled(tiny, PROBLEMS, batch_size=4))  # fewer than the samples of one prompt
    assert ids(together) != ids(sampled(tiny, PROBLEMS, seed=4))
    assert ids(sampled(tiny, PROBLEMS, samples=2)) == ids([r for r in together if r.sample < 2])


def ids(rollouts: list[Rollout]) -> list[Rollout]:
    """Without the log-probs, whose last digit is rounding that depends on the batch."""
    return [dataclasses.replace(rollout, logprobs=None) for rollout in rollouts]


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_size", [128, 12, 4])  # all problems in one unit, two, a part of one
def test_an_interrupted_start_ends_as_an_undisturbed_one(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, batch_size: int
) -> None:
    """In bfloat16 a row's bits depend on its batch: units are cut as if nothing were known."""
    lm = model.load(ModelConfig(name=str(tiny_path), dtype=dtype, device="cpu"))  # type: ignore[arg-type]
    units: list[list[Rollout]] = []
    whole = sampled(lm, PROBLEMS, batch_size=batch_size, on_unit=units.append)
    assert sorted(map(key, whole)) == sorted(key(r) for unit in units for r in unit)
    assert [len(unit) for unit in units] == {128: [30], 12: [12, 12, 6], 4: [4, 2] * 5}[batch_size]
    decoded: list[int] = []
    decode = engines.decode
    monkeypatch.setattr(engines, "decode", lambda *args: decoded.append(args[2]) or decode(*args))
    for kept in range(len(units) + 1):
        known = [r for unit in reversed(units[:kept]) for r in unit]
        known += units[-1][:-1]  # of a unit that was written in part
        late: list[list[Rollout]] = []
        decoded.clear()
        assert sampled(lm, PROBLEMS, batch_size=batch_size, known=known, on_unit=late.append) == whole
        assert late == units[kept:]
        assert decoded == [len(unit) for unit in units[kept:]]


def test_what_a_kill_leaves_was_handed_out(tiny: CausalLM) -> None:
    units: list[list[Rollout]] = []

    def kill(unit: list[Rollout]) -> None:
        units.append(unit)
        if len(units) == 2:
            raise Killed

    with pytest.raises(Killed):
        sampled(tiny, PROBLEMS, batch_size=6, on_unit=kill)
    left: list[list[Rollout]] = []
    whole = sampled(tiny, PROBLEMS, batch_size=6)
    known = [r for unit in units for r in unit]
    assert sampled(tiny, PROBLEMS, batch_size=6, known=known, on_unit=left.append) == whole
    assert len(left) == 3


def key(rollout: Rollout) -> tuple[str, int]:
    return rollout.problem_id, rollout.sample


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 1.0}, {"temperature": 0.0}, {"top_p": 0.7}, {"top_p": 1.0}, {"top_k": 2}],
    ids=str,
)
def test_logprobs_are_those_of_the_uncut_distribution(tiny: CausalLM, settings: dict[str, object]) -> None:
    """Against one teacher-forced pass and a softmax over the whole vocabulary, at the sampling temperature."""
    temperature = float(str(settings.get("temperature", 1.3))) or 1.0
    for r in sampled(tiny, PROBLEMS, **settings):
        logits = tiny.model(input_ids=torch.tensor([r.prompt_ids + r.completion_ids])).logits[0].double() / temperature
        predicting = logits[len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = predicting[range(len(r.completion_ids)), r.completion_ids]
        assert r.logprobs == pytest.approx(expected.tolist(), abs=2e-5)
        assert r.logprobs == [float(f"{value:.6g}") for value in r.logprobs]  # short lines


def test_a_completion_that_does_not_fit_the_model_is_refused(tiny: CausalLM) -> None:
    tiny.model.config.max_position_embeddings = 16
    with pytest.raises(PromptError, match=r"the longest prompt has 14 tokens and max_new_tokens is 12, .* only 16"):
        sampled(tiny, PROBLEMS)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_broken_model_is_noticed(tiny: CausalLM, temperature: float, top_p: float) -> None:
    with torch.no_grad():
        tiny.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        sampled(tiny, PROBLEMS, temperature=temperature, top_p=top_p)


def test_ids_are_kept_as_sampled_with_the_eos(tiny: CausalLM) -> None:
    rollouts = sampled(tiny, PROBLEMS)
    reasons = {r.finish_reason for r in rollouts}
    assert reasons == {"stop", "length"}
    for r in rollouts:
        assert 2 not in r.completion_ids[:-1]
        assert (r.completion_ids[-1] == 2) == (r.finish_reason == "stop")
        assert len(r.completion_ids) == 12 or r.finish_reason == "stop"
        assert r.text == tiny.tokenizer.decode(r.completion_ids, skip_special_tokens=True)


def test_wide_nuclei_are_looked_up_again_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first width would lose tokens: with it alone the draw at u -> 1 would be another token."""
    lm = CausalLM(None, None, torch.zeros(300, 4), None, None, 1.0, frozenset(), adapted=False)  # type: ignore[arg-type]
    monkeypatch.setattr(sampling, "WIDTHS", (8, 16))
    uniform = torch.tensor([0.999], dtype=torch.float64)
    drawn, logprob = sample_tokens(lm, torch.ones(1, 4), uniform, SamplingParams())
    assert drawn.tolist() == [299]
    assert float(logprob) == pytest.approx(-math.log(300))


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_draws_from_the_most_probable_tokens_are_those_of_a_full_sort(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of 3000 tokens can be drawn; 5,000 numbers, each below 64 tokens' mass, 1024 tokens' or above."""
    generator = torch.Generator().manual_seed(1)
    head, hidden = torch.randn(3000, 8, generator=generator) * spread, torch.randn(1, 8, generator=generator)
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset(), adapted=False)  # type: ignore[arg-type]
    uniforms = torch.rand(5_000, dtype=torch.float64, generator=generator)
    sort, left = sampling._sorted, list[int]()

    def once(lm: CausalLM, rows: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        left.append(rows.shape[0])
        return tuple(x.expand(rows.shape[0], -1) for x in sort(lm, rows[:1], temperature))  # type: ignore[return-value]

    monkeypatch.setattr(sampling, "_sorted", once)
    drawn, logprobs = sample_tokens(lm, hidden.expand(5_000, -1), uniforms, SamplingParams())
    p, ids = (hidden @ head.T)[0].double().softmax(-1).sort(descending=True, stable=True)
    edges = p.cumsum(-1)
    place = torch.searchsorted(edges, uniforms, right=True)
    near = ((uniforms - edges[place]).abs() < 1e-5) | ((uniforms - (edges - p)[place]).abs() < 1e-5)  # of rounding
    assert torch.equal(drawn[~near], ids[place][~near]) and (drawn == ids[place]).double().mean() > 0.99
    exact = torch.zeros(3000, dtype=torch.float64).scatter(0, ids, p.log())
    torch.testing.assert_close(logprobs, exact[drawn], atol=1e-5, rtol=1e-5)
    beyond = int((uniforms > edges[1023]).sum())
    assert abs(sum(left) - beyond) <= 2 and max(left, default=0) <= sampling.ROWS
    assert (spread == 3.0) == (beyond < 50)


class _Waits(TorchDispatchMode):
    """Counts what has a GPU's host wait for a number: reading one, and choosing rows by a mask."""

    found = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        indices = args[1] if call.overloadpacket.__name__ in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.found += by_mask or call.overloadpacket.__name__ in names
        return call(*args, **(kwargs or {}))


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.6, 0.95), SamplingParams(1.0, 1.0, 5)], ids=str)
def test_a_draw_that_the_first_tokens_decide_waits_for_the_device_once(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whether it is decided; a read of a list is no operation that could be counted."""
    head = 3 * torch.randn(90, 8, generator=torch.Generator().manual_seed(0))
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset(), adapted=False)  # type: ignore[arg-type]
    stats = linear_entropy_topk(torch.ones(5, 8), k=64 if params.top_k is None else 5, **lm.head_at(params.temperature))
    monkeypatch.setattr(sampling, "linear_entropy_topk", lambda *_, **__: stats)
    lists, tolist = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: (lists.append(self.shape), tolist(self))[1])
    with _Waits() as waits:
        sample_tokens(lm, torch.ones(5, 8), torch.full((5,), 0.9, dtype=torch.float64), params)
    assert (waits.found, lists) == (0, [(2,)])


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 0.7), (5, 0.95), (1500, 0.5), (64, 0.3)])
def test_the_nucleus_is_of_the_top_k_as_in_transformers(top_k: int, top_p: float) -> None:
    """A flat distribution, of which top_k hold little: cut from the whole, the nucleus would be all of them."""
    generator = torch.Generator().manual_seed(0)
    head, hidden = torch.randn(2000, 8, generator=generator) * 0.1, torch.randn(1, 8, generator=generator)
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset(), adapted=False)  # type: ignore[arg-type]
    ids = torch.zeros(1, 1, dtype=torch.int64)
    kept = TopPLogitsWarper(top_p)(ids, TopKLogitsWarper(top_k)(ids, hidden @ head.T)).softmax(-1)[0].double()
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn, _ = sample_tokens(lm, hidden.expand(4000, -1), uniforms, SamplingParams(1.0, top_p, top_k))
    assert set(drawn.tolist()) <= set(kept.nonzero()[:, 0].tolist())
    torch.testing.assert_close(drawn.bincount(minlength=2000).double() / 4000, kept, atol=5e-4, rtol=0)
