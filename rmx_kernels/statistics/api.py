"""entropy_topk and linear_entropy_topk: row statistics of logits, or of hidden @ weight.T without storing it."""

from typing import Any

from torch import Tensor

from rmx_kernels import checks, choice, dispatch, ignored
from rmx_kernels.logits import LoRA, linear, plain
from rmx_kernels.results import VocabStats
from rmx_kernels.statistics.op import statistics


def entropy_topk(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    k: int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    impl: str | None = None,
) -> VocabStats:
    r"""Log-sum-exp, entropy, log-prob of a target and top-k of each row, in one pass over the vocabulary.

    .. math::
        z_n = \mathrm{cap}(\mathrm{logits}_n) / \mathrm{temperature}_n, \quad p = \mathrm{softmax}(z), \quad
        \mathrm{lse} = \log \sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v, \quad \log p_\mathrm{target}

    with cap(u) = softcap * tanh(u / softcap), or u without a softcap. Entries of -inf have probability 0. A row
    that contains a NaN or +inf, or only -inf, has no distribution: its results are NaN (its ids are arbitrary).

    Args:
        logits: [..., V], bfloat16, float16, float32 or float64. Differentiable.
        target: token ids [...] in [0, V), int64 or int32; or several ids per row, [..., K]; None for no ``logprob``.
        k: number of most probable tokens to return, 0 <= k <= V. Ties go to the lower id.
        temperature: divides the logits, > 0: a number, or a constant floating-point tensor [...] on the same device
            with one value per row, used in float32 (float64 for float64 logits). A value that is not finite or not
            above 0 raises a ValueError on a CPU. On a GPU its row is NaN, since a check would wait for the device.
        softcap: bound of the logits as in Gemma 2, > 0, or None.
        ignore_index: a target with this id is ignored: its ``logprob`` is 0 and has no gradient. None: no such id.
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
    checks.scaling(temperature, softcap, logits)
    checks.top_k(k, logits.shape[-1])
    missing = None
    if target is not None:
        target, missing = ignored.without(target, ignore_index)
        checks.candidates(target, logits.shape[:-1], logits.device)
    chosen = choice.chosen("entropy_topk", impl, logits)
    z = plain(logits, temperature, softcap)
    return _counted(statistics(z, target, k, chosen), missing)


def linear_entropy_topk(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    k: int = 0,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
    process_group: Any = None,
    reduce_hidden_grad: bool = True,
    early_gradient: bool = False,
    impl: str | None = None,
) -> VocabStats:
    r"""The results of :func:`entropy_topk` for logits = hidden @ weight.T + bias, without storing the logits.

    .. math:: z_n = \mathrm{cap}(\mathrm{hidden}_n \, (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}_n

    The dtypes may differ, except that float64 does not mix with others. The product uses the wider dtype of hidden
    and weight (``torch.promote_types``), or the dtype of ``torch.autocast``, as torch's own linear does. All operands
    are cast to it; a head of another dtype is copied. Each operand gets its gradient in its own dtype.

    Args:
        hidden: final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        weight: output head [V, H] on the same device. Differentiable; a frozen head costs no gradient.
        target: token ids [...] in [0, V), int64 or int32; or several ids per row, [..., K]; None for no ``logprob``.
        bias: [V], or None. Differentiable.
        lora: (A [r, H], B [V, r], scale), with tensors on the same device, or None for a head without
            adapter. A and B are differentiable; scale is a finite number. W + scale B A is never stored.
        k, temperature, softcap, ignore_index, impl: as in :func:`entropy_topk`.
        process_group: a torch.distributed group; its ranks hold the rows of the head, in rank order. weight, bias and B
            are this rank's part; target and results refer to the whole vocabulary. All other arguments have
            to be equal on every rank, which is checked first. It calls ``vocab_parallel_entropy_topk``: see there for
            details, and for ``check=False`` in inner loops. ``torch.distributed.group.WORLD`` is the default group.
        reduce_hidden_grad: with a process_group, False leaves the sum of hidden's gradient over ranks to the caller.
        early_gradient: True computes the gradient of ``logprob`` for hidden and A together with the values, from the
            same logits, and keeps it (N x H numbers) for the backward pass: 2 products with a frozen head instead of 3.
            Use it if the loss depends only on the log-probs. If another result has a gradient too, the backward pass
            computes everything again and this costs one more product. It has no effect with several targets per row or
            with a process_group.

    Returns:
        :class:`VocabStats` of float32 (float64 for float64 inputs), in nats. Scratch memory does not grow with N x V.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: scoring pass of arXiv 2605.06241, section 3.

    >>> import torch
    >>> linear_entropy_topk(torch.randn(2, 16), torch.zeros(8, 16)).entropy
    tensor([2.0794, 2.0794])
    """
    missing = None
    if target is not None:
        target, missing = ignored.without(target, ignore_index)
    if process_group is not None:
        checks.process_group(process_group)
        head: dict[str, Any] = {"bias": bias, "lora": lora, "temperature": temperature, "softcap": softcap}
        head |= {"group": process_group, "reduce_hidden_grad": reduce_hidden_grad, "impl": impl}
        over_ranks: VocabStats = dispatch.sharded("entropy_topk")(hidden, weight, target, k=k, **head)
        return _counted(over_ranks, missing)
    checks.operand(hidden, weight, bias, lora, temperature, softcap)
    checks.top_k(k, weight.shape[0])
    if target is not None:
        checks.candidates(target, hidden.shape[:-1], hidden.device)
    chosen = choice.chosen("linear_entropy_topk", impl, hidden)
    z = linear(hidden, weight, bias, lora, temperature, softcap)
    return _counted(statistics(z, target, k, chosen, bool(early_gradient)), missing)


def _counted(stats: VocabStats, missing: Tensor | None) -> VocabStats:
    """With log-probs of 0 where the target is ignored."""
    if missing is None or stats.logprob is None:
        return stats
    return stats._replace(logprob=ignored.filled(stats.logprob, missing))
