"""What a run of `model.dtype: auto` takes, says and keeps, and that it goes on with it on another machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_pipeline import changed

from rmx.analyses.benchmarks import run_benchmarks
from rmx.artefacts import read_meta
from rmx.config import Config, ModelConfig
from rmx.models import model
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES
from rmx_kernels import precision
from rmx_kernels.precision import Precision


def on_machine(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """Let this be a machine of which ``auto`` says ``dtype``."""
    monkeypatch.setattr(precision, "choose", lambda _: Precision(dtype, f"a machine of {dtype}"))


@pytest.fixture
def auto(tiny_config: Config) -> Config:
    return changed(tiny_config, model={"dtype": "auto"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_is_loaded_as_the_device_says(tiny_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    on_machine(monkeypatch, dtype)
    found = model.load(ModelConfig(name=str(tiny_path), device="cpu"))
    assert found.weight.dtype == getattr(torch, dtype)
    told = model.load(ModelConfig(name=str(tiny_path), device="cpu", dtype="float32"))
    assert told.weight.dtype == torch.float32


def test_this_machine_decides(tiny_path: Path) -> None:
    found = model.load(ModelConfig(name=str(tiny_path), device="cpu"))
    assert str(found.weight.dtype) == f"torch.{precision.choose('cpu').dtype}"


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_says_its_choice_once_and_keeps_it_everywhere(
    auto: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    on_machine(monkeypatch, dtype)
    run = Run(auto)
    run.run()
    said = f"loading {auto.model.name} in {dtype} (model.dtype=auto: a machine of {dtype})"
    assert capsys.readouterr().err.count(said) == 1
    assert str(run.lm.weight.dtype) == f"torch.{dtype}"
    kept = json.loads(run.path("precision.json").read_text())
    assert (kept["dtype"], kept["reason"]) == (dtype, f"a machine of {dtype}")
    assert run.stages()["rollouts"]["settings"]["model"]["dtype"] == dtype
    assert read_meta(run.path("rollouts.jsonl"))["dtype"] == dtype
    assert json.loads(run.path("scores/index.json").read_text())["origin"]["dtype"] == dtype
    assert json.loads(run.path("adapter/rmx.json").read_text())["dtype"] == dtype
    assert read_meta(run.path("evaluation.tuned.jsonl"))["model"]["dtype"] == dtype
    assert f"{dtype} (auto)" in run.path("report.html").read_text()


@pytest.mark.thorough
@pytest.mark.parametrize("last", ["problems", "rollouts", "score", "evaluate"])
def test_a_run_that_moved_goes_on_as_it_began(
    auto: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last: str
) -> None:
    on_machine(monkeypatch, "bfloat16")
    run = Run(auto)
    for stage in list(STAGES)[: list(STAGES).index(last) + 1]:
        run.execute(stage)
    moved = auto.model_copy(update={"run_dir": str(tmp_path / "moved")})
    shutil.copytree(run.dir, moved.run_dir)
    on_machine(monkeypatch, "float32")
    capsys.readouterr()
    found = Run(moved)
    found.run()
    expected = "float32" if last == "problems" else "bfloat16"  # without a model there is nothing to go on with
    assert str(found.lm.weight.dtype) == f"torch.{expected}"
    assert found.stages()["rollouts"]["settings"]["model"]["dtype"] == expected
    said = "this run began with it" if expected == "bfloat16" else "a machine of float32"
    assert f"in {expected} (model.dtype=auto: {said})" in capsys.readouterr().err
    told = changed(moved, model={"dtype": expected})  # the same in words
    assert Run(told).run() == found.evaluation()
    other = {"bfloat16": "float32", "float32": "bfloat16"}[expected]
    with pytest.raises(RunError, match=f"model.dtype was '{expected}', is now '{other}'"):
        Run(changed(moved, model={"dtype": other})).run()


def test_rollouts_under_way_go_on_as_they_began(auto: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the first stage that runs the model: only precision.json knows."""
    on_machine(monkeypatch, "bfloat16")
    run = Run(changed(auto, rollouts={"batch_size": 12}))
    run.execute("problems")
    units: list[int] = []

    def stops(read: int) -> None:
        units.append(read)
        if len(units) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(run.meter), "read", property(lambda _: 0, lambda _, n: stops(n) if n else None))
    with pytest.raises(KeyboardInterrupt):
        run.execute("rollouts")
    monkeypatch.undo()
    on_machine(monkeypatch, "float32")
    journal = run.path("rollouts.journal.jsonl").read_text()
    assert journal.count("\n") > 2
    again = Run(run.config)
    again.execute("rollouts")
    assert read_meta(again.path("rollouts.jsonl"))["dtype"] == "bfloat16"
    ids = {tuple(r["completion_ids"]) for line in journal.splitlines()[1:] for r in json.loads(line)}
    assert ids <= {tuple(r.completion_ids) for r in again.rollouts()}


@pytest.mark.thorough
def test_a_run_of_an_earlier_version_stays_bfloat16(auto: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has "auto" among its settings and no precision.json: all devices took bfloat16 then."""
    on_machine(monkeypatch, "bfloat16")
    run = Run(auto)
    result = run.run()
    run.path("precision.json").unlink()
    stages = run.stages()
    stages["rollouts"]["settings"]["model"]["dtype"] = "auto"
    run.path("stages.json").write_text(json.dumps(stages))
    on_machine(monkeypatch, "float32")
    old = Run(auto)
    assert old.run() == result
    assert (old.dtype[0], old.is_done("report")) == ("bfloat16", True)
    old.execute("train", again=True)
    assert json.loads(old.path("adapter/rmx.json").read_text())["dtype"] == "bfloat16"


def test_a_precision_that_is_none_is_an_error(auto: Config) -> None:
    run = Run(auto)
    for text in ("{", '{"dtype": "int8"}', "[]"):
        run.dir.mkdir(exist_ok=True)
        run.path("precision.json").write_text(text)
        with pytest.raises(RunError, match=r"precision.json: cannot be understood: .*; delete it, or set model.dtype"):
            Run(auto).dtype  # noqa: B018


def test_benchmarks_take_the_run_s_own(auto: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text('{"question": "sum of 1 and 2", "answer": "3"}\n')
    on_machine(monkeypatch, "bfloat16")
    assert Run(auto).dtype[0] == "bfloat16"
    on_machine(monkeypatch, "float32")
    (result,) = run_benchmarks(Run(auto), [str(file)])
    assert result.settings["model"]["dtype"] == "bfloat16"
