"""A plan and how it is shown: figures of each stage, each with how it came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table

from rmx.cost import GIB
from rmx.progress import duration
from rmx.tables import new_table

Kind = Literal["counted", "measured", "assumed"]
MARKS: dict[Kind, str] = {"counted": "c", "measured": "m", "assumed": "a"}


@dataclass(frozen=True)
class Figure:
    """A number and how it came about; what follows from an assumption is assumed, whatever else was measured."""

    value: float
    kind: Kind

    def __add__(self, other: "Figure") -> "Figure":
        return Figure(self.value + other.value, weaker(self.kind, other.kind))


def weaker(*kinds: Kind) -> Kind:
    order: tuple[Kind, ...] = ("counted", "measured", "assumed")
    return max(kinds, key=order.index)


@dataclass(frozen=True)
class StagePlan:
    """None: nothing worth a figure, or not known here."""

    stage: str
    done: bool
    tokens_read: Figure | None = None
    tokens_generated: Figure | None = None
    seconds: Figure | None = None
    host_bytes: Figure | None = None
    device_bytes: Figure | None = None  # None without a GPU
    disk_bytes: Figure | None = None


@dataclass(frozen=True)
class Plan:
    stages: list[StagePlan]
    device: str
    dtype: str
    host_free: int | None  # bytes
    device_free: int | None
    disk_free: int
    assumptions: list[str]
    advice: list[str]  # what does not fit, and the settings that change it
    measured: dict[str, Any]  # rates


def table(plan: Plan) -> Table:
    """Per stage, and in all: times and disk are added up, memory is the highest."""
    gpu = plan.device_free is not None
    memory = ["host GiB", *(["device GiB"] if gpu else [])]
    grid = new_table(["stage", "tokens read", "generated", "time", *memory, "disk GiB"], title="Plan")

    def cell(figure: Figure | None, show: Any) -> str:
        return "-" if figure is None else f"{show(figure.value)} {MARKS[figure.kind]}"

    def gib(value: float) -> str:
        return f"{value / GIB:.2f}"

    def row(stage: StagePlan) -> list[str]:
        cells = [cell(stage.tokens_read, "{:,.0f}".format), cell(stage.tokens_generated, "{:,.0f}".format)]
        cells += [cell(stage.seconds, duration), cell(stage.host_bytes, gib)]
        cells += [cell(stage.device_bytes, gib)] if gpu else []
        return [stage.stage, *cells, cell(stage.disk_bytes, gib)]

    for stage in plan.stages:
        own = row(stage)
        grid.add_row(*(own if not stage.done else [own[0], "done", *own[2:]]))
    grid.add_section()
    grid.add_row(*row(total(plan.stages)))
    return grid


def total(stages: Sequence[StagePlan]) -> StagePlan:
    """Of what is left to do."""
    sums: dict[str, Figure | None] = {}
    for key in ("tokens_read", "tokens_generated", "seconds", "disk_bytes"):
        known = [f for stage in stages if (f := getattr(stage, key)) is not None]
        sums[key] = sum(known[1:], known[0]) if known else None
    for key in ("host_bytes", "device_bytes"):
        known = [f for stage in stages if (f := getattr(stage, key)) is not None]
        sums[key] = max(known, key=lambda figure: figure.value, default=None)
    return StagePlan("in all", False, **sums)


def say(plan: Plan) -> list[str]:
    """The lines below the table."""
    lines = ["c: counted, m: measured here, a: assumed, or computed from an assumption"]
    lines += [f"assumed: {said}" for said in plan.assumptions]
    return lines + [f"to change: {said}" for said in plan.advice] + ([] if plan.advice else ["fits this machine"])
