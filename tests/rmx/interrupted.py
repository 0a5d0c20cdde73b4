"""Runs that are killed or stopped, and what is compared afterwards."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from test_pipeline import changed

from rmx.config import Config
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES

KILLS = int(os.environ.get("RMX_KILLS", "6"))
PER_RUN = 3  # kills of one run, before it is left to finish
UNITS = {"rollouts": 10, "evaluation.base": 5, "evaluation.tuned": 5}  # of many_units
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
RMX = [sys.executable, "-m", "rmx.cli"]


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
