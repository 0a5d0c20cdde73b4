"""Full-logits oracles, written from the mathematics alone, and the yardstick by which results are judged.

Each function works in the dtype of its inputs: in float64 it is the truth, in the dtype of the kernel's inputs it is
the eager code that people write (logits and their scaling in that dtype, then ``.float().log_softmax``).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor


class Stats(NamedTuple):
    lse: Tensor
    entropy: Tensor
    logprob: Tensor
    topk_logprobs: Tensor


class Loss(NamedTuple):
    loss: Tensor
    logprob: Tensor
    kl: Tensor


def scaled(logits: Tensor, temperature: Temperature = 1.0, softcap: float | None = None) -> Tensor:
    """The logits [..., V] after softcap and temperature (one, or one a row [...]), upcast to float32 only then."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[..., None] if isinstance(temperature, Tensor) else temperature)
    return logits if logits.dtype == torch.float64 else logits.float()


def linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, lora: tuple[Tensor, Tensor, float] | None = None
) -> Tensor:
    """hidden @ (W + scale B A).T + bias; in other dtypes than float64 the way PEFT adds the LoRA pair."""
    if lora is None:
        return F.linear(hidden, weight, bias)
    A, B, scale = lora
    if hidden.dtype == torch.float64:
        return F.linear(hidden, weight + scale * B @ A, bias)
    return F.linear(hidden, weight, bias) + scale * F.linear(F.linear(hidden, A), B)


def top_k(logits: Tensor, k: int) -> Tensor:
    """Ids of the k largest, descending, ties to the lower id."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def vocab_stats(
    logits: Tensor, target: Tensor, ids: Tensor, temperature: Temperature = 1.0, softcap: float | None = None
) -> Stats:
    """Row statistics, with the log-probs of the tokens in ids [..., K] in the place of the top-k."""
    z = scaled(logits, temperature, softcap)
    logp = z.log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(p == 0, 0)).sum(-1)
    return Stats(z.logsumexp(-1), entropy, logp.gather(-1, target.long()[..., None])[..., 0], logp.gather(-1, ids))


def kl_divergence(base_logp: Tensor, logp: Tensor) -> Tensor:
    """sum p_b (log p_b - log p_s), where a base probability of zero contributes nothing."""
    p_b = base_logp.exp()
    return (p_b * (base_logp - logp).masked_fill(p_b == 0, 0)).sum(-1)


def logprob_kl(
    logits: Tensor, base_logits: Tensor, target: Tensor, temperature: Temperature = 1.0, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """log p_s(target) and KL(p_b || p_s) of each row; the base is a constant."""
    logp = scaled(logits, temperature, softcap).log_softmax(-1)
    base_logp = scaled(base_logits.detach(), temperature, softcap).log_softmax(-1)
    return logp.gather(-1, target.long()[..., None])[..., 0], kl_divergence(base_logp, logp)


def contrastive_loss(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: Temperature = 1.0,
    softcap: float | None = None,
) -> Loss:
    logprob, kl = logprob_kl(logits, base_logits, target, temperature, softcap)
    loss = (kl_weight.to(kl.dtype) * kl).sum() - (ce_weight.to(kl.dtype) * logprob).sum()
    return Loss(loss, logprob, kl)


def divergence(
    logits: Tensor,
    teacher_logits: Tensor,
    kind: str,
    beta: float,
    temperature: Temperature = 1.0,
    softcap: float | None = None,
    teacher_temperature: Temperature | None = None,
    teacher_softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence of each row from a teacher, a constant, and the student's entropy."""
    log_q = scaled(logits, temperature, softcap).log_softmax(-1)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    log_p = scaled(teacher_logits.detach(), teacher_temperature, teacher_softcap).log_softmax(-1)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q.exp() == 0, 0)).sum(-1)
    if kind == "forward_kl":
        return kl_divergence(log_p, log_q), entropy
    if kind == "reverse_kl":
        return kl_divergence(log_q, log_p), entropy
    if kind == "alpha":
        both = (log_p.exp() > 0) & (log_q.exp() > 0)
        power = (beta * log_p + (1 - beta) * log_q).masked_fill(~both, -math.inf).exp()
        terms = beta * log_p.exp() + (1 - beta) * log_q.exp() - power
        return terms.sum(-1) / (beta * (1 - beta)), entropy
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m), entropy


def assert_as_good_as_eager(
    got: Tensor,
    eager: Tensor | Sequence[Tensor],
    oracle: Tensor,
    *,
    size: Tensor,
    what: str,
    input_dtype: torch.dtype,
    roundings: int = 1,
) -> None:
    """Error at most twice that of eager, in the largest and in the mean entry, plus a few roundings of ``size``.

    ``eager`` may be the results of several evaluations that are as good; then the largest error counts.
    Eager's error counts as half a step of the dtype of the result, for each of the ``roundings`` that eager makes of
    numbers of its size, where eager was luckier than that.
    ``size`` is the magnitude of the result or of the terms it sums. In float64 eager and oracle are the same code, so
    there the roundings alone decide.
    """
    assert got.shape == oracle.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(oracle.shape)}"
    if got.numel() == 0:
        return
    fp64 = input_dtype == torch.float64
    floor = 64 * torch.finfo(torch.float64).eps if fp64 else 8 * torch.finfo(torch.float32).eps
    size = size.detach().double()
    got_error = (got.detach().double() - oracle.detach()).abs()
    eager_errors = [
        (e.detach().double() - oracle.detach()).abs() for e in ([eager] if isinstance(eager, Tensor) else eager)
    ]
    rounding = roundings * torch.finfo(got.dtype).eps / 2
    for norm in (torch.max, torch.mean):  # the mean sees the many small probabilities that the largest entry hides
        of_eager = max(norm(e) for e in eager_errors)
        allowed = 2 * max(of_eager, rounding * norm(size)) + floor * norm(size)
        assert norm(got_error) <= allowed, (
            f"{what}: {norm.__name__} error {norm(got_error):.3g} above {allowed:.3g} (eager {of_eager:.3g})"
        )
