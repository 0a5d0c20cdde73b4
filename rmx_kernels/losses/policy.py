"""linear_policy_loss: PPO, GRPO, DAPO, CISPO and GSPO from hidden states, with no tensor of tokens x vocabulary."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmx_kernels import checks, ignored
from rmx_kernels.logits import LoRA
from rmx_kernels.losses.api import linear_logprob_kl
from rmx_kernels.results import PolicyLoss
from rmx_kernels.statistics.api import linear_entropy_topk

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")


class PolicyOptions(NamedTuple):
    r"""What :func:`linear_policy_loss` minimises. The defaults are those of GRPO.

    With the advantage A and :math:`r = e^{\log p - \log p_\mathrm{old}}` (for ``ratio="sequence"`` e to the mean of
    that difference over the tokens of a sequence), a token's term is

    .. math::
        \mathrm{clip}: \; -\min(\min(r, \delta) A, \; \mathrm{clamp}(r, 1 - \epsilon_l, 1 + \epsilon_h) A), \qquad
        \mathrm{cispo}: \; -\mathrm{sg}[\min(r, \epsilon_h)] \, A \log p

    plus ``kl_coef`` times a KL penalty, with :math:`d = \log p_\mathrm{ref} - \log p`:

    .. math::
        k_1 = -d, \quad k_2 = d^2 / 2, \quad k_3 = e^d - d - 1, \quad
        \mathrm{full} = \mathrm{KL}(p_\mathrm{base} \,\|\, p)
    """

    objective: str = "clip"  # or cispo
    ratio: str = "token"  # or sequence (GSPO)
    clip_low: float = 0.2  # epsilon_l
    clip_high: float = 0.2  # epsilon_h; for cispo, the bound of the ratio itself
    delta: float | None = None  # upper bound of the ratio where the advantage is negative (dual clip)
    kl: str = "k3"  # k1, k2, k3, full
    kl_coef: float = 0.0
    entropy_coef: float = 0.0  # subtracts this times the mean entropy
    # token-mean: the sum over tokens divided by their number (BNPO; DAPO on one device). seq-mean-token-mean: GRPO.
    # seq-mean-token-sum: the mean of sums. A number: the sum divided by it (Dr. GRPO: sequences x longest).
    aggregation: str | float = "seq-mean-token-mean"


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    old_logprob: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    ref_logprob: Tensor | None = None,
    base_hidden: Tensor | None = None,
    options: PolicyOptions | None = None,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    impl: str | None = None,
) -> PolicyLoss:
    r"""The clipped policy-gradient loss of sampled tokens, from the hidden states that predict them.

    The equations are in :class:`PolicyOptions`. Value and gradient cost 2 products of the rows that count with a frozen
    head: one for the logits and, in the same pass, one for the gradient of hidden. An entropy bonus makes it 3, since
    the backward pass computes the logits again. A "full" KL adds 5.

    Args:
        hidden: [B, T, H], the final hidden states that predict the tokens of B completions. Differentiable.
        weight: output head [V, H]. Differentiable, as are bias and the LoRA pair. Dtypes may differ, and autocast
            applies, as in :func:`linear_entropy_topk`.
        target: the sampled tokens [B, T], int64 or int32.
        advantage: [B], or [B, T] for one per token. A constant.
        old_logprob: [B, T], log-probs under the policy that sampled; None uses the current ones (r = 1).
        mask: [B, T], non-zero where a token counts; None for all. Other rows are not read.
        ref_logprob: [B, T], log-probs under the reference, for the KL penalties k1 to k3.
        base_hidden: [B, T, H] of a base that shares the head, for "full" or instead of ref_logprob. A constant.
        options: None for the defaults.
        bias, lora, temperature, softcap, impl: as in :func:`linear_entropy_topk`; temperature a number, or [B, T] for
            one per token; it also divides the base's logits. The base has no lora.
        ignore_index: a token with this target is ignored, as if its mask were 0. None: no such id.

    Returns:
        :class:`PolicyLoss`. A mean over no tokens is 0, as in TRL.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: PPO (arXiv 1707.06347), GRPO (2402.03300), DAPO (2503.14476), CISPO (2506.13585), GSPO (2507.18071), dual
    clip (1912.09729); k1 to k3: J. Schulman, Approximating KL Divergence.

    >>> h = torch.zeros(1, 2, 3, requires_grad=True)
    >>> linear_policy_loss(h, torch.ones(4, 3), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)).loss
    tensor(-1., grad_fn=<MeanBackward0>)
    """
    options = PolicyOptions() if options is None else options
    _check(hidden, advantage, mask, options, ref_logprob, base_hidden)
    rows = hidden.shape[:-1]
    for name, value in (("old_logprob", old_logprob), ("ref_logprob", ref_logprob)):
        if value is not None:
            checks.row_weights(name, value, rows, hidden.device)
    live = torch.ones(rows, dtype=torch.bool, device=hidden.device) if mask is None else mask != 0
    target, missing = ignored.without(target, ignore_index)
    checks.targets(target, rows, None, hidden.device)
    if missing is not None:
        live = live & ~missing
    head: dict[str, Any] = {"bias": bias, "softcap": softcap, "impl": impl}
    head["temperature"] = checks.temperature_of(temperature, hidden, live)
    own, ids = hidden[live], target[live]
    alone = not options.entropy_coef  # the log-probs have a gradient, and nothing else does
    stats = linear_entropy_topk(own, weight, ids, lora=lora, early_gradient=alone, **head)
    assert stats.logprob is not None
    logprob, entropy = (x.new_zeros(rows).masked_scatter(live, x) for x in (stats.logprob, stats.entropy))
    old = logprob.detach() if old_logprob is None else torch.where(live, old_logprob, 0.0)
    tokens = live.to(logprob.dtype)
    lengths = tokens.sum(-1, keepdim=True).clamp(min=1)
    log_ratio = (logprob - old) * tokens
    if options.ratio == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / lengths
    ratio = log_ratio.exp()
    A = advantage if advantage.dim() == 2 else advantage.unsqueeze(1)
    if options.objective == "cispo":
        terms = -ratio.clamp(max=options.clip_high).detach() * A * logprob
        clipped = ratio > options.clip_high
    else:
        bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
        capped = ratio if options.delta is None else ratio.clamp(max=options.delta)
        terms = -torch.minimum(capped * A, bounded * A)
        clipped = ((ratio < 1 - options.clip_low) & (A < 0)) | ((ratio > 1 + options.clip_high) & (A > 0))
    kl = torch.full_like(logprob, float("nan"))
    if options.kl_coef:
        if options.kl == "full":
            assert base_hidden is not None
            penalty = linear_logprob_kl(own, base_hidden.detach()[live], weight, ids, lora=lora, **head).kl
        else:
            reference = _reference(ref_logprob, base_hidden, weight, target, live, head)
            penalty = _estimate(options.kl, reference - stats.logprob)
        kl = torch.zeros_like(logprob).masked_scatter(live, penalty.to(logprob.dtype))
        terms = terms + options.kl_coef * kl
    loss = _aggregated(terms.expand(rows), tokens, lengths, options.aggregation)
    if options.entropy_coef:
        loss = loss - options.entropy_coef * (entropy * tokens).sum() / tokens.sum().clamp(min=1)
    parts = [torch.where(live, x.detach(), float("nan")) for x in (logprob, entropy, ratio.expand(rows), kl)]
    share = (clipped.expand(rows) & live).sum() / tokens.sum().clamp(min=1)
    return PolicyLoss(loss, parts[0], parts[1], parts[2], parts[3], share)


def _reference(
    ref_logprob: Tensor | None,
    base_hidden: Tensor | None,
    weight: Tensor,
    target: Tensor,
    live: Tensor,
    head: dict[str, Any],
) -> Tensor:
    """log p_ref of the tokens that count [n]."""
    if ref_logprob is not None:
        return ref_logprob[live]
    assert base_hidden is not None
    with torch.no_grad():
        found = linear_entropy_topk(base_hidden[live], weight, target[live], **head).logprob
    assert found is not None
    return found


def _estimate(kind: str, d: Tensor) -> Tensor:
    """The KL penalty from d = log p_ref - log p."""
    return {"k1": lambda: -d, "k2": lambda: d.square() / 2, "k3": lambda: torch.expm1(d) - d}[kind]()


def _aggregated(terms: Tensor, tokens: Tensor, lengths: Tensor, aggregation: str | float) -> Tensor:
    """The terms [B, T] of the tokens that count, as one number."""
    sums = torch.where(tokens > 0, terms, 0.0)  # 0 * inf is not part of the sum
    if aggregation == "token-mean":
        return sums.sum() / tokens.sum().clamp(min=1)
    if aggregation == "seq-mean-token-mean":
        return (sums.sum(-1, keepdim=True) / lengths).mean()
    if aggregation == "seq-mean-token-sum":
        return sums.sum(-1).mean()
    return sums.sum() / float(aggregation)


def _check(
    hidden: object,
    advantage: object,
    mask: object,
    options: PolicyOptions,
    ref_logprob: object,
    base_hidden: object,
) -> None:
    checks.floating("hidden", hidden, 3)
    assert isinstance(hidden, Tensor)
    if hidden.dim() != 3:
        raise ValueError(f"hidden: expected shape [B, T, H], got {tuple(hidden.shape)}")
    checks.is_tensor("advantage", advantage)
    assert isinstance(advantage, Tensor)
    whole = advantage.dim() == 1
    checks.row_weights("advantage", advantage, hidden.shape[: 1 if whole else 2], hidden.device)
    if mask is not None:
        checks.is_tensor("mask", mask)
        assert isinstance(mask, Tensor)
        if mask.shape != hidden.shape[:2] or mask.device != hidden.device:
            raise ValueError(
                f"mask: expected shape {tuple(hidden.shape[:2])} on {hidden.device}, got {tuple(mask.shape)} on "
                f"{mask.device}"
            )
    for name, values in (
        ("objective", ("clip", "cispo")),
        ("ratio", ("token", "sequence")),
        ("kl", ("k1", "k2", "k3", "full")),
    ):
        if getattr(options, name) not in values:
            raise ValueError(f"{name}: expected one of {', '.join(values)}, got {getattr(options, name)!r}")
    how = options.aggregation
    if how not in AGGREGATIONS and (isinstance(how, bool | str) or not how > 0):
        raise ValueError(f"aggregation: expected one of {', '.join(AGGREGATIONS)}, or a number above 0, got {how!r}")
    if base_hidden is not None:
        checks.like("base_hidden", base_hidden, "hidden", hidden, mixed=True)
    if options.kl_coef and base_hidden is None and (options.kl == "full" or ref_logprob is None):
        needed = "base_hidden" if options.kl == "full" else "ref_logprob or base_hidden"
        raise ValueError(f"{needed}: expected one for kl={options.kl!r} with kl_coef={options.kl_coef}, got none")
