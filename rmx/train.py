"""The training loop: gated contrastive loss on decision tokens, KL anchor elsewhere, into a LoRA adapter.

Departures from the paper's released code: one copy of the model (the anchor comes from the same weights with the
adapter off), no logits, batches of several sequences, EOS is trained and anchored like any other token.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rmx.config import TrainConfig
from rmx.errors import RmxError
from rmx.lora import Adapter
from rmx.model import CausalLM, batches, pad
from rmx.records import TrainingSequence
from rmx_kernels import ContrastiveLoss, linear_gated_contrastive_loss


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


def sequence_weights(sequence: TrainingSequence, config: TrainConfig) -> tuple[Tensor, Tensor]:
    r"""(ce_weight, kl_weight) [L - 1] of the predicting positions of one sequence of L tokens.

    .. math::
        \mathrm{loss}_i = \frac{1}{|G|} \sum_{t \in G} A \beta(A) (-\log p_s(y_{t+1}))
            + \frac{\lambda}{|\bar G|} \sum_{t \in \bar G} \mathrm{KL}(p_b \| p_s)

    so that the loss of a batch is one weighted sum, however its sequences are grouped (arXiv 2605.06241, section 3).
    """
    P, T = len(sequence.prompt_ids), len(sequence.completion_ids)
    gate = torch.zeros(P + T - 1, dtype=torch.bool)
    gate[[P - 1 + t for t in sequence.decision_tokens]] = True
    anchor = ~gate
    if config.anchor == "completion":
        anchor[: P - 1] = False
    beta = config.negative_weight if sequence.advantage < 0 else 1.0
    ce = gate.double() * (sequence.advantage * beta / max(1, int(gate.sum())))
    kl = anchor.double() * (config.anchor_weight / max(1, int(anchor.sum())))
    return ce.float(), kl.float()


@dataclass(frozen=True)
class BatchRows:
    """The rows of one forward pass that carry a weight."""

    where: tuple[Tensor, Tensor]  # (sequence, position) of each of R rows
    target: Tensor  # [R]
    ce_weight: Tensor  # [R]
    kl_weight: Tensor  # [R]
    base_logprob: Tensor  # [R], NaN at prompt positions


def batch_rows(sequences: Sequence[TrainingSequence], config: TrainConfig, divisor: int) -> BatchRows:
    columns: list[tuple[Tensor, ...]] = []
    for n, sequence in enumerate(sequences):
        ce, kl = (weight / divisor for weight in sequence_weights(sequence, config))
        ids = torch.tensor(sequence.prompt_ids + sequence.completion_ids)
        known = torch.full((len(ids) - 1,), float("nan"))
        known[len(sequence.prompt_ids) - 1 :] = torch.tensor(sequence.base_logprob)
        used = ((ce != 0) | (kl != 0)).nonzero().squeeze(1)
        columns.append((torch.full_like(used, n), used, ids[1:][used], ce[used], kl[used], known[used]))
    row, position, target, ce, kl, known = (torch.cat(column) for column in zip(*columns, strict=True))
    return BatchRows((row, position), target, ce, kl, known)


def batch_loss(
    lm: CausalLM, adapter: Adapter, sequences: Sequence[TrainingSequence], config: TrainConfig, divisor: int
) -> tuple[ContrastiveLoss, BatchRows]:
    """The share of one forward pass in the loss of a step of ``divisor`` sequences; differentiable in the adapter."""
    ids, mask = pad([s.prompt_ids + s.completion_ids for s in sequences], lm.device)
    rows = batch_rows(sequences, config, divisor)
    where = rows.where[0].to(lm.device), rows.where[1].to(lm.device)
    student = lm.hidden(ids, mask, use_cache=False)[where]
    if bool(rows.kl_weight.any()):
        with torch.no_grad(), adapter.off():
            base = lm.hidden(ids, mask, use_cache=False)[where]
    else:
        base = student.detach()  # not read where nothing is anchored
    loss = linear_gated_contrastive_loss(
        student,
        base,
        target=rows.target.to(lm.device),
        ce_weight=rows.ce_weight.to(lm.device),
        kl_weight=rows.kl_weight.to(lm.device),
        **lm.head,
    )
    return loss, rows


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
    on_step: Callable[[StepMetrics, int], None] = lambda *_: None,
) -> list[StepMetrics]:
    """Train ``adapter`` in place with AdamW.

    Args:
        on_step: called after each step with its metrics and the number of steps in all.

    Raises:
        TrainingError: no sequence has a decision token, or a loss or gradient is not finite (the step is named).
    """
    if not any(sequence.decision_tokens and sequence.advantage for sequence in sequences):
        raise TrainingError(
            f"train: none of the {len(sequences)} sequences has a decision token: lower select.tau or set select.budget"
        )
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    history = []
    order = step_order(len(sequences), config, seed)
    for number, chosen in enumerate(order):
        started = time.perf_counter()
        rate = learning_rate(number, len(order), config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = [sequences[i] for i in chosen]
        parts = []
        for group_ids in batches([len(s.prompt_ids) + len(s.completion_ids) for s in batch], config.token_budget):
            loss, rows = batch_loss(lm, adapter, [batch[i] for i in group_ids], config, len(batch))
            loss.loss.backward()
            parts.append((loss, rows))
        norm = float(torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.clip))
        total = float(sum(float(loss.loss.detach()) for loss, _ in parts))
        if not (math.isfinite(total) and math.isfinite(norm)):
            names = ", ".join(f"{s.problem_id}/{s.sample}" for s in batch)
            raise TrainingError(
                f"train: loss {total} or gradient norm {norm} is not finite at step {number + 1}: {names}"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens = sum(len(s.prompt_ids) + len(s.completion_ids) for s in batch)
        seconds = time.perf_counter() - started
        history.append(_metrics(parts, number + 1, total, norm, rate, tokens, seconds))
        on_step(history[-1], len(order))
    return history


def _metrics(
    parts: Sequence[tuple[ContrastiveLoss, BatchRows]],
    step: int,
    total: float,
    norm: float,
    rate: float,
    tokens: int,
    seconds: float,
) -> StepMetrics:
    def joined(values: Iterator[Tensor]) -> Tensor:
        return torch.cat([value.detach().float().cpu() for value in values])

    logprob = joined(loss.logprob for loss, _ in parts)
    kl = joined(loss.kl for loss, _ in parts)
    ce = joined(rows.ce_weight for _, rows in parts)
    shift = logprob - joined(rows.base_logprob for _, rows in parts)
    anchored = ~kl.isnan()
    return StepMetrics(
        step=step,
        loss=total,
        decision=float(-(ce * logprob)[ce != 0].double().sum()),
        anchor_kl=float(kl[anchored].double().mean()) if bool(anchored.any()) else 0.0,
        positive_shift=float(shift[ce > 0].mean()) if bool((ce > 0).any()) else None,
        negative_shift=float(shift[ce < 0].mean()) if bool((ce < 0).any()) else None,
        gradient_norm=norm,
        learning_rate=rate,
        tokens=tokens,
        seconds=seconds,
    )


class MetricsLog:
    """metrics.jsonl, one line a step, started anew with each training."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, metrics: StepMetrics) -> None:
        self.file.write(json.dumps(asdict(metrics)) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
