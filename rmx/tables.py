"""Tables on the terminal and in pipes: a name is cut where there is no room for it, a number never."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rmx.errors import visible

NAME = 14  # columns that a name keeps


def new_table(headings: Sequence[str], left: Sequence[str] = (), **settings: Any) -> Table:
    """A table whose first column holds names and the others numbers, to the right but for those in ``left``."""
    grid = Table(box=box.SIMPLE, **{"pad_edge": False, **settings})
    grid.add_column(headings[0], overflow="ellipsis")
    for heading in headings[1:]:
        grid.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return grid


def show(table: Table) -> None:
    """Print a table, wider than the terminal (in a pipe: than 80 columns) where its numbers need that."""
    console = Console()
    for column in table.columns:
        column._cells = [visible(cell) if isinstance(cell, str) else cell for cell in column._cells]
    for number, column in enumerate(table.columns):
        longest = max(console.measure(cell).maximum for cell in (column.header, *column.cells))
        column.min_width = longest if number else min(NAME, longest)
    wide = console.options.update(width=10_000)
    console.width = max(console.width, Measurement.get(console, wide, table).minimum)
    console.print(table)
