"""Exact temperature / top-k / top-p sampling from the k most probable tokens; the vocabulary is rarely sorted."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rmx.models.model import CausalLM, ModelError
from rmx_kernels import linear_entropy_topk

WIDTHS = (64, 1024)  # tried in turn; only rows whose nucleus is wider go on, at last to a sort of the vocabulary
ROWS = 32  # sorted at a time
NOT_FINITE = "sampling: the model gave logits that are not finite"


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
    widths = WIDTHS if limit == V else (limit,) if limit <= WIDTHS[-1] else ()  # the mass of top_k is known at the end
    rest = torch.arange(hidden.shape[0], device=hidden.device)
    chosen, logprobs = torch.empty_like(rest), torch.empty_like(rest, dtype=torch.float64)
    for number, width in enumerate(widths):
        rows = hidden if number == 0 else hidden[rest]
        stats = linear_entropy_topk(rows, k=min(width, limit), **lm.head_at(params.temperature))
        assert stats.topk_logprobs is not None and stats.topk_ids is not None
        p = stats.topk_logprobs.double().exp()
        chosen[rest], logprobs[rest], decided = _draw(p, stats.topk_ids, uniforms[rest], params, width >= limit)
        finite, complete = torch.stack([torch.isfinite(stats.lse).all(), decided.all()]).tolist()  # the one wait
        if not finite:
            raise ModelError(NOT_FINITE)
        if complete:
            return chosen, logprobs
        rest = rest[~decided]
    for own in rest.split(ROWS):
        p, ids = _sorted(lm, hidden[own], params.temperature)
        chosen[own], logprobs[own], _ = _draw(p[:, :limit], ids[:, :limit], uniforms[own], params, True)
    return chosen, logprobs


def _draw(
    p: Tensor, ids: Tensor, uniforms: Tensor, params: SamplingParams, complete: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """By inversion from p [B, K] descending, cut to the nucleus; ids [B, K], uniforms [B].

    Args:
        complete: whether no token is left out that could be drawn.

    Returns:
        (ids [B], their log p [B], whether these K tokens decide the draw [B]). They do where they hold the nucleus, or,
        if that is the whole vocabulary, where the uniform number lies below their mass. A row of NaN has any token.
    """
    kept, nucleus = p.cumsum(-1), p
    if params.top_p < 1:
        whole = 1.0 if params.top_k is None else p.sum(-1, keepdim=True)
        nucleus = p.masked_fill(kept - p >= params.top_p * whole, 0)  # outside: tokens that start beyond top_p
        kept = nucleus.cumsum(-1)
    more = params.top_p == 1 and not complete  # the mass of all tokens is 1
    below = uniforms if more else uniforms * kept[:, -1]
    drawn = (kept <= below[:, None]).sum(-1, keepdim=True)
    last = ((nucleus > 0).sum(-1, keepdim=True) - 1).clamp(min=0)
    place = torch.minimum(drawn, last)
    decided = uniforms < kept[:, -1] if more else p.sum(-1) >= params.top_p
    return ids.gather(1, place).squeeze(1), p.gather(1, place).squeeze(1).log(), decided | complete


def _sorted(lm: CausalLM, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(probabilities, ids) of the whole vocabulary, descending, ties to the lower id; [B, V] for a few rows B."""
    p, ids = (lm.logits(hidden).double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    _check(p[:, 0])
    return p, ids


def _check(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ModelError(NOT_FINITE)
