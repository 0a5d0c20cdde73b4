"""Eager PyTorch: the divergence of a student from a teacher, tile by tile.

With p of the teacher, q of the student and m = beta p + (1 - beta) q, a KL is a sum of terms that are never negative:

    KL(p || q) = sum p (e^x - 1 - x),  x = log q - log p;   KL(q || p) with both exchanged
    JSD = beta KL(p || m) + (1 - beta) KL(q || m),  KL(p || m) = sum p (y - log(1 + y)),  y = (1 - beta) (q - p) / p

    alpha = sum (a p + b q - p^a q^b) / (a b) = sum p (c_2 x^2 / 2! + c_3 x^3 / 3! + ...),  a = beta, b = 1 - beta,
        c_n = 1 + b + ... + b^(n - 2)

and exactly 0 where both are equal. The gradients of a row with respect to the student's scaled logits:

    KL(p || q): q - p    KL(q || p): q (l - mean), l = log q - log p    JSD: (1 - beta) q (l - mean), l = log q - log m
    alpha: q (l - mean), l = (1 - (p / q)^a) / a    entropy: -q (log q + entropy)

The mean is sum q l, summed as it stands: what a rounded normaliser adds to every l then cancels in the difference.

Products with the heads, a row: one of each for the normalisers, one of each for the terms, one of each for the
gradient and one back.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from rmx_kernels.divergences.op import ALPHA, FORWARD_KL, NORMS, REVERSE_KL, DivergenceForward, HeadPair, Upstream
from rmx_kernels.head.reference import GradientSink, RowSums, VocabTiles
from rmx_kernels.logits import Gradients, Needs, chunks
from rmx_kernels.losses.reference import kl_terms

NEAR = 0.3  # of 0: where y - log(1 + y) is a series
NEAR_POWER = 0.5  # nats between two log-probs up to which a term of the alpha divergence is a series
LAST_POWER = 18  # of that series
FAR = 80.0  # nats between two log-probs from which on the smaller probability adds nothing to a mixture
Tile = tuple[slice, slice, Tensor, Tensor]  # rows, columns, scaled logits of student and teacher


def excess_of_log(y: Tensor) -> Tensor:
    """y - log(1 + y) for abs(y) < NEAR: y s - 2 s^3 (1/3 + s^2/5 + ...), s = y / (2 + y), since log is 2 atanh s."""
    s = y / (2 + y)
    w = s * s
    series = torch.full_like(w, 1 / 21)
    for n in range(19, 1, -2):
        series.mul_(w).add_(1 / n)
    return y * s - series.mul_(w).mul_(s).mul_(2)


def mixture_terms(p: Tensor, mixture: Tensor, y: Tensor) -> Tensor:
    """p (y - log(1 + y)) = m - p (1 + log(1 + y)): those of KL(p || m), m = p (1 + y)."""
    near = y.abs() < NEAR
    terms = mixture - p * (1 + y.log1p())
    return torch.where(near, p * excess_of_log(torch.where(near, y, 0.0)), terms)


def log_ratio(p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """log q - log p where a mixture is made of both: bounded, and 0 for tokens that neither has."""
    return (log_q - log_p).masked_fill_((p == 0) & (q == 0), 0).clamp_(-FAR, FAR)


def alpha_parts(order: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(p, q, where x = log q - log p is near 0, x there, p^a q^b) of a tile."""
    x = log_q - log_p
    near = x.abs() <= NEAR_POWER
    power = (order * log_p + (1 - order) * log_q).exp()
    return log_p.exp(), log_q.exp(), near, torch.where(near, x, 0.0), power


def alpha_slopes(order: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """q l = (q - p^a q^b) / a, of the mean and of the gradient."""
    _, q, near, x, power = alpha_parts(order, log_p, log_q)
    return torch.where(near, -q * torch.expm1(-order * x), q - power) / order


def alpha_terms(order: float, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The terms of the alpha divergence."""
    a, b = order, 1 - order
    p, q, near, x, power = alpha_parts(order, log_p, log_q)
    coefficients, c, factorial = [], 1.0, 2
    for n in range(2, LAST_POWER + 1):
        coefficients.append(c / factorial)
        c, factorial = 1 + b * c, factorial * (n + 1)
    series = torch.full_like(x, coefficients.pop())
    while coefficients:
        series.mul_(x).add_(coefficients.pop())
    far = ((a * p + b * q - power) / (a * b)).clamp(min=0)
    return torch.where(near, series.mul_(x).mul_(x).mul_(p), far)


def terms(kind: str, beta: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor | None]:
    """Of a tile: the terms of the divergence, and those of the mean that its gradient needs, if it needs one."""
    p, q = log_p.exp(), log_q.exp()
    if kind == FORWARD_KL:
        return kl_terms(q, p, log_q - log_p), None
    if kind == REVERSE_KL:
        return kl_terms(p, q, log_p - log_q), (q * (log_q - log_p)).masked_fill_(q == 0, 0)
    if kind == ALPHA:
        return alpha_terms(beta, log_p, log_q), alpha_slopes(beta, log_p, log_q)
    x = log_ratio(p, q, log_p, log_q)
    mixture = beta * p + (1 - beta) * q
    of_p = mixture_terms(p, mixture, (1 - beta) * x.expm1())
    y = x.neg_().expm1_().mul_(beta)
    found = of_p.mul_(beta).add_(mixture_terms(q, mixture, y), alpha=1 - beta)
    return found, y.log1p_().mul_(q).neg_()


def row_gradient(kind: str, beta: float, log_p: Tensor, log_q: Tensor, mean: Tensor) -> Tensor:
    """The gradient of a row's divergence with respect to a tile of the student's scaled logits; mean: norms[4]."""
    p, q = log_p.exp(), log_q.exp()
    if kind == FORWARD_KL:
        return q - p  # 0 where they are equal
    if kind == ALPHA:
        return alpha_slopes(beta, log_p, log_q) - q * mean[:, None]
    if kind == REVERSE_KL:
        of_q = (log_q - log_p) - mean[:, None]
    else:
        x = log_ratio(p, q, log_p, log_q)
        of_q = (x.neg_().expm1_().mul_(beta).log1p_() + mean[:, None]).mul_(beta - 1)
    return (q * of_q).masked_fill_(q == 0, 0)


def entropy_gradient(log_q: Tensor, entropy: Tensor) -> Tensor:
    """-q (log q + entropy), 0 where q is."""
    q = log_q.exp()
    return (q * (log_q + entropy[:, None])).masked_fill_(q == 0, 0).neg_()


def flat_upstream(upstream: Upstream, dtype: torch.dtype) -> Upstream:
    """Upstream gradients [B...] as [N] in full precision."""
    g_divergence, g_entropy = (None if g is None else g.reshape(-1).to(dtype) for g in upstream)
    return g_divergence, g_entropy


def of_rows(upstream: Upstream, rows: slice) -> Upstream:
    g_divergence, g_entropy = (None if g is None else g[rows] for g in upstream)
    return g_divergence, g_entropy


class Rows:
    """The values and gradients of rows [N], from any number of walks over tiles of their logits."""

    def __init__(self, pair: HeadPair, norms: Tensor) -> None:
        self.kind, self.beta, self.norms = pair.kind, pair.beta, norms

    def find_norms(self, tiles: Callable[[], Iterable[Tile]]) -> None:
        """Normalisers and entropy, into the norms."""
        sums = [RowSums(self.norms.shape[1], self.norms.dtype, self.norms.device) for _ in range(2)]
        for rows, _, z, teacher_z in tiles():
            sums[0].fold(rows, z)
            sums[1].fold(rows, teacher_z, entropy=False)
        for place, one in enumerate(sums):
            self.norms[2 * place], self.norms[2 * place + 1] = one.finish()
        self.norms[5] = sums[0].entropy()

    def log_probs(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """(log p, log q) of a tile."""
        rows, _, z, teacher_z = tile
        m, log_d, teacher_m, teacher_log_d = self.norms[:4, rows, None]
        return (teacher_z - teacher_m) - teacher_log_d, (z - m) - log_d

    def values(self, tiles: Callable[[], Iterable[Tile]]) -> Tensor:
        """The divergence [N]; the mean for its gradient goes into the norms."""
        value, mean = (torch.zeros_like(self.norms[0]) for _ in range(2))
        for tile in tiles():
            found, of_mean = terms(self.kind, self.beta, *self.log_probs(tile))
            value[tile[0]] += found.sum(-1)
            if of_mean is not None:
                mean[tile[0]] += of_mean.sum(-1)
        self.norms[4] = torch.where(value.isnan(), value, mean)
        return value

    def gradient(self, tile: Tile, upstream: Upstream) -> Tensor:
        """Of a tile of the student's scaled logits, for upstream gradients [N] of divergence and entropy."""
        rows = tile[0]
        log_p, log_q = self.log_probs(tile)
        dz = None
        if upstream[0] is not None:
            dz = row_gradient(self.kind, self.beta, log_p, log_q, self.norms[4, rows]).mul_(upstream[0][rows, None])
        if upstream[1] is not None:
            own = entropy_gradient(log_q, self.norms[5, rows]).mul_(upstream[1][rows, None])
            dz = own if dz is None else dz.add_(own)
        return torch.zeros_like(log_q) if dz is None else dz


class TilePair:
    """Tiles of both models, whose heads may differ in width: as many columns as the wider one allows.

    Of half as many rows as for one model, since twice as many tiles are alive at once.
    """

    def __init__(self, pair: HeadPair) -> None:
        self.student, self.teacher = VocabTiles(pair.student), VocabTiles(pair.teacher)
        wider = pair.teacher.x.shape[-1] > pair.student.x.shape[-1]
        self.wide = self.teacher if wider else self.student
        self.N = pair.student.x.shape[0]
        self.step = max(1, next(self.wide.rows(), slice(0, 1)).stop // 2)

    def __call__(self, sink: GradientSink | None = None) -> Iterator[Tile]:
        """Each tile. The sink is opened before those of the same columns, and closed behind them."""
        for cols in self.wide.columns():
            head, teacher_head = self.student.head(cols), self.teacher.head(cols)
            if sink is not None:
                sink.open(cols, head)
            for rows in chunks(self.N, self.step):
                yield rows, cols, self.student(rows, cols, head), self.teacher(rows, cols, teacher_head)
            if sink is not None:
                sink.close()


def sweep(rows: Rows, tiles: TilePair, sink: GradientSink, upstream: Upstream) -> None:
    """The gradients of all rows, for upstream gradients [N], into the sink."""
    if sink.active:
        for tile in tiles(sink):
            sink.add(tiles.student, tile[0], rows.gradient(tile, upstream), tile[2])


def divergence(pair: HeadPair, gradient: bool) -> DivergenceForward:
    z, pair = pair.student, pair.rows()
    norms = pair.student.x.new_full((NORMS, pair.student.x.shape[0]), float("nan"), dtype=z.real)
    rows, tiles = Rows(pair, norms), TilePair(pair)
    rows.find_norms(tiles)
    value = rows.values(tiles)
    sink = GradientSink(pair.student, (gradient, False, False, gradient, False))
    sweep(rows, tiles, sink, (torch.ones_like(value), None))
    dx, du = (value.new_empty(0) for _ in range(2))
    if gradient:
        dx = sink.x.view(z.x.shape)
        du = du if z.lora_hidden is None else sink.lora_hidden.view(z.lora_hidden.shape)
    return value.view(z.lead), norms[5].clone().view(z.lead), norms, dx, du


def divergence_backward(pair: HeadPair, norms: Tensor, upstream: Upstream, needs: Needs) -> Gradients:
    z, pair = pair.student, pair.rows()
    sink = GradientSink(pair.student, needs)
    sweep(Rows(pair, norms), TilePair(pair), sink, flat_upstream(upstream, norms.dtype))
    return sink.gradients(z)
