"""Rollouts of transformers' continuous batching against the loop's, and which engine is taken."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rmx.config import LoraConfig, ModelConfig, PromptConfig, RolloutsConfig
from rmx.models import lora, model
from rmx.models.model import CausalLM, ModelError
from rmx.models.prompts import Renderer
from rmx.records import Problem, Rollout
from rmx.sampling.engines import EngineError
from rmx.sampling.rollouts import _engine, generate_rollouts

PROBLEMS = [Problem(f"p{i}", "sum of " + " and ".join("123456789"[: i + 1]), "1") for i in range(5)]


def sampled(
    lm: CausalLM, engine: str, prompt: PromptConfig | None = None, known: tuple[Rollout, ...] = (), **more: Any
) -> list[Rollout]:
    on_unit = more.pop("on_unit", lambda _: None)
    problems = more.pop("problems", PROBLEMS)
    settings = {"samples": 4, "temperature": 1.3, "max_new_tokens": 12, "engine": engine, **more}
    renderer = Renderer(lm.tokenizer, prompt or PromptConfig())
    config = RolloutsConfig.model_validate(settings)
    return generate_rollouts(lm, renderer, problems, config, 3, known=known, on_unit=on_unit)


# transformers' continuous batching


@pytest.mark.thorough
def test_greedy_batches_equal_the_loop(tiny: CausalLM) -> None:
    ours, theirs = (sampled(tiny, engine, temperature=0.0, samples=2) for engine in ("loop", "generate_batch"))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprobs is not None and other.logprobs == pytest.approx(mine.logprobs, abs=2e-5)
        assert other.completion_ids == mine.completion_ids
        assert (other.problem_id, other.sample, other.prompt_ids) == (mine.problem_id, mine.sample, mine.prompt_ids)
        assert (other.finish_reason, other.text) == (mine.finish_reason, mine.text)
    assert {r.finish_reason for r in theirs} == {"stop", "length"}


@pytest.mark.thorough
@pytest.mark.parametrize("cut", [{"top_p": 0.7}, {"top_k": 3}, {"top_p": 1.0}], ids=str)
def test_batches_follow_the_cut_distribution(tiny: CausalLM, cut: dict[str, Any]) -> None:
    """First tokens of 600 samples against the loop's probabilities: within 5 standard deviations."""
    drawn = {
        engine: sampled(tiny, engine, problems=PROBLEMS[:1], samples=600, batch_size=600, max_new_tokens=1, **cut)
        for engine in ("loop", "generate_batch")
    }
    counts = {engine: Counter(r.completion_ids[0] for r in rollouts) for engine, rollouts in drawn.items()}
    assert counts["loop"].keys() == counts["generate_batch"].keys() or cut == {"top_p": 1.0}
    for token, count in counts["loop"].items():
        p = count / 600
        assert abs(counts["generate_batch"][token] - count) < 5 * math.sqrt(2 * 600 * p * (1 - p)) + 1
    logprobs = {r.completion_ids[0]: r.logprobs for r in drawn["loop"]}
    for r in drawn["generate_batch"]:
        if cut != {"top_p": 1.0}:
            assert r.logprobs is None  # transformers tells those after the cut
        else:
            assert r.logprobs == pytest.approx(logprobs.get(r.completion_ids[0], r.logprobs), abs=2e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("batch_size", [8, 3])
def test_batches_are_repeatable_and_survive_a_kill(tiny: CausalLM, batch_size: int) -> None:
    torch.manual_seed(0)
    units: list[list[Rollout]] = []
    settings = {"batch_size": batch_size, "problems": PROBLEMS[:3]}
    whole = sampled(tiny, "generate_batch", on_unit=units.append, **settings)
    assert len({tuple(r.completion_ids) for r in whole}) == 12  # samples and problems differ
    known = tuple(r for unit in units[:1] for r in unit)
    assert sampled(tiny, "generate_batch", known=known, **settings) == whole
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))  # torch's own stream is left as it was


@pytest.mark.thorough
def test_batches_see_the_adapter_and_leave_the_model_as_it_was(tiny: CausalLM) -> None:
    base = sampled(tiny, "generate_batch", temperature=0.0, samples=1)
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=64), 0)
    for parameter in adapter.parameters():
        parameter.data.normal_()
    tuned = sampled(tiny, "generate_batch", temperature=0.0, samples=1)
    assert [r.completion_ids for r in tuned] == [
        r.completion_ids for r in sampled(tiny, "loop", temperature=0.0, samples=1)
    ]
    assert tuned != base
    with adapter.off():
        assert sampled(tiny, "generate_batch", temperature=0.0, samples=1) == base
    assert tiny.model.config._attn_implementation == "sdpa"


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_model_fails_the_batch(tiny: CausalLM, temperature: float) -> None:
    with torch.no_grad():
        tiny.weight[3] = float("nan")
    with pytest.raises((ModelError, EngineError), match=r"not finite|inf|nan"):
        sampled(tiny, "generate_batch", temperature=temperature)


@pytest.mark.parametrize(
    ("device", "attention", "engine"),
    [
        ("cpu", "sdpa", "loop"),
        ("cuda", "sdpa", "loop"),
        ("cuda", "flash_attention_2", "generate_batch"),
    ],
)
def test_which_engine_is_taken(device: str, attention: str, engine: str) -> None:
    config = SimpleNamespace(_attn_implementation=attention)
    lm: Any = SimpleNamespace(device=torch.device(device), model=SimpleNamespace(config=config))
    assert _engine(lm, RolloutsConfig()) == engine
    assert _engine(lm, RolloutsConfig(engine="loop")) == "loop"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu(tiny_path: Path) -> None:
    lm = model.load(ModelConfig(name=str(tiny_path), dtype="float32", device="cuda"))
    whole = sampled(lm, "generate_batch", batch_size=8)
    assert sampled(lm, "generate_batch", batch_size=8) == whole
    assert {len(r.completion_ids) for r in whole if r.finish_reason == "length"} == {12}
