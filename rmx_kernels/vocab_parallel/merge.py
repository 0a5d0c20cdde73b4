"""Statistics of a distribution from those of its parts. Tensors of [world, N, ...] hold a part of each rank, in order.

With pi_r the mass of part r, by the chain rules of entropy and of the KL divergence:

    H = sum_r pi_r (H_r - log pi_r)        KL(p || q) = sum_r pi_r KL_r + KL(pi || rho)

Every rank computes the same from the same numbers, in float64 and in rank order.
"""

from functools import reduce
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rmx_kernels.losses.reference import kl_terms

ROUNDINGS = 4  # (z - m_r) - log d_r is two off z, relative to the log-prob; so a tie of two is four apart at most


class Shares(NamedTuple):
    """m and log d of the whole vocabulary, lse = m + log d, and what each part has of it. All float64."""

    m: Tensor  # [N]
    log_d: Tensor  # [N]
    log: Tensor  # [world, N], log pi_r

    @property
    def lse(self) -> Tensor:
        return self.m + self.log_d


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """x of every rank, [world, *x.shape]."""
    whole = x.new_empty(dist.get_world_size(group), *x.shape)
    if x.numel():
        dist.all_gather(list(whole.unbind()), x.contiguous(), group=group)
    return whole


def summed(parts: list[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each of the parts [N, columns] summed over ranks, in float32 or better; in the order that the backend takes."""
    real = torch.promote_types(parts[0].dtype, torch.float32)
    total = torch.cat([part.to(real) for part in parts], -1)
    if total.numel():
        dist.all_reduce(total, group=group)
    columns = [part.shape[-1] for part in parts]
    return [whole.to(part.dtype) for whole, part in zip(total.split(columns, -1), parts, strict=True)]


def packed_ids(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of ids as numbers of ``dtype``, float32 or float64, to travel with others in one tensor."""
    return ids.to(torch.int64 if dtype == torch.float64 else torch.int32).view(dtype)


def unpacked_ids(packed: Tensor) -> Tensor:
    return packed.contiguous().view(torch.int64 if packed.dtype == torch.float64 else torch.int32).long()


def shares(m: Tensor, log_d: Tensor) -> Shares:
    """From m and log d of each part, [world, N]; m = -inf is a part without mass."""
    m, log_d = m.double(), log_d.double()
    top = m.amax(0)
    parts = (m - top) + log_d
    total = reduce(torch.logaddexp, parts)
    return Shares(top, total, parts - total)


def entropy(whole: Shares, parts: Tensor) -> Tensor:
    """[N] from the entropy of each part, [world, N]."""
    mass = whole.log.exp()
    terms = mass * (parts.double() - whole.log)
    return reduce(torch.add, torch.where(mass == 0, 0.0, terms)).clamp(min=0)


def logprob(whole: Shares, parts: Tensor) -> Tensor:
    """[N] from the log-prob of the target within each part, [world, N]; -inf in parts that it is not of."""
    return (parts.double() + whole.log).amax(0)


def divergence(student: Shares, base: Shares, parts: Tensor) -> Tensor:
    """KL(base || student), [N], from the KL within each part, [world, N]."""
    mass = base.log.exp()
    within = torch.where(mass == 0, 0.0, mass * parts.double())
    return reduce(torch.add, within + kl_terms(student.log.exp(), mass, student.log - base.log))


def top_k(whole: Shares, values: Tensor, ids: Tensor, k: int, none: int) -> tuple[Tensor, Tensor]:
    """(log-probs, ids), [N, k], from the top-k of each part, [world, N, k], of lower ids in lower ranks.

    Entries whose id is ``none`` are no candidates. Ties go to the lower id. Log-probs of equal logits in two parts
    differ by their roundings, so what is no further apart is a tie.
    """
    logprobs = (values.double() + whole.log[..., None]).movedim(0, 1).flatten(1)
    ids = ids.movedim(0, 1).flatten(1)
    descending, order = logprobs.sort(dim=-1, descending=True, stable=True)
    step = ROUNDINGS * torch.finfo(values.dtype).eps * descending[:, :-1].abs()
    apart = descending[:, :-1] - descending[:, 1:] > step  # not so between -inf and -inf
    rank = torch.nn.functional.pad(apart.cumsum(-1), (1, 0))
    count = ids.shape[1]
    rank = torch.where(ids.gather(1, order) == none, count, rank)
    order = order.gather(1, (rank * count + order).argsort(-1))  # by rank, then in the order of the parts: by id
    return descending[:, :k], ids.gather(1, order)[:, :k]
