"""What a run is doing, read from the files that it keeps; while it runs and after."""

import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rmx.progress import duration
from rmx.runs.rundir import RunDirectory
from rmx.runs.stages import STAGES

RECENT = 20  # steps behind the speed and the means that are shown


@dataclass(frozen=True)
class Line:
    """One stage: what it says when it is done, or how far it is."""

    stage: str
    state: str  # done, under way, to do
    text: str


def look(run: RunDirectory) -> list[Line]:
    """Each stage of a run."""
    done = run.stages()
    under_way = next((name for name in STAGES if name not in done), None)
    lines = []
    for name in STAGES:
        if name in done:
            record = {key: value for key, value in done[name].items() if key not in ("settings", "seconds")}
            said = ", ".join(f"{key} {value}" for key, value in record.items())
            lines.append(Line(name, "done", f"{duration(done[name]['seconds'])}  {said}"))
        elif name == under_way:
            lines.append(Line(name, "under way", progress_of(run, name)))
        else:
            lines.append(Line(name, "to do", ""))
    return lines


def progress_of(run: RunDirectory, stage: str) -> str:
    """How far a stage is whose predecessors are done; empty where that cannot be seen from its files."""
    return _PROGRESS.get(stage, lambda _: "")(run)


def running(run: RunDirectory) -> bool:
    """Whether a process works in the directory: it holds a lock there."""
    path = run.path(".lock")
    if not path.exists():
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def changes(run: RunDirectory, every: float, wait: Callable[[float], None] = time.sleep) -> Iterator[list[Line]]:
    """:func:`look` again and again, until no process works in the directory or all is done."""
    while True:
        working = running(run)
        lines = look(run)
        yield lines
        if not working or all(line.state == "done" for line in lines):
            return
        wait(every)


def _sampled(run: RunDirectory, journal: str, wanted: int) -> str:
    """Completions in a journal: units of records, one a line."""
    path = run.path(journal)
    count = path.read_bytes().count(b'"problem_id"') if path.exists() else 0
    return f"{count} of {wanted} completions"


def _rollouts(run: RunDirectory) -> str:
    return _sampled(run, "rollouts.journal.jsonl", len(run.problems("train")) * run.config.rollouts.samples)


def _evaluate(run: RunDirectory) -> str:
    wanted = len(run.problems("evaluate")) * run.config.evaluate.samples
    sides = []
    for side in ("base", "tuned"):
        whole = run.path(f"evaluation.{side}.jsonl").exists()
        journal = f"evaluation.{side}.journal.jsonl"
        sides.append(f"{side}: {'all' if whole else _sampled(run, journal, wanted)}")
    return ", ".join(sides)


def _score(run: RunDirectory) -> str:
    files = list(run.path("scores").glob("shard-*.safetensors"))
    return f"{len(files)} files, {sum(file.stat().st_size for file in files) / 2**20:,.0f} MiB"


def _train(run: RunDirectory) -> str:
    steps = _steps(run.path("metrics.jsonl"))
    if not steps:
        return "no step yet"
    total = _total(run)
    recent = steps[-RECENT:]
    seconds = statistics.median(step["seconds"] for step in recent)
    speed = sum(step["tokens"] for step in recent) / max(1e-9, sum(step["seconds"] for step in recent))
    said = [f"step {len(steps)} of {total}", f"loss {statistics.mean(step['loss'] for step in recent):+.3f}"]
    said += [f"KL {statistics.mean(step['anchor_kl'] for step in recent):.4f}", f"{speed:,.0f} tokens/s"]
    return ", ".join([*said, f"{duration(seconds * (total - len(steps)))} left"])


def _total(run: RunDirectory) -> int:
    with run.path("training_set.jsonl").open("rb") as file:
        count = sum(1 for _ in file) - 1  # the first line is about the others
    return run.config.train.steps(count)


def _steps(path: Path) -> list[dict[str, Any]]:
    """Those that are written whole: the last line may be under way."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


_PROGRESS: dict[str, Callable[[RunDirectory], str]] = {
    "rollouts": _rollouts,
    "score": _score,
    "train": _train,
    "evaluate": _evaluate,
}
