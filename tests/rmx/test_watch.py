"""What a run is doing, from its files: at every stage, while another process works, and after."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rmx.cli import app
from rmx.runs import watch
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES


def at(run: Run, kept: int, folder: Path) -> Run:
    """A copy of a run whose first ``kept`` stages are done."""
    shutil.copytree(run.dir, folder)
    (folder / "stages.json").write_text(json.dumps(dict(list(run.stages().items())[:kept])))
    return Run(run.config.model_copy(update={"run_dir": str(folder)}))


def of(lines: list[watch.Line], stage: str) -> watch.Line:
    return next(line for line in lines if line.stage == stage)


def test_a_finished_run(finished: Run) -> None:
    lines = watch.look(finished)
    assert [line.stage for line in lines] == list(STAGES) and {line.state for line in lines} == {"done"}
    assert f"gain {finished.evaluation().gain}" in of(lines, "evaluate").text
    assert not watch.running(finished)


def test_each_stage_under_way(finished: Run, tmp_path: Path) -> None:
    run = at(finished, 1, tmp_path / "rollouts")
    unit = [{"problem_id": "p", "sample": n, "text": 'says "problem_id"'} for n in range(3)]
    run.path("rollouts.journal.jsonl").write_text('{"meta": {}}\n' + json.dumps(unit) + "\n")
    lines = watch.look(run)
    assert of(lines, "rollouts") == watch.Line("rollouts", "under way", "3 of 240 completions")
    assert of(lines, "problems").state == "done" and of(lines, "train") == watch.Line("train", "to do", "")

    run = at(finished, 3, tmp_path / "score")
    assert of(watch.look(run), "score").text.startswith("1 files, ")

    run = at(finished, 5, tmp_path / "train")
    total = len(finished.history())
    whole = run.path("metrics.jsonl").read_text().splitlines(keepends=True)
    run.path("metrics.jsonl").write_text("".join(whole[:4]) + whole[4][:20])  # a line that is being written
    text = of(watch.look(run), "train").text
    assert text.startswith(f"step 4 of {total}, loss ") and "tokens/s" in text and text.endswith(" left")
    run.path("metrics.jsonl").unlink()
    assert of(watch.look(run), "train").text == "no step yet"

    run = at(finished, 7, tmp_path / "evaluate")
    run.path("evaluation.tuned.jsonl").unlink()
    assert of(watch.look(run), "evaluate").text == "base: all, tuned: 0 of 40 completions"


def test_it_ends_with_the_process_that_works(finished: Run, tmp_path: Path) -> None:
    run = at(finished, 5, tmp_path / "copy")
    waits: list[float] = []
    with run.locked():
        assert watch.running(run)
        seen = watch.changes(run, 2.0, waits.append)
        assert [of(next(seen), "train").state for _ in range(3)] == ["under way"] * 3
    assert of(next(seen), "train").state == "under way"  # it was killed
    assert next(seen, None) is None and waits == [2.0] * 3


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["watch", *arguments])


def test_the_command(finished: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(finished.config.model_dump(mode="json")))
    for arguments in ([str(path)], [str(path), "--once"]):  # both into a pipe
        done = command(*arguments)
        assert done.exit_code == 0
        assert [line.split()[0] for line in done.output.splitlines()] == list(STAGES)
        assert "\x1b" not in done.output
    missing = command(str(path), "--set", f"run_dir={tmp_path / 'none'}")
    assert "no run has begun there" in str(missing.exception)


def test_names_of_problems_cannot_reach_the_terminal(finished: Run, tmp_path: Path) -> None:
    run = at(finished, 9, tmp_path / "copy")
    stages = run.stages()
    stages["report"]["written"] = "\x1b[2J"
    run.path("stages.json").write_text(json.dumps(stages))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    assert "\x1b" not in command(str(path), "--once").output


@pytest.mark.parametrize("stage", [name for name in STAGES if name not in ("rollouts", "score", "train", "evaluate")])
def test_other_stages_say_nothing_more(stage: str, finished: Run, tmp_path: Path) -> None:
    run = at(finished, list(STAGES).index(stage), tmp_path / "copy")
    assert of(watch.look(run), stage) == watch.Line(stage, "under way", "")
