"""A whole run on a tiny model: artefacts, resuming, interruption, changed settings, full disks, the command line."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import process

from rmx import artefacts
from rmx.artefacts import ArtefactError
from rmx.config import Config
from rmx.config_file import load_config
from rmx.models import model
from rmx.models.lora import AdapterError
from rmx.models.prompts import PromptError
from rmx.runs import pipeline
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES
from rmx.training.select import SelectionError
from rmx.training.train import TrainingError


def changed(config: Config, **sections: dict[str, object]) -> Config:
    tree = config.model_dump()
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return Config.model_validate(tree)


def write_yaml(config: Config, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def test_a_run_leaves_every_artefact_and_they_agree(finished: Run) -> None:
    assert list(finished.stages()) == list(STAGES)
    names = {path.name for path in finished.dir.iterdir()}
    assert {
        "adapter",
        "metrics.jsonl",
        "report.png",
        "report.html",
        "gate.json",
        "gate.png",
        "choice.json",
        "evaluation.json",
        "scores",
    } <= names
    assert not [name for name in names if name.endswith(".partial")]
    held_out = {p.question for p in finished.problems("evaluate")}
    assert not held_out & {p.question for p in finished.problems("train")}
    rollouts = finished.rollouts()
    assert len(rollouts) == len(finished.verdicts()) == 20 * 12
    assert len(finished.scores()) <= len(rollouts)
    known = {(r.problem_id, r.sample): r for r in rollouts}
    sequences = finished.training_set()
    assert sequences
    for s in sequences:
        assert known[s.problem_id, s.sample].completion_ids == s.completion_ids
    assert [m.step for m in finished.history()] == list(range(1, len(finished.history()) + 1))
    assert finished.evaluation().problems == 20


def test_a_finished_run_is_not_repeated(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.dir.rglob("*.json*")}
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("nothing is left to do"))
    again = Run(finished.config)
    assert again.run() == finished.evaluation()
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


def test_the_report_reads_tokens_without_the_weights(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens() -> str:
        page = finished.path("report.html").read_text()
        return page[page.index('<section id="rollouts">') : page.index('<section id="training">')]

    before = tokens()
    assert 'class="tokens"' in before
    finished.path("report.html").unlink()
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("the weights were loaded"))
    Run(finished.config).execute("report")
    assert tokens() == before


@pytest.mark.parametrize("stage", ["problems", "verify", "select"])
def test_a_stage_without_a_model_loads_nothing_of_it(
    finished: Run, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    for name in ("load", "load_vocabulary"):
        monkeypatch.setattr(model, name, lambda *_: pytest.fail("nothing of the model is needed"))
    Run(finished.config).execute(stage, again=True)


@pytest.mark.thorough
def test_a_stage_that_is_done_says_so_without_torch(finished: Run, tmp_path: Path) -> None:
    path = write_yaml(finished.config, tmp_path / "done.yaml")
    for stage in STAGES:
        if stage == "report":
            continue
        code = "import sys; from rmx import cli; cli.app(sys.argv[1:], standalone_mode=False)"
        code += "; print(*({'torch', 'transformers', 'matplotlib'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code, stage, path], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "\n"), done.stderr
        assert f"{stage} is done; --again redoes it" in done.stderr.replace("\n", " ")


@pytest.mark.thorough
def test_changed_settings_are_named_and_only_where_they_matter(finished: Run) -> None:
    with pytest.raises(RunError, match=r"stage 'train' .*train.epochs was 1.0, is now 3.0"):
        Run(changed(finished.config, train={"epochs": 3})).run()
    retrained = Run(changed(finished.config, train={"epochs": 2}))
    with retrained.locked():
        retrained.execute("train", again=True)
    assert list(retrained.stages()) == list(STAGES)[:6]  # evaluation and report are stale
    retrained.run()
    assert len(retrained.history()) == 2 * len(finished.training_set()) // 8


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [s for s in STAGES if s not in ("report",)])
def test_a_failure_in_any_stage_loses_nothing_before_it(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The disk is full when the stage writes: no half artefact stays, and the next start continues there."""
    run = Run(tiny_config)
    for earlier in list(STAGES)[: list(STAGES).index(stage)]:
        run.execute(earlier)
    logs = ("stages.json", "costs.jsonl")
    kept = {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file() and path.name not in logs}
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target).name != "stages.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(artefacts.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run.execute(stage)
    monkeypatch.undo()
    assert not list(run.dir.glob(".*.partial"))
    assert all(path.read_bytes() == then for path, then in kept.items())
    assert stage not in Run(tiny_config).stages()
    again = Run(tiny_config)
    again.execute(stage)
    assert stage in again.stages()


@pytest.mark.thorough
def test_kill_in_the_middle_of_training_and_start_again(tiny_config: Config, tmp_path: Path) -> None:
    """SIGKILL after the second step; the next start finishes with what an undisturbed run gives."""
    slow = changed(tiny_config, train={"sequences_per_step": 1, "epochs": 3})
    path = write_yaml(slow, tmp_path / "run.yaml")
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = subprocess.Popen([sys.executable, "-m", "rmx.cli", "run", str(path)], **quiet)  # type: ignore[call-overload]
    metrics = Path(slow.run_dir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(Run(slow).stages()) == list(STAGES)[:5]
    assert not Run(slow).path("adapter").exists()
    assert metrics.read_text().count("\n") < 3 * len(Run(slow).training_set())
    (Path(slow.run_dir) / ".adapter.partial").mkdir()  # as a kill during the write would leave it
    result = Run(slow).run()
    assert not list(Path(slow.run_dir).glob(".*.partial"))
    elsewhere = Config.model_validate({**slow.model_dump(), "run_dir": str(tmp_path / "undisturbed")})
    assert Run(elsewhere).run() == result


@pytest.mark.thorough
def test_what_settings_name_is_watched_too(finished: Run, tiny_path: Path, tmp_path: Path) -> None:
    """Other weights or problems under the same name are other inputs."""
    problems = Path(finished.config.problems.sources[0].jsonl or "")
    before = problems.read_text()
    problems.write_text(before.replace('"answer": "1"', '"answer": "2"'))
    with pytest.raises(RunError, match=r"stage 'problems' was run with other settings: files\..*p.*\.jsonl was"):
        Run(finished.config).run()
    problems.write_text(before)
    weights = tiny_path / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4] + b"\0\0\0\0")
        with pytest.raises(RunError, match=r"stage 'rollouts' was run with other settings: weights was"):
            Run(finished.config).run()
    finally:
        weights.write_bytes(content)
    shutil.rmtree(finished.path("adapter"))
    assert Run(finished.config).run().problems == 20
    assert finished.path("adapter/adapter_model.safetensors").exists()
    finished.path("stages.json").write_text('{"problems": {}}')
    with pytest.raises(RunError, match=r"stages.json: cannot be understood"):
        Run(finished.config).run()


@pytest.mark.thorough
def test_an_interrupted_evaluation_keeps_what_still_fits(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = Run.generate
    made: list[str] = []

    def watched(self: Run, title: str, *rest: object) -> object:
        made.append(title.removeprefix("evaluation."))
        return generate(self, title, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "generate", watched)

    def evaluated(config: Config, again: bool = True) -> list[str]:
        made.clear()
        Run(config).execute("evaluate", again=again)
        return list(made)

    assert evaluated(finished.config) == ["base", "tuned"]
    assert evaluated(changed(finished.config, evaluate={"bootstrap": 100})) == []
    assert evaluated(changed(finished.config, evaluate={"temperature": 0.9})) == ["base", "tuned"]
    retrained = changed(finished.config, evaluate={"temperature": 0.9}, train={"learning_rate": 0.02})
    Run(retrained).execute("train", again=True)
    Run(retrained).execute("choose")
    assert evaluated(retrained, again=False) == ["tuned"]
    Run(retrained).path("evaluation.tuned.jsonl").unlink()  # as if it had been stopped between the two
    assert evaluated(changed(retrained, evaluate={"bootstrap": 50})) == ["tuned"]


def test_a_half_written_or_foreign_artefact_is_never_taken_for_whole(finished: Run) -> None:
    path = finished.path("verdicts.jsonl")
    whole = path.read_text()
    path.write_text(whole[:-20])
    with pytest.raises(ArtefactError, match=r"verdicts.jsonl:\d+: not a JSON value"):
        finished.verdicts()
    path.write_text(whole.replace('"prompt": "', '"prompt": "x'))
    with pytest.raises(ArtefactError, match="made with other prompts"):
        finished.verdicts()
    path.write_text(whole.replace('"right"', '"rihgt"'))
    with pytest.raises(ArtefactError, match=r"verdicts.jsonl:\d+: outcome"):
        finished.verdicts()
    path.write_text("")
    with pytest.raises(ArtefactError, match="empty"):
        finished.verdicts()


def test_a_full_disk_names_the_file_that_had_no_room(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left on device: '.*scores'"), artefacts.replacing(tmp_path / "scores"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("sections", "error", "message"),
    [
        ({"lora": {"targets": ["q_porj"]}}, AdapterError, "'q_porj' matches no layer"),
        ({"lora": {"first_layer": 2}}, AdapterError, "first_layer=2: the model has layers 0 to 1"),
        ({"rollouts": {"max_new_tokens": 3000}}, PromptError, r"lower rollouts\.max_new_tokens"),
        ({"evaluate": {"max_new_tokens": 3000}}, PromptError, r"only 2048 positions: lower evaluate\.max_new_tokens"),
    ],
)
def test_mistakes_are_found_before_a_token_is_sampled(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, sections: Any, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(pipeline.rollouts, "generate_rollouts", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(error, match=message):
        Run(changed(tiny_config, **sections)).run()


@pytest.mark.thorough
def test_a_warm_up_longer_than_the_training_is_found_as_early_as_can_be(tiny_config: Config) -> None:
    """At the start, by a bound; where fewer problems turn out to be of use, before the training's first step."""
    assert tiny_config.most_steps == 12
    run = Run(changed(tiny_config, train={"warmup_steps": 13}))
    with pytest.raises(TrainingError, match="warm-up takes 13 steps, the training at most 12: lower"):
        run.run()
    assert run.stages() == {}
    run = Run(changed(tiny_config, train={"warmup_steps": 12, "epochs": 0.99}))
    for stage in list(STAGES)[:5]:
        run.execute(stage)
    training_set = run.path("training_set.jsonl")
    training_set.write_text("".join(training_set.read_text().splitlines(keepends=True)[:17]))
    with pytest.raises(TrainingError, match="warm-up takes 12 steps, the training 2: lower"):
        run.execute("train")


def test_evaluations_of_earlier_versions_count_as_done(finished: Run) -> None:
    """They were of 8192 tokens where the configuration said nothing."""
    tree = finished.config.model_dump()
    del tree["evaluate"]["max_new_tokens"]
    stages = finished.stages()
    for stage in ("evaluate",):
        stages[stage]["settings"]["evaluate"]["max_new_tokens"] = 8192
    finished.path("stages.json").write_text(json.dumps(stages))
    assert Run(Config.model_validate(tree)).is_done("evaluate")
    with pytest.raises(RunError, match=r"evaluate.max_new_tokens was 8192, is now 4"):
        Run(finished.config).is_done("evaluate")


@pytest.mark.thorough
def test_a_configuration_and_its_run_are_found_from_anywhere(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tiny_config.model_dump(mode="json")
    source = tree["problems"]["sources"][0]
    shutil.copy(source["jsonl"], tmp_path / "problems.jsonl")
    tree["run_dir"], source["jsonl"] = "runs/mine", "problems.jsonl"
    shutil.copytree(tiny_config.model.name, tmp_path / "weights")
    tree["model"]["name"] = "./weights"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = Run(load_config(path))
    result = run.run()
    assert run.dir == tmp_path / "runs/mine"
    monkeypatch.chdir(tmp_path)
    again = Run(load_config(Path("run.yaml")))
    assert again.dir == Path("runs/mine") and again.run() == result
    assert list(elsewhere.iterdir()) == []


def test_two_processes_do_not_share_a_run_directory(tiny_config: Config) -> None:
    with Run(tiny_config).locked(), pytest.raises(RunError, match="another process"):
        Run(tiny_config).run()


def test_an_empty_selection_stops_the_run_with_advice(tiny_config: Config) -> None:
    with pytest.raises(SelectionError, match=r"0 of 20 problems had mixed outcomes"):
        Run(changed(tiny_config, rollouts={"temperature": 0.0})).run()


@pytest.mark.thorough
def test_the_command_line_runs_stages_and_reports_errors_in_one_line(tiny_config: Config, tmp_path: Path) -> None:
    path = write_yaml(tiny_config, tmp_path / "run.yaml")
    early = process("train", path)
    assert (early.returncode, early.stdout) == (1, "")
    assert early.stderr.startswith("rmx: error: ")
    assert "stage 'train' needs stage 'problems'" in early.stderr
    done = process("run", path, "--set", "train.epochs=0.5")
    assert done.returncode == 0, done.stderr
    for words in ("20 held-out problems x 2 samples", "base", "tuned", "gain", "adapter", "report.html", "Cost"):
        assert words in done.stdout
    wrong = process("run", path, "--set", "train.epohcs=1")
    assert wrong.returncode == 1
    assert "train.epohcs: unknown key" in wrong.stderr
    assert "Traceback" not in wrong.stderr
    broken = tmp_path / "broken.jsonl"
    broken.write_text(Path(tiny_config.problems.sources[0].jsonl).read_text() + "{\n")
    other = changed(tiny_config, problems={"sources": [{"jsonl": str(broken)}]})
    named = process("problems", write_yaml(other, path), "--set", f"run_dir={tmp_path / 'other'}")
    assert named.returncode == 1
    assert f"{broken}:41: not a JSON value" in named.stderr
    assert "reference  runs here" in process("backends").stdout
