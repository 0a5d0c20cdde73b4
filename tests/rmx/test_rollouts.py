"""Exact nucleus sampling, and generation that agrees with transformers and does not depend on the batch."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmx import sampling
from rmx.config import PromptConfig, RolloutsConfig
from rmx.model import CausalLM, ModelError
from rmx.prompts import PromptError, Renderer
from rmx.records import Problem
from rmx.rollouts import generate_rollouts
from rmx.sampling import SamplingParams, sample_tokens

PROBLEMS = [Problem(f"p{i}", "sum of " + " and ".join("123456789"[: i + 1]), "1") for i in range(5)]


def naive_nucleus(logits: Tensor, uniform: float, params: SamplingParams) -> int:
    """Sort the whole vocabulary of one row, cut, renormalise, invert."""
    p, ids = (logits.double() / params.temperature).softmax(-1).sort(descending=True, stable=True)
    if params.top_k is not None:
        p[params.top_k :] = 0
    before = (logits.double() / params.temperature).softmax(-1).sort(descending=True).values.cumsum(-1) - p
    p[before >= params.top_p] = 0
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
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset())  # type: ignore[arg-type]
    got = sample_tokens(lm, hidden, uniforms, params)
    logits = hidden @ head.T
    assert got.tolist() == [naive_nucleus(z, float(u), params) for z, u in zip(logits, uniforms, strict=True)]


def test_draws_follow_the_distribution() -> None:
    head = torch.tensor([[0.0], [1.0], [2.0], [-9.0]])
    lm = CausalLM(None, None, head, None, None, 1.0, frozenset())  # type: ignore[arg-type]
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = sample_tokens(lm, torch.ones(4000, 1), uniforms, SamplingParams(top_p=0.99))
    p = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)
    torch.testing.assert_close(drawn.bincount(minlength=4)[:3] / 4000, p, atol=5e-4, rtol=0)
    assert not (drawn == 3).any()


def test_greedy_equals_transformers(demo_lm: CausalLM) -> None:
    renderer = Renderer(demo_lm.tokenizer, PromptConfig())
    problems = [Problem("a", "What is 2 + 3?", "5"), Problem("b", "Name the capital of France.", "")]
    settings = RolloutsConfig(samples=1, temperature=0.0, max_new_tokens=12)
    for rollout in generate_rollouts(demo_lm, renderer, problems, settings, seed=0):
        ids = torch.tensor([rollout.prompt_ids])
        theirs = demo_lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        assert rollout.completion_ids == theirs[0, ids.shape[1] :].tolist()


def sampled(lm: CausalLM, problems: list[Problem], seed: int = 3, **more: object) -> list[object]:
    settings = RolloutsConfig.model_validate({"samples": 6, "temperature": 1.3, "max_new_tokens": 12, **more})
    return list(generate_rollouts(lm, Renderer(lm.tokenizer, PromptConfig()), problems, settings, seed))


def test_a_rollout_depends_on_its_seed_and_problem_alone(tiny: CausalLM) -> None:
    together = sampled(tiny, PROBLEMS)
    apart = [rollout for problem in PROBLEMS for rollout in sampled(tiny, [problem])]
    assert together == apart  # other padding, other neighbours that finish earlier
    assert together == sampled(tiny, PROBLEMS, batch_size=7)
    assert together == sampled(tiny, PROBLEMS, batch_size=4)  # fewer than the samples of one prompt
    assert together != sampled(tiny, PROBLEMS, seed=4)
    assert sampled(tiny, PROBLEMS, samples=2) == [r for r in together if r.sample < 2]  # type: ignore[attr-defined]


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
    reasons = {r.finish_reason for r in rollouts}  # type: ignore[attr-defined]
    assert reasons == {"stop", "length"}
    for r in rollouts:
        fields = dataclasses.asdict(r)  # type: ignore[call-overload]
        ids = fields["completion_ids"]
        assert 2 not in ids[:-1]
        assert (ids[-1] == 2) == (fields["finish_reason"] == "stop")
        assert len(ids) == 12 or fields["finish_reason"] == "stop"
        assert fields["text"] == tiny.tokenizer.decode(ids, skip_special_tokens=True)


def test_wide_nuclei_are_looked_up_again_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first width would lose tokens: with it alone the draw at u -> 1 would be another token."""
    lm = CausalLM(None, None, torch.zeros(300, 4), None, None, 1.0, frozenset())  # type: ignore[arg-type]
    monkeypatch.setattr(sampling, "WIDTHS", (8, 16))
    drawn = sample_tokens(lm, torch.ones(1, 4), torch.tensor([0.999], dtype=torch.float64), SamplingParams())
    assert drawn.tolist() == [299]
