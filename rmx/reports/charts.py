"""Charts of report.html as data: in percent of the plot, so that their text keeps its size at every width."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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


def curves(history: Sequence[StepMetrics]) -> list[Chart]:
    """Small multiples by step."""
    return [
        _curve(history, "Loss", "nats", {"plain": "loss"}),
        _curve(history, "Log-prob change", "nats", {"right": "positive_shift", "wrong": "negative_shift"}),
        _curve(history, "Anchor KL", "nats", {"gated": "anchor_kl"}),
        _curve(history, "Gradient norm", "before clipping", {"plain": "gradient_norm"}),
        _curve(history, "Learning rate", "of each step", {"exact": "learning_rate"}),
    ]


def _curve(history: Sequence[StepMetrics], title: str, unit: str, columns: dict[str, str]) -> Chart:
    """Each column as it is, faint, and its running mean; those of class "exact" as they are alone."""
    stride = -(-len(history) // POINTS)
    steps = np.array([m.step for m in history], dtype=float)[::stride]
    series: list[tuple[str, np.ndarray]] = []
    for name, column in columns.items():
        values = np.array([getattr(m, column) for m in history], dtype=float)  # None becomes NaN: a gap
        if name == "exact":
            series.append((name, values[::stride]))
        else:
            smooth = running_mean(values)
            series += [(f"{name} faint", values[::stride]), (name, smooth[::stride])]
    known = np.concatenate([v[~np.isnan(v)] for _, v in series] + [np.zeros(1)])  # zero is always in sight
    ticks = tick_values(known.min(), known.max(), 4) if known.any() else [0.0, 1.0]
    low, high = ticks[0], ticks[-1]
    first, last = steps[0], max(steps[-1], steps[0] + 1)
    x, y = 100 / (last - first), 100 / (high - low)
    return Chart(
        title=title,
        unit=unit,
        x_label="step",
        x_ticks=[t for t in tick_labels(tick_values(first, last, 5), x, first) if 0 <= t[0] < 100.01],
        y_ticks=[(100 - at, text) for at, text in tick_labels(ticks, y, low)],
        lines=[(name, _path(10 * x * (steps - first), 10 * (100 - y * (v - low)))) for name, v in series],
        legend=[(name, name) for name in columns] if len(columns) > 1 else [],
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
