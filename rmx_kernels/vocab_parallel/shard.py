"""What one rank computes from its rows of the head: statistics of its part of the vocabulary, and gradients.

The kernels of the operators serve both ways. Forward they find m and log d of the part. Backward they are handed those
of the whole vocabulary, and so write the gradient of the whole softmax, of which this rank's columns are its part; a
target or a top-k id of another rank lies outside of the columns, where they find nothing to subtract.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from rmx_kernels.entropy_topk import reference
from rmx_kernels.linear_logprob_kl.reference import RowGroup, normalisers, sweep
from rmx_kernels.tiles import GradientSink, VocabTiles

Gradients = Sequence[Tensor | None]  # of hidden, weight, bias, lora_hidden and lora_weight
Needs = Sequence[bool]  # of the same five
NEG_INF = float("-inf")


class Student(NamedTuple):
    """What this rank's logits of the student are made from; hidden and lora_hidden are the same on every rank."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V_r, H]
    bias: Tensor | None  # [V_r]
    lora_hidden: Tensor | None  # [N, r]
    lora_weight: Tensor | None  # [V_r, r]


@dataclass(frozen=True)
class Shard:
    """A rank's place: its group, the id of its first row of the head, the scaling of logits, and with which kernels."""

    group: dist.ProcessGroup | None
    start: int
    temperature: float
    softcap: float | None
    eager: bool  # impl="reference"

    def local(self, target: Tensor, V: int) -> tuple[Tensor, Tensor]:
        """(ids counted from ``start``, any in rows where they are another rank's; the rows where they are ours)."""
        ids = target - self.start
        return ids.clamp(0, V - 1), (ids >= 0) & (ids < V)

    def massless(self, bias: Tensor | None) -> Tensor | None:
        """Whether the bias is -inf throughout, so that this part has no mass: for the kernels, no distribution."""
        return None if bias is None or self.softcap is not None else (bias == NEG_INF).all()

    def statistics(self, student: Student, target: Tensor | None, k: int) -> tuple[Tensor, ...]:
        """(lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d) of this part, as linear_entropy_topk's kernels."""
        if not self.eager:
            return torch.ops.rmx_kernels.linear_entropy_topk(*student, target, k, self.temperature, self.softcap)
        stats = reference.run(
            student.hidden,
            target,
            weight=student.weight,
            bias=student.bias,
            lora_hidden=student.lora_hidden,
            lora_weight=student.lora_weight,
            k=k,
            temperature=self.temperature,
            softcap=self.softcap,
        )
        m, log_d, _ = normalisers(self._tiles(student), None)
        none = m.new_empty(m.shape[0], 0)
        given = (stats.logprob, stats.topk_logprobs, stats.topk_ids)
        logprob, values, ids = (none if x is None else x for x in given)
        return stats.lse, stats.entropy, logprob, values, ids.long(), m, log_d

    def statistics_gradient(
        self,
        student: Student,
        target: Tensor | None,
        ids: Tensor,
        norms: tuple[Tensor, Tensor, Tensor],
        upstream: Gradients,
        needs: Needs,
    ) -> Gradients:
        """This part of the gradients; target, ids [N, k], norms (m, log d, entropy) are of the whole vocabulary.

        upstream: of lse, entropy, logprob and the top-k.
        """
        target = None if target is None else target - self.start
        ids = ids - self.start
        if not self.eager:
            return torch.ops.rmx_kernels.linear_entropy_topk_backward(
                *student, target, ids, *norms, *upstream, self.temperature, self.softcap, *needs
            )
        context = SimpleNamespace(  # what autograd would hand it, but for the norms
            saved_tensors=(*student, target, *norms, ids),
            needs_input_grad=needs,
            temperature=self.temperature,
            softcap=self.softcap,
            has_target=target is not None,
        )
        g_lse, g_entropy, g_logprob, g_topk = upstream
        return reference._VocabStats.backward(context, g_lse, g_entropy, g_logprob, g_topk, None)[:5]

    def divergence(self, student: Student, base_hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(logprob, kl, norms [4, N]) of this part, as linear_logprob_kl's kernels."""
        if not self.eager:
            hidden, *head = student
            return torch.ops.rmx_kernels.linear_logprob_kl(
                hidden, base_hidden, *head, target, self.temperature, self.softcap
            )
        tiles, base = self._tiles(student), self._base_tiles(student, base_hidden)
        m, log_d, chosen = normalisers(tiles, target)
        base_norm = normalisers(base, None)[:2]
        zero = torch.zeros_like(m)
        group = RowGroup(tiles, target, (m, log_d), base, base_norm)
        (kl,) = sweep([group], [(zero, zero)], GradientSink(tiles))
        assert kl is not None
        return (chosen - m) - log_d, kl, torch.stack([m, log_d, *base_norm])

    def divergence_gradient(
        self, student: Student, base_hidden: Tensor, norms: Tensor, g_kl: Tensor, needs: Needs
    ) -> Gradients:
        """This part of the gradients of sum g_kl KL; norms [4, N] are of the whole vocabulary."""
        if not self.eager:
            hidden, *head = student
            any_target = torch.zeros_like(g_kl, dtype=torch.int64)  # without a gradient of its log-prob
            return torch.ops.rmx_kernels.linear_logprob_kl_backward(
                hidden, base_hidden, *head, any_target, norms, None, g_kl, self.temperature, self.softcap, *needs
            )
        tiles, base = self._tiles(student), self._base_tiles(student, base_hidden)
        sink = GradientSink(tiles, *needs)
        m, log_d, base_m, base_log_d = norms.unsqueeze(-1)
        for cols in tiles.columns():
            part = tiles.head(cols)
            sink.open(cols, part)
            for rows in tiles.rows():
                z = tiles(rows, cols, part)
                p_s = ((z - m[rows]) - log_d[rows]).exp()
                p_b = ((base(rows, cols, part) - base_m[rows]) - base_log_d[rows]).exp()
                sink.add(tiles, rows, (p_s - p_b) * g_kl[rows, None], z)
            sink.close()
        return sink.gradients()

    def _tiles(self, student: Student) -> VocabTiles:
        return VocabTiles(*student, temperature=self.temperature, softcap=self.softcap)

    def _base_tiles(self, student: Student, base_hidden: Tensor) -> VocabTiles:
        return self._tiles(Student(base_hidden, student.weight, student.bias, None, None))
