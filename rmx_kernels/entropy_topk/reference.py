"""Eager PyTorch: exact in fp32 (fp64 for fp64 inputs), bounded scratch. Also serves linear_entropy_topk."""

from typing import Any

import torch
from torch import Tensor

from rmx_kernels import traced_reference
from rmx_kernels.entropy_topk.ops import fake_stats
from rmx_kernels.once import differentiable_once
from rmx_kernels.results import VocabStats
from rmx_kernels.tiles import GradientSink, RowSums, VocabTiles, add_at, flat, pick


def exact_topk(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, descending, ties to the lower index (which torch.topk leaves open)."""
    values, ids = z.topk(k, dim=-1)
    ambiguous = (z >= values[:, -1:]).sum(-1) != k  # more entries equal the k-th value than fit; or NaN
    if ambiguous.any():
        v, i = z[ambiguous].sort(dim=-1, descending=True, stable=True)
        values[ambiguous], ids[ambiguous] = v[:, :k], i[:, :k]
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def merge_topk(best: tuple[Tensor, Tensor], values: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Merge with the k best of the columns to the right; the stable sort keeps lower ids first among equals."""
    both = torch.cat([best[0], values], dim=-1)
    values, order = both.sort(dim=-1, descending=True, stable=True)
    return values[:, :k], torch.cat([best[1], ids], dim=-1).gather(1, order[:, :k])


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    target, k = others[4:6]
    return fake_stats(x, target, k)[:5]


@traced_reference.register(
    "stats",
    f"(Tensor x, {traced_reference.LINEAR}, Tensor? target, int k, float temperature, float? softcap) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    (0, 1, 2, 3, 4),
    upstream=4,
)
class _VocabStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        lora_hidden: Tensor | None,
        lora_weight: Tensor | None,
        target: Tensor | None,
        k: int,
        temperature: float,
        softcap: float | None,
    ) -> tuple[Tensor, ...]:
        tiles = VocabTiles(x, weight, bias, lora_hidden, lora_weight, temperature=temperature, softcap=softcap)
        sums = RowSums(tiles.N, tiles.dtype, x.device)
        chosen = sums.m.new_full((tiles.N if target is not None else 0,), float("nan"))
        best = sums.m.new_full((tiles.N, k), float("-inf")), torch.zeros(tiles.N, k, dtype=torch.int64, device=x.device)
        for cols in tiles.columns():
            head = tiles.head(cols)
            for rows in tiles.rows():
                z = tiles(rows, cols, head)
                if target is not None:
                    pick(chosen, z, target, rows, cols)
                if k:
                    values, ids = exact_topk(z, min(k, z.shape[1]))
                    filled = min(k, cols.start)  # earlier tiles may hold fewer than k columns
                    seen = best[0][rows, :filled], best[1][rows, :filled]
                    values, ids = merge_topk(seen, values, ids + cols.start, k)
                    best[0][rows, : values.shape[1]], best[1][rows, : ids.shape[1]] = values, ids
                sums.fold(rows, z)
        m, log_d = sums.finish()
        entropy = sums.entropy()
        ctx.temperature, ctx.softcap, ctx.has_target = temperature, softcap, target is not None
        ids = best[1]
        ctx.save_for_backward(x, weight, bias, lora_hidden, lora_weight, target, m, log_d, entropy, ids)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        logprob = (chosen - m) - log_d if target is not None else chosen
        return m + log_d, entropy, logprob, (best[0] - m[:, None]) - log_d[:, None], ids

    @staticmethod
    @differentiable_once("entropy_topk")
    def backward(ctx: Any, saved: Any, g_lse: Any, g_entropy: Any, g_logprob: Any, g_topk: Any, _: Any) -> Any:
        *inputs, target, m, log_d, entropy, ids = saved
        x = inputs[0]
        tiles = VocabTiles(*inputs, temperature=ctx.temperature, softcap=ctx.softcap)
        sink = GradientSink(tiles, *ctx.needs_input_grad[:5])
        if not ctx.has_target:
            g_logprob = None
        # dz = p * along_p - g_entropy * p * (log p + H) + g_logprob * onehot(target) + g_topk * onehot(ids)
        along_p = torch.zeros_like(m)
        if g_lse is not None:
            along_p += g_lse
        if g_logprob is not None:
            along_p -= g_logprob
        if g_topk is not None:
            along_p -= g_topk.sum(-1)
        with torch.autocast(x.device.type, enabled=False):
            for cols in tiles.columns():
                head = tiles.head(cols)
                sink.open(cols, head)
                for rows in tiles.rows():
                    z = tiles(rows, cols, head)
                    log_p = (z - m[rows, None]) - log_d[rows, None]
                    dz = log_p.exp()
                    if g_entropy is not None:
                        slope = log_p.masked_fill_(dz == 0, 0).add_(entropy[rows, None]).mul_(g_entropy[rows, None])
                        dz *= along_p[rows, None] - slope
                    else:
                        dz *= along_p[rows, None]
                    if g_logprob is not None:
                        add_at(dz, g_logprob[rows], target[rows], cols)
                    if g_topk is not None:
                        add_at(dz, g_topk[rows], ids[rows], cols)
                    sink.add(tiles, rows, dz, z)
                sink.close()
        return *sink.gradients(), None, None, None, None


def run(
    x: Tensor,
    target: Tensor | None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    k: int,
    temperature: float,
    softcap: float | None,
) -> VocabStats:
    """x [..., V], or [..., H] with weight [V, H]; arguments as checked by the public operators."""
    lead = x.shape[:-1]
    with torch.autocast(x.device.type, enabled=False):
        ids = None if target is None else target.reshape(-1).long()
        lse, entropy, logprob, values, topk_ids = traced_reference.apply(
            "stats", _VocabStats, *(flat(x), weight, bias, flat(lora_hidden), lora_weight, ids, k, temperature, softcap)
        )
    return VocabStats(
        lse.view(lead),
        entropy.view(lead),
        None if target is None else logprob.view(lead),
        values.view(*lead, k) if k else None,
        topk_ids.view(*lead, k) if k else None,
    )
