"""Eager PyTorch: the tiles of entropy_topk's reference, each produced by a slice of the head."""

from torch import Tensor

from rmx_kernels.entropy_topk import reference
from rmx_kernels.results import VocabStats


def run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None,
    *,
    bias: Tensor | None,
    k: int,
    temperature: float,
    softcap: float | None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
) -> VocabStats:
    return reference.run(
        hidden,
        target,
        weight=weight,
        bias=bias,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
        k=k,
        temperature=temperature,
        softcap=softcap,
    )
