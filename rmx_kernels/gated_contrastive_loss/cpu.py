"""Native kernels: one call goes over each row of student and base twice while both are in the cache, and once more in
backward, since the gradient is as large as the logits and is rounded only after the upstream gradient came."""

import torch
from torch import Tensor

from rmx_kernels import checks, native
from rmx_kernels.gated_contrastive_loss.ops import run as run
from rmx_kernels.gated_contrastive_loss.reference import live_rows
from rmx_kernels.linear_logprob_kl.reference import BASE_MASS_TOLERANCE
from rmx_kernels.tiles import compute_dtype


def flat_weights(
    target: Tensor, ce_weight: Tensor, kl_weight: Tensor, vocab: int, real: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(target, ce, kl) flattened, the weights in full precision."""
    checks.target_range(target, vocab, used=(ce_weight != 0) | (kl_weight != 0))
    return target.reshape(-1).long(), ce_weight.reshape(-1).to(real), kl_weight.reshape(-1).to(real)


def weighted_sum(ce: Tensor, kl_weight: Tensor, logprob: Tensor, kl: Tensor) -> Tensor:
    """The loss of live rows; an impossible target or an infinite KL counts only where it has a weight."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, term in ((-ce, logprob), (kl_weight, kl)):
        used = weight != 0
        total += (weight[used].double() * term[used].double()).sum()
    return total.to(ce.dtype)


def spread(index: Tensor, norms: Tensor, terms: Tensor, lead: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """(logprob [B...], kl [B...], norms [4, N]) of all rows, NaN in those that are not live."""
    whole = norms.new_full((6, lead.numel()), float("nan"))
    whole[:, index] = torch.cat([norms, terms])
    return whole[4].clone().view(lead), whole[5].clone().view(lead), whole[:4].clone()


def _pack(*tensors: Tensor | None) -> native.Loss:
    return native.Loss(*(native.address(x) for x in tensors), 1.0, BASE_MASS_TOLERANCE, 1)


def forward(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::gated_contrastive_loss."""
    V, real = logits.shape[-1], compute_dtype(logits.dtype)
    ids, ce, kl_w = flat_weights(target, ce_weight, kl_weight, V, real)
    index, anchored = live_rows(ce, kl_w)
    n = index.shape[0]
    norms, terms = (torch.full((count, n), float("nan"), dtype=real) for count in (4, 2))
    own = ids[index]
    loss = _pack(own, None, None, *norms, *terms)
    student, base = native.rows(logits, index), native.rows(base_logits, index)
    scale = native.scale(temperature, softcap)
    native.call("rmx_gated_contrastive_loss", student, base, anchored, scale, n, V, loss, None)
    total = weighted_sum(ce[index], kl_w[index], *terms)
    return total, *spread(index, norms, terms, target.shape)


def backward(
    logits: Tensor,
    base_logits: Tensor,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    norms: Tensor,
    g_loss: Tensor,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """The kernel of rmx_kernels::gated_contrastive_loss_backward."""
    V = logits.shape[-1]
    ids, ce, kl_w = flat_weights(target, ce_weight, kl_weight, V, norms.dtype)
    index, anchored = live_rows(ce, kl_w)
    dx = native.scratch(logits.numel(), logits.dtype).view(logits.shape)
    if index.shape[0] < ids.shape[0]:
        dx.zero_()  # rows without a weight have no gradient
    own = [x[index] for x in (ids, ce, kl_w, *norms)]
    loss = _pack(*own, None, None)
    loss.upstream = g_loss.item()
    student, base, gradient = native.rows(logits, index), native.rows(base_logits, index), native.rows(dx, index)
    scale = native.scale(temperature, softcap)
    native.call(
        *("rmx_gated_contrastive_loss_backward", student, base, anchored, scale),
        *(index.shape[0], 0, V, loss, gradient),
    )
    return dx
