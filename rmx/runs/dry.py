"""What a command of the stages would do, from the files that are there. Nothing is written, no model is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from rmx.grading.problems import build_problems
from rmx.models.source import locate
from rmx.runs import watch
from rmx.runs.merge import check_writable
from rmx.runs.rundir import RunDirectory, RunError
from rmx.runs.stages import STAGES
from rmx.tables import new_table
from rmx.training import trackers
from rmx.training.train import check_warmup

DONE, ON, TODO, AGAIN, UNDONE = "done", "goes on", "to do", "again", "undone"
CHOSEN = (("train", "candidates"), ("choose", "adapter"))  # written where there are several candidates
MODEL = ("rollouts", "score", "train", "choose", "evaluate")  # stages that load the model


@dataclass(frozen=True)
class Step:
    """One stage, and what would become of it."""

    stage: str
    state: str  # done: kept as it is; goes on; to do; again: redone; undone: no longer counts as done
    said: str  # what there is of it
    writes: Sequence[str]  # in the run directory


def run_all(run: RunDirectory) -> list[Step]:
    """What ``rmx run`` would do.

    Raises:
        RmxError: a mistake that shows without the model: in settings, problem files, paths, or a run with others.
    """
    done = _done(run)
    steps: list[Step] = []
    for stage in STAGES:
        begun = not any(step.state in (ON, TODO) for step in steps)  # the first that is not done
        steps.append(Step(stage, DONE, "", ()) if stage in done else _to_do(run, stage, begun))
    _check(run, [step.stage for step in steps if step.state != DONE])
    return steps


def run_one(run: RunDirectory, stage: str, again: bool) -> list[Step]:
    """What the command of one stage would do, and which later ones would no longer count as done.

    Raises:
        RmxError: see :func:`run_all`; also where an earlier stage is not done.
    """
    run.writes = False
    if not again and stage != "report" and run.is_done(stage):
        _check(run, [])
        return [Step(stage, DONE, "--again redoes it", ())]
    run.check_order(stage)
    _check(run, [stage])
    step = _to_do(run, stage, not again)
    if again:
        removed = [name for name in STAGES[stage].partial if run.path(name).exists()]
        step = Step(
            stage, AGAIN, f"{', '.join(removed)} removed first" if removed else "from its beginning", step.writes
        )
    order = list(STAGES)
    later = [name for name in order[order.index(stage) + 1 :] if name in run.stages()]
    return [step, *(Step(name, UNDONE, f"has to follow {stage}", ()) for name in later)]


def _done(run: RunDirectory) -> set[str]:
    """Leading stages that are done; one that is redone undoes those behind it. Changed settings are an error."""
    run.writes = False
    done: set[str] = set()
    for stage in STAGES:
        if not run.is_done(stage):
            break
        done.add(stage)
    return done


def _to_do(run: RunDirectory, stage: str, begun: bool) -> Step:
    unused = CHOSEN if run.config.train.candidates == 1 else ()
    writes = [name for name in (STAGES[stage].output, *STAGES[stage].beside) if (stage, name) not in unused]
    found = [name for name in STAGES[stage].partial if run.path(name).exists()] if begun else []
    if not found:
        return Step(stage, TODO, "", writes)
    said = watch.progress_of(run, stage)
    return Step(stage, ON, said or f"{', '.join(found)} kept", writes)


def _check(run: RunDirectory, to_do: Sequence[str]) -> None:
    """What can be wrong before the model is loaded."""
    check_writable(run.dir, "run_dir")
    if watch.running(run):
        raise RunError(f"{run.dir}: another process is running in it")
    _ = run.named_files  # reads them
    if set(MODEL) & set(to_do):
        locate(run.config.located_model)
    if "problems" in to_do and all(source.dataset is None for source in run.config.problems.sources):
        build_problems(run.config.problems, run.config.seed, run.config.path)
    if "train" in to_do:
        if "select" in to_do or not run.path("training_set.jsonl").exists():
            check_warmup(run.config.train, run.config.most_steps, "at most ")
        else:
            check_warmup(run.config.train, run.config.train.steps(len(run.training_set())))
        trackers.check(run.config.train.trackers)


def notes(run: RunDirectory, steps: Sequence[Step]) -> list[str]:
    """The lines below the table."""
    unread = [str(s.dataset) for s in run.config.problems.sources if s.dataset is not None]
    said = []
    if unread and any(step.stage == "problems" and step.state != DONE for step in steps):
        said.append(f"not read: {', '.join(unread)}")
    if any(step.state == ON for step in steps):
        said.append("a stage continues with its stored results if its settings, problems and weights are unchanged")
    if any(step.stage in MODEL and step.state not in (DONE, UNDONE) for step in steps):
        said.append(
            f"model: {run.config.located_model.name} in {run.dtype_now()[0]}; its layers are checked in the run"
        )
    return [*said, f"dry run: nothing was written to {Path(run.dir)}"]


def table(steps: Sequence[Step]) -> Table:
    """One line a stage."""
    grid = new_table(["stage", "state", "what there is", "writes"], left=["state", "what there is", "writes"])
    for step in steps:
        grid.add_row(step.stage, step.state, escape(step.said), escape(", ".join(step.writes)))
    return grid
