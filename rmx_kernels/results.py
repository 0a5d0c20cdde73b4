"""What the operators return. B... stands for the leading dimensions of the input, K for top-k."""

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


class VocabStats(NamedTuple):
    """Row statistics of a distribution over the vocabulary; fields that were not requested are None."""

    lse: Tensor  # [B...]     log-sum-exp of the scaled logits, nats
    entropy: Tensor  # [B...]     nats
    logprob: Tensor | None  # [B...]     log p(target), nats; has the shape of the target; None without a target
    topk_logprobs: Tensor | None  # [B..., K]  descending, nats; None where k = 0
    topk_ids: Tensor | None  # [B..., K]  int64, ties to the lower id; None where k = 0


def named(stats: tuple[Tensor, ...], target: Tensor | None, k: int) -> VocabStats:
    """The results of an operator (lse, entropy, logprob, topk_logprobs, topk_ids, ...); None if not requested."""
    lse, entropy, logprob, values, ids = stats[:5]
    return VocabStats(lse, entropy, None if target is None else logprob, values if k else None, ids if k else None)


class ContrastiveLoss(NamedTuple):
    """The weighted sum, and its detached parts for metrics (NaN in rows where they were not computed)."""

    loss: Tensor  # []      differentiable, nats
    logprob: Tensor  # [B...]  log p_student(target); NaN where both weights are zero
    kl: Tensor  # [B...]  KL(p_base || p_student); NaN where kl_weight is zero


class LogprobKL(NamedTuple):
    """Both differentiable with respect to the student."""

    logprob: Tensor  # [B...]  log p_student(target), nats
    kl: Tensor  # [B...]  KL(p_base || p_student), nats, never negative


class DivergenceStats(NamedTuple):
    """Both differentiable with respect to the student."""

    divergence: Tensor  # [B...]  of the student from the teacher, nats, never negative
    entropy: Tensor  # [B...]  of the student, nats


class CrossEntropy(NamedTuple):
    """The loss and its statistics."""

    loss: Tensor  # [] or [B...]  differentiable, nats
    lse: Tensor  # [B...]  log-sum-exp of the scaled logits, nats; NaN in ignored rows. Differentiable
    prediction: Tensor  # [B...]  int64, the most probable token; ignore_index in ignored rows
    accuracy: Tensor  # []  share of the rows whose target is the prediction; NaN without rows


class KeptStats(NamedTuple):
    """Statistics of a distribution renormalised over a set of kept tokens. All are differentiable."""

    logprob: Tensor | None  # [B...]  log q(target), nats; -inf for a target outside the set; None without a target
    entropy: Tensor  # [B...]  of q, nats
    logprobs: Tensor  # [B..., K]  log q of the kept tokens, nats; -inf in empty places


class PolicyLoss(NamedTuple):
    """The loss, and its detached parts for metrics (NaN in ignored rows)."""

    loss: Tensor  # []  differentiable
    logprob: Tensor  # [B, T]  nats
    entropy: Tensor  # [B, T]  nats
    ratio: Tensor  # [B, T]  probability ratio to the policy that sampled, before clipping
    kl: Tensor  # [B, T]  the KL penalty, nats; NaN without one
    clipped: Tensor  # []  share of the tokens whose ratio was clipped


RESULTS = (VocabStats, ContrastiveLoss, LogprobKL, DivergenceStats, CrossEntropy, KeptStats, PolicyLoss)
for kind in RESULTS:  # torch.export saves these by name
    pytree._register_namedtuple(kind, serialized_type_name=f"{__name__}.{kind.__name__}")
