"""gated_contrastive_loss: weighted cross-entropy and KL anchor from the logits of a student and a frozen base."""

from torch import Tensor

import rmx_kernels.gated_contrastive_loss.ops  # noqa: F401  registers the schemas
from rmx_kernels import checks, dispatch
from rmx_kernels.results import ContrastiveLoss


def gated_contrastive_loss(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> ContrastiveLoss:
    r"""The sum over rows of a weighted negative log-prob and a weighted full-vocabulary KL to the base.

    .. math::
        \mathrm{loss} = \sum_i c_i \, (-\log p_{s,i}(\mathrm{target}_i))
            + w_i \, \mathrm{KL}(p_{b,i} \,\|\, p_{s,i}), \qquad
        \frac{\partial\,\mathrm{loss}}{\partial z_s} = (c + w) p_s - c\,\mathrm{onehot} - w\,p_b

    The weights c = ``ce_weight`` (of any sign: an advantage) and w = ``kl_weight`` hold every mean and gate, so the
    loss never depends on how sequences are batched. A row whose two weights are zero is not read, neither is its
    target; a row with kl_weight = 0 needs no base.

    Args:
        logits: the student's, [..., V], bfloat16, float16, float32 or float64. Differentiable.
        base_logits: the frozen base's, same shape, dtype and device; a constant, so it may not require a gradient.
        target: token ids [...] in [0, V), int64 or int32.
        ce_weight, kl_weight: [...] floating point, constants.
        temperature, softcap: as in :func:`entropy_topk`, applied to both.
        impl: None (best available), "reference", "cpu" or "triton".

    Returns:
        :class:`ContrastiveLoss` of float32 (float64 for float64 logits), in nats. ``logprob`` and ``kl`` are per
        row, detached, and NaN where they were not computed: kl where kl_weight is zero, logprob where both are.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: loss of arXiv 2605.06241, section 3.

    >>> import torch
    >>> z, one = torch.zeros(1, 4), torch.ones(1)
    >>> gated_contrastive_loss(z, z, torch.tensor([2]), one, one).loss
    tensor(1.3863)
    """
    checks.floating("logits", logits, 1)
    checks.like("base_logits", base_logits, "logits", logits)
    checks.frozen("base_logits", base_logits, "the base distribution is a constant")
    checks.scaling(temperature, softcap)
    rows, V = logits.shape[:-1], logits.shape[-1]
    checks.row_weights("ce_weight", ce_weight, rows, logits.device)
    checks.row_weights("kl_weight", kl_weight, rows, logits.device)
    checks.targets(target, rows, V, logits.device, used=(ce_weight != 0) | (kl_weight != 0))
    module = dispatch.load("gated_contrastive_loss", impl, logits.device, logits.dtype)
    return module.run(logits, base_logits, target, ce_weight, kl_weight, temperature=temperature, softcap=softcap)
