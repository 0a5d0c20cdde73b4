"""The training loop: gated contrastive loss on decision tokens, KL anchor elsewhere, into a LoRA adapter.

Departures from the paper's released code: one copy of the model and no pass of it as the base (its states were kept by
rmx.score; else they come from the same weights with the adapter off), no logits, sequences packed without padding, EOS
trained and anchored like any other token. Layers below the first adapted one are visited neither forward nor backward.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from rmx import forward
from rmx.allocator import keeping_freed_memory
from rmx.artefacts import replacing
from rmx.checkpoint import Checkpoint, State
from rmx.config import TrainConfig
from rmx.distributed import ALONE, Group
from rmx.errors import RmxError
from rmx.lora import Adapter
from rmx.loss import BaseSource, BatchRows, batch_loss
from rmx.model import CausalLM
from rmx.progress import console
from rmx.records import TrainingSequence
from rmx_kernels import ContrastiveLoss


class TrainingError(RmxError):
    """Training cannot start, or stopped at a value that is not finite."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    step: int  # 1 ..
    loss: float  # nats
    decision: float  # its contrastive part
    anchor_kl: float  # mean KL(base || student) over anchor positions, nats
    positive_shift: float | None  # mean change of log p since the base, decisions of right rollouts, nats
    negative_shift: float | None  # the same of wrong rollouts
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # read, without padding
    seconds: float


def step_order(count: int, config: TrainConfig, seed: int) -> list[list[int]]:
    """Indices of each step: whole shuffled epochs end to end, cut off at ``epochs`` and into steps."""
    random = np.random.default_rng(seed)
    total = max(1, round(config.epochs * count))
    stream = np.concatenate([random.permutation(count) for _ in range(math.ceil(total / count))])[:total]
    return [stream[i : i + config.sequences_per_step].tolist() for i in range(0, total, config.sequences_per_step)]


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up over ``warmup_steps``, then linear decay to zero; ``step`` counts from 0."""
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (steps - step) / max(1, steps - warmup)


def train_adapter(
    lm: CausalLM,
    adapter: Adapter,
    sequences: Sequence[TrainingSequence],
    config: TrainConfig,
    seed: int,
    *,
    base: BaseSource | None = None,
    checkpoint: Checkpoint | None = None,
    group: Group = ALONE,
    on_step: Callable[[StepMetrics, int], None] = lambda *_: None,
) -> list[StepMetrics]:
    """Train ``adapter`` in place with AdamW.

    All random numbers are functions of (seed, step, sequence), so the state of a training is its step, the adapter and
    the optimiser: from a checkpoint it goes on with the same bits on a CPU.

    Args:
        base: see :func:`batch_loss`.
        checkpoint: where the state is kept and taken up again; None: nowhere.
        group: the processes among which the sequences of each step are divided.
        on_step: called after each step with its metrics and the number of steps in all.

    Returns:
        The metrics of the steps that this call made.

    Raises:
        TrainingError: no sequence has a decision token; a loss or gradient is not finite (the step, the rows and the
            last checkpoint are named); one sequence alone does not fit the memory.
        Interrupted: SIGTERM or SIGINT arrived; the state is in the checkpoint.
    """
    if not any(sequence.decision_tokens and sequence.advantage for sequence in sequences):
        raise TrainingError(
            f"train: none of the {len(sequences)} sequences has a decision token: lower select.tau or set select.budget"
        )
    forward.check(lm, adapter.config.first_layer)
    order = step_order(len(sequences), config, seed)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    state = State(adapter, optimizer, token_budget=config.token_budget)
    history = []
    with ExitStack() as stack:
        stack.enter_context(adapter.training())
        stack.enter_context(forward.layer_options(lm, config))
        if lm.device.type == "cpu":
            stack.enter_context(keeping_freed_memory())
        if checkpoint is not None:
            stack.enter_context(checkpoint.watching())
            checkpoint.restore(state)
        while state.step < len(order) and not state.stopped:
            started = time.perf_counter()
            rate = learning_rate(state.step, len(order), config)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            parts = _gradients(lm, adapter, sequences, order[state.step], config, seed, state, base, group)
            norm = float(torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.clip))
            chosen = [sequences[i] for i in order[state.step]]
            tokens = sum(len(s.ids) for s in chosen)
            metrics = _metrics(parts, state.step + 1, norm, rate, tokens, group)
            if not (math.isfinite(metrics.loss) and math.isfinite(norm)):
                raise TrainingError(_not_finite(metrics, parts, chosen, checkpoint))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.stopped = _sinks(state, metrics, config, group)
            stop = 0 if checkpoint is None else group.largest(checkpoint.signum)
            history.append(replace(metrics, seconds=time.perf_counter() - started))
            on_step(history[-1], len(order))
            if checkpoint is not None:
                checkpoint.after_step(state, state.stopped or state.step == len(order), stop)
    return history


def _sinks(state: State, metrics: StepMetrics, config: TrainConfig, group: Group) -> bool:
    """Whether right rollouts' decisions are less likely than in the base, on average over ``early_stop_steps``."""
    if config.early_stop_steps is None:
        return False
    if metrics.positive_shift is not None:
        state.shifts = [*state.shifts, metrics.positive_shift][-config.early_stop_steps :]
    if len(state.shifts) < config.early_stop_steps or sum(state.shifts) >= 0:
        return False
    if group.leads:
        said = f"{sum(state.shifts) / len(state.shifts):+.4f} nats on average over {len(state.shifts)} steps"
        said = f"train: stops early after step {metrics.step}: right rollouts' decisions changed by {said}"
        console.print(said, markup=False, soft_wrap=True)
    return True


@dataclass(frozen=True)
class Part:
    """One forward pass of a step."""

    sequences: list[TrainingSequence]
    loss: ContrastiveLoss
    rows: BatchRows


def _gradients(
    lm: CausalLM,
    adapter: Adapter,
    sequences: Sequence[TrainingSequence],
    chosen: Sequence[int],
    config: TrainConfig,
    seed: int,
    state: State,
    base: BaseSource | None,
    group: Group,
) -> list[Part]:
    """Accumulate the gradient of one step; where memory runs out, again with half the tokens in a pass."""
    mine = group.share(chosen)
    lengths = [len(sequences[i].ids) for i in mine]
    while True:
        parts: list[Part] = []
        try:
            for members in forward.passes(lm, lengths, state.token_budget):
                parts.append(
                    _pass(lm, adapter, sequences, [mine[j] for j in members], len(chosen), config, seed, state, base)
                )
            break
        except RuntimeError as fault:
            if not _out_of_memory(fault):
                raise
            problem = str(fault).splitlines()[0]
        parts.clear()
        for parameter in adapter.parameters():
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if state.token_budget <= max(lengths):
            raise TrainingError(
                f"train: out of memory at step {state.step + 1} with one sequence of {max(lengths)} tokens alone: set "
                f"train.activation_checkpointing=true or select.max_completion_tokens ({problem})"
            )
        state.token_budget = max(max(lengths), min(state.token_budget, sum(lengths)) // 2)
        console.print(
            f"train: out of memory at step {state.step + 1}; goes on with train.token_budget={state.token_budget}",
            markup=False,
            soft_wrap=True,
        )
    group.sum_gradients(adapter.parameters())
    return parts


def _pass(
    lm: CausalLM,
    adapter: Adapter,
    sequences: Sequence[TrainingSequence],
    own: Sequence[int],
    divisor: int,
    config: TrainConfig,
    seed: int,
    state: State,
    base: BaseSource | None,
) -> Part:
    """One forward and backward pass; a function of its own, so that nothing of it outlives a fault."""
    draws = [np.random.default_rng([seed, state.step, i]) for i in own]
    if adapter.config.dropout:
        torch.manual_seed(int(np.random.default_rng([seed, state.step, *own]).integers(2**63)))
    batch = [sequences[i] for i in own]
    loss, rows = batch_loss(lm, adapter, batch, config, divisor, base=base, draws=draws)
    loss.loss.backward()
    return Part(batch, ContrastiveLoss(*(value.detach() for value in loss)), rows)


def _out_of_memory(fault: RuntimeError) -> bool:
    return isinstance(fault, torch.OutOfMemoryError) or "can't allocate memory" in str(fault)


def _not_finite(
    metrics: StepMetrics, parts: Sequence[Part], chosen: Sequence[TrainingSequence], checkpoint: Checkpoint | None
) -> str:
    """Which step, which rows, and where the last good state is."""
    bad = []
    for part in parts:
        rows = part.rows
        wrong = ~torch.isfinite(part.loss.logprob.cpu() * rows.ce_weight)
        wrong |= ~torch.isfinite(part.loss.kl.cpu()) & (rows.kl_weight != 0)
        for n, position in zip(rows.sequence[wrong].tolist(), rows.position[wrong].tolist(), strict=True):
            s = part.sequences[n]
            bad.append(f"{s.problem_id}/{s.sample} position {position}")
    named = bad or [f"{s.problem_id}/{s.sample}" for s in chosen]
    rows_said = ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
    kept = "no checkpoint yet" if checkpoint is None else checkpoint.describe()
    return (
        f"train: loss {metrics.loss} or gradient norm {metrics.gradient_norm} is not finite at step {metrics.step}: "
        f"{rows_said}; {kept}"
    )


def _metrics(parts: Sequence[Part], step: int, norm: float, rate: float, tokens: int, group: Group) -> StepMetrics:
    """Sums over this process's rows, added up over the group."""
    sums = np.zeros(8)
    for part in parts:
        logprob, kl = part.loss.logprob.double().cpu(), part.loss.kl.double().cpu()
        ce = part.rows.ce_weight.double()
        shift = logprob - part.rows.base_logprob
        anchored = part.rows.kl_weight != 0
        up, down = ce > 0, ce < 0
        sums += [
            float(part.loss.loss),
            float(part.loss.loss) - float((part.rows.kl_weight.double() * kl)[anchored].sum()),
            float(kl[anchored].sum()),
            int(anchored.sum()),
            float(shift[up].sum()),
            int(up.sum()),
            float(shift[down].sum()),
            int(down.sum()),
        ]
    loss, decision, kl_sum, anchors, up_sum, ups, down_sum, downs = group.sum(sums).tolist()
    return StepMetrics(
        step=step,
        loss=loss,
        decision=decision,
        anchor_kl=kl_sum / anchors if anchors else 0.0,
        positive_shift=up_sum / ups if ups else None,
        negative_shift=down_sum / downs if downs else None,
        gradient_norm=norm,
        learning_rate=rate,
        tokens=tokens,
        seconds=0.0,
    )


class MetricsLog:
    """metrics.jsonl, one line a step; a training that is taken up again after ``steps`` steps keeps their lines."""

    def __init__(self, path: Path, steps: int = 0) -> None:
        kept = path.read_bytes().splitlines(keepends=True)[:steps] if steps and path.exists() else []
        with replacing(path) as aside:
            aside.write_bytes(b"".join(kept))
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, metrics: StepMetrics) -> None:
        self.file.write(json.dumps(asdict(metrics)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
