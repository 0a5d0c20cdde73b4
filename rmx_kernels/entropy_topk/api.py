"""entropy_topk: row statistics of logits."""

from torch import Tensor

import rmx_kernels.entropy_topk.ops  # noqa: F401  registers the schemas
from rmx_kernels import checks, dispatch
from rmx_kernels.results import VocabStats


def entropy_topk(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    k: int = 0,
    temperature: float = 1.0,
    softcap: float | None = None,
    impl: str | None = None,
) -> VocabStats:
    r"""Log-sum-exp, entropy, log-prob of a target and top-k of each row, in one pass over the vocabulary.

    .. math::
        z = \mathrm{cap}(\mathrm{logits}) / \mathrm{temperature}, \quad p = \mathrm{softmax}(z), \quad
        \mathrm{lse} = \log \sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v, \quad \log p_\mathrm{target}

    with cap(u) = softcap * tanh(u / softcap), or u without a softcap. Entries of -inf have probability 0. A row
    that holds a NaN or +inf, or nothing but -inf, has no distribution: its results are NaN (its ids are arbitrary).

    Args:
        logits: [..., V], bfloat16, float16, float32 or float64. Differentiable.
        target: token ids [...] in [0, V), int64 or int32; None for no ``logprob``.
        k: how many of the most probable tokens to return, 0 <= k <= V. Ties go to the lower id.
        temperature: divides the logits, > 0.
        softcap: bound of the logits in the manner of Gemma 2, > 0, or None.
        impl: None (best available), "reference", "cpu" or "triton".

    Returns:
        :class:`VocabStats` of float32 (float64 for float64 logits), in nats; all but ``topk_ids`` differentiable
        once: d lse = p, d logprob = onehot - p, d entropy = -p (log p + H).

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: entropy gate of arXiv 2605.06241, section 3.

    >>> import torch
    >>> entropy_topk(torch.zeros(2, 8), k=1).entropy
    tensor([2.0794, 2.0794])
    """
    checks.floating("logits", logits, 1)
    checks.scaling(temperature, softcap)
    checks.top_k(k, logits.shape[-1])
    if target is not None:
        checks.targets(target, logits.shape[:-1], logits.shape[-1], logits.device)
    module = dispatch.load("entropy_topk", impl, logits.device, logits.dtype)
    return module.run(logits, target, k=k, temperature=temperature, softcap=softcap)
