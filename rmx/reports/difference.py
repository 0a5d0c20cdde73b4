"""Two runs side by side: tables for the terminal, and one self-contained page."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from rich.markup import escape
from rich.table import Table

from rmx import cost
from rmx.errors import CONTROL
from rmx.records import Interval, StepMetrics
from rmx.reports.charts import Chart, Series, by_step, percent, placed
from rmx.reports.pages import bounds, duration, public, signed, write_page
from rmx.reports.report import FEW, WINDOW
from rmx.tables import new_table

WIDEST = 40  # characters of a setting's value in the table on the terminal
NAME = 24  # of a run's name in a heading
CURVES = (
    ("Loss", "nats", "loss", False),
    ("Log-prob change, right rollouts", "nats", "positive_shift", False),
    ("Log-prob change, wrong rollouts", "nats", "negative_shift", False),
    ("Anchor KL", "nats", "anchor_kl", False),
    ("Gradient norm", "before clipping", "gradient_norm", False),
    ("Learning rate", "of each step", "learning_rate", True),
)


@dataclass(frozen=True)
class Gate:
    """Of a run's training set."""

    tau: float  # nats
    gated: int  # decision tokens
    tokens: int

    @property
    def share(self) -> float:
        return self.gated / max(1, self.tokens)


@dataclass(frozen=True)
class Side:
    """What is known of one run; what its stages have not made is None or empty."""

    name: str
    missing: Sequence[str]  # stages that are not done
    gate: Gate | None
    history: Sequence[StepMetrics]
    costs: Sequence[cost.StageCost]
    currency: str


@dataclass(frozen=True)
class Row:
    """A metric of both runs over the problems that both have judged samples for."""

    metric: str
    first: Interval
    second: Interval
    change: Interval  # second - first, paired over problems
    problems: int

    def text(self, value: float) -> str:
        return f"{value:{self.spec}}"

    @property
    def spec(self) -> str:
        return ".1f" if self.metric == "tokens" else ".3f"


@dataclass(frozen=True)
class Difference:
    """All that differs between two runs."""

    first: Side
    second: Side
    settings: Sequence[tuple[str, Any, Any]]  # key, value, value; of the stages that both have done
    metrics: Sequence[Row]  # empty unless both are evaluated
    notes: Sequence[str]  # what is missing, and what was left out

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.first, self.second


def verdict(found: Difference) -> str:
    """The outcome in one sentence, whichever way it came out."""
    names = f"{found.second.name} against {found.first.name}"
    row = next((row for row in found.metrics if row.metric == "tuned pass@1"), None)
    if row is None:
        return f"{names}: no accuracy to compare."
    change = f"{row.change:+.3f}".replace("-", "−")
    said = f"{names}: tuned pass@1 {change}"
    if row.problems < FEW:
        return f"{said}; {row.problems} problems are too few for such an interval to mean much."
    if row.change.low > 0:
        return f"{said}, better, with a 95 % interval above zero."
    if row.change.high < 0:
        return f"{said}, worse, with a 95 % interval below zero."
    return f"{said}, no clear difference: the 95 % interval holds zero."


def _value(value: Any) -> str:
    """A setting as it is written in YAML."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def facts(found: Difference) -> list[tuple[str, str, str]]:
    """(what, first, second) of gate, training and cost."""
    first, second = (_facts(side) for side in found.sides)
    order = [label for label in _facts(None) if label in first or label in second]
    return [(label, first.get(label, "–"), second.get(label, "–")) for label in order]


def _facts(side: Side | None) -> dict[str, str]:
    """What is known of a run, by what it is; all labels for None."""
    known: dict[str, str] = {}
    loss, kl = f"loss, last {WINDOW} steps", f"anchor KL, last {WINDOW} steps"
    if side is None:
        labels = ("gated share of trained tokens", "tau (nats)", "trained tokens", "training steps", loss, kl)
        return dict.fromkeys((*labels, "time", "tokens read", "tokens generated", "peak GiB", "price"), "")
    if side.gate is not None:
        known["gated share of trained tokens"] = percent(side.gate.share)
        known["tau (nats)"] = f"{side.gate.tau:.3f}"
        known["trained tokens"] = f"{side.gate.tokens:,}"
    if side.history:
        last = side.history[-WINDOW:]  # as the curves end
        known["training steps"] = f"{len(side.history)}"
        known[loss] = signed(mean(m.loss for m in last), ".4f")
        known[kl] = f"{mean(m.anchor_kl for m in last):.5f}"
    if side.costs:
        all_ = cost.total(side.costs)
        known["time"] = duration(all_.seconds)
        known["tokens read"], known["tokens generated"] = f"{all_.tokens_read:,}", f"{all_.tokens_generated:,}"
        if all_.peak_gib is not None:
            known["peak GiB"] = f"{all_.peak_gib:.2f}"
        if all_.price is not None:
            known["price"] = f"{all_.price:.4f} {side.currency}"
    return known


def tables(found: Difference) -> list[Table]:
    """Settings, metrics, and the rest; without those that would be empty."""
    names = [escape(_cut(side.name, NAME)) for side in found.sides]
    made = []
    if found.settings:
        made.append(new_table(["setting", *names], left=names, title="Settings that differ"))
        for key, *values in found.settings:
            made[-1].add_row(escape(key), *(escape(_cut(_value(v), WIDEST)) for v in values))
    if found.metrics:
        title = f"{found.metrics[0].problems} held-out problems of both [95 % interval]"
        said = {"title": title.replace("[", r"\["), "caption": "tokens, truncated, boxed: of the tuned model"}
        made.append(new_table(["metric", *names, "change"], padding=(0, 0, 0, 1), **said))
        for row in found.metrics:
            cells = [format(v, row.spec) for v in (row.first, row.second)]
            change = format(row.change, f"+{row.spec}")
            made[-1].add_row(row.metric, *(escape(cell) for cell in (*cells, change)))
    if rest := facts(found):
        made.append(new_table(["gate, training, cost", *names]))
        for label, *both in rest:
            made[-1].add_row(label, *both)
    return made


def write_html(path: Path, found: Difference) -> None:
    """Write the page: one file that loads nothing, with everything in it escaped."""
    stages = list(dict.fromkeys(c.stage for side in found.sides for c in side.costs))
    write_page(
        path,
        "difference.html.j2",
        found=found,
        names=[_shown(_cut(side.name, NAME)) for side in found.sides],
        verdict=_shown(verdict(found)),
        settings=[(_shown(public_key(key)), *map(_mailed, values)) for key, *values in found.settings],
        metrics=[_cells(row) for row in found.metrics],
        dots=_dots(found),
        curves=_curves(found),
        window=WINDOW,
        facts=facts(found),
        costs=[(stage, *(_cost(side, stage) for side in found.sides)) for stage in stages],
        notes=[_shown(note) for note in found.notes],
    )


def public_key(key: str) -> str:
    """A file's fingerprint has the file's path for a key: its last part says enough."""
    section, _, name = key.partition(".")
    return f"{section}.{public(name)}" if section == "files" else key


def _mailed(value: Any) -> str:
    text = public(_value(value))
    return _shown("a server" if text.startswith(("http://", "https://")) else text)


def _shown(text: str) -> str:
    return text.translate(CONTROL)


def _cells(row: Row) -> tuple[str, ...]:
    if row.spec == ".3f":
        limits = [bounds(v).replace("-", "−") for v in (row.first, row.second)]
        change = f"[{signed(row.change.low)}, {signed(row.change.high)}]"
    else:
        limits = [f"[{v.low:{row.spec}}, {v.high:{row.spec}}]" for v in (row.first, row.second)]
        change = f"[{signed(row.change.low, row.spec)}, {signed(row.change.high, row.spec)}]"
    first, second = row.text(row.first.mean), row.text(row.second.mean)
    return row.metric, first, limits[0], second, limits[1], signed(row.change.mean, row.spec), change


def _dots(found: Difference) -> dict[str, Any] | None:
    rates = [(row.metric, row.first, row.second) for row in found.metrics if "@" in row.metric]
    return placed(rates, ("first", "second")) | {"whole": len(rates)} if rates else None


def _curves(found: Difference) -> list[Chart]:
    """Both runs in each chart."""
    pairs = [(name, s) for name, s in zip(("first", "second"), found.sides, strict=True) if s.history]
    legend = [(name, _shown(_cut(side.name, NAME))) for name, side in pairs]
    made = []
    for title, unit, column, exact in CURVES if pairs else ():
        series = [Series(name, side.history, column, exact) for name, side in pairs]
        made.append(replace(by_step(title, unit, series), legend=legend))
    return made


def _cost(side: Side, stage: str) -> tuple[str, str]:
    """(time, tokens)"""
    found = next((row for row in side.costs if row.stage == stage), None)
    if found is None:
        return "–", ""
    tokens = {"read": found.tokens_read, "generated": found.tokens_generated}
    return duration(found.seconds), ", ".join(f"{count:,} {what}" for what, count in tokens.items() if count)
