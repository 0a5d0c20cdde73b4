"""The cost of a run: seconds, tokens and peak memory of each stage, and their price on this machine."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table

from rmx.artefacts import Journal
from rmx.config import CostConfig
from rmx.tables import new_table

GIB = 2**30
META = {"costs": 1}  # the form of the log


@dataclass(frozen=True, slots=True)
class StageCost:
    """All starts of one stage together, including interrupted and repeated ones."""

    stage: str
    seconds: float
    tokens_read: int | None  # forward passes over given text; None where the stage runs no model
    tokens_generated: int | None
    peak_gib: float | None  # the highest of the GPU's allocated memory where there is one, else of this process's
    price: float | None  # in cost.currency; None without cost.per_hour


@dataclass(slots=True)
class Meter:
    """Counts of the stage that is running."""

    read: int = 0
    generated: int = 0
    seconds: float = 0.0  # known once it ends


@dataclass(frozen=True, slots=True)
class _Start:
    """One line of the log: one start of one stage."""

    stage: str
    seconds: float
    tokens_read: int
    tokens_generated: int
    peak_gib: float | None
    finished: bool


@contextmanager
def metered(stage: str, log: Path) -> Iterator[Meter]:
    """Measure the body and append a line to ``log``, also if it fails; only a SIGKILL leaves no line."""
    _reset_peak()
    meter, started, finished = Meter(), time.perf_counter(), False
    try:
        yield meter
        finished = True
    finally:
        meter.seconds = round(time.perf_counter() - started, 2)
        line = _Start(stage, meter.seconds, meter.read, meter.generated, _peak_gib(), finished)
        journal, _ = Journal.open(log, _Start, META)
        with journal:
            journal.append([line])


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # where there is no such file the mark is that of the whole process so far
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark of the resident set starts anew


def _peak_gib() -> float | None:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / GIB, 3)
    peak = process_bytes("VmHWM")
    return None if peak is None else round(peak / GIB, 3)


def process_bytes(field: str) -> int | None:
    """Memory of this process: VmRSS, what is resident, or VmHWM, its peak; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def stage_costs(log: Path, order: Sequence[str], config: CostConfig) -> list[StageCost]:
    """One row a stage that was started, in the order of the stages."""
    if not log.exists():
        return []
    starts = Journal.read(log, _Start, META)
    rows = []
    for stage in order:
        if own := [start for start in starts if start.stage == stage]:
            seconds = sum(start.seconds for start in own)
            peaks = [start.peak_gib for start in own if start.peak_gib is not None]
            rows.append(
                StageCost(
                    stage=stage,
                    seconds=seconds,
                    tokens_read=sum(start.tokens_read for start in own) or None,
                    tokens_generated=sum(start.tokens_generated for start in own) or None,
                    peak_gib=max(peaks, default=None),
                    price=None if config.per_hour is None else seconds / 3600 * config.per_hour,
                )
            )
    return rows


def table(rows: Sequence[StageCost], config: CostConfig) -> Table:
    """One row per stage, and the total."""
    priced = config.per_hour is not None
    headings = ["stage", "seconds", "tokens read", "generated", "peak GiB", *([config.currency] if priced else [])]
    grid = new_table(headings, title="Cost")

    def show(row: StageCost) -> list[str]:
        counts = ["-" if n is None else f"{n:,}" for n in (row.tokens_read, row.tokens_generated)]
        peak = "-" if row.peak_gib is None else f"{row.peak_gib:.2f}"
        return [
            row.stage,
            f"{row.seconds:.0f}",
            *counts,
            peak,
            *([f"{row.price:.4f}"] if row.price is not None else []),
        ]

    for row in rows:
        grid.add_row(*show(row))
    grid.add_section()
    grid.add_row(*show(total(rows)))
    return grid


def total(rows: Sequence[StageCost]) -> StageCost:
    """The sums, and the highest peak."""
    prices = [row.price for row in rows if row.price is not None]
    return StageCost(
        stage="in all",
        seconds=sum(row.seconds for row in rows),
        tokens_read=sum(row.tokens_read or 0 for row in rows),
        tokens_generated=sum(row.tokens_generated or 0 for row in rows),
        peak_gib=max((row.peak_gib for row in rows if row.peak_gib is not None), default=None),
        price=sum(prices) if prices else None,
    )
