"""vocab_parallel_entropy_topk and vocab_parallel_gated_contrastive_loss: what every rank calls."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rmx_kernels import checks, choice
from rmx_kernels.logits import Logits, LoRA, linear, scaling_of
from rmx_kernels.losses.api import linear_gated_contrastive_loss
from rmx_kernels.results import ContrastiveLoss, VocabStats, named
from rmx_kernels.statistics.api import linear_entropy_topk
from rmx_kernels.vocab_parallel.agreement import (
    MAX_VOCAB,
    UNKNOWN,
    Claim,
    agree,
    gradient_of,
    membership,
    shard_start,
    targets_of,
    values_of,
)
from rmx_kernels.vocab_parallel.functions import Divergence, Replicated, Statistics
from rmx_kernels.vocab_parallel.shard import Shard


def vocab_parallel_entropy_topk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    start: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    k: int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
    check: bool = True,
) -> VocabStats:
    r"""The results of :func:`linear_entropy_topk` for a head whose rows are sharded over the ranks of a group.

    .. math::
        \mathrm{lse} = \log \sum_r e^{\mathrm{lse}_r}, \quad \pi_r = e^{\mathrm{lse}_r - \mathrm{lse}}, \quad
        H = \sum_r \pi_r (H_r - \log \pi_r), \quad \log p(y) = \log p_r(y) + \log \pi_r

    Every rank of the group calls it with its own rows of the head; all other arguments are equal on every rank. Hidden
    states and results are replicated, as in Megatron's vocabulary-parallel cross-entropy. Upstream gradients have to be
    equal on every rank too: each rank computes the whole loss from the results, not a share of it.

    Args:
        hidden: final hidden states [..., H], the same on every rank, bfloat16, float16, float32 or float64.
            Differentiable: its gradient is that of the whole vocabulary, on every rank.
        weight: this rank's rows [V_r, H] of the output head, ids start to start + V_r - 1. The rows follow rank order,
            without gap or overlap. V_r may differ between ranks, but is at least 1. Differentiable, as is bias.
        target: token ids [...] in [0, V), int64 or int32, the same on every rank; None for no ``logprob``.
        start: id of this rank's first row; None, only with ``check``, computes it from the rows of the lower ranks.
        group: the process group; None for the default one. Works with gloo and NCCL.
        reduce_hidden_grad: False skips the sum over ranks in the backward pass: hidden gets this rank's share of its
            gradient, for frameworks that sum it themselves (tensor parallelism with sequence parallelism). The small
            gradient of lora's A still is that of the whole vocabulary.
        bias: this rank's [V_r], or None on all ranks. A rank whose bias is all -inf has no probability mass. A row
            whose logits on a rank are all -inf for another reason is NaN.
        lora: (A [r, H], B [V_r, r], scale): A and scale are equal on every rank, B is this rank's rows. The gradient
            of A is that of the whole vocabulary, on every rank.
        k: 0 <= k <= V. Ties go to the lower id. The log-probs of equal logits on two ranks differ by rounding, so
            tokens of two ranks whose log-probs are within 4 roundings of each other are ties.
        temperature, softcap, impl: as in :func:`entropy_topk`, also a temperature per row; equal on every rank (impl
            may differ).
        check: first compare shapes, arguments and checksums of values that have to be equal on all ranks, so that a
            difference raises an error on every rank. It waits for the device. Without the check, a difference causes a
            hang or a wrong result, and a target that no rank holds gets the log-prob -inf.

    Returns:
        :class:`VocabStats` of float32 (float64 for float64 inputs), in nats. They are equal on every rank, and equal up
        to rounding to those of one process. In a group of one, this is :func:`linear_entropy_topk`.

    Each rank sends 4 (4 + 2 k) N bytes forward (8 (4 + 2 k) N in float64), and 224 for the check. Backward sums 4 N H
    bytes over ranks (8 N H), and 4 N r more with lora, for tensors that require a gradient. The statistics are merged
    in rank order; the backend chooses the order of the backward sum.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on every rank if any rank has one. RuntimeError:
        torch.distributed is not initialised. BackendUnavailable: ``impl`` cannot run here.

    Source: vocabulary-parallel cross-entropy of Megatron-LM (arXiv 1909.08053, section 3); the rest by the chain rules.
    """
    world = membership(group)

    def claim() -> Claim:
        found = _check_head(hidden, weight, start, bias, lora, temperature, softcap, check)
        found |= {"reduce_hidden_grad": bool(reduce_hidden_grad)}
        checks.top_k(k, MAX_VOCAB)
        if target is not None:
            checks.targets(target, hidden.shape[:-1], MAX_VOCAB, hidden.device)
        _check_temperatures(temperature)
        choice.chosen("linear_entropy_topk", impl, hidden)
        found |= {"operator": 0, "k": k}
        if check:
            found |= targets_of(target) | values_of("hidden", hidden) | _temperatures(temperature, hidden)
            if target is not None:
                found |= values_of("target", target.long())
        return found

    start = agree(claim, group) if check else int(claim()["start"])
    if world == 1:
        scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
        return linear_entropy_topk(hidden, weight, target, bias=bias, lora=lora, k=k, impl=impl, **scaling)
    shard = Shard(group, start, choice.chosen("linear_entropy_topk", impl, hidden), reduce_hidden_grad)
    z = linear(hidden, weight, bias, _pair(lora, shard), temperature, softcap).rows()
    ids = None if target is None else target.reshape(-1).long()
    lse, entropy, logprob, values, topk_ids = Statistics.apply(shard, *z, ids, k)
    lead = hidden.shape[:-1]
    rows = (x.view(lead) for x in (lse, entropy, logprob))
    return named((*rows, values.view(*lead, k), topk_ids.view(*lead, k)), target, k)


def vocab_parallel_gated_contrastive_loss(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    start: int | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_hidden_grad: bool = True,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
    check: bool = True,
) -> ContrastiveLoss:
    r"""The results of :func:`linear_gated_contrastive_loss` for a head whose rows are sharded over ranks of a group.

    .. math::
        \mathrm{loss} = \sum_i c_i \, (-\log p_{s,i}(\mathrm{target}_i)) + w_i \, \mathrm{KL}(p_{b,i} \,\|\, p_{s,i}),
        \quad \mathrm{KL}(p_b \,\|\, p_s) = \sum_r \pi_r \mathrm{KL}_r + \mathrm{KL}(\pi \,\|\, \rho)

    with :math:`\mathrm{KL}_r` between the distributions within the rows of rank r, and :math:`\pi_r, \rho_r` the mass
    that base and student give to these rows. No term is negative, and equal hidden states give exactly 0.

    Every rank of the group calls it with its own rows of the head and differentiates the same loss; all other arguments
    are equal on every rank, see :func:`vocab_parallel_entropy_topk`. d hidden is that of the whole vocabulary, on every
    rank; d weight, d bias and d B are those of this rank's rows.

    Args:
        hidden, base_hidden: of student and frozen base, [..., H], equal on every rank; hidden is differentiable.
        weight, bias, lora, start, group, reduce_hidden_grad, temperature, softcap, impl, check: as in
            :func:`vocab_parallel_entropy_topk`. The base has no lora; weight's gradient comes from the student only.
        target: token ids [...] of the whole vocabulary; not read in rows whose two weights are zero.
        ce_weight, kl_weight: [...] floating point, constants, the same on every rank.

    Returns:
        :class:`ContrastiveLoss`, as :func:`gated_contrastive_loss`, equal on every rank. In a group of one, this is
        :func:`linear_gated_contrastive_loss`. The gradient is not computed with the value, since it needs results of
        the other ranks: a row with ce_weight costs 3 products with this rank's part, with kl_weight 5, with both 8.

    With n rows with ce_weight and m with kl_weight, each rank sends 16 n + 24 m bytes forward (twice that in float64),
    and 224 for the check. Backward sums 4 (n + m) H bytes over ranks, and 4 (n + m) r more with lora.

    Raises:
        TypeError, ValueError: a wrong argument, by name; on every rank if any rank has one. RuntimeError:
        torch.distributed is not initialised. BackendUnavailable: ``impl`` cannot run here.

    Source: loss of arXiv 2605.06241, section 3.
    """
    world = membership(group)

    def claim() -> Claim:
        found = _check_head(hidden, weight, start, bias, lora, temperature, softcap, check)
        found |= {"reduce_hidden_grad": bool(reduce_hidden_grad)}
        checks.base("base_hidden", base_hidden, "hidden", hidden, mixed=True)
        checks.loss_rows(target, ce_weight, kl_weight, hidden.shape[:-1], hidden.device)
        used = (ce_weight != 0) | (kl_weight != 0)
        checks.target_range(target, MAX_VOCAB, used)
        _check_temperatures(temperature, used)
        for op in ("linear_entropy_topk", "linear_logprob_kl"):
            choice.chosen(op, impl, hidden)
        found |= {"operator": 1, "k": 0}
        if check:
            live = {f"rows with {n}_weight": int((w != 0).sum()) for n, w in (("ce", ce_weight), ("kl", kl_weight))}
            found |= targets_of(target, used) | live | values_of("hidden", hidden[used])
            found |= values_of("base_hidden", base_hidden[kl_weight != 0]) | values_of("target", target[used].long())
            found |= values_of("ce_weight", ce_weight) | values_of("kl_weight", kl_weight)
            found |= _temperatures(temperature, hidden, used)
        return found

    start = agree(claim, group) if check else int(claim()["start"])
    scaling: dict[str, Any] = {"temperature": temperature, "softcap": softcap}
    if world == 1:
        weights = ce_weight, kl_weight
        return linear_gated_contrastive_loss(
            hidden, base_hidden, weight, target, *weights, bias=bias, lora=lora, impl=impl, **scaling
        )
    shard = Shard(group, start, choice.chosen("linear_logprob_kl", impl, hidden), reduce_hidden_grad)
    z = linear(hidden, weight, bias, _pair(lora, shard), temperature, softcap).rows()
    base, ids = base_hidden.detach().to(z.x.dtype).reshape(z.x.shape), target.reshape(-1).long()
    ce, kl_w = (w.detach().reshape(-1).to(z.real) for w in (ce_weight, kl_weight))
    decisions, anchors = ce.nonzero().squeeze(1), kl_w.nonzero().squeeze(1)
    _, _, logprob, _, _ = Statistics.apply(shard, *_rows(z, decisions), ids[decisions], 0)
    anchor_logprob, kl = Divergence.apply(shard, *_rows(z, anchors), base[anchors], ids[anchors])
    loss = (kl_w[anchors].double() * kl.double()).sum() - (ce[decisions].double() * logprob.double()).sum()
    row_logprob, row_kl = (torch.full_like(ce, float("nan")) for _ in range(2))
    row_logprob[anchors], row_kl[anchors] = anchor_logprob, kl.detach()
    row_logprob[decisions] = logprob.detach()
    return ContrastiveLoss(loss.to(ce.dtype), row_logprob.view(target.shape), row_kl.view(target.shape))


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    start: int | None,
    bias: Tensor | None,
    lora: LoRA | None,
    temperature: float | Tensor,
    softcap: float | None,
    check: bool,
) -> Claim:
    checks.operand(hidden, weight, bias, lora, temperature, softcap)
    shard_start(start, weight.shape[0], known_by_others=check)
    claim = {
        "hidden.dtype": checks.FLOATS.index(hidden.dtype),
        "hidden rows": hidden.shape[:-1].numel(),
        "hidden.shape[-1]": hidden.shape[-1],
        "bias given": bias is not None,
        "temperature": 0 if isinstance(temperature, Tensor) else temperature,  # one a row: 0 is not taken
        "softcap": softcap or 0,  # none: 0 is not taken
        "start": UNKNOWN if start is None else start,
        "rows of weight": weight.shape[0],
    }
    if lora is not None:
        claim |= {"lora rank": lora[0].shape[0], "lora scale": lora[2]} | gradient_of("lora A", lora[0])
        if check:
            claim |= values_of("lora A", lora[0])
    return claim | gradient_of("hidden", hidden)


def _check_temperatures(temperature: float | Tensor, used: Tensor | None = None) -> None:
    """Before ranks talk, so that all of them raise if one does."""
    if isinstance(temperature, Tensor):
        checks.temperature_range(temperature, used)


def _temperatures(temperature: float | Tensor, x: Tensor, used: Tensor | None = None) -> Claim:
    """Those of the rows x that are used, as the kernels take them."""
    own = scaling_of(temperature, None, x).row_temperature
    return {} if own is None else values_of("temperature", own if used is None else own[used])


def _pair(lora: LoRA | None, shard: Shard) -> LoRA | None:
    """With an A whose gradient is whole where the one of lora_hidden, which leads to it, is a part."""
    if lora is None or shard.reduce_hidden_grad:
        return lora
    return Replicated.apply(lora[0], shard.group), lora[1], lora[2]


def _rows(z: Logits, index: Tensor) -> Logits:
    lora_hidden = None if z.lora_hidden is None else z.lora_hidden[index]
    return z._replace(x=z.x[index], lora_hidden=lora_hidden, row_temperature=z.temperatures(index))
