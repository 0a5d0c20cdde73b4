"""What would be done, told without doing it: trees stay as they are to the byte, and no model is loaded."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rmx.cli import app
from rmx.config import Config
from rmx.errors import RmxError
from rmx.models import model
from rmx.runs import dry
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES


@pytest.fixture
def config_file(tiny_config: Config, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config.model_dump(mode="json")))
    return path


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """From here on, a model that is loaded is an error; the finished run comes first."""
    if "finished" in request.fixturenames:
        request.getfixturevalue("finished")

    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(model, "load", loaded)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)


def tree(*folders: Path) -> dict[str, Any]:
    """Content and time of change of all that is there."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for folder in folders
        for path in (folder, *folder.rglob("*"))
        if path.exists()
    }


def call(*arguments: object) -> Any:
    """The command; nothing changed beside it, in the run, the working directory or the cache."""
    cache = Path(os.environ["RMX_CACHE"])
    config = next(Path(str(a)) for a in arguments if str(a).endswith(".yaml"))
    before = tree(config.parent, cache)
    done = CliRunner().invoke(app, [*map(str, arguments), "--dry-run"])
    assert tree(config.parent, cache) == before
    return done


def states(output: str) -> dict[str, str]:
    rows = [line.split() for line in output.splitlines()]
    return {
        row[0]: " ".join(row[1:3]) if row[1:2] in (["to"], ["goes"]) else row[1]
        for row in rows
        if row[:1] and row[0] in STAGES
    }


def at(run: Run, kept: int) -> None:
    run.path("stages.json").write_text(json.dumps(dict(list(run.stages().items())[:kept])))


def test_a_run_that_has_not_begun(config_file: Path) -> None:
    done = call("run", config_file)
    assert done.exit_code == 0, done.output
    assert states(done.output) == dict.fromkeys(STAGES, "to do")
    for written in ("rollouts.jsonl", "adapter/adapter_model.safetensors", "report.html", "nothing was written"):
        assert written in done.output
    done = call("run", config_file, "--set", "model.dtype=auto")  # no choice of a dtype is kept
    assert done.exit_code == 0, done.output


def test_what_is_done_is_kept_and_the_rest_goes_on(finished: Run, config_file: Path) -> None:
    assert states(call("run", config_file).output) == dict.fromkeys(STAGES, "done")
    at(finished, 1)
    unit = [{"problem_id": "p", "sample": n} for n in range(3)]
    finished.path("rollouts.journal.jsonl").write_text('{"meta": {}}\n' + json.dumps(unit) + "\n")
    done = call("run", config_file)
    found = states(done.output)
    assert (found["problems"], found["rollouts"], found["verify"]) == ("done", "goes on", "to do")
    assert "3 of 240 completions" in done.output and "are unchanged" in done.output


def test_one_stage(finished: Run, config_file: Path) -> None:
    done = call("select", config_file)
    assert states(done.output) == {"select": "done"} and "--again redoes it" in done.output
    done = call("score", config_file, "--again")
    later = dict.fromkeys(("select", "train", "choose", "evaluate", "report"), "undone")
    assert states(done.output) == {"score": "again", **later} and "scores removed first" in done.output
    assert "gate.json" in call("select", config_file, "--again").output
    assert states(call("report", config_file).output) == {"report": "to do"}
    at(finished, 2)
    assert "run `rmx verify` first" in str(call("score", config_file).exception)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_can_tell(stage: str, finished: Run, config_file: Path) -> None:
    at(finished, list(STAGES).index(stage))
    done = call(stage, config_file)
    assert done.exit_code == 0, (done.output, done.exception)
    assert states(done.output)[stage] in ("to do", "goes on") and STAGES[stage].output in done.output


def test_the_stages_declare_all_that_they_write(finished: Run) -> None:
    """What --dry-run promises is what a run makes: nothing else, and nothing less but kept candidates."""
    declared = {Path(name).parts[0] for stage in STAGES.values() for name in (stage.output, *stage.beside)}
    of_the_run = {"stages.json", "costs.jsonl", ".lock"}
    assert {path.name for path in finished.dir.iterdir()} == (declared - {"candidates"}) | of_the_run
    at(finished, 5)
    writes = {step.stage: step.writes for step in dry.run_all(finished)}
    assert "candidates" not in writes["train"] and "adapter" not in writes["choose"]
    several = finished.config.model_copy(update={"train": finished.config.train.model_copy(update={"candidates": 2})})
    writes = {step.stage: step.writes for step in dry.run_all(Run(several))}
    assert "candidates" in writes["train"] and "adapter" in writes["choose"]


def test_mistakes_are_found(finished: Run, config_file: Path, tmp_path: Path) -> None:
    other = f"run_dir={tmp_path / 'other'}"
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"question": "q"}\n')
    cases = {
        ("run", "train.epoch=2"): "did you mean 'epochs'",
        ("run", "train.learning_rate=0.5"): "train.learning_rate was 0.01, is now 0.5",
        ("train", "train.learning_rate=0.5"): "train.learning_rate was 0.01, is now 0.5",
        ("run", f"model.name={tmp_path / 'nowhere'}", other): "no such directory",
        ("run", "problems.sources.0.jsonl=none.jsonl", other): "none.jsonl: cannot be read",
        ("run", f"problems.sources.0.jsonl={tmp_path / 'bad.jsonl'}", other): "no field 'answer'",
        ("run", "problems.train_count=500", other): "lower problems.train_count or add a source",
        ("run", "train.warmup_steps=5000", other): "lower train.warmup_steps",
        ("run", "verify.reward=none.py:f", other): "verify.reward",
        ("run", "lora.start=nowhere", other): "nowhere: cannot be read as an adapter",
        ("run", f"run_dir={tmp_path / 'file'}"): "is a file; expected a directory",
        ("run", f"run_dir={tmp_path / 'file' / 'inside'}"): "is a file; expected a directory",
    }
    for (name, *settings), said in cases.items():
        fault = call(name, config_file, *(part for s in settings for part in ("--set", s))).exception
        assert isinstance(fault, RmxError) and said in str(fault), (settings, fault)


def test_another_process_is_noticed(finished: Run, config_file: Path) -> None:
    with finished.locked():
        assert "another process is running in it" in str(call("run", config_file).exception)


def test_a_directory_that_cannot_be_written(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = os.access  # root may write anywhere
    closed = lambda path, mode: Path(path) != tmp_path and access(path, mode)  # noqa: E731
    monkeypatch.setattr(os, "access", closed)
    fault = call("run", config_file, "--set", f"run_dir={tmp_path / 'new' / 'run'}").exception
    assert str(fault) == f"run_dir: {tmp_path} cannot be written: permission denied"


def test_data_sets_of_others_are_not_read(config_file: Path) -> None:
    done = call("run", config_file, "--set", "problems.sources=[{dataset: openai/gsm8k}]")
    assert done.exit_code == 0 and "not read: openai/gsm8k" in done.output


def test_merge(finished: Run, config_file: Path, tmp_path: Path) -> None:
    done = call("merge", config_file, tmp_path / "merged")
    assert done.exit_code == 0 and not (tmp_path / "merged").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    torn = tmp_path / "torn"
    shutil.copytree(finished.path("adapter"), torn)
    (torn / "adapter_model.safetensors").unlink()
    dora = tmp_path / "dora"
    shutil.copytree(finished.path("adapter"), dora)
    settings = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    cases = {
        (tmp_path / "full",): "is not empty: expected a directory that is empty or new",
        (tmp_path / "full" / "x",): "is a file",
        (tmp_path / "full" / "x" / "y",): "is a file",
        (tmp_path / "m", "--adapter", tmp_path / "nowhere"): "cannot be read as an adapter",
        (tmp_path / "m", "--adapter", torn): "has no adapter_model.safetensors",
        (tmp_path / "m", "--adapter", dora): "use_dora is True, which is not supported",
        (tmp_path / "m", "--set", f"run_dir={tmp_path / 'other'}"): "run `rmx problems` first, or name an adapter",
    }
    for arguments, said in cases.items():
        fault = call("merge", config_file, *arguments).exception
        assert isinstance(fault, RmxError) and said in str(fault), (arguments, fault)


def test_only_the_first_stage_goes_on(finished: Run) -> None:
    """Files that an older run left behind for later stages are not promised to be taken up."""
    at(finished, 1)
    steps = {step.stage: step.state for step in dry.run_all(Run(finished.config))}
    assert steps["evaluate"] == dry.TODO and steps["score"] == dry.TODO
