"""What is compared: plain eager PyTorch as trainers write it, torch.compile of it, other libraries, and rmx_kernels.

Every provider of an operator is a function of one signature; dimensions N rows, V vocabulary, H hidden, K top-k:

* ``entropy_topk``: (logits [N, V], target [N], k) -> (entropy [N], logprob [N], top log-probs [N, K], top ids [N, K])
* ``linear_entropy_topk``: (hidden [N, H], weight [V, H], target [N], k) -> the same
* ``gated_contrastive_loss``: (logits [N, V], base_logits [N, V], target [N], ce [N], kl [N]) -> loss []
* ``linear_gated_contrastive_loss``: (hidden [N, H], base [N, H], weight [V, H], target, ce, kl) -> loss []
* ``linear_cross_entropy``: (hidden [N, H], weight [V, H], target [N]) -> loss [], the sum over rows. It is our linear
  loss with ce = 1 and kl = 0 in every row: the part that other libraries offer too.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rmx_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS = tuple(rmx_kernels.backends())  # best first
CE_ONLY = "linear_cross_entropy"
OTHERS = ("linear_cross_entropy", "liger", "cce")  # not ours to correct
Run = Callable[..., Any]
Stats = tuple[Tensor | None, ...]


def upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def eager_stats(logits: Tensor, target: Tensor, k: int) -> Stats:
    log_p = F.log_softmax(upcast(logits), dim=-1)
    top = log_p.topk(k)
    return -(log_p.exp() * log_p).sum(-1), log_p.gather(1, target[:, None]).squeeze(1), top.values, top.indices


def eager_linear_stats(hidden: Tensor, weight: Tensor, target: Tensor, k: int) -> Stats:
    return eager_stats(hidden @ weight.T, target, k)


def eager_row_terms(logits: Tensor, base_logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) [N] and KL(base || student) [N]."""
    log_s, log_b = F.log_softmax(upcast(logits), dim=-1), F.log_softmax(upcast(base_logits), dim=-1)
    return -log_s.gather(1, target[:, None]).squeeze(1), (log_b.exp() * (log_b - log_s)).sum(-1)


def eager_loss(logits: Tensor, base_logits: Tensor, target: Tensor, ce: Tensor, kl: Tensor) -> Tensor:
    decision, anchor = eager_row_terms(logits, base_logits, target)
    return (ce * decision + kl * anchor).sum()


def eager_linear_loss(hidden: Tensor, base: Tensor, weight: Tensor, target: Tensor, ce: Tensor, kl: Tensor) -> Tensor:
    return eager_loss(hidden @ weight.T, base @ weight.T, target, ce, kl)


def eager_linear_ce(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(upcast(hidden @ weight.T), target, reduction="sum")


EAGER: dict[str, Run] = {
    "entropy_topk": eager_stats,
    "linear_entropy_topk": eager_linear_stats,
    "gated_contrastive_loss": eager_loss,
    "linear_gated_contrastive_loss": eager_linear_loss,
    CE_ONLY: eager_linear_ce,
}


def ours(operator: str, impl: str) -> Run:
    if operator == CE_ONLY:

        def ce_only(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            one = torch.ones(len(target), device=target.device)
            return rmx_kernels.linear_gated_contrastive_loss(
                hidden, hidden.detach(), weight, target, one, torch.zeros_like(one), impl=impl
            ).loss

        return ce_only
    op = getattr(rmx_kernels, operator)
    if operator.endswith("loss"):
        return lambda *tensors: op(*tensors, impl=impl).loss

    def stats(*arguments: Any) -> Stats:
        *tensors, k = arguments
        found = op(*tensors, k=k, impl=impl)
        return found.entropy, found.logprob, found.topk_logprobs, found.topk_ids

    return stats


def torch_linear_ce() -> Run:
    """Chunked: without options, torch runs what eager does."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functools.partial(F.linear_cross_entropy, reduction="sum", options=options)


def liger_linear_ce() -> Run:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, target: loss(weight, hidden, target)


def cce_linear_ce() -> Run:
    from cut_cross_entropy import linear_cross_entropy

    # Its filter leaves small probabilities out of the gradient on purpose; only whole gradients are compared.
    impl = "cce" if DEVICE == "cuda" else "torch_compile"
    return functools.partial(linear_cross_entropy, reduction="sum", filter_eps=None, impl=impl)


def missing(operator: str, name: str) -> str:
    """Why a provider cannot run here, or an empty string."""
    if name in OURS:
        backend = rmx_kernels.backends()[name]
        if backend.reason:
            return backend.reason
        if (operator if operator != CE_ONLY else "linear_gated_contrastive_loss") not in backend.operators:
            return f"no {name} implementation of this operator"
        return "" if DEVICE in backend.devices else f"does not run on {DEVICE}"
    package = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if name == "liger" and DEVICE != "cuda":
        return "needs a GPU (Triton kernels)"
    if name == "linear_cross_entropy" and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return ""


def competitors(operator: str) -> tuple[str, ...]:
    others = OTHERS if operator == CE_ONLY else ()
    return ("eager", "compile", *others, *reversed(OURS))


def fastest(operator: str) -> str:
    """Our implementation that impl=None chooses here."""
    return next(name for name in OURS if not missing(operator, name))


def provider(operator: str, name: str) -> Run:
    """The function to call; only where it is not missing."""
    if name in OURS:
        return ours(operator, name)
    if name == "compile":
        torch.compiler.reset()  # each shape is compiled for itself, and the limit of recompilations is never met
        return torch.compile(EAGER[operator], dynamic=False)
    others = {"linear_cross_entropy": torch_linear_ce, "liger": liger_linear_ce, "cce": cce_linear_ce}
    return others[name]() if name in others else EAGER[operator]
