"""The training loop: gated contrastive loss on decision tokens, KL anchor elsewhere, into a LoRA adapter.

Departures from the paper's released code: one copy of the model and no pass of it as the base (its states were kept by
rmx.training.score; else they come from the same weights with the adapter off), no logits, sequences packed without
padding, EOS trained and anchored like any other token. Layers below the first adapted one are visited neither forward
nor backward.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmx.artefacts import replacing
from rmx.config import TrainConfig
from rmx.errors import RmxError
from rmx.models import forward
from rmx.models.lora_layers import Adapter, Masters
from rmx.models.model import CausalLM
from rmx.progress import console
from rmx.records import StepMetrics, TrainingSequence
from rmx.training.allocator import keeping_freed_memory
from rmx.training.checkpoint import Checkpoint, State
from rmx.training.distributed import ALONE, Group
from rmx.training.graphs import Passes
from rmx.training.loss import BaseSource, BatchRows, Prepared, prepare, prepared_loss
from rmx_kernels import ContrastiveLoss


class TrainingError(RmxError):
    """Training cannot start, or it stopped because a value is not finite."""


def step_order(count: int, config: TrainConfig, seed: int) -> list[list[int]]:
    """Indices of the sequences of each step: shuffled epochs, one after the other, cut at ``epochs`` and into steps."""
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


def check_warmup(config: TrainConfig, steps: int, at_most: str = "") -> None:
    """Refuse a warm-up that is longer than the training of ``steps`` steps.

    Args:
        at_most: text before the number of steps in the message, if it is an upper bound.

    Raises:
        TrainingError: the warm-up is longer.
    """
    if config.warmup_steps > steps:
        raise TrainingError(
            f"train: the warm-up takes {config.warmup_steps} steps, the training {at_most}{steps}: "
            "lower train.warmup_steps, or train longer (train.epochs, select.max_problems, select.max_sequences)"
        )


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
    the optimiser. On a CPU, a training that continues from a checkpoint gives the same bits.

    Args:
        base: see :func:`batch_loss`.
        checkpoint: where the state is saved and restored from; None: nowhere.
        group: the processes among which the sequences of each step are divided.
        on_step: called after each step with its metrics and the total number of steps.

    Returns:
        The metrics of the steps that this call made.

    Raises:
        TrainingError: no sequence has a decision token; a loss or gradient is not finite (the step, the rows and the
            last checkpoint are named); a single sequence does not fit into memory.
        Interrupted: SIGTERM or SIGINT arrived; the state is in the checkpoint.
    """
    if not any(sequence.decision_tokens and sequence.advantage for sequence in sequences):
        raise TrainingError(
            f"train: none of the {len(sequences)} sequences has a decision token: lower select.tau or set select.budget"
        )
    forward.check(lm, adapter.config.first_layer)
    order = step_order(len(sequences), config, seed)
    masters = Masters(adapter)
    optimizer = torch.optim.AdamW([masters.flat], lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    state = State(masters, optimizer, token_budget=config.token_budget)
    source = _Source(lm, adapter, sequences, order, config, seed, base, group)
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
            parts = _gradients(source, state)
            reading = _Reading([_sums(part) for part in parts], masters.flat.grad)
            if state.step + 1 < len(order):
                source.read_ahead(state.step + 1, state.token_budget)
            sums, norm = reading.wait()  # the only wait of a step
            chosen = [sequences[i] for i in order[state.step]]
            metrics = _metrics(group.sum(sums), state.step + 1, norm, rate, sum(len(s.ids) for s in chosen))
            if not (math.isfinite(metrics.loss) and math.isfinite(norm)):
                raise TrainingError(_not_finite(metrics, parts, chosen, checkpoint))
            if norm > config.clip:
                assert masters.flat.grad is not None
                masters.flat.grad.mul_(config.clip / (norm + 1e-6))
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
    """Whether decisions of right rollouts fell below the base, on average over ``early_stop_steps``."""
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
    """One forward pass of a step, after it; without the states that it read."""

    sequences: list[TrainingSequence]
    rows: BatchRows  # on the host
    there: BatchRows  # on the device
    loss: ContrastiveLoss


class _Source:
    """The passes of each step, read from the host's records; one step ahead while the device computes."""

    def __init__(
        self,
        lm: CausalLM,
        adapter: Adapter,
        sequences: Sequence[TrainingSequence],
        order: Sequence[Sequence[int]],
        config: TrainConfig,
        seed: int,
        base: BaseSource | None,
        group: Group,
    ) -> None:
        self.lm, self.adapter, self.sequences, self.order = lm, adapter, sequences, order
        self.config, self.seed, self.base, self.group = config, seed, base, group
        self.ahead: tuple[int, int, list[tuple[list[int], Prepared]]] | None = None  # step, token budget, its passes
        self.beside = torch.cuda.Stream(lm.device) if lm.device.type == "cuda" else None
        lengths = ([len(sequences[i].ids) for i in own] for step in range(len(order)) for own in self._members(step))
        self.captured = Passes(lm, adapter, config, lengths)

    def share(self, step: int) -> list[int]:
        """The sequences of a step that this process computes."""
        return self.group.share(self.order[step])

    def _members(self, step: int, token_budget: int | None = None) -> list[list[int]]:
        """The sequences of each pass of a step, here."""
        mine = self.share(step)
        budget = self.config.token_budget if token_budget is None else token_budget
        members = forward.passes(self.lm, [len(self.sequences[i].ids) for i in mine], budget)
        return [[mine[j] for j in own] for own in members]

    def passes(self, step: int, token_budget: int) -> Iterator[tuple[list[int], Prepared]]:
        """The passes of a step, with the numbers of their sequences: those read ahead, else one after the other."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead[:2] != (step, token_budget):
            yield from self._read(step, token_budget)
            return
        while ahead[2]:  # what a pass has read is let go after it
            own, prepared = ahead[2].pop(0)
            if self.beside is not None:
                now = torch.cuda.current_stream(self.lm.device)
                now.wait_stream(self.beside)
                for tensor in prepared.tensors():
                    tensor.record_stream(now)
            yield own, prepared

    def read_ahead(self, step: int, token_budget: int) -> None:
        """Read a step's passes, and copy them to the device beside what it is doing; not where memory is short."""
        try:
            with nullcontext() if self.beside is None else torch.cuda.stream(self.beside):
                self.ahead = step, token_budget, list(self._read(step, token_budget))
        except RuntimeError as fault:
            if not _out_of_memory(fault):
                raise
            self.ahead = None  # the step itself reads them, one by one

    def _read(self, step: int, token_budget: int) -> Iterator[tuple[list[int], Prepared]]:
        divisor = len(self.order[step])
        for own in self._members(step, token_budget):
            draws = [np.random.default_rng([self.seed, step, i]) for i in own]
            batch = [self.sequences[i] for i in own]
            yield own, prepare(self.lm, self.adapter, batch, self.config, divisor, base=self.base, draws=draws)


def _gradients(source: _Source, state: State) -> list[Part]:
    """Accumulate the gradient of one step. If memory runs out, repeat it with half the tokens in each pass."""
    lengths = [len(source.sequences[i].ids) for i in source.share(state.step)]
    while True:
        parts: list[Part] = []
        try:
            for own, prepared in source.passes(state.step, state.token_budget):
                parts.append(_pass(source, own, prepared, state))
            break
        except RuntimeError as fault:
            if not _out_of_memory(fault):
                raise
            problem = str(fault).splitlines()[0]
        parts.clear()
        state.masters.flat.grad = None
        had_graphs = source.captured.close()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if had_graphs:
            console.print(f"train: out of memory at step {state.step + 1}; goes on without CUDA graphs", markup=False)
            continue
        if state.token_budget <= max(lengths):
            raise TrainingError(
                f"train: out of memory at step {state.step + 1} with a single sequence of {max(lengths)} tokens: set "
                "train.activation_checkpointing=true (then offload, which moves more to host memory), or "
                f"select.max_completion_tokens ({problem})"
            )
        state.token_budget = max(max(lengths), min(state.token_budget, sum(lengths)) // 2)
        console.print(
            f"train: out of memory at step {state.step + 1}; goes on with train.token_budget={state.token_budget}",
            markup=False,
            soft_wrap=True,
        )
    source.group.sum_gradients([state.masters.flat])
    return parts


def _pass(source: _Source, own: Sequence[int], prepared: Prepared, state: State) -> Part:
    """Do one forward and backward pass, in a function of its own so that an error frees all its tensors."""
    if source.adapter.config.dropout:
        torch.manual_seed(int(np.random.default_rng([source.seed, state.step, *own]).integers(2**63)))
    with state.masters.lent(source.lm.weight.dtype, source.config.compile):
        hidden = source.captured.final_hidden
        loss = prepared_loss(source.lm, source.adapter, prepared, source.config, hidden)
        loss.loss.backward()
    detached = ContrastiveLoss(*(value.detach() for value in loss))
    return Part(prepared.sequences, prepared.rows, prepared.there, detached)


def _out_of_memory(fault: RuntimeError) -> bool:
    return isinstance(fault, torch.OutOfMemoryError) or "can't allocate memory" in str(fault)


def _not_finite(
    metrics: StepMetrics, parts: Sequence[Part], chosen: Sequence[TrainingSequence], checkpoint: Checkpoint | None
) -> str:
    """Describe the step, the rows, and where the last good state is."""
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


def _sums(part: Part) -> Tensor:
    """[8] float64 on the device, of one pass: what :func:`_metrics` makes the metrics of."""
    rows, logprob, kl = part.there, part.loss.logprob.double(), part.loss.kl.double()
    shift = logprob - rows.base_logprob
    up, down, anchored = rows.ce_weight > 0, rows.ce_weight < 0, rows.kl_weight != 0
    loss = part.loss.loss.double()
    return torch.stack(
        [
            loss,
            loss - (rows.kl_weight * kl).where(anchored, 0).sum(),
            kl.where(anchored, 0).sum(),
            anchored.sum(),
            shift.where(up, 0).sum(),
            up.sum(),
            shift.where(down, 0).sum(),
            down.sum(),
        ]
    )


class _Reading:
    """The sums of a step's passes and the norm of its gradient, on their way to the host."""

    def __init__(self, sums: Sequence[Tensor], gradient: Tensor | None) -> None:
        assert gradient is not None
        norm = torch.linalg.vector_norm(gradient).double()
        total = torch.stack(list(sums)).sum(0) if sums else torch.zeros(8, dtype=torch.float64, device=norm.device)
        values = torch.cat([total, norm[None]])
        self.event = torch.cuda.Event() if values.is_cuda else None
        self.values = torch.empty(9, dtype=torch.float64, pin_memory=values.is_cuda).copy_(values, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def wait(self) -> tuple[np.ndarray, float]:
        """(the sums, the norm)."""
        if self.event is not None:
            self.event.synchronize()
        return self.values[:8].numpy(), float(self.values[8])


def _metrics(sums: np.ndarray, step: int, norm: float, rate: float, tokens: int) -> StepMetrics:
    """From sums over the rows of all processes."""
    loss, decision, kl_sum, anchors, up_sum, ups, down_sum, downs = sums.tolist()
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
