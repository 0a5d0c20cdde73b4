"""Native kernels: one pass over the logits. Also serves linear_entropy_topk, whose tiles it folds."""

import torch
from torch import Tensor

from rmx_kernels import checks, native
from rmx_kernels.entropy_topk.ops import run as run
from rmx_kernels.tiles import compute_dtype


class RunningStats:
    """The sums and the top-k of N rows while tiles of columns are folded in; csrc/rmx_cpu.h says what they hold."""

    def __init__(self, N: int, k: int, real: torch.dtype, target: Tensor | None) -> None:
        self.N, self.k, self.target = N, k, target
        self.m, self.d, self.T = (torch.empty(N, dtype=real) for _ in range(3))
        self.chosen = None if target is None else torch.empty(N, dtype=real)
        self.best = torch.empty(N, 2 * k, dtype=torch.int64)

    def _sums(self, rows: slice) -> native.Sums:
        parts = (self.m, self.d, self.T, self.chosen, self.target)
        pointers = (native.address(None if part is None else part[rows]) for part in parts)
        return native.Sums(*pointers, self.k, native.address(self.best[rows]))

    def fold(self, z: native.Rows, scale: native.Scale, rows: slice, first: int, columns: int) -> None:
        native.call("rmx_entropy_topk", z, scale, rows.stop - rows.start, first, columns, self._sums(rows))

    def finish(self) -> tuple[Tensor, ...]:
        """(lse, entropy, logprob, topk_logprobs, topk_ids, m, log_d), each [N] or [N, k]."""
        log_d, lse, entropy = (torch.empty_like(self.m) for _ in range(3))
        logprob = self.m.new_empty(0 if self.chosen is None else self.N)
        values, ids = self.m.new_empty(self.N, self.k), torch.empty(self.N, self.k, dtype=torch.int64)
        stats = native.Stats(*(native.address(x) for x in (log_d, lse, entropy, logprob, values, ids)))
        dtype = native.DTYPES[self.m.dtype]
        native.call("rmx_entropy_topk_finish", dtype, self.N, self._sums(slice(0, self.N)), stats)
        return lse, entropy, logprob, values, ids, self.m, log_d


def shaped(stats: tuple[Tensor, ...], lead: torch.Size, has_target: bool) -> tuple[Tensor, ...]:
    lse, entropy, logprob, values, ids, m, log_d = stats
    k = ids.shape[-1]
    logprob = logprob.view(lead) if has_target else logprob
    return (
        lse.view(lead),
        entropy.view(lead),
        logprob,
        values.view(*lead, k),
        ids.view(*lead, k),
        m.view(lead),
        log_d.view(lead),
    )


def token_ids(target: Tensor | None, vocab: int) -> Tensor | None:
    if target is None:
        return None
    checks.target_range(target, vocab)
    return target.reshape(-1).long().contiguous()


def forward(
    logits: Tensor, target: Tensor | None, k: int, temperature: float, softcap: float | None
) -> tuple[Tensor, ...]:
    """The kernel of rmx_kernels::entropy_topk."""
    V, lead = logits.shape[-1], logits.shape[:-1]
    stats = RunningStats(lead.numel(), k, compute_dtype(logits.dtype), token_ids(target, V))
    stats.fold(native.rows(logits), native.scale(temperature, softcap), slice(0, stats.N), 0, V)
    return shaped(stats.finish(), lead, target is not None)


class StatsGradient:
    """Upstream gradients of N rows, flattened and in full precision, and what the backward kernel needs besides."""

    def __init__(
        self,
        target: Tensor | None,
        topk_ids: Tensor,
        m: Tensor,
        log_d: Tensor,
        entropy: Tensor,
        g_lse: Tensor | None,
        g_entropy: Tensor | None,
        g_logprob: Tensor | None,
        g_topk: Tensor | None,
    ) -> None:
        def flat(x: Tensor | None, *shape: int) -> Tensor | None:
            return None if x is None else x.to(m.dtype).reshape(-1, *shape).contiguous()

        self.k = topk_ids.shape[-1]
        self.N = m.numel()
        self.ids = topk_ids.reshape(self.N, self.k)
        self.norms = tuple(x.reshape(-1) for x in (m, log_d, entropy))
        self.g_entropy, self.g_logprob = flat(g_entropy), flat(g_logprob)
        self.g_topk = None if g_topk is None or self.k == 0 else flat(g_topk, self.k)
        self.target = None if target is None else target.reshape(-1).long().contiguous()
        self.along_p = torch.zeros(self.N, dtype=m.dtype)
        if g_lse is not None:
            self.along_p += g_lse.reshape(-1)
        if self.g_logprob is not None:
            self.along_p -= self.g_logprob
        if self.g_topk is not None:
            self.along_p -= self.g_topk.sum(-1)

    def __call__(
        self, x: native.Rows, dx: native.Rows, scale: native.Scale, rows: slice, first: int, columns: int
    ) -> None:
        """dx of a tile of the logits x, for some of the rows; in place if both are the same."""
        parts = (*self.norms, self.target, self.ids, self.along_p, self.g_entropy, self.g_logprob, self.g_topk)
        pointers = (native.address(None if part is None else part[rows]) for part in parts)
        gradient = native.StatsGradient(*pointers, self.k)
        count = rows.stop - rows.start
        native.call("rmx_entropy_topk_backward", x, scale, count, first, columns, gradient, dx)


def backward(
    logits: Tensor,
    target: Tensor | None,
    topk_ids: Tensor,
    m: Tensor,
    log_d: Tensor,
    entropy: Tensor,
    g_lse: Tensor | None,
    g_entropy: Tensor | None,
    g_logprob: Tensor | None,
    g_topk: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """The kernel of rmx_kernels::entropy_topk_backward."""
    gradient = StatsGradient(target, topk_ids, m, log_d, entropy, g_lse, g_entropy, g_logprob, g_topk)
    dx = native.scratch(logits.numel(), logits.dtype).view(logits.shape)
    scale = native.scale(temperature, softcap)
    gradient(native.rows(logits), native.rows(dx), scale, slice(0, gradient.N), 0, logits.shape[-1])
    return dx
