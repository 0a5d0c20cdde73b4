"""Metrics in trackers: TensorBoard's own files, and the calls that other trackers get from accelerate's wrappers."""

import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_pipeline import changed

from rmx.config import Config
from rmx.records import StepMetrics
from rmx.runs.pipeline import Run
from rmx.training import trackers
from rmx.training.trackers import TrackerError, Trackers

METRICS = StepMetrics(3, 0.5, 0.25, 0.01, 0.1, None, 2.0, 1e-4, 800, 2.0)


@pytest.mark.thorough
def test_a_run_in_tensorboard(tiny_config: Config, tmp_path: Path) -> None:
    config = changed(tiny_config, train={"trackers": ["tensorboard"]}).model_copy(
        update={"run_dir": str(tmp_path / "r")}
    )
    run = Run(config)
    run.run()
    found = EventAccumulator(str(run.path("tensorboard")))
    found.Reload()
    history = run.history()
    for name, values in {
        "train/loss": [m.loss for m in history],
        "train/grad_norm": [m.gradient_norm for m in history],
        "train/anchor_kl": [m.anchor_kl for m in history],
    }.items():
        events = found.Scalars(name)
        assert [e.step for e in events] == [m.step for m in history]
        assert [e.value for e in events] == pytest.approx(values, rel=1e-6)
    (gain,) = found.Scalars("eval/gain")
    assert gain.value == pytest.approx(run.evaluation().gain.mean) and gain.step == history[-1].step
    assert found.Images("report")[0].width > 500
    (settings,) = run.path("tensorboard").glob("*/hparams.yml")
    assert "train.learning_rate: 0.01" in settings.read_text()
    assert "trackers" not in json.dumps(run.stages())  # another tracker is no other run


class Service:
    """Stands for the package of a tracker, and keeps what it is told."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> None:
        self.calls: list[Any] = []
        self.module: Any = ModuleType(name)
        self.module.__spec__ = importlib.machinery.ModuleSpec(name, None)

        def log(values: dict[str, Any], step: int) -> None:
            self.calls.append((step, values))
            if fails:
                raise ConnectionError("no network")

        run = SimpleNamespace(
            id="abc", log=log, finish=lambda: self.calls.append("finish"), info=SimpleNamespace(run_id="m1")
        )
        self.module.init = lambda **given: (self.calls.append(given), run)[1]
        self.module.config = SimpleNamespace(update=lambda values, **_: self.calls.append(values))
        self.module.search_experiments = lambda **_: []
        self.module.create_experiment = lambda **given: "e1"
        self.module.start_run = lambda **given: (self.calls.append(given), run)[1]
        self.module.log_params = self.calls.append
        self.module.log_metrics = lambda values, step: log(values, step)
        self.module.end_run = run.finish
        self.module.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )
        monkeypatch.setitem(sys.modules, name, self.module)


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_what_other_trackers_are_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(name, monkeypatch)
    for _ in range(2):  # a run that goes on adds to its own
        shown = Trackers([name], tmp_path, {"seed": 1, "lora": {"r": 8, "targets": ["q", "k"]}})
        shown.step(METRICS, 0.75)
        shown.close()
    begun, settings, (step, values), end, again = service.calls[:5]
    assert tmp_path.name in begun.values()
    assert settings == {"seed": 1, "lora.r": 8, "lora.targets": '["q", "k"]'}
    assert step == 3 and end == "finish"
    assert values == {
        "train/loss": 0.5,
        "train/grad_norm": 2.0,
        "train/learning_rate": 1e-4,
        "train/epoch": 0.75,
        "train/tokens_per_second": 400.0,
        "train/decision_loss": 0.25,
        "train/anchor_kl": 0.01,
        "train/right_decisions_shift": 0.1,
    }
    if name == "wandb":
        assert begun["id"] is None and again["id"] == "abc" and again["resume"] == "allow"
    if name == "mlflow":
        assert begun["run_id"] is None and again["run_id"] == "m1"


def test_a_tracker_that_fails_is_said_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service("wandb", monkeypatch, fails=True)
    shown = Trackers(["wandb"], tmp_path, {})
    for _ in range(3):
        shown.step(METRICS, 0.5)
    shown.close()
    assert sum(isinstance(call, tuple) for call in service.calls) == 1
    assert "wandb is left out from here on: ConnectionError: no network" in "".join(capsys.readouterr())


def test_a_tracker_that_is_not_installed_stops_before_any_work(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = changed(tiny_config, train={"trackers": ["trackio"]}).model_copy(update={"run_dir": str(tmp_path / "r")})
    with pytest.raises(TrackerError, match=r"train.trackers: trackio is not installed: pip install 'rmx\[trackio\]'"):
        Run(config).run()
    assert not (tmp_path / "r" / "rollouts.jsonl").exists()
