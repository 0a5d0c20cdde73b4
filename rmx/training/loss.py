"""The loss of some sequences: the weights of their positions, the rows with a weight, and one forward pass."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmx.attention.packing import sent
from rmx.config import TrainConfig
from rmx.models import forward
from rmx.models.lora_layers import Adapter
from rmx.models.model import CausalLM
from rmx.records import BaseStates, TrainingSequence
from rmx_kernels import ContrastiveLoss, linear_gated_contrastive_loss, linear_logprob_kl

BaseSource = Callable[[TrainingSequence], BaseStates]


def sequence_weights(
    sequence: TrainingSequence, config: TrainConfig, draw: np.random.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""(ce_weight, kl_weight) [L - 1] of the predicting positions of one sequence of L tokens.

    .. math::
        \mathrm{loss}_i = \frac{s}{|G|} \sum_{t \in G} A \beta(A) (-\log p_s(y_{t+1}))
            + \frac{\lambda}{|\bar G|} \sum_{t \in \bar G} \mathrm{KL}(p_b \| p_s)

    so that the loss of a batch is one weighted sum, however its sequences are grouped (arXiv 2605.06241, section 3).
    s is the sequence's ``scale``, which is 1 except in controls.
    With ``draw`` the second mean is over a random ``anchor_fraction`` of those positions, whose expectation is the
    same.
    """
    P, T = len(sequence.prompt_ids), len(sequence.completion_ids)
    gate = torch.zeros(P + T - 1, dtype=torch.bool)
    gate[[P - 1 + t for t in sequence.decision_tokens]] = True
    anchor = ~gate
    if config.anchor == "completion":
        anchor[: P - 1] = False
    if draw is not None and config.anchor_fraction < 1 and bool(anchor.any()):
        positions = anchor.nonzero().squeeze(1).numpy()
        count = math.ceil(config.anchor_fraction * len(positions))
        anchor = torch.zeros_like(gate)
        anchor[torch.from_numpy(draw.choice(positions, count, replace=False))] = True
    beta = config.negative_weight if sequence.advantage < 0 else 1.0
    ce = gate.double() * (sequence.scale * sequence.advantage * beta / max(1, int(gate.sum())))
    kl = anchor.double() * (config.anchor_weight / max(1, int(anchor.sum())))
    return ce.float(), kl.float()


@dataclass(frozen=True)
class BatchRows:
    """The R rows of one forward pass that have a weight."""

    where: Tensor  # [R] among the pass's tokens, end to end
    sequence: Tensor  # [R] which sequence
    position: Tensor  # [R] predicting position in it
    target: Tensor  # [R]
    ce_weight: Tensor  # [R]
    kl_weight: Tensor  # [R]
    base_logprob: Tensor  # [R], NaN at prompt positions

    def sent(self, device: torch.device) -> "BatchRows":
        return BatchRows(*(sent(getattr(self, field.name), device) for field in fields(self)))


def batch_rows(
    sequences: Sequence[TrainingSequence],
    config: TrainConfig,
    divisor: int,
    draws: Sequence[np.random.Generator] | None = None,
) -> BatchRows:
    columns: list[tuple[Tensor, ...]] = []
    start = 0
    for n, sequence in enumerate(sequences):
        weights = sequence_weights(sequence, config, draws[n] if draws else None)
        ce, kl = (weight / divisor for weight in weights)
        ids = torch.tensor(sequence.ids)
        known = torch.full((len(ids) - 1,), float("nan"))
        known[len(sequence.prompt_ids) - 1 :] = torch.tensor(sequence.base_logprob)
        used = ((ce != 0) | (kl != 0)).nonzero().squeeze(1)
        of = torch.full_like(used, n)
        columns.append((start + used, of, used, ids[1:][used], ce[used], kl[used], known[used]))
        start += len(ids)
    return BatchRows(*(torch.cat(column) for column in zip(*columns, strict=True)))


def batch_loss(
    lm: CausalLM,
    adapter: Adapter,
    sequences: Sequence[TrainingSequence],
    config: TrainConfig,
    divisor: int,
    *,
    base: BaseSource | None = None,
    draws: Sequence[np.random.Generator] | None = None,
) -> tuple[ContrastiveLoss, BatchRows]:
    """The share of one forward pass in the loss of a step of ``divisor`` sequences; differentiable in the adapter.

    Args:
        base: the base's states of each sequence, with those that enter the adapter's first layer if that is not 0;
            None: they are computed here, in a pass with the adapter off.
        draws: random streams of the sequences, for ``anchor_fraction``; None: every anchor position.
    """
    prepared = prepare(lm, adapter, sequences, config, divisor, base=base, draws=draws)
    return prepared_loss(lm, adapter, prepared, config), prepared.rows


@dataclass(frozen=True)
class Prepared:
    """The data of one forward pass, prepared on the host before the pass."""

    sequences: list[TrainingSequence]
    ids: list[list[int]]
    rows: BatchRows  # on the host
    there: BatchRows  # the same on the device
    base_rows: Tensor | None  # [R, H] on the device, where they are kept and some row is anchored
    entry: Tensor | None  # [T, H] on the device, where they are kept and lower layers are not visited
    anchored: bool

    def tensors(self) -> list[Tensor]:
        """All that is on the device."""
        found = [self.base_rows, self.entry, *(getattr(self.there, field.name) for field in fields(self.there))]
        return [tensor for tensor in found if tensor is not None]


def prepare(
    lm: CausalLM,
    adapter: Adapter,
    sequences: Sequence[TrainingSequence],
    config: TrainConfig,
    divisor: int,
    *,
    base: BaseSource | None = None,
    draws: Sequence[np.random.Generator] | None = None,
) -> Prepared:
    """The first half of :func:`batch_loss`: reads and copies, no kernel of the model."""
    ids = [s.ids for s in sequences]
    rows = batch_rows(sequences, config, divisor, draws)
    anchored = bool(rows.kl_weight.any())
    base_rows = entry = None
    if base is not None:
        known = [base(sequence) for sequence in sequences]
        if adapter.config.first_layer:
            entry = sent(torch.cat([_entry(state) for state in known]), lm.device)
        if anchored:
            base_rows = sent(_base_rows(known, ids, rows), lm.device)
    return Prepared(list(sequences), ids, rows, rows.sent(lm.device), base_rows, entry, anchored)


def prepared_loss(
    lm: CausalLM,
    adapter: Adapter,
    prepared: Prepared,
    config: TrainConfig,
    final_hidden: Callable[..., Tensor] = forward.final_hidden,
) -> ContrastiveLoss:
    """The second half of :func:`batch_loss`; ``final_hidden`` makes the student's states."""
    ids, rows, first = prepared.ids, prepared.there, adapter.config.first_layer
    base_rows, entry = prepared.base_rows, prepared.entry
    if (prepared.anchored and base_rows is None) or (first and entry is None):
        with torch.no_grad(), adapter.off():
            final, entry = forward.all_states(lm, ids, first)
        base_rows = final.index_select(0, rows.where)
    student = final_hidden(lm, ids, first, entry).index_select(0, rows.where)
    # base rows are not read where nothing is anchored
    return contrastive(student, student.detach() if base_rows is None else base_rows, rows, config, lm.head)


def contrastive(
    student: Tensor, base: Tensor, rows: BatchRows, config: TrainConfig, head: dict[str, Any]
) -> ContrastiveLoss:
    r"""The weighted loss of rows with final states ``student`` and ``base`` [R, H]; c < 0 is a negative row's weight.

    ``negatives`` says what such a row adds, since :math:`-\log p` times a negative number has no lower bound:

    .. math::
        \mathrm{ce:}\; |c| \log p_s \qquad
        \mathrm{ratio:}\; |c| \max(p_s / p_b, 1 - \epsilon) \qquad
        \mathrm{hinge:}\; |c| \max(\log p_s - \log p_b + m, 0)

    ``negative_floor`` f takes rows with :math:`\log p_s < f` out of ce. Ratio is the clipped surrogate of PPO
    (arXiv 1707.06347) for a negative advantage. log p_b comes from the scores.
    """
    device = student.device
    target, ce, kl_weight = (sent(x, device) for x in (rows.target, rows.ce_weight, rows.kl_weight))
    if config.negatives == "ce" and config.negative_floor is None:
        return linear_gated_contrastive_loss(student, base, target=target, ce_weight=ce, kl_weight=kl_weight, **head)
    logprob, kl = linear_logprob_kl(student, base, target=target, **head)
    up, down = ce.clamp(min=0), -ce.clamp(max=0)
    since = logprob - torch.where(down > 0, sent(rows.base_logprob, device), logprob.detach())
    if config.negatives == "ratio":
        pushed = since.exp().clamp(min=1 - config.ratio_clip)
    elif config.negatives == "hinge":
        pushed = (since + config.hinge_margin).clamp(min=0)
    else:
        pushed = logprob.masked_fill(logprob < (config.negative_floor or -math.inf), 0)
    loss = (down * pushed - up * logprob + kl_weight * kl).sum()
    return ContrastiveLoss(loss, logprob.detach(), kl.detach())


def _entry(states: BaseStates) -> Tensor:
    assert states.entry is not None
    return states.entry


def _base_rows(known: Sequence[BaseStates], ids: Sequence[list[int]], rows: BatchRows) -> Tensor:
    """Base states [R, H] of the rows; those that are not kept carry no KL, and get a neighbour's."""
    hidden = []
    for n, (state, own) in enumerate(zip(known, ids, strict=True)):
        mine = rows.sequence == n
        place = rows.position[mine] - (len(own) - 1 - len(state.hidden))
        assert not bool((rows.kl_weight[mine][place < 0] != 0).any())
        hidden.append(state.hidden[place.clamp_(min=0)])
    return torch.cat(hidden)
