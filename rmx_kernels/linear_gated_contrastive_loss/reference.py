"""Eager PyTorch: gated_contrastive_loss's reference over tiles that a slice of the head produces."""

from torch import Tensor

from rmx_kernels.gated_contrastive_loss import reference
from rmx_kernels.results import ContrastiveLoss


def run(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    *,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    base_lse: Tensor | None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
) -> ContrastiveLoss:
    return reference.run(
        hidden,
        base_hidden,
        target,
        ce_weight,
        kl_weight,
        weight=weight,
        bias=bias,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
        temperature=temperature,
        softcap=softcap,
        base_lse=base_lse,
    )
