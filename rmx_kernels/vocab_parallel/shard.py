"""What one rank computes from its rows of the head: statistics of its part of the vocabulary, and gradients.

The registered operators serve both ways. Forward they find m and log d of the part. Backward they are handed those of
the whole vocabulary, and so write the gradient of the whole softmax, of which this rank's columns are its part; a
target or a top-k id of another rank lies outside of the columns, where they find nothing to subtract.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rmx_kernels.logits import Gradients, Logits, Needs, spread

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Shard:
    """A rank's place: its group, the id of its first row of the head, and its implementation of the operators.

    The logits [N, V_r] that it is given are those of this rank's rows; hidden states are the same on every rank.
    """

    group: dist.ProcessGroup | None
    start: int
    impl: str

    def local(self, target: Tensor, V: int) -> tuple[Tensor, Tensor]:
        """(ids counted from ``start``, any in rows where they are another rank's; the rows where they are ours)."""
        ids = target - self.start
        return ids.clamp(0, V - 1), (ids >= 0) & (ids < V)

    def massless(self, z: Logits) -> Tensor | None:
        """Whether the bias is -inf throughout, so that this part has no mass: for the kernels, no distribution."""
        return None if z.bias is None or z.softcap is not None else (z.bias == NEG_INF).all()

    def statistics(self, z: Logits, target: Tensor | None, k: int) -> Any:
        """(lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d) of this part."""
        return torch.ops.rmx_kernels.vocab_stats(*z, target, k, self.impl)

    def statistics_gradient(self, z: Logits, saved: Sequence[Any], upstream: Gradients, needs: Needs) -> Gradients:
        """This part of the gradients. saved: target, ids [N, k], m, log d and entropy of the whole vocabulary.

        upstream: of lse, entropy, logprob and the top-k.
        """
        target, ids, *norms = saved
        target = None if target is None else target - self.start
        found = torch.ops.rmx_kernels.vocab_stats_backward(
            *z, target, ids - self.start, *norms, *upstream, list(needs), self.impl
        )
        return spread(found, needs)

    def divergence(self, z: Logits, base_hidden: Tensor, target: Tensor) -> Any:
        """(logprob, kl, norms [4, N]) of this part."""
        return torch.ops.rmx_kernels.logprob_kl(*z, base_hidden, target, self.impl)

    def divergence_gradient(
        self, z: Logits, base_hidden: Tensor, norms: Tensor, g_kl: Tensor, needs: Needs
    ) -> Gradients:
        """This part of the gradients of sum g_kl KL; norms [4, N] are of the whole vocabulary."""
        any_target = torch.zeros_like(g_kl, dtype=torch.int64)  # without a gradient of its log-prob
        found = torch.ops.rmx_kernels.logprob_kl_backward(
            *z, base_hidden, any_target, norms, None, g_kl, list(needs), self.impl
        )
        return spread(found, needs)
