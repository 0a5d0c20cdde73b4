"""linear_kept_logprobs and kept_set: the distribution that top-k, top-p and min-p sampling draws from."""

from typing import Any

import torch
from torch import Tensor

from rmx_kernels import checks, ignored
from rmx_kernels.logits import Logits, LoRA, chunks, linear
from rmx_kernels.once import differentiable_once
from rmx_kernels.results import KeptStats, VocabStats

GATHER_BYTES = 64 << 20  # of the rows of the head that are gathered at a time
NEG_INF = float("-inf")


def linear_kept_logprobs(
    hidden: Tensor,
    weight: Tensor,
    kept: Tensor,
    target: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int | None = None,
) -> KeptStats:
    r"""Log-probs and entropy of the next token, renormalised over the tokens that sampling kept.

    .. math::
        q(v) = \frac{e^{z_v}}{\sum_{u \in S} e^{z_u}} \text{ for } v \in S, \quad
        z_n = \mathrm{cap}(h_n (W + \mathrm{scale} \, B A)^\top + b) / \mathrm{temperature}_n

    A rollout that was sampled with top-k, top-p or min-p comes from q, not from the whole softmax. The ratio of a
    policy gradient is right only with log-probs of q. Only the rows of the head in S are read: N K H products instead
    of N V H, and no tensor of rows x vocabulary.

    Args:
        hidden: final hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        weight: output head [V, H] on the same device. Differentiable, as is bias. Dtypes as in
            :func:`linear_entropy_topk`; if they differ, the whole head is cast.
        kept: ids of the set S of each row, [..., K], int64 or int32, distinct and in [0, V), or -1 for an empty place;
            at least one id per row. :func:`kept_set` makes it from :class:`VocabStats`.
        target: token ids [...], or None for no ``logprob``.
        bias, lora, temperature, softcap: as in :func:`linear_entropy_topk`, with the values that sampled the
            rollout; temperature a number, or [...] for one per row.
        ignore_index: as in :func:`entropy_topk`.

    Returns:
        :class:`KeptStats` of float32 (float64 for float64 inputs), in nats, differentiable once. A row without a
        kept token is NaN. Scratch memory is 64 MiB of gathered rows.

    Raises:
        TypeError, ValueError: a wrong argument, by name.

    Source: the distribution of nucleus sampling, arXiv 1904.09751, section 3.1; min-p of arXiv 2407.01082.

    >>> kept = torch.tensor([[2, 0, -1]])
    >>> linear_kept_logprobs(torch.zeros(1, 3), torch.ones(4, 3), kept, torch.tensor([2])).logprob
    tensor([-0.6931])
    """
    checks.operand(hidden, weight, bias, lora, temperature, softcap)
    _check_kept(kept, hidden, weight.shape[0])
    missing = None
    if target is not None:
        target, missing = ignored.without(target, ignore_index)
        checks.targets(target, hidden.shape[:-1], weight.shape[0], hidden.device)
    if isinstance(temperature, Tensor) and not torch.compiler.is_compiling():
        checks.temperature_range(temperature)
    z = linear(hidden, weight, bias, lora, temperature, softcap).rows()
    ids = kept.reshape(z.x.shape[0], kept.shape[-1]).long()
    with torch.autocast(hidden.device.type, enabled=False):
        raw = _KeptLogits.apply(*z.tensors, ids.clamp(min=0))
        scores = z.scaled(raw).masked_fill(ids < 0, NEG_INF)
        log_q = (scores - torch.logsumexp(scores, -1, keepdim=True)).view(kept.shape)
        some = (kept >= 0) & (log_q > NEG_INF)
        finite = torch.where(some, log_q, 0.0)
        empty = (~(kept >= 0).any(-1)).to(log_q.dtype)
        entropy = -(finite.exp() * finite * some).sum(-1) + torch.where(empty > 0, torch.nan, 0.0)
        logprob = None
        if target is not None:
            same = (kept == target.unsqueeze(-1)) & (kept >= 0)
            logprob = torch.where(same.any(-1), torch.where(same, log_q, 0.0).sum(-1), NEG_INF)
            logprob = ignored.filled(logprob, missing)
    return KeptStats(logprob, entropy, log_q)


def kept_set(stats: VocabStats, *, top_k: int | None = None, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    r"""The tokens that sampling keeps, computed from the top-k of each row's statistics.

    .. math::
        S = \Big\{ v_j : j < \mathrm{top\_k}, \; \sum_{i<j} q(v_i) < \mathrm{top\_p}, \;
            p(v_j) \ge \mathrm{min\_p} \, p(v_0) \Big\}

    with v in descending order of probability, and q the distribution p renormalised over the first top_k tokens (over
    the whole vocabulary if top_k is None), in the same order as transformers' generate. The most probable token is
    always kept.

    Args:
        stats: from :func:`entropy_topk` or :func:`linear_entropy_topk` with k, at the temperature of the sampling.
        top_k: maximum number of tokens, <= k; None for no bound. top_p: in (0, 1]. min_p: in [0, 1].

    Returns:
        ids [..., K], int64, -1 where a token is not kept.

    Raises:
        TypeError, ValueError: a wrong argument, or a k that is too small for the set of some row. This check waits once
        for a GPU.

    Source: as in :func:`linear_kept_logprobs`.

    >>> from rmx_kernels import entropy_topk
    >>> kept_set(entropy_topk(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), k=3), top_p=0.8)
    tensor([[ 1,  2, -1]])
    """
    if stats.topk_logprobs is None or stats.topk_ids is None:
        raise ValueError("stats: expected statistics with k > 0, got k = 0")
    for name, value, least in (("top_p", top_p, 0.0), ("min_p", min_p, -1.0)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not max(least, 0.0) <= value <= 1 or value == least:
            raise ValueError(f"{name}: expected a number in {'(' if least == 0 else '['}0, 1], got {value}")
    logprobs, ids = stats.topk_logprobs.detach(), stats.topk_ids
    k = ids.shape[-1]
    if top_k is not None:
        checks.top_k(top_k, k)
        if top_k == 0:
            raise ValueError("top_k: expected None or a number of at least 1, got 0")
        logprobs, ids, k = logprobs[..., :top_k], ids[..., :top_k], top_k
    p = logprobs.double().exp()
    mass = p.cumsum(-1)
    whole = 1.0 if top_k is None else mass[..., -1:]
    kept = (mass - p < top_p * whole) & (p >= min_p * p[..., :1])
    kept[..., 0] = True
    if top_k is None:
        further = kept[..., -1] & (mass[..., -1] < top_p * (1 - 1e-6)) & ~(p[..., -1] == 0)
        if bool(further.any()):
            raise ValueError(
                f"stats: expected a top-k with {top_p} of the probability mass, got k = {k}, which has "
                f"{float(mass[..., -1].min()):.3f} in some row; use a larger k, or a top_k"
            )
    return torch.where(kept, ids, -1)


def _check_kept(kept: object, hidden: Tensor, vocab: int) -> None:
    checks.is_tensor("kept", kept)
    assert isinstance(kept, Tensor)
    if kept.dtype not in checks.INTEGERS:
        raise TypeError(f"kept: expected int64 or int32 token ids, got {kept.dtype}")
    if kept.shape[:-1] != hidden.shape[:-1] or kept.dim() != hidden.dim() or kept.shape[-1] == 0:
        expected = [*hidden.shape[:-1], "K"]
        raise ValueError(f"kept: expected the ids of each row, shape {expected} with K >= 1, got {tuple(kept.shape)}")
    checks.same_device("kept", kept, "hidden", hidden)
    if kept.is_cuda or torch.compiler.is_compiling():
        return
    if kept.numel() and not (kept.min() >= -1 and kept.max() < vocab):
        wrong = kept[(kept < -1) | (kept >= vocab)]
        raise ValueError(f"kept: expected ids in [0, {vocab}), or -1 for none, got {int(wrong[0])}")
    ordered = kept.sort(-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError("kept: expected distinct ids in each row, got a duplicate")


class _KeptLogits(torch.autograd.Function):
    """x [N, H] @ W[ids].T (+ bias + LoRA) for ids [N, K], in full precision, without scaling."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, ids = inputs
        z = Logits(*tensors)
        ctx.save_for_backward(*inputs)
        out = z.x.new_empty(ids.shape, dtype=z.real)
        for rows in _row_chunks(z, ids):
            out[rows] = (_gathered(z.weight, ids[rows], z.real) @ z.x[rows].to(z.real).unsqueeze(-1)).squeeze(-1)
            if z.lora_hidden is not None:
                part = _gathered(z.lora_weight, ids[rows], z.real) @ z.lora_hidden[rows].to(z.real).unsqueeze(-1)
                out[rows] += part.squeeze(-1)
            if z.bias is not None:
                out[rows] += z.bias[ids[rows]].to(z.real)
        return out

    @staticmethod
    @differentiable_once("linear_kept_logprobs")
    def backward(ctx: Any, saved: Any, g: Tensor) -> Any:
        *tensors, ids = saved
        z = Logits(*tensors)
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(tensors)
        for place, (of, other) in {0: (z.x, z.weight), 3: (z.lora_hidden, z.lora_weight)}.items():
            if of is not None and needs[place]:
                dx = torch.empty_like(of, dtype=z.real)
                for rows in _row_chunks(z, ids):
                    dx[rows] = (g[rows].unsqueeze(1) @ _gathered(other, ids[rows], z.real)).squeeze(1)
                found[place] = dx.to(of.dtype)
        for place, (of, other) in {1: (z.weight, z.x), 4: (z.lora_weight, z.lora_hidden)}.items():
            if of is not None and other is not None and needs[place]:
                total = torch.zeros_like(of, dtype=z.real)
                for rows in _row_chunks(z, ids):  # index_put_ adds in an order that does not change from run to run
                    parts = g[rows].unsqueeze(-1) * other[rows].to(z.real).unsqueeze(1)
                    total.index_put_((ids[rows].flatten(),), parts.flatten(0, 1), accumulate=True)
                found[place] = total.to(of.dtype)
        if z.bias is not None and needs[2]:
            total = torch.zeros_like(z.bias, dtype=z.real)
            found[2] = total.index_put_((ids.flatten(),), g.flatten(), accumulate=True).to(z.bias.dtype)
        return *found, None


def _gathered(matrix: Tensor | None, ids: Tensor, real: torch.dtype) -> Tensor:
    """The rows of a matrix [V, H] that ids [n, K] name, [n, K, H]."""
    assert matrix is not None
    return matrix[ids].to(real)


def _row_chunks(z: Logits, ids: Tensor) -> Any:
    row = ids.shape[1] * z.x.shape[1] * (z.real.itemsize + z.x.element_size())
    return chunks(ids.shape[0], max(1, GATHER_BYTES // row))
