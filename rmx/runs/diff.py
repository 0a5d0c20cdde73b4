"""What differs between two runs, from the files that they keep: settings, accuracy, gate, training and cost."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from rmx.artefacts import ArtefactError, describe
from rmx.config import Config
from rmx.config_file import load_config
from rmx.cost import stage_costs
from rmx.errors import close_to
from rmx.grading.metrics import EvaluationError, bootstrap, of_each
from rmx.grading.problems import contradict, folded
from rmx.records import Problem
from rmx.reports.difference import Difference, Gate, Row, Side
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunDirectory, RunError, differences, meant
from rmx.runs.stages import STAGES

Values = dict[str, dict[str, float]]  # metric -> problem_id -> value


def open_side(given: Path) -> Run:
    """The run that a configuration file or a run directory names.

    Raises:
        RmxError: there is neither, or no run has begun there.
    """
    if given.is_dir():
        run = RunDirectory(Config.model_construct(run_dir=str(given)))
        if not run.stages():
            raise RunError(f"{given}: no run has begun there: expected a run directory, which contains stages.json")
        return Run(_recorded(run))
    if not given.exists():
        parent = given.absolute().parent
        near = close_to(given.name, [path.name for path in parent.iterdir()] if parent.is_dir() else [])
        raise RunError(f"{given}: no such run: expected the YAML file of a run, or its directory{near}")
    found = Run(load_config(given))
    if not found.stages():
        raise RunError(f"{given}: its run_dir {found.dir}: no run has begun there")
    return found


def _recorded(run: RunDirectory) -> Config:
    """The configuration of a run directory, from the records of its stages."""
    tree: dict[str, Any] = {"model": {"name": "not recorded"}}  # of a run that has its problems alone
    for record in run.stages().values():
        tree |= {key: value for key, value in record["settings"].items() if key in Config.model_fields}
    try:
        return Config.model_validate({**tree, "run_dir": str(run.dir)})
    except pydantic.ValidationError as fault:
        said = f"{run.path('stages.json')}: its settings are not those of this version: {describe(fault, Config)}"
        raise RunError(f"{said}; give the YAML file of the run instead of its directory") from fault


def compare(first: Run, second: Run, given: Sequence[Path] = ()) -> Difference:
    """Compare two runs in what both have; accuracies are judged again and paired over the problems that both judged.

    Args:
        given: what the user named the runs by; a reward function of the user's own needs the YAML file.

    Raises:
        RunError: both are one run. EvaluationError: both are evaluated, on problems of which none is common.
    """
    if first.dir.resolve() == second.dir.resolve():
        raise RunError(f"diff: both are the run in {first.dir}: expected two runs")
    names = _names(first, second)
    sides = [_side(run, name) for run, name in zip((first, second), names, strict=True)]
    notes = [f"{side.name}: not done: {', '.join(side.missing)}." for side in sides if side.missing]
    rows: list[Row] = []
    if all("evaluate" not in side.missing for side in sides):
        for run, path in zip((first, second), given, strict=False):
            _check_reward(run, path)
        rows, said = _metrics(first, second, names)
        notes += said
    return Difference(sides[0], sides[1], list(_settings(first, second)), rows, notes)


def _names(first: Run, second: Run) -> tuple[str, str]:
    """The last parts of both directories, as many as tell them apart."""
    one, other = first.dir.resolve().parts, second.dir.resolve().parts
    count = next((n for n in range(1, len(one) + 1) if one[-n:] != other[-n:]), 1)
    return "/".join(one[-count:]), "/".join(other[-count:])


def _done(run: Run) -> list[str]:
    """Stages with a record and an artefact, whatever the configuration says today."""
    return [name for name in STAGES if name in run.stages() and run.path(STAGES[name].output).exists()]


def _side(run: Run, name: str) -> Side:
    done = _done(run)
    return Side(
        name=name,
        missing=[stage for stage in STAGES if stage not in done],
        gate=_gate(run) if "select" in done else None,
        history=run.history() if "train" in done else [],
        costs=stage_costs(run.path("costs.jsonl"), done, run.config.cost),
        currency=run.config.cost.currency,
    )


def _gate(run: Run) -> Gate | None:
    path = run.path("gate.json")
    if not path.exists():
        return None  # an imported run has none
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Gate(float(found["tau"]), int(found["gated"]), int(found["tokens"]))
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise ArtefactError(f"{path}: cannot be read: {fault}; run `rmx select` with --again") from fault


def _settings(first: Run, second: Run) -> Iterator[tuple[str, Any, Any]]:
    """Of the stages that both have done, each key once."""
    seen = set()
    for stage in STAGES:
        if stage in _done(first) and stage in _done(second):
            old, new = (_numbered(meant(run.stages()[stage]["settings"])) for run in (first, second))
            for key, one, other in differences(old, new):
                if key not in seen:
                    seen.add(key)
                    yield key, one, other


def _numbered(tree: Any) -> Any:
    """Lists of sections as sections, so that a difference names the key inside."""
    if isinstance(tree, dict):
        return {key: _numbered(value) for key, value in tree.items()}
    if isinstance(tree, list) and tree and all(isinstance(item, dict) for item in tree):
        return {str(number): _numbered(item) for number, item in enumerate(tree)}
    return tree


def _check_reward(run: Run, given: Path) -> None:
    """A function that a run directory names is not run: who gave the directory may have chosen it."""
    recorded = run.stages()["verify"]["settings"]["verify"].get("reward")
    if recorded is not None and given.is_dir():
        raise RunError(
            f"{given}: was judged by verify.reward={recorded}: give the YAML file of the run instead of its "
            "directory: only your own configuration may name the function to run"
        )
    if recorded != run.config.verify.reward:
        raise RunError(f"{given}: verify.reward was {recorded}, is now {run.config.verify.reward}")


def _metrics(first: Run, second: Run, names: tuple[str, str]) -> tuple[list[Row], list[str]]:
    problems = [run.problems("evaluate") for run in (first, second)]
    pairs = _common(*problems)
    values = [_values(run) for run in (first, second)]
    judged = [len(own["base pass@1"]) for own in values]
    draws, seed = first.config.evaluate.bootstrap, first.config.seed
    rows = []
    for metric in values[0]:
        one, other = values[0][metric], values[1].get(metric, {})
        both = [(one[a], other[b]) for a, b in pairs if a in one and b in other]
        if both:
            before, after = np.array(both).T
            old, new, change = (bootstrap(v, draws, seed) for v in (before, after, after - before))
            rows.append(Row(metric, old, new, change, len(both)))
    if not rows:
        counts = " and ".join(f"{len(own)} of {name}" for own, name in zip(problems, names, strict=True))
        raise EvaluationError(
            f"diff: no held-out problem was judged in both runs ({counts}): evaluate both on the same ones, with the "
            "same problems.sources, problems.evaluate_count and seed"
        )
    used = rows[0].problems
    notes = []
    if used < max(judged):
        counts = " and ".join(f"{n} of {name}" for n, name in zip(judged, names, strict=True))
        notes.append(f"The held-out problems differ: {used} are in both, of the judged {counts}; only they are used.")
    return rows, notes


def _common(first: Sequence[Problem], second: Sequence[Problem]) -> list[tuple[str, str]]:
    """Ids of the same problem in both runs: the same question, whatever its white space, with the same answer."""
    there = {folded(problem): problem for problem in second}
    found = ((problem, there.get(folded(problem))) for problem in first)
    return [(a.problem_id, b.problem_id) for a, b in found if b is not None and not contradict(a, b)]


def _values(run: Run) -> Values:
    """Of each problem with a judged sample on both sides, as the evaluation has it."""
    base, tuned = (of_each(*run.evaluated(side)) for side in ("base", "tuned"))
    before, after = base.get("pass@1", {}), tuned.get("pass@1", {})
    both = before.keys() & after.keys()
    found = {"base pass@1": {key: before[key] for key in before if key in both}}
    found["tuned pass@1"] = {key: after[key] for key in after if key in both}
    found["gain"] = {key: after[key] - before[key] for key in before if key in both}
    for metric in [metric for metric in tuned if metric != "pass@1"]:
        label = f"tuned {metric}" if "@" in metric else metric
        found[label] = {key: value for key, value in tuned[metric].items() if key in both}
    return found
