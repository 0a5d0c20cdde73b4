"""The final table and the picture of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.markup import escape
from rich.table import Table

from rmx.artefacts import replacing
from rmx.errors import CONTROL
from rmx.records import Evaluation, Interval, StepMetrics
from rmx.tables import new_table

COLOURS = {  # of the pictures, and of report.html on a light page
    "base": "#6c8099",
    "tuned": "#d1495b",
    "gate": "#edae49",
    "line": "#b87708",  # of gated things, where a line has to be seen
    "right": "#137a6c",
    "wrong": "#7d4ba0",
}
BASE, TUNED, GATE = COLOURS["base"], COLOURS["tuned"], COLOURS["gate"]
WINDOW = 5  # steps in a running mean
SHORT = 10  # characters of a name that stays in one line below its bars
FEW = 20  # problems, under which a percentile bootstrap is far too narrow


def table(result: Evaluation) -> Table:
    """Base against tuned, pass@1 with 95 % intervals."""
    title = f"{result.problems} held-out problems x {result.samples} samples, pass@1 [95 % interval]"
    grid = new_table(("", "base", "tuned", "gain"), title=title, padding=(0, 0, 0, 1))
    base, tuned = result.base, result.tuned
    grid.add_row("all", str(base.pass_at_1), f"[bold]{tuned.pass_at_1}[/]", f"[bold]{result.gain}[/]")
    for category, (before, after) in result.categories.items():
        grid.add_row(
            escape(category.removeprefix("reasoning_gym:")), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}"
        )
    grid.add_section()
    if k := max((k for k in base.pass_at_k.keys() & tuned.pass_at_k.keys() if k > 1), default=None):
        for name in ("pass", "maj"):
            before, after = (getattr(side, f"{name}_at_k")[k] for side in (base, tuned))
            grid.add_row(f"{name}@{k}", str(before), str(after), f"{after.mean - before.mean:+.3f}")

    def add_share(label: str, before: float, after: float) -> None:
        grid.add_row(label, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} pt")

    add_share("boxed", base.boxed, tuned.boxed)
    grid.add_row("mean tokens", f"{base.tokens:.1f}", f"{tuned.tokens:.1f}", f"{tuned.tokens - base.tokens:+.1f}")
    add_share("truncated", base.truncated, tuned.truncated)
    if base.unverified or tuned.unverified:
        grid.add_row("not verified", str(base.unverified), str(tuned.unverified), "")
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


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no screen."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=120)


def plot(path: Path, entropy: np.ndarray, tau: float, history: Sequence[StepMetrics], result: Evaluation) -> None:
    """PNG of three panels: base entropy with the gate, training curves, accuracy.

    Args:
        entropy: base entropies of all rollout tokens, nats. tau: the gate, nats.
    """
    figure = new_figure(15, 4.6)
    gate, curves, bars = figure.subplots(1, 3)
    _plot_gate(gate, entropy, tau)
    _plot_training(curves, history)
    _plot_accuracy(bars, result)
    save_png(figure, path)


def plot_gate(path: Path, entropy: np.ndarray, tau: float) -> None:
    """PNG of the first panel alone."""
    figure = new_figure(6, 4.2)
    _plot_gate(figure.subplots(), entropy, tau)
    save_png(figure, path)


def _plot_gate(axes: Axes, entropy: np.ndarray, tau: float) -> None:
    width = max(float(entropy.max()), tau, 1e-6) / 60
    below = int(np.ceil(tau / width))
    edges = tau + width * np.arange(-below, 62 - below)  # tau is an edge: no bar is half gated
    above = f"above tau: {np.mean(entropy > tau):.1%} of {entropy.size:,} tokens"
    for mask, colour, label in ((entropy <= tau, BASE, "at most tau"), (entropy > tau, GATE, above)):
        axes.hist(entropy[mask], bins=edges.tolist(), color=colour, label=label)
    axes.axvline(max(tau, 0), color="black", linestyle="--", linewidth=1, label=f"tau = {tau:.2f} nats")
    axes.set(title="Where the base model is unsure", xlabel="base entropy (nats)", ylabel="completion tokens")
    axes.set(yscale="log", xlim=(0, None))
    _legend_below(axes)


def _plot_training(axes: Axes, history: Sequence[StepMetrics]) -> None:
    steps = np.array([m.step for m in history])
    for name, colour, label in (
        ("positive_shift", COLOURS["right"], "right rollouts, decision tokens"),
        ("negative_shift", COLOURS["wrong"], "wrong rollouts, decision tokens"),
    ):
        values = np.array([getattr(m, name) for m in history], dtype=float)  # None becomes NaN: a gap
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
        axes.plot(steps, running_mean(values), color=colour, linewidth=2, label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(
        title=f"Training (mean of {WINDOW} steps)", xlabel="step", ylabel="change of log-prob since the base (nats)"
    )
    other = axes.twinx()
    kl = np.array([m.anchor_kl for m in history])
    other.plot(steps, running_mean(kl), color=COLOURS["line"], linestyle=":", linewidth=2, label="anchor KL (right)")
    other.set_ylabel("KL(base || tuned) at anchors (nats)")
    other.set_ylim(bottom=0)
    for own in (axes.yaxis, other.yaxis):  # each tick says its whole number: an exponent above would lie on the title
        own.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    _legend_below(axes, [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]])


def _legend_below(axes: Axes, handles: Sequence[Artist] | None = None, lines: int = 1) -> None:
    """Outside, where it covers nothing; ``lines``: of the labels of the ticks above it."""
    known = list(handles or axes.get_legend_handles_labels()[0])
    columns = 2 if len(known) > 2 else max(1, len(known))
    axes.legend(
        handles=known,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1 - 0.07 * lines),
        ncols=columns,
        fontsize=9,
    )


def running_mean(values: np.ndarray) -> np.ndarray:
    """Of the last WINDOW values that are not NaN, at every step."""
    known = ~np.isnan(values)
    sums, counts = np.cumsum(np.where(known, values, 0.0)), np.cumsum(known)
    sums[WINDOW:] -= sums[:-WINDOW].copy()
    counts[WINDOW:] -= counts[:-WINDOW].copy()
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _plot_accuracy(axes: Axes, result: Evaluation) -> None:
    names = ["all", *(_drawable(category.removeprefix("reasoning_gym:")) for category in result.categories)]
    base: list[Interval | float] = [result.base.pass_at_1, *(before for before, _ in result.categories.values())]
    tuned: list[Interval | float] = [result.tuned.pass_at_1, *(after for _, after in result.categories.values())]
    plot_bars(axes, names, {"base": base, "tuned": tuned})
    axes.set(title=f"Held-out pass@1, gain {result.gain}")


def _drawable(name: str) -> str:
    """Without what a font has no sign for."""
    return name.encode("utf-8", "replace").decode().translate(dict.fromkeys(CONTROL, "\ufffd"))


def plot_bars(axes: Axes, names: Sequence[str], sides: Mapping[str, Sequence[Interval | float]]) -> None:
    """Accuracies of "base" and, where given, "tuned" under each name; an interval's bar has its whiskers."""
    top = 0.0
    offsets = {"base": -0.2, "tuned": 0.2} if len(sides) > 1 else {"base": 0.0}
    for label, values in sides.items():
        heights = [v.mean if isinstance(v, Interval) else v for v in values]
        axes.bar(
            np.arange(len(names)) + offsets[label],
            heights,
            0.38,
            color={"base": BASE, "tuned": TUNED}[label],
            label=label,
        )
        for x, (value, height) in enumerate(zip(values, heights, strict=True)):
            at, high = x + offsets[label], height
            if isinstance(value, Interval):
                high, error = value.high, [[max(0.0, height - value.low)], [max(0.0, value.high - height)]]
                axes.errorbar([at], [height], yerr=error, color="black", capsize=3, linewidth=1)
            axes.annotate(f"{height:.2f}", (at, high), (0, 3), textcoords="offset points", ha="center", fontsize=8)
            top = max(top, high)
    shown = [name if len(name) <= SHORT else name.replace("_", "_\n") for name in names]
    axes.set_xticks(range(len(names)), shown, fontsize=9 if len(names) > 5 else 10, parse_math=False)
    axes.set(ylabel="accuracy", xlim=(-0.5, len(names) - 0.5), ylim=(0, min(1.1, top + 0.08)))
    _legend_below(axes, lines=1 + max(name.count("\n") for name in shown))
