"""Exact temperature / top-k / top-p sampling from the k most probable tokens; no sort of the vocabulary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmx.model import CausalLM
from rmx_kernels import linear_entropy_topk

WIDTHS = (64, 1024)  # tried in turn; only rows whose nucleus is wider go on, at last to the whole vocabulary


@dataclass(frozen=True)
class SamplingParams:
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int | None = None


def sample_tokens(lm: CausalLM, hidden: Tensor, uniforms: Tensor, params: SamplingParams) -> Tensor:
    r"""One token id a row from the tempered distribution p, restricted to its nucleus and renormalised.

    .. math:: \mathrm{nucleus} = \text{the fewest most probable tokens with } \sum p \ge \mathrm{top\_p}

    intersected with the ``top_k`` most probable ones. Tokens are drawn by inversion in descending order of p, so a
    row's token is a function of its uniform number alone, and base and tuned models can share random numbers.

    Args:
        hidden: [B, H] final hidden states. uniforms: [B] float64 in [0, 1).

    Returns:
        [B] int64.
    """
    V = lm.weight.shape[0]
    if params.temperature == 0:
        greedy = linear_entropy_topk(hidden, k=1, **lm.head).topk_ids
        assert greedy is not None
        return greedy[:, 0]
    limit = V if params.top_k is None else min(params.top_k, V)
    chosen = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    rest = torch.arange(hidden.shape[0], device=hidden.device)
    for width in (*WIDTHS, limit):
        width = min(width, limit)
        stats = linear_entropy_topk(hidden[rest], k=width, temperature=params.temperature, **lm.head)
        assert stats.topk_logprobs is not None and stats.topk_ids is not None
        p = stats.topk_logprobs.double().exp()
        mass = p.cumsum(-1)
        done = (mass[:, -1] >= params.top_p) | (width == limit)
        p, mass, rows = p[done], mass[done], rest[done]
        p = p.masked_fill(mass - p >= params.top_p, 0)  # outside: tokens that start beyond top_p
        kept = p.cumsum(-1)
        drawn = (kept <= uniforms[rows, None] * kept[:, -1:]).sum(-1, keepdim=True)
        last = (p > 0).sum(-1, keepdim=True) - 1
        chosen[rows] = stats.topk_ids[done].gather(1, torch.minimum(drawn, last)).squeeze(1)
        rest = rest[~done]
        if rest.numel() == 0:
            break
    return chosen
