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
) -> VocabStats:
    return reference.run(hidden, target, weight=weight, bias=bias, k=k, temperature=temperature, softcap=softcap)
