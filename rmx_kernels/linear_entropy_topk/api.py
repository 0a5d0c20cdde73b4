"""linear_entropy_topk: row statistics of hidden @ weight.T, which is never stored."""

from torch import Tensor

import rmx_kernels.linear_entropy_topk.ops  # noqa: F401  registers the schemas
from rmx_kernels import checks, dispatch
from rmx_kernels.lora import LoRA, split
from rmx_kernels.results import VocabStats


def linear_entropy_topk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    k: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> VocabStats:
    r"""What :func:`entropy_topk` returns for logits = hidden @ weight.T + bias, without making them.

    .. math:: z = \mathrm{cap}(\mathrm{hidden} \, (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}

    Args:
        hidden: final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        weight: output head [V, H] of the same dtype and device. Differentiable; a frozen head costs no gradient.
        target: token ids [...] in [0, V), int64 or int32; None for no ``logprob``.
        bias: [V] of the same dtype, or None. Differentiable.
        lora: (A [r, H], B [V, r], scale), the tensors of the same dtype and device, or None for a head without
            adapter. A and B are differentiable; scale is a finite number. W + scale B A is never made.
        k, temperature, softcap, impl: as in :func:`entropy_topk`.

    Returns:
        :class:`VocabStats` of float32 (float64 for float64 inputs), in nats. Scratch memory does not grow with N x V.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: scoring pass of arXiv 2605.06241, section 3.

    >>> import torch
    >>> linear_entropy_topk(torch.randn(2, 16), torch.zeros(8, 16)).entropy
    tensor([2.0794, 2.0794])
    """
    checks.floating("hidden", hidden, 1)
    checks.head(hidden, weight, bias)
    checks.lora(hidden, weight, lora)
    checks.scaling(temperature, softcap)
    checks.top_k(k, weight.shape[0])
    if target is not None:
        checks.targets(target, hidden.shape[:-1], weight.shape[0], hidden.device)
    module = dispatch.load("linear_entropy_topk", impl, hidden.device, hidden.dtype)
    lora_hidden, lora_weight = split(hidden, lora)
    return module.run(
        hidden,
        weight,
        target,
        bias=bias,
        k=k,
        temperature=temperature,
        softcap=softcap,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
    )
