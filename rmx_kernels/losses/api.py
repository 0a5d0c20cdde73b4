"""gated_contrastive_loss, linear_gated_contrastive_loss and linear_logprob_kl: a student against a frozen base.

The linear operators store no tensor of size [tokens, vocabulary].
"""

from typing import Any

from torch import Tensor

from rmx_kernels import checks, choice, dispatch, ignored
from rmx_kernels.logits import LoRA, linear, plain
from rmx_kernels.losses.op import Pair, contrastive_loss, logprob_kl
from rmx_kernels.results import ContrastiveLoss, LogprobKL


def gated_contrastive_loss(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    impl: str | None = None,
) -> ContrastiveLoss:
    r"""The sum over rows of a weighted negative log-prob and a weighted full-vocabulary KL to the base.

    .. math::
        \mathrm{loss} = \sum_i c_i \, (-\log p_{s,i}(\mathrm{target}_i))
            + w_i \, \mathrm{KL}(p_{b,i} \,\|\, p_{s,i}), \qquad
        \frac{\partial\,\mathrm{loss}}{\partial z_s} = (c + w) p_s - c\,\mathrm{onehot} - w\,p_b

    The weights c = ``ce_weight`` (of any sign: an advantage) and w = ``kl_weight`` include every mean and gate, so the
    loss never depends on how sequences are batched. If both weights of a row are zero, neither the row nor its target
    is read. A row with kl_weight = 0 needs no base.

    Args:
        logits: the student's, [..., V], bfloat16, float16, float32 or float64. Differentiable.
        base_logits: the frozen base's, same shape, dtype and device; a constant, so it must not require a gradient.
        target: token ids [...] in [0, V), int64 or int32.
        ce_weight, kl_weight: [...] floating point, constants.
        temperature, softcap: as in :func:`entropy_topk`, for student and base alike: temperature_i divides both logits
            of row i. It is not read in a row whose two weights are zero.
        ignore_index: a target with this id is ignored: ce_weight counts as 0 in its row. None: no such id.
        impl: None (best available), "reference", "cpu" or "triton".

    Returns:
        :class:`ContrastiveLoss` of float32 (float64 for float64 logits), in nats. ``logprob`` and ``kl`` are per
        row and detached. kl is NaN where kl_weight is zero, logprob where both weights are zero.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: loss of arXiv 2605.06241, section 3.

    >>> import torch
    >>> z, one = torch.zeros(1, 4), torch.ones(1)
    >>> gated_contrastive_loss(z, z, torch.tensor([2]), one, one).loss
    tensor(1.3863)
    """
    checks.floating("logits", logits, 1)
    checks.base("base_logits", base_logits, "logits", logits)
    checks.scaling(temperature, softcap, logits)
    target, missing = ignored.without(target, ignore_index)
    checks.loss_rows(target, ce_weight, kl_weight, logits.shape[:-1], logits.device)
    ce_weight = ignored.filled(ce_weight, missing)
    chosen = choice.chosen("gated_contrastive_loss", impl, logits)
    z = plain(logits, temperature, softcap)
    return _counted(contrastive_loss(Pair(z, base_logits, target), ce_weight, kl_weight, None, chosen), missing)


def linear_gated_contrastive_loss(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    base_lse: Tensor | None = None,
    process_group: Any = None,
    reduce_hidden_grad: bool = True,
    impl: str | None = None,
) -> ContrastiveLoss:
    r"""The results of :func:`gated_contrastive_loss` for student and base logits that share one output head.

    .. math::
        \mathrm{loss} = \sum_i c_i \, (-\log p_{s,i}(\mathrm{target}_i)) + w_i \, \mathrm{KL}(p_{b,i} \,\|\, p_{s,i})

        z_{s,i} = \mathrm{cap}(h_{s,i} (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}_i, \quad
        z_{b,i} = \mathrm{cap}(h_{b,i} W^\top + b) / \mathrm{temperature}_i

    Args:
        hidden: the student's final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        base_hidden: the frozen base's, same shape and device; it must not require a gradient.
        weight: output head [V, H]. Its gradient comes from the student only: p_b is a constant. Dtypes may differ,
            and autocast applies, as in :func:`linear_entropy_topk`.
        target: token ids [...] in [0, V), int64 or int32; not read in rows whose two weights are zero.
        ce_weight, kl_weight: [...] floating point, constants.
        bias: [V] or None. Differentiable like weight.
        lora: (A [r, H], B [V, r], scale) of the student only, with tensors on the device of hidden, or None. A
            and B are differentiable; scale is a finite number. W + scale B A is never stored.
            The gradient of A is a sum over all rows, so hidden must also be finite in rows without weight.
        temperature, softcap, ignore_index: as in :func:`gated_contrastive_loss`.
        base_lse: log-sum-exp [...] of the base's scaled logits, if known (``VocabStats.lse`` from scoring with the
            same temperature and softcap), float32 or float64. It saves one product with the head. If it does not
            match base_hidden (the base's mass is off by over 5 %), kl, loss and gradients are NaN. Not with a
            process_group.
        process_group, reduce_hidden_grad: as in :func:`linear_entropy_topk`; it calls
            ``vocab_parallel_gated_contrastive_loss``.
        impl: None (best available), "reference", "cpu" or "triton".

    Returns:
        :class:`ContrastiveLoss`, as :func:`gated_contrastive_loss`. Scratch memory does not grow with N x V.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: loss of arXiv 2605.06241, section 3.

    >>> import torch
    >>> h, one = torch.zeros(1, 3), torch.ones(1)
    >>> linear_gated_contrastive_loss(h, h, torch.ones(4, 3), torch.tensor([2]), one, one).loss
    tensor(1.3863)
    """
    target, missing = ignored.without(target, ignore_index)
    if process_group is not None:
        checks.process_group(process_group)
        if missing is not None:
            checks.row_weights("ce_weight", ce_weight, missing.shape, missing.device)
            ce_weight = ignored.filled(ce_weight, missing)
        if base_lse is not None:
            raise ValueError("base_lse: expected None with a process_group, which recomputes it, got a tensor")
        head: dict[str, Any] = {"bias": bias, "lora": lora, "temperature": temperature, "softcap": softcap}
        head |= {"group": process_group, "reduce_hidden_grad": reduce_hidden_grad, "impl": impl}
        rows = hidden, base_hidden, weight, target, ce_weight, kl_weight
        over_ranks: ContrastiveLoss = dispatch.sharded("gated_contrastive_loss")(*rows, **head)
        return _counted(over_ranks, missing)
    checks.operand(hidden, weight, bias, lora, temperature, softcap)
    checks.base("base_hidden", base_hidden, "hidden", hidden, mixed=True)
    checks.loss_rows(target, ce_weight, kl_weight, hidden.shape[:-1], hidden.device)
    ce_weight = ignored.filled(ce_weight, missing)
    if base_lse is not None:
        checks.row_weights("base_lse", base_lse, hidden.shape[:-1], hidden.device)
        checks.full_precision("base_lse", base_lse)
    chosen = choice.chosen("linear_gated_contrastive_loss", impl, hidden)
    z = linear(hidden, weight, bias, lora, temperature, softcap)
    pair = Pair(z, base_hidden.to(z.x.dtype), target)
    return _counted(contrastive_loss(pair, ce_weight, kl_weight, base_lse, chosen), missing)


def linear_logprob_kl(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    impl: str | None = None,
) -> LogprobKL:
    r"""The two values per row from which contrastive, clipped, hinge and distillation losses are computed.

    .. math::
        \mathrm{logprob}_i = \log p_{s,i}(\mathrm{target}_i), \qquad
        \mathrm{kl}_i = \mathrm{KL}(p_{b,i} \,\|\, p_{s,i}) = \sum_v p_b (e^\delta - 1 - \delta), \quad
        \delta = \log p_s - \log p_b

    with :math:`z_{s,i} = \mathrm{cap}(h_{s,i} (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}_i` and
    :math:`z_{b,i} = \mathrm{cap}(h_{b,i} W^\top + b) / \mathrm{temperature}_i`.

    Args:
        hidden: the student's final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        base_hidden: the frozen base's, same shape and device; it must not require a gradient.
        weight: output head [V, H]. Its gradient comes from the student only: p_b is a constant. Dtypes may differ,
            and autocast applies, as in :func:`linear_entropy_topk`.
        target: token ids [...] in [0, V), int64 or int32.
        bias: [V] or None. Differentiable like weight.
        lora: (A [r, H], B [V, r], scale) of the student only, with tensors on the device of hidden, or None. A
            and B are differentiable; scale is a finite number. W + scale B A is never stored.
        temperature, softcap, impl: as in :func:`entropy_topk`, applied to both distributions.
        ignore_index: a target with this id is ignored: its logprob is 0 and has no gradient. None: no such id.

    Returns:
        :class:`LogprobKL` of float32 (float64 for float64 inputs), in nats. kl >= 0, and exactly 0 if both hidden
        states are equal and there is no lora. Scratch memory does not grow with N x V.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: loss of arXiv 2605.06241, section 3, as its row terms.

    >>> import torch
    >>> h = torch.zeros(1, 3)
    >>> linear_logprob_kl(h, h, torch.ones(4, 3), torch.tensor([2]))
    LogprobKL(logprob=tensor([-1.3863]), kl=tensor([0.]))
    """
    checks.operand(hidden, weight, bias, lora, temperature, softcap)
    checks.base("base_hidden", base_hidden, "hidden", hidden, mixed=True)
    target, missing = ignored.without(target, ignore_index)
    checks.targets(target, hidden.shape[:-1], None, hidden.device)
    chosen = choice.chosen("linear_logprob_kl", impl, hidden)
    z = linear(hidden, weight, bias, lora, temperature, softcap)
    found = logprob_kl(Pair(z, base_hidden.to(z.x.dtype), target), chosen)
    return found._replace(logprob=ignored.filled(found.logprob, missing))


def _counted(found: ContrastiveLoss, missing: Tensor | None) -> ContrastiveLoss:
    """Set the log-probs of ignored targets to NaN, as in all rows without one."""
    if missing is None:
        return found
    return found._replace(logprob=ignored.filled(found.logprob, missing, float("nan")))
