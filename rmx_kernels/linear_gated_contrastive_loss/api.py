"""linear_gated_contrastive_loss: the training loss from hidden states, with no tensor of size [tokens, vocabulary]."""

from torch import Tensor

import rmx_kernels.linear_gated_contrastive_loss.ops  # noqa: F401  registers the schemas
from rmx_kernels import checks, dispatch
from rmx_kernels.lora import LoRA, split
from rmx_kernels.results import ContrastiveLoss


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
    temperature: float = 1.0,
    softcap: float | None = None,
    base_lse: Tensor | None = None,
    impl: str | None = None,
) -> ContrastiveLoss:
    r"""What :func:`gated_contrastive_loss` returns for student and base logits that share one output head.

    .. math::
        \mathrm{loss} = \sum_i c_i \, (-\log p_{s,i}(\mathrm{target}_i)) + w_i \, \mathrm{KL}(p_{b,i} \,\|\, p_{s,i})

        z_s = \mathrm{cap}(h_s (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}, \quad
        z_b = \mathrm{cap}(h_b W^\top + b) / \mathrm{temperature}

    Args:
        hidden: the student's final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        base_hidden: the frozen base's, same shape, dtype and device; may not require a gradient.
        weight: output head [V, H]. Its gradient, if asked for, is the student's alone: p_b is a constant.
        target: token ids [...] in [0, V), int64 or int32; not read in rows whose two weights are zero.
        ce_weight, kl_weight: [...] floating point, constants.
        bias: [V] or None. Differentiable like weight.
        lora: (A [r, H], B [V, r], scale) of the student alone, the tensors of the same dtype and device as hidden, or
            None. A and B are differentiable; scale is a finite number. W + scale B A is never made.
            The gradient of A is a sum over all rows, so hidden must be finite in rows without weight as well.
        temperature, softcap: as in :func:`entropy_topk`, applied to both.
        base_lse: log-sum-exp [...] of the base's scaled logits where it is known already (``VocabStats.lse`` of
            scoring with the same temperature and softcap), which saves one product with the head; float32 or
            float64. Where it does not fit base_hidden (the base's mass is off by over 5 %), kl, loss and
            gradients are NaN.
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
    checks.floating("hidden", hidden, 1)
    checks.like("base_hidden", base_hidden, "hidden", hidden)
    checks.frozen("base_hidden", base_hidden, "the base distribution is a constant")
    checks.head(hidden, weight, bias)
    checks.lora(hidden, weight, lora)
    checks.scaling(temperature, softcap)
    rows = hidden.shape[:-1]
    checks.row_weights("ce_weight", ce_weight, rows, hidden.device)
    checks.row_weights("kl_weight", kl_weight, rows, hidden.device)
    if base_lse is not None:
        checks.row_weights("base_lse", base_lse, rows, hidden.device)
        checks.full_precision("base_lse", base_lse)
    checks.targets(target, rows, weight.shape[0], hidden.device, used=(ce_weight != 0) | (kl_weight != 0))
    module = dispatch.load("linear_gated_contrastive_loss", impl, hidden.device, hidden.dtype)
    lora_hidden, lora_weight = split(hidden, lora)
    return module.run(
        hidden,
        base_hidden,
        weight,
        target,
        ce_weight,
        kl_weight,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        base_lse=base_lse,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
    )
