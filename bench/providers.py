"""What is compared: plain eager PyTorch as trainers write it, and rmx_kernels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rmx_kernels


def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def eager_stats(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> tuple[Tensor, ...]:
    log_p = log_probs(hidden, weight)
    top = log_p.topk(k)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(1, target[:, None]).squeeze(1), top.values, top.indices


def eager_loss(hidden: Tensor, base: Tensor, weight: Tensor, target: Tensor, ce: Tensor, kl: Tensor) -> Tensor:
    log_s, log_b = log_probs(hidden, weight), log_probs(base, weight)
    decision = -log_s.gather(1, target[:, None]).squeeze(1)
    return (ce * decision + kl * (log_b.exp() * (log_b - log_s)).sum(-1)).sum()


def ours_stats(impl: str) -> Callable[..., tuple[Tensor | None, ...]]:
    def run(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> tuple[Tensor | None, ...]:
        stats = rmx_kernels.linear_entropy_topk(hidden, weight, target, k=k, impl=impl)
        return stats.entropy, stats.logprob, stats.topk_logprobs, stats.topk_ids

    return run


def ours_loss(impl: str) -> Callable[..., Tensor]:
    def run(hidden: Tensor, base: Tensor, weight: Tensor, target: Tensor, ce: Tensor, kl: Tensor) -> Tensor:
        return rmx_kernels.linear_gated_contrastive_loss(hidden, base, weight, target, ce, kl, impl=impl).loss

    return run


STATS = {"eager": eager_stats, **{n: ours_stats(n) for n, b in rmx_kernels.backends().items() if b.available}}
LOSS = {"eager": eager_loss, **{n: ours_loss(n) for n, b in rmx_kernels.backends().items() if b.available}}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
