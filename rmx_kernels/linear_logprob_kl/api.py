"""linear_logprob_kl: per-row log-prob and KL to a frozen base, both differentiable, without logits."""

from torch import Tensor

import rmx_kernels.linear_logprob_kl.ops  # noqa: F401  registers the schemas
from rmx_kernels import checks, dispatch
from rmx_kernels.lora import LoRA, split
from rmx_kernels.results import LogprobKL


def linear_logprob_kl(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> LogprobKL:
    r"""The two row values from which contrastive, clipped, hinge and distillation losses are made.

    .. math::
        \mathrm{logprob}_i = \log p_{s,i}(\mathrm{target}_i), \qquad
        \mathrm{kl}_i = \mathrm{KL}(p_{b,i} \,\|\, p_{s,i}) = \sum_v p_b (e^\delta - 1 - \delta), \quad
        \delta = \log p_s - \log p_b

    of :math:`z_s = \mathrm{cap}(h_s (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}` and
    :math:`z_b = \mathrm{cap}(h_b W^\top + b) / \mathrm{temperature}`.

    Args:
        hidden: the student's final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        base_hidden: the frozen base's, same shape, dtype and device; may not require a gradient.
        weight: output head [V, H]. Its gradient, if asked for, is the student's alone: p_b is a constant.
        target: token ids [...] in [0, V), int64 or int32.
        bias: [V] or None. Differentiable like weight.
        lora: (A [r, H], B [V, r], scale) of the student alone, the tensors of the same dtype and device as hidden, or
            None. A and B are differentiable; scale is a finite number. W + scale B A is never made.
        temperature, softcap, impl: as in :func:`entropy_topk`, applied to both distributions.

    Returns:
        :class:`LogprobKL` of float32 (float64 for float64 inputs), in nats: kl >= 0, and exactly 0 where both hidden
        states are equal and there is no lora. Scratch memory does not grow with N x V.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: loss of arXiv 2605.06241, section 3, as its row terms.

    >>> import torch
    >>> h = torch.zeros(1, 3)
    >>> linear_logprob_kl(h, h, torch.ones(4, 3), torch.tensor([2]))
    LogprobKL(logprob=tensor([-1.3863]), kl=tensor([0.]))
    """
    checks.floating("hidden", hidden, 1)
    checks.like("base_hidden", base_hidden, "hidden", hidden)
    checks.frozen("base_hidden", base_hidden, "the base distribution is a constant")
    checks.head(hidden, weight, bias)
    checks.lora(hidden, weight, lora)
    checks.scaling(temperature, softcap)
    checks.targets(target, hidden.shape[:-1], weight.shape[0], hidden.device)
    module = dispatch.load("linear_logprob_kl", impl, hidden.device, hidden.dtype)
    lora_hidden, lora_weight = split(hidden, lora)
    return module.run(
        hidden,
        base_hidden,
        weight,
        target,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
    )
