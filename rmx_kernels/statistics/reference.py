"""Eager PyTorch: exact in fp32 (fp64 for fp64 inputs), bounded scratch."""

import torch
from torch import Tensor

from rmx_kernels.head.reference import GradientSink, RowSums, VocabTiles, add_at, pick
from rmx_kernels.logits import Gradients, Logits, Needs
from rmx_kernels.statistics.op import Forward, Saved, Upstream


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


def forward(z: Logits, target: Tensor | None, k: int, gradient: bool) -> Forward:
    """The statistics of all rows, folded tile by tile; the gradient of the log-probs from the tiles made anew."""
    tiles, lead = VocabTiles(z.rows()), z.lead
    ids = None if target is None else target.reshape(tiles.N, *target.shape[len(lead) :]).long()
    sums = RowSums(tiles.N, tiles.dtype, z.x.device)
    chosen = sums.m.new_full((0,) if ids is None else ids.shape, float("nan"))
    best = sums.m.new_full((tiles.N, k), float("-inf")), sums.m.new_zeros(tiles.N, k, dtype=torch.int64)
    for cols in tiles.columns():
        head = tiles.head(cols)
        for rows in tiles.rows():
            tile = tiles(rows, cols, head)
            if ids is not None:
                pick(chosen, tile, ids, rows, cols)
            if k:
                values, places = exact_topk(tile, min(k, tile.shape[1]))
                filled = min(k, cols.start)  # earlier tiles may hold fewer than k columns
                seen = best[0][rows, :filled], best[1][rows, :filled]
                values, places = merge_topk(seen, values, places + cols.start, k)
                best[0][rows, : values.shape[1]], best[1][rows, : places.shape[1]] = values, places
            sums.fold(rows, tile)
    m, log_d = sums.finish()
    logprob = chosen
    if target is not None:
        several = [1] * (chosen.dim() - 1)
        logprob = ((chosen - m.view(-1, *several)) - log_d.view(-1, *several)).view(target.shape)
    topk = ((best[0] - m[:, None]) - log_d[:, None]).view(*lead, k), best[1].view(*lead, k)
    lse, entropy, m, log_d = (x.view(lead) for x in (m + log_d, sums.entropy(), m, log_d))
    dx, du = z.empty_row_gradients(gradient, "reference")
    if gradient:
        sink = GradientSink(tiles.z, (True, False, False, True, False))
        upstream = Upstream(None, None, torch.ones_like(m), None)
        _sweep(tiles, Saved(target, topk[1], m, log_d, entropy), upstream, sink)
        dx, du = sink.x, sink.lora_hidden
    return lse, entropy, logprob, *topk, m, log_d, *z.shaped(dx, du)


def backward(z: Logits, saved: Saved, upstream: Upstream, needs: Needs) -> Gradients:
    tiles = VocabTiles(z.rows())
    sink = GradientSink(tiles.z, needs)
    _sweep(tiles, saved, upstream, sink)
    return sink.gradients(z)


def _sweep(tiles: VocabTiles, saved: Saved, upstream: Upstream, sink: GradientSink) -> None:
    """dz = p * along_p - g_entropy * p * (log p + H) + g_logprob * onehot(target) + g_topk * onehot(ids)."""
    m, log_d, entropy = (x.reshape(-1) for x in (saved.m, saved.log_d, saved.entropy))
    target = None if saved.target is None else saved.target.reshape(-1).long()
    k = saved.topk_ids.shape[-1]
    ids, g_topk = (None if x is None else x.reshape(m.numel(), k) for x in (saved.topk_ids, upstream.topk))
    g_lse, g_entropy, g_logprob = (None if g is None else g.reshape(-1) for g in upstream[:3])
    along_p = torch.zeros_like(m)
    if g_lse is not None:
        along_p += g_lse
    if g_logprob is not None:
        along_p -= g_logprob
    if g_topk is not None:
        along_p -= g_topk.sum(-1)
    for cols in tiles.columns():
        head = tiles.head(cols)
        sink.open(cols, head)
        for rows in tiles.rows():
            tile = tiles(rows, cols, head)
            log_p = (tile - m[rows, None]) - log_d[rows, None]
            dz = log_p.exp()
            if g_entropy is not None:
                slope = log_p.masked_fill_(dz == 0, 0).add_(entropy[rows, None]).mul_(g_entropy[rows, None])
                dz *= along_p[rows, None] - slope
            else:
                dz *= along_p[rows, None]
            if g_logprob is not None and target is not None:
                add_at(dz, g_logprob[rows], target[rows], cols)
            if g_topk is not None and ids is not None:
                add_at(dz, g_topk[rows], ids[rows], cols)
            sink.add(tiles, rows, dz, tile)
        sink.close()
