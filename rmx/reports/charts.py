"""Charts of report.html as data: in percent of the plot, so that their text keeps its size at every width."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from rmx.records import Interval, StepMetrics
from rmx.reports.report import running_mean

BINS = 60  # of the histogram
POINTS = 500  # of a curve


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


@dataclass(frozen=True)
class Chart:
    """A plot with y upwards in the data and downwards on the page."""

    title: str
    unit: str
    x_label: str
    x_ticks: list[tuple[float, str]]  # percent from the left
    y_ticks: list[tuple[float, str]]  # percent from the top
    areas: list[tuple[str, str]] = field(default_factory=list)  # class, path in a box of 1000 x 1000
    lines: list[tuple[str, str]] = field(default_factory=list)  # the same
    legend: list[tuple[str, str]] = field(default_factory=list)  # class, text
    zero: float | None = None  # y of a line at 0
    mark: tuple[float, str] | None = None  # x of a vertical line, and what it says


def interval_lines(
    axes: Axes, lines: Mapping[str, Sequence[tuple[float, Interval]]], colours: Mapping[str, str], ticks: bool = True
) -> None:
    """Draw named lines of (x > 0, estimate) with their intervals, over a logarithmic x; a lone point is a point.

    ``ticks``: at each x alone, and points of one x are set apart by a little, so that whiskers do not cover each other.
    """
    for number, (name, points) in enumerate(lines.items()):
        apart = 1.03 ** (number - (len(lines) - 1) / 2) if ticks else 1.0
        x = np.array([at for at, _ in points]) * apart
        mean, low, high = (np.array([getattr(own, key) for _, own in points]) for key in ("mean", "low", "high"))
        errors = np.maximum([mean - low, high - mean], 0.0)
        axes.errorbar(x, mean, yerr=errors, color=colours[name], marker="o", capsize=3, linewidth=1.5, label=name)
    axes.set_xscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(plain)
    if ticks:
        axes.set_xticks(sorted({at for points in lines.values() for at, _ in points}))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=9)


def tick_values(low: float, high: float, count: int = 5) -> list[float]:
    return [float(v) for v in MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]


def tick_labels(ticks: Sequence[float], scale: float, start: float = 0.0) -> list[tuple[float, str]]:
    """(percent, text) of each tick, all with the same number of decimals."""
    texts = [f"{v:g}" for v in ticks]
    if not any("e" in text for text in texts):
        decimals = max(len(text.partition(".")[2]) for text in texts)
        texts = [f"{v:.{decimals}f}" for v in ticks]
    return [(scale * (v - start), text.replace("-", "−")) for v, text in zip(ticks, texts, strict=True)]


def histogram(entropy: np.ndarray, tau: float) -> Chart | None:
    """Tokens by base entropy on a logarithmic scale; tau is an edge, so that no bar is half gated."""
    if not entropy.size:
        return None
    at, top = max(tau, 0.0), max(float(entropy.max()), tau, 1e-6)
    width = top / BINS
    below = max(round(at / width), int(at > 0))  # bars
    width = at / below if at > width else width
    edges = np.concatenate(
        [np.linspace(0, at, below + 1)[:-1], at + width * np.arange(math.ceil((top - at) / width) + 2)]
    )
    inside = np.maximum(np.searchsorted(edges, entropy) - 1, 0)  # a bar holds its right edge: the gate is strict
    counts = np.bincount(inside, minlength=len(edges) - 1)
    x = 100 / edges[-1]
    y = 100 / (math.log10(counts.max()) + 0.5)  # the axis begins at half a token
    height = np.where(counts > 0, 10 * y * (np.log10(np.maximum(counts, 1)) + 0.3), 0)
    bars = [
        f"M{10 * x * left:.1f} 1000V{1000 - up:.1f}H{10 * x * right:.1f}V1000Z"
        for left, right, up in zip(edges[:-1], edges[1:], height, strict=True)
    ]
    split, share = int((edges[:-1] < tau).sum()), float(np.mean(entropy > tau))
    return Chart(
        title="Completion tokens",
        unit="number, log scale",
        x_label="base entropy (nats)",
        x_ticks=[tick for tick in tick_labels(tick_values(0, edges[-1], 8), x) if tick[0] < 100.01],
        y_ticks=[(100 - y * (d + 0.3), f"{10**d:,}") for d in range(int(math.log10(counts.max())) + 1)],
        areas=[("below", "".join(bars[:split])), ("gated", "".join(bars[split:]))],
        legend=[("below", f"at most tau: {percent(1 - share)}"), ("gated", f"above: {percent(share)}")],
        mark=(x * at, f"tau = {tau:.2f}"),
    )


def placed(rows: Sequence[tuple[str, Interval, Interval]], kinds: tuple[str, str]) -> dict[str, Any]:
    """Two dots of each row, with their intervals, as (class, value, its place, low, high) in percent of the width."""
    high = max(max(a.high, b.high) for _, a, b in rows)
    ticks = tick_values(0, max(high, 0.05))
    x = 100 / ticks[-1]
    found = [
        (label, [(kind, i.mean, i.mean * x, i.low * x, i.high * x) for kind, i in zip(kinds, pair, strict=True)])
        for label, *pair in rows
    ]
    return {"rows": found, "ticks": tick_labels(ticks, x)}


@dataclass(frozen=True)
class Series:
    """One line of a chart by step."""

    name: str  # its class
    history: Sequence[StepMetrics]
    column: str  # of the history
    exact: bool = False  # as it is; else faint, and its running mean


def curves(history: Sequence[StepMetrics]) -> list[Chart]:
    """Small multiples by step."""

    def curve(title: str, unit: str, columns: dict[str, str], exact: bool = False) -> Chart:
        return by_step(title, unit, [Series(name, history, column, exact) for name, column in columns.items()])

    return [
        curve("Loss", "nats", {"plain": "loss"}),
        curve("Log-prob change", "nats", {"right": "positive_shift", "wrong": "negative_shift"}),
        curve("Anchor KL", "nats", {"gated": "anchor_kl"}),
        curve("Gradient norm", "before clipping", {"plain": "gradient_norm"}),
        curve("Learning rate", "of each step", {"exact": "learning_rate"}, exact=True),
    ]


def by_step(title: str, unit: str, series: Sequence[Series]) -> Chart:
    """Lines by step; each history has a step, and they may differ in length."""
    drawn: list[tuple[str, np.ndarray, np.ndarray]] = []
    for own in series:
        stride = -(-len(own.history) // POINTS)
        steps = np.array([m.step for m in own.history], dtype=float)[::stride]
        values = np.array([getattr(m, own.column) for m in own.history], dtype=float)  # None becomes NaN: a gap
        if own.exact:
            drawn.append((own.name, steps, values[::stride]))
        else:
            smooth = running_mean(values)
            drawn += [(f"{own.name} faint", steps, values[::stride]), (own.name, steps, smooth[::stride])]
    known = np.concatenate([v[~np.isnan(v)] for _, _, v in drawn] + [np.zeros(1)])  # zero is always in sight
    ticks = tick_values(known.min(), known.max(), 4) if known.any() else [0.0, 1.0]
    low, high = ticks[0], ticks[-1]
    first = min(steps[0] for _, steps, _ in drawn)
    last = max(max(steps[-1] for _, steps, _ in drawn), first + 1)
    x, y = 100 / (last - first), 100 / (high - low)
    return Chart(
        title=title,
        unit=unit,
        x_label="step",
        x_ticks=[t for t in tick_labels(tick_values(first, last, 5), x, first) if 0 <= t[0] < 100.01],
        y_ticks=[(100 - at, text) for at, text in tick_labels(ticks, y, low)],
        lines=[(name, _path(10 * x * (steps - first), 10 * (100 - y * (v - low)))) for name, steps, v in drawn],
        legend=[(own.name, own.name) for own in series] if len(series) > 1 else [],
        zero=100 + y * low if low < 0 else None,
    )


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path through the points; NaN makes a gap, and a point between two gaps a dot."""
    parts, pen = [], False
    for a, b in zip(x, y, strict=True):
        if math.isnan(b):
            pen = False
            continue
        parts.append(f"L{a:.0f} {b:.0f}" if pen else f"M{a:.0f} {b:.0f}h0")
        pen = True
    return "".join(parts)
