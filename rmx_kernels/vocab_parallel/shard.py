"""What one rank computes from its rows of the head: statistics of its part of the vocabulary, and gradients.

The registered operators serve both ways. Forward they find m and log d of the part. Backward they are handed those of
the whole vocabulary, and so write the gradient of the whole softmax, of which this rank's columns are its part; a
target or a top-k id of another rank lies outside of the columns, where they find nothing to subtract.

The Triton kernels keep m before the temperature, the others after it, as ranks exchange it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rmx_kernels.logits import Gradients, Logits, Needs, spread

NEG_INF = float("-inf")
Norm = tuple[Tensor, Tensor]  # m and log d [N]


def exchanged(norm: Norm, unit: float | Tensor, other: float | Tensor) -> Norm:
    """The same lse = m unit + log d with m in another unit; what is rounded off m goes into log d."""
    m, log_d = norm
    value = m.double() * unit
    found = (value / other).to(m.dtype)
    return found, (log_d.double() + (value - found.double() * other)).to(log_d.dtype)


@dataclass(frozen=True)
class Shard:
    """A rank's place: its group, the id of its first row of the head, and its implementation of the operators.

    The logits [N, V_r] that it is given are those of this rank's rows; hidden states are the same on every rank.
    """

    group: dist.ProcessGroup | None
    start: int
    impl: str
    reduce_hidden_grad: bool = True

    def local(self, target: Tensor, V: int) -> tuple[Tensor, Tensor]:
        """(ids counted from ``start``, any in rows where they are another rank's; the rows where they are ours)."""
        ids = target - self.start
        return ids.clamp(0, V - 1), (ids >= 0) & (ids < V)

    def massless(self, z: Logits) -> Tensor | None:
        """Whether the bias is -inf throughout, so that this part has no mass: for the kernels, no distribution."""
        return None if z.bias is None or z.softcap is not None else (z.bias == NEG_INF).all()

    def statistics(self, z: Logits, target: Tensor | None, k: int) -> Any:
        """(lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d) of this part."""
        *others, m, log_d, _, _ = torch.ops.rmx_kernels.vocab_stats(*z, target, k, False, self.impl)
        return *others, *self._given((m, log_d), z)

    def statistics_gradient(self, z: Logits, saved: Sequence[Any], upstream: Gradients, needs: Needs) -> Gradients:
        """This part of the gradients. saved: target, ids [N, k], m, log d and entropy of the whole vocabulary.

        upstream: of lse, entropy, logprob and the top-k.
        """
        target, ids, m, log_d, entropy = saved
        norm = self._taken((m, log_d), z)
        target = None if target is None else target - self.start
        found = torch.ops.rmx_kernels.vocab_stats_backward(
            *z, target, ids - self.start, *norm, entropy, *upstream, list(needs), self.impl
        )
        return spread(found, needs)

    def divergence(self, z: Logits, base_hidden: Tensor, target: Tensor) -> Any:
        """(logprob, kl, norms [4, N]) of this part."""
        logprob, kl, norms = torch.ops.rmx_kernels.logprob_kl(*z, base_hidden, target, self.impl)
        m, log_d, base_m, base_log_d = norms
        return logprob, kl, torch.stack([*self._given((m, log_d), z), *self._given((base_m, base_log_d), z)])

    def divergence_gradient(
        self, z: Logits, base_hidden: Tensor, norms: Tensor, g_kl: Tensor, needs: Needs
    ) -> Gradients:
        """This part of the gradients of sum g_kl KL; norms [4, N] are of the whole vocabulary."""
        m, log_d, base_m, base_log_d = norms
        norms = torch.stack([*self._taken((m, log_d), z), *self._taken((base_m, base_log_d), z)])
        any_target = torch.zeros_like(g_kl, dtype=torch.int64)  # without a gradient of its log-prob
        found = torch.ops.rmx_kernels.logprob_kl_backward(
            *z, base_hidden, any_target, norms, None, g_kl, list(needs), self.impl
        )
        return spread(found, needs)

    def _unit(self, z: Logits) -> float | Tensor:
        """What m of this rank's kernels is multiplied by to be that of z."""
        if self.impl != "triton":
            return 1.0
        own = z.divisors()
        return 1.0 / z.temperature if own is None else own.squeeze(1).double().reciprocal()

    def _given(self, norm: Norm, z: Logits) -> Norm:
        """As ranks exchange it, from that of this rank's kernels."""
        unit = self._unit(z)
        return norm if isinstance(unit, float) and unit == 1 else exchanged(norm, unit, 1.0)

    def _taken(self, norm: Norm, z: Logits) -> Norm:
        """As this rank's kernels take it."""
        unit = self._unit(z)
        return norm if isinstance(unit, float) and unit == 1 else exchanged(norm, 1.0, unit)
