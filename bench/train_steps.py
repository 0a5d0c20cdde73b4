"""The ways of making an optimiser step that bench_train_step.py compares, their check, and the FLOPs that they need."""

import contextlib
import copy
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from report import device_name
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from rmx.config import LoraConfig, TrainConfig
from rmx.models import forward
from rmx.models.lora import Adapter, attach
from rmx.models.model import CausalLM
from rmx.records import BaseStates, Rollout, StepMetrics, TrainingSequence
from rmx.training import loss, train
from rmx.training.loss import sequence_weights
from rmx.training.score import Keep, score_rollouts
from rmx_kernels import backends, linear_gated_contrastive_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATOR = "linear_gated_contrastive_loss"
IMPL = next(n for n, b in backends().items() if b.available and DEVICE in b.devices and OPERATOR in b.operators)
PEAK_FLOPS = {"H200": 989e12, "H100 80GB HBM3": 989e12}  # dense bf16 tensor cores, NVIDIA's data sheets


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model with a LoRA adapter and, for the released way alone, a second copy of it without one."""

    lm: CausalLM
    adapter: Adapter
    base: PreTrainedModel
    kept: dict[int, BaseStates] = dataclasses.field(default_factory=dict)  # by sample number

    def float32(self) -> "Pair":
        """The same weights in float32, in which rounding is below anything that bfloat16 could show."""
        model = copy.deepcopy(self.lm.model).float()
        lm = dataclasses.replace(self.lm, model=model, weight=model.get_output_embeddings().weight)
        adapter = dataclasses.replace(
            self.adapter, layers={name: model.get_submodule(name) for name in self.adapter.layers}
        )
        return Pair(lm, adapter, copy.deepcopy(self.base).float())

    def keep(self, sequences: list[TrainingSequence], config: TrainConfig) -> None:
        """What the scoring stage keeps of these sequences, made by the stage's own code."""
        keep = Keep(config.anchor, self.adapter.config.first_layer)
        rollouts = [Rollout("", s.sample, s.prompt_ids, s.completion_ids, "stop", "") for s in sequences]
        with self.adapter.off():
            found = score_rollouts(self.lm, rollouts, top_k=0, token_budget=config.token_budget, keep=keep)
        self.kept.update({scores.sample: base for scores, base in found})


Step = Callable[[Pair, list[TrainingSequence], TrainConfig], float]  # returns the loss, nats


def make_pair(lm: CausalLM, config: LoraConfig) -> Pair:
    base = copy.deepcopy(lm.model)
    adapter = attach(lm.model, config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter.layers.values():  # at the initial B = 0, A has no gradient and no KL either
            layer.lora_B.copy_(0.03 * torch.randn(layer.lora_B.shape, generator=generator))
    return Pair(lm, adapter, base)


def both(lm: CausalLM, config: LoraConfig, first: int) -> tuple[Pair, Pair]:
    """Adapters on all layers, and from layer ``first`` on."""
    model = copy.deepcopy(lm.model)
    other = dataclasses.replace(lm, model=model, weight=model.get_output_embeddings().weight)
    all_layers, upper = ({"first_layer": n} for n in (0, first))
    return make_pair(lm, config.model_copy(update=all_layers)), make_pair(other, config.model_copy(update=upper))


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
    """One step, the first of a training: the memory of all later ones is touched in it for the first time."""
    return _train(pair, sequences, config, steps=1)[0].loss


def _train(
    pair: Pair, sequences: list[TrainingSequence], config: TrainConfig, steps: int, on_step: Any = lambda *_: None
) -> list[StepMetrics]:
    settings = {"epochs": float(steps), "sequences_per_step": len(sequences), "warmup_steps": 0}
    config = config.model_copy(update=settings)
    base = lambda s: pair.kept[s.sample]  # noqa: E731
    return train.train_adapter(pair.lm, pair.adapter, sequences, config, 0, base=base, on_step=on_step)


def step_seconds(step: Step, pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> float:
    """Of one step: of ours the second of a training, as all but the first are."""
    marks = [time.perf_counter()]

    def mark(*_: Any) -> None:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    if step is released:
        released(pair, sequences, config)
        mark()
    else:
        with reference_operator() if step is ours_reference else contextlib.nullcontext():
            _train(pair, sequences, config, steps=2, on_step=mark)
    return marks[-1] - marks[-2]


@contextlib.contextmanager
def reference_operator() -> Iterator[None]:
    operator = functools.partial(linear_gated_contrastive_loss, impl="reference")
    with mock.patch("rmx.training.loss.linear_gated_contrastive_loss", operator):
        yield


def ours_reference(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> float:
    with reference_operator():
        return ours(pair, sequences, config)


def released(
    pair: Pair,
    sequences: list[TrainingSequence],
    config: TrainConfig,
    optimizer: torch.optim.Optimizer | None = None,
) -> float:
    """As the published training loop computes it, in eager PyTorch; the autocast of its LoRA products is left out."""
    parameters = pair.adapter.parameters()
    if optimizer is None:
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    total = 0.0
    for sequence in sequences:
        ids = torch.tensor([sequence.ids], device=pair.lm.device)
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

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:  # ours has one tensor, in the order of the others
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat([p.grad.double().flatten() for p in mine if p.grad is not None]))

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


def check(
    steps: dict[str, Step], pair: Pair, sequences: list[TrainingSequence], config: TrainConfig
) -> dict[str, dict[str, float]]:
    """Relative errors of loss and gradient (2-norm) of each provider against the released step in float32.

    In the model's own dtype ours may err twice as much as the released way does; where that is float32, the bounds of
    float32 hold alone. A loss is one number, which may be right by luck: a rounding step of bfloat16 is its floor. In
    float32 all must compute the same loss up to rounding, also with a heavier anchor, since at the real weight the KL
    is a hundredth of the gradient and hardly seen.
    """
    high = pair.float32()
    high.keep(sequences, config)
    heavy = config.model_copy(update={"anchor_weight": 30 * config.anchor_weight})

    def errors(step: Step, of: Pair, settings: TrainConfig, exact: tuple[float, Tensor]) -> dict[str, float]:
        loss, got = gradient(step, of, sequences, settings)
        return {"loss": abs(loss / exact[0] - 1), "gradient": float((got - exact[1]).norm() / exact[1].norm())}

    exact, exact_heavy = (gradient(released, high, sequences, settings) for settings in (config, heavy))
    figures = {name: errors(step, pair, config, exact) for name, step in steps.items()}
    for name in steps.keys() - {"released"}:
        same = errors(steps[name], high, heavy, exact_heavy)
        assert same["loss"] < 1e-4 and same["gradient"] < 1e-3, f"{name}: another loss, seen in float32: {same}"
        rounding = 5e-4 if pair.lm.weight.dtype == torch.float32 else 0.0
        assert figures[name]["gradient"] <= 2 * max(figures["released"]["gradient"], rounding), f"{name}: {figures}"
        assert figures[name]["loss"] <= 2 * max(figures["released"]["loss"], 2**-8), f"{name}: {figures}"
        figures[name] |= {f"{key}_float32": error for key, error in same.items()}
    return figures


def step_flops(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig) -> float:
    """FLOPs of the products of one step of ours, counted: 2 a multiply-add; recomputation is not useful work.

    Per token of a visited layer: its linear weights forward and once more backward (they are frozen, so only their
    inputs get a gradient), LoRA pairs twice more; causal attention 4 D a query, head and key seen, and 2.5 times that
    backward. Per row of the loss: the student's logits and their gradient times the head; of anchors the base's logits.
    """
    settings = pair.lm.model.config
    first = pair.adapter.config.first_layer
    layers = forward.decoder_layers(pair.lm.model)[1][first:]
    adapted = sum(p.numel() for p in pair.adapter.parameters())
    linear = sum(m.weight.numel() for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Linear))
    lengths = [len(s.ids) for s in sequences]
    heads = settings.num_attention_heads
    width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    attention = sum(3.5 * 4 * width * heads * n * (n + 1) / 2 for n in lengths) * len(layers)
    rows = loss.batch_rows(sequences, config, 1, [np.random.default_rng(0) for _ in sequences])
    products = 2 * len(rows.where) + int((rows.kl_weight != 0).sum())
    head = 2 * products * pair.lm.weight.numel()
    return sum(lengths) * (4 * linear + 6 * adapted) + attention + head


def peak_flops(lm: CausalLM) -> float:
    """FLOPs per second: of the data sheet for a known GPU, elsewhere of the bare product of an MLP, measured now."""
    name = device_name().removeprefix("NVIDIA ")
    if name in PEAK_FLOPS:
        return PEAK_FLOPS[name]
    settings = lm.model.config
    a = torch.randn(1024, settings.hidden_size, device=lm.device, dtype=lm.weight.dtype)
    b = torch.randn(settings.intermediate_size, settings.hidden_size, device=lm.device, dtype=lm.weight.dtype)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        a @ b.T
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * a.numel() * b.shape[0] / statistics.median(times)
