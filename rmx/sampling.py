"""Exact temperature / top-k / top-p sampling from the k most probable tokens; the vocabulary is rarely sorted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmx.model import CausalLM, ModelError
from rmx_kernels import linear_entropy_topk

WIDTHS = (64, 1024)  # tried in turn; only rows whose nucleus is wider go on, at last to a sort of the vocabulary
ROWS = 32  # sorted at a time


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int | None = None


def sample_tokens(lm: CausalLM, hidden: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    r"""One token a row from the tempered distribution p, restricted to its nucleus and renormalised.

    .. math:: \mathrm{nucleus} = \text{the fewest most probable tokens with } \sum p \ge \mathrm{top\_p}

    of the ``top_k`` most probable ones, renormalised, where there is a ``top_k``. Tokens are drawn by inversion in
    descending order of p, so a row's token is a function of its uniform number alone, and base and tuned models can
    share random numbers.

    Args:
        hidden: [B, H] final hidden states. uniforms: [B] float64 in [0, 1).

    Returns:
        (token ids [B] int64, their log p [B] float64, nats): before the cut to the nucleus; of the untempered
        distribution where the temperature is 0.
    """
    if params.temperature == 0:
        greedy = linear_entropy_topk(hidden, k=1, **lm.head)
        _check(greedy.lse)
        assert greedy.topk_ids is not None and greedy.topk_logprobs is not None
        return greedy.topk_ids[:, 0], greedy.topk_logprobs[:, 0].double()
    V = lm.weight.shape[0]
    limit = V if params.top_k is None else min(params.top_k, V)
    everything = params.top_p == 1 and limit == V
    chosen = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(hidden.shape[0], dtype=torch.float64, device=hidden.device)
    rest = torch.arange(hidden.shape[0], device=hidden.device)
    widths = WIDTHS if limit == V else (limit,) if limit <= WIDTHS[-1] else ()  # the mass of top_k is known at the end
    for width in () if everything else widths:
        width = min(width, limit)
        stats = linear_entropy_topk(hidden[rest], k=width, **lm.head_at(params.temperature))
        _check(stats.lse)
        assert stats.topk_logprobs is not None and stats.topk_ids is not None
        p = stats.topk_logprobs.double().exp()
        done = (p.sum(-1) >= params.top_p) | (width == limit)
        rows = rest[done]
        chosen[rows], logprobs[rows] = _draw(p[done], stats.topk_ids[done], uniforms[rows], params)
        rest = rest[~done]
        if rest.numel() == 0:
            return chosen, logprobs
    for rows in rest.split(ROWS):
        p, ids = _sorted(lm, hidden[rows], params.temperature)
        chosen[rows], logprobs[rows] = _draw(p[:, :limit], ids[:, :limit], uniforms[rows], params)
    return chosen, logprobs


def _draw(p: Tensor, ids: Tensor, uniforms: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """(ids [B], log p [B]) by inversion from p [B, K] descending, cut to the nucleus; ids [B, K], uniforms [B]."""
    whole = 1.0 if params.top_k is None else p.sum(-1, keepdim=True)
    nucleus = p.masked_fill(p.cumsum(-1) - p >= params.top_p * whole, 0)  # outside: tokens that start beyond top_p
    kept = nucleus.cumsum(-1)
    drawn = (kept <= uniforms[:, None] * kept[:, -1:]).sum(-1, keepdim=True)
    last = (nucleus > 0).sum(-1, keepdim=True) - 1
    place = torch.minimum(drawn, last)
    return ids.gather(1, place).squeeze(1), p.gather(1, place).squeeze(1).log()


def _sorted(lm: CausalLM, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the whole vocabulary, descending, ties to the lower id; [B, V] for a few rows B."""
    p, ids = (lm.logits(hidden).double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    _check(p[:, 0])
    return p, ids


def _check(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ModelError("sampling: the model gave logits that are not finite")
