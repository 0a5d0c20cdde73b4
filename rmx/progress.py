"""The progress of a stage on standard error: a bar on a terminal, else one line per minute."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rmx.errors import visible


class _Console(Console):
    """Prints text of problems, models and servers: never its control characters."""

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(visible(o) if isinstance(o, str) else o for o in objects), **settings)


console = _Console(stderr=True)
EVERY = 60.0  # seconds between two lines


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """Yield ``update(done, note)``; it shows done / total, the time taken, the time left and the note."""
    if not console.is_terminal:
        with _lines(title, total, unit) as update:
            yield update
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield update


@contextmanager
def _lines(title: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """The same as :func:`progress`, in lines that a thread of its own prints, however long the work under way takes."""
    started, end = time.monotonic(), threading.Event()
    state: tuple[int, int, str] | None = None  # done at the first update (by an earlier start), done now, note

    def update(done: int, note: str = "") -> None:
        nonlocal state
        state = (done if state is None else state[0], done, note)

    def speak() -> None:
        while not end.wait(EVERY):
            first, done, note = state or (0, 0, "")
            said = line(f"{title}: {done} of {total} {unit}", time.monotonic() - started, done - first, total - done)
            console.print(f"{said} {note}".rstrip(), markup=False, highlight=False, soft_wrap=True)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    try:
        yield update
    finally:
        end.set()
        speaker.join()


def line(what: str, seconds: float, made: int, missing: int) -> str:
    """``what``, the time taken, and the time left at the rate of ``made`` in so many seconds."""
    left = f"about {duration(seconds / made * missing)} left" if made else "time left not known yet"
    return f"{what} after {duration(seconds)}, {left}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, bars of other libraries are not drawn where standard error is no terminal: a log would be full of them.

    Also a decorator: ``@quiet()``.
    """
    if console.is_terminal:
        yield
        return
    from tqdm.std import tqdm
    from transformers.utils import logging

    shown, init = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    tqdm.__init__ = partialmethod(init, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = init
        if shown:
            logging.enable_progress_bar()
