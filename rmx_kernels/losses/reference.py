"""Eager PyTorch: log-probs and KL of a student against a frozen base, tile by tile.

With delta = log p_s - log p_b, KL(p_b || p_s) = sum p_b (e^delta - 1 - delta), because both sum to one. No term is
negative, identical inputs give exactly 0, and an error eps in either normaliser moves the sum by eps^2 / 2 only.

Products with the head, a row: 1 for the student's normaliser, 1 for the base's unless base_lse is given, then 2
recomputed and 1 for dhidden; rows without anchor skip the base's, rows without any weight skip all.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rmx_kernels.head.reference import GradientSink, RowSums, VocabTiles, add_at, pick
from rmx_kernels.logits import Gradients, Needs
from rmx_kernels.losses.op import BASE_MASS_TOLERANCE, LossForward, Pair, Terms, Weights

Norm = tuple[Tensor, Tensor]  # m and log d of each row


def normalisers(tiles: VocabTiles, target: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(m, log d, z[target]) of each row; z[target] is NaN without a target. One product with the head."""
    sums = RowSums(tiles.N, tiles.dtype, tiles.z.x.device)
    chosen = sums.m.new_full((tiles.N,), float("nan"))
    for cols in tiles.columns():
        head = tiles.head(cols)
        for rows in tiles.rows():
            z = tiles(rows, cols, head)
            if target is not None:
                pick(chosen, z, target, rows, cols)
            sums.fold(rows, z, entropy=False)
    return *sums.finish(), chosen


def kl_terms(p_s: Tensor, p_b: Tensor, delta: Tensor) -> Tensor:
    """p_b (e^delta - 1 - delta) = p_s - p_b (1 + delta), without cancellation near 0 or overflow far from it."""
    d = delta.clamp(-0.5, 0.5)
    series = torch.full_like(d, 1 / 6227020800)  # Horner over 1/n!, n = 13 .. 2: 5e-15 of the sum at |delta| = 0.5
    for n in (479001600, 39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2):
        series.mul_(d).add_(1 / n)
    near = series.mul_(d).mul_(d).mul_(p_b)
    far = p_s - p_b * (1 + delta)
    return torch.where(p_b == 0, p_s, torch.where(delta.abs() < 0.5, near, far))


def live_rows(ce_weight: Tensor, kl_weight: Tensor) -> tuple[Tensor, int]:
    """(positions of the rows with a weight, those with an anchor first; how many have one). Waits for a GPU once."""
    anchored = kl_weight != 0
    if not anchored.is_cuda:  # fewer operations, but a GPU would be waited for twice
        anchors = anchored.nonzero().squeeze(1)
        return torch.cat([anchors, ((ce_weight != 0) & ~anchored).nonzero().squeeze(1)]), anchors.shape[0]
    live = anchored | (ce_weight != 0)
    order = torch.argsort(2 - live.int() - anchored.int(), stable=True)
    rows, with_base = torch.stack([live.sum(), anchored.sum()]).tolist()
    return order[:rows], with_base


def split_rows(ce_weight: Tensor, kl_weight: Tensor) -> list[tuple[Tensor, bool]]:
    """(rows, anchored?) of the rows with an anchor and of those with a decision alone; empty groups left out."""
    index, with_base = live_rows(ce_weight, kl_weight)
    return [(rows, anchored) for rows, anchored in ((index[:with_base], True), (index[with_base:], False)) if len(rows)]


@dataclass(frozen=True)
class RowGroup:
    """Rows that are treated alike, with their normalisers (m, log d) and weights; without a base there is no KL."""

    student: VocabTiles
    target: Tensor
    norm: Norm
    base: VocabTiles | None
    base_norm: Norm
    weights: Weights


def groups_of(
    pair: Pair, rows: Sequence[tuple[Tensor | None, bool]], norms: Tensor, weights: Weights
) -> list[RowGroup]:
    """Groups of the rows [N] of a pair: (their positions or None for all, with a base?); norms are [4, N]."""
    groups = []
    for index, with_base in rows:
        where = slice(None) if index is None else index
        m, log_d, base_m, base_log_d = norms[:, where]
        base = VocabTiles(pair.base, index) if with_base else None
        own = weights[0][where], weights[1][where]
        student = VocabTiles(pair.student, index)
        groups.append(RowGroup(student, pair.target[where], (m, log_d), base, (base_m, base_log_d), own))
    return groups


def sweep(groups: Sequence[RowGroup], sink: GradientSink, *, values: bool = True) -> list[Tensor | None]:
    """KL of each row of each group; adds ce (p_s - onehot) + kl (p_s - p_b) to the sink, if it is active.

    Rows whose base normaliser belongs to other logits, so that p_b does not sum to one, get NaN. Without ``values``
    neither is looked at, and the gradients alone are made.
    """
    kls = [torch.zeros_like(group.norm[0]) if group.base is not None and values else None for group in groups]
    masses = [None if kl is None else torch.zeros_like(kl) for kl in kls]
    whole = VocabTiles(sink.z)
    for cols in whole.columns():
        head = whole.head(cols)
        sink.open(cols, head)
        for group, kl, mass in zip(groups, kls, masses, strict=True):
            m, log_d = group.norm
            ce, kl_weight = group.weights
            for rows in group.student.rows():
                z = group.student(rows, cols, head)
                log_s = (z - m[rows, None]) - log_d[rows, None]
                p_s = log_s.exp()
                dz = p_s * ce[rows, None] if sink.active else None
                if group.base is not None:
                    base_m, base_log_d = group.base_norm
                    log_b = (group.base(rows, cols, head) - base_m[rows, None]) - base_log_d[rows, None]
                    p_b = log_b.exp()
                    if kl is not None and mass is not None:
                        kl[rows] += kl_terms(p_s, p_b, log_s.sub_(log_b)).sum(-1)
                        mass[rows] += p_b.sum(-1)
                    if dz is not None:  # p_s - p_b first: it is exact where they are close
                        dz.addcmul_(p_s.sub_(p_b), kl_weight[rows, None])
                if dz is not None:
                    add_at(dz, -ce[rows], group.target[rows], cols)
                    sink.add(group.student, rows, dz, z)
        sink.close()
    for group, kl, mass in zip(groups, kls, masses, strict=True):
        if kl is not None and mass is not None:
            bad = (mass - 1).abs() > BASE_MASS_TOLERANCE
            kl[bad] = float("nan")
            sink.poison(group.student, bad)
    return kls


def contrastive_loss(pair: Pair, weights: Weights, base_lse: Tensor | None, gradient: bool) -> LossForward:
    z, lead = pair.student, pair.student.lead
    pair = pair.rows()._replace(target=pair.target.reshape(-1).long())
    ce, kl_weight = (w.reshape(-1).to(z.real) for w in weights)
    logprob, kl, norms = (ce.new_full((*shape, ce.shape[0]), float("nan")) for shape in ((), (), (4,)))
    rows = split_rows(ce, kl_weight)
    for index, with_base in rows:
        m, log_d, chosen = normalisers(VocabTiles(pair.student, index), pair.target[index])
        logprob[index] = (chosen - m) - log_d
        norms[0, index], norms[1, index] = m, log_d
        if not with_base:
            continue
        if base_lse is not None:
            norms[2, index], norms[3, index] = base_lse.reshape(-1)[index].to(z.real), 0
        else:
            norms[2, index], norms[3, index] = normalisers(VocabTiles(pair.base, index), None)[:2]
    sink = GradientSink(pair.student, (gradient, False, False, gradient, False))
    row_kls = sweep(groups_of(pair, rows, norms, (ce, kl_weight)), sink)
    loss = ce.new_zeros(())
    for (index, _), row_kl in zip(rows, row_kls, strict=True):
        live = ce[index] != 0  # 0 * -inf is not part of the sum
        loss = loss - (ce[index][live] * logprob[index][live]).sum()
        if row_kl is not None:
            kl[index] = row_kl
            loss = loss + (kl_weight[index] * row_kl).sum()
            norms[2, index] = torch.where(row_kl.isnan(), row_kl, norms[2, index])  # so that no gradient is a number
    dx, du = (ce.new_empty(0) for _ in range(2))
    if gradient:
        dx = sink.x.view(z.x.shape)
        du = du if z.lora_hidden is None else sink.lora_hidden.view(z.lora_hidden.shape)
    return loss, logprob.view(lead), kl.view(lead), norms, dx, du


def contrastive_loss_backward(pair: Pair, weights: Weights, norms: Tensor, g_loss: Tensor, needs: Needs) -> Gradients:
    z, pair = pair.student, pair.rows()._replace(target=pair.target.reshape(-1).long())
    ce, kl_weight = (w.reshape(-1).to(z.real) for w in weights)
    sink = GradientSink(pair.student, needs, upstream=g_loss)
    sweep(groups_of(pair, split_rows(ce, kl_weight), norms, (ce, kl_weight)), sink, values=False)
    return sink.gradients(z)


def logprob_kl(pair: Pair) -> Terms:
    lead, pair = pair.student.lead, pair.rows()._replace(target=pair.target.reshape(-1).long())
    m, log_d, chosen = normalisers(VocabTiles(pair.student), pair.target)
    norms = torch.stack([m, log_d, *normalisers(VocabTiles(pair.base), None)[:2]])
    zero = torch.zeros_like(m)
    (kl,) = sweep(groups_of(pair, [(None, True)], norms, (zero, zero)), GradientSink(pair.student, [False] * 5))
    assert kl is not None
    return ((chosen - m) - log_d).view(lead), kl.view(lead), norms


def logprob_kl_backward(
    pair: Pair, norms: Tensor, upstream: tuple[Tensor | None, Tensor | None], needs: Needs
) -> Gradients:
    z, pair = pair.student, pair.rows()._replace(target=pair.target.reshape(-1).long())
    zero = torch.zeros_like(norms[0])
    g_logprob, g_kl = (None if g is None else g.reshape(-1) for g in upstream)
    weights = zero if g_logprob is None else -g_logprob, zero if g_kl is None else g_kl
    sink = GradientSink(pair.student, needs)
    sweep(groups_of(pair, [(None, g_kl is not None)], norms, weights), sink, values=False)
    return sink.gradients(z)
