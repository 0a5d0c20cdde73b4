"""The final table and the picture of a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from rmx.artefacts import replacing
from rmx.records import Evaluation
from rmx.train import StepMetrics

BASE, TUNED, GATE = "#7a8ca3", "#d1495b", "#edae49"
WINDOW = 5  # steps in a running mean
FEW = 20  # problems, under which a percentile bootstrap is far too narrow


def table(result: Evaluation) -> Table:
    """Base against tuned, pass@1 with 95 % intervals."""
    title = f"{result.problems} held-out problems x {result.samples} samples, pass@1 [95 % interval]"
    grid = Table(title=title, box=box.SIMPLE, padding=(0, 0, 0, 1), pad_edge=False)  # fits 80 columns
    for heading in ("", "base", "tuned", "gain"):
        grid.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    grid.add_row("all", str(result.base), f"[bold]{result.tuned}[/]", f"[bold]{result.gain}[/]")
    for category, (before, after) in result.categories.items():
        grid.add_row(
            escape(category.removeprefix("reasoning_gym:")), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"
        )
    grid.add_section()
    lengths = result.base_tokens, result.tuned_tokens
    grid.add_row("mean tokens", f"{lengths[0]:.1f}", f"{lengths[1]:.1f}", f"{lengths[1] - lengths[0]:+.1f}")
    cut = result.base_truncated, result.tuned_truncated
    grid.add_row("truncated", f"{cut[0]:.1%}", f"{cut[1]:.1%}", f"{100 * (cut[1] - cut[0]):+.1f} pt")
    if result.unverified:
        grid.add_row("not verified", str(result.unverified), "", "")
    return grid


def verdict(result: Evaluation) -> str:
    """The outcome in one sentence, whichever way it came out."""
    gain = result.gain
    if result.problems < FEW:
        return f"Gain {gain}; {result.problems} problems are too few for such an interval to mean much."
    if gain.low > 0:
        return f"The tuned model is better: {gain} with a 95 % interval above zero."
    if gain.high < 0:
        return f"The tuned model is worse: {gain} with a 95 % interval below zero."
    return f"No clear difference: the 95 % interval of the gain, {gain}, holds zero."


def plot(path: Path, entropy: np.ndarray, tau: float, history: Sequence[StepMetrics], result: Evaluation) -> None:
    """PNG of three panels: base entropy with the gate, training curves, accuracy.

    Args:
        entropy: base entropies of all rollout tokens, nats. tau: the gate, nats.
    """
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    gate, curves, bars = figure.subplots(1, 3)
    _plot_gate(gate, entropy, tau)
    _plot_training(curves, history)
    _plot_accuracy(bars, result)
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def _plot_gate(axes: Axes, entropy: np.ndarray, tau: float) -> None:
    width = max(float(entropy.max()), tau, 1e-6) / 60
    below = int(np.ceil(tau / width))
    edges = tau + width * np.arange(-below, 62 - below)  # tau is an edge: no bar is half gated
    gated = f"gated: {np.mean(entropy > tau):.1%} of {entropy.size:,} tokens"
    for mask, colour, label in ((entropy <= tau, BASE, "anchored"), (entropy > tau, GATE, gated)):
        axes.hist(entropy[mask], bins=edges.tolist(), color=colour, label=label)
    axes.axvline(max(tau, 0), color="black", linestyle="--", linewidth=1, label=f"tau = {tau:.2f} nats")
    axes.set(title="Where the base model is unsure", xlabel="base entropy (nats)", ylabel="completion tokens")
    axes.set(yscale="log", xlim=(0, None))
    axes.legend(frameon=False)


def _plot_training(axes: Axes, history: Sequence[StepMetrics]) -> None:
    steps = np.array([m.step for m in history])
    for name, colour, label in (
        ("positive_shift", TUNED, "right rollouts, decision tokens"),
        ("negative_shift", BASE, "wrong rollouts, decision tokens"),
    ):
        values = np.array([getattr(m, name) for m in history], dtype=float)  # None becomes NaN: a gap
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, _running_mean(values), color=colour, linewidth=2, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(
        title=f"Training (mean of {WINDOW} steps)", xlabel="step", ylabel="change of log-prob since the base (nats)"
    )
    other = axes.twinx()
    kl = np.array([m.anchor_kl for m in history])
    other.plot(steps, _running_mean(kl), color=GATE, linestyle=":", linewidth=2, label="anchor KL (right axis)")
    other.set_ylabel("KL(base || tuned) at anchors (nats)")
    other.set_ylim(bottom=0)
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, loc="best")


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Of the last WINDOW values that are not NaN, at every step."""
    known = ~np.isnan(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[WINDOW:] -= sums[:-WINDOW].copy()
    counts[WINDOW:] -= counts[:-WINDOW].copy()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _plot_accuracy(axes: Axes, result: Evaluation) -> None:
    names = ["all", *(category.removeprefix("reasoning_gym:") for category in result.categories)]
    base = [result.base.mean, *(before for before, _ in result.categories.values())]
    tuned = [result.tuned.mean, *(after for _, after in result.categories.values())]
    at = np.arange(len(names))
    sides = ((base, result.base, -0.2, BASE, "base"), (tuned, result.tuned, 0.2, TUNED, "tuned"))
    for values, interval, offset, colour, label in sides:
        axes.bar(at + offset, values, 0.38, color=colour, label=label)
        error = [[interval.mean - interval.low], [interval.high - interval.mean]]
        axes.errorbar([offset], [interval.mean], yerr=error, color="black", capsize=3, linewidth=1)
        for x, value, top in zip(at, values, [interval.high, *values[1:]], strict=True):
            axes.annotate(
                f"{value:.2f}", (x + offset, top), (0, 3), textcoords="offset points", ha="center", fontsize=8
            )
    axes.set_xticks(at, names)
    top = max(*base, *tuned, result.tuned.high)
    axes.set(title=f"Held-out pass@1, gain {result.gain}", ylabel="accuracy", ylim=(0, min(1.15, top + 0.2)))
    axes.legend(frameon=False, loc="upper right")
