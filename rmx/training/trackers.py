"""Metrics of a training in the trackers that people use, by accelerate's wrappers; metrics.jsonl has them too."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rmx.artefacts import write_json
from rmx.errors import RmxError
from rmx.progress import console
from rmx.records import Evaluation, StepMetrics

PROJECT = "rmx"
KEPT = "trackers.json"  # identities of a run's own runs, so that one that goes on adds to them


class TrackerError(RmxError):
    """A tracker's package is not installed."""


def check(names: Sequence[str]) -> None:
    """Raise TrackerError if the package of a tracker is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise TrackerError(f"train.trackers: {name} is not installed: pip install 'rmx[{name}]'")


class Trackers:
    """The trackers ``names`` of the run in a directory.

    Args:
        settings: of the run, as nested dictionaries, shown by dotted names; None where the trackers have them already.
    """

    def __init__(self, names: Sequence[str], folder: Path, settings: dict[str, Any] | None = None) -> None:
        check(names)
        self.folder = folder
        self.open: dict[str, Any] = {}
        for name in names:
            self._try(name, lambda name=name: self._start(name, settings))  # type: ignore[misc]

    def step(self, metrics: StepMetrics, epoch: float) -> None:
        values = {
            "train/loss": metrics.loss,
            "train/grad_norm": metrics.gradient_norm,
            "train/learning_rate": metrics.learning_rate,
            "train/epoch": epoch,
            "train/tokens_per_second": metrics.tokens / metrics.seconds if metrics.seconds else None,
            "train/decision_loss": metrics.decision,
            "train/anchor_kl": metrics.anchor_kl,
            "train/right_decisions_shift": metrics.positive_shift,
            "train/wrong_decisions_shift": metrics.negative_shift,
        }
        self._log({key: value for key, value in values.items() if value is not None}, metrics.step)

    def evaluation(self, found: Evaluation, step: int, picture: Path | None = None) -> None:
        """The evaluation of the adapter of ``step``; ``picture``: the report's, for trackers that show pictures."""
        values = {"eval/base_pass@1": found.base.pass_at_1.mean, "eval/pass@1": found.tuned.pass_at_1.mean}
        values |= {"eval/gain": found.gain.mean, "eval/gain_low": found.gain.low, "eval/gain_high": found.gain.high}
        values |= {"eval/completion_length": found.tuned.tokens, "eval/truncated": found.tuned.truncated}
        self._log(values, step)
        if picture is not None and picture.exists():
            self._show(picture, step)

    def close(self) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.finish)
        self.open.clear()

    def _start(self, name: str, settings: dict[str, Any] | None) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # its wrappers log through it
        kept = self._kept()
        run, folder = self.folder.name, str(self.folder)
        given: dict[str, dict[str, Any]] = {
            "tensorboard": {"run_name": "tensorboard", "logging_dir": folder},
            "wandb": {"run_name": PROJECT, "name": run, "dir": folder, "resume": "allow", "id": kept.get(name)},
            "trackio": {"run_name": PROJECT, "name": run, "resume": "allow"},
            "mlflow": {"experiment_name": PROJECT, "run_name": run, "run_id": kept.get(name)},
        }
        tracker: Any = LOGGER_TYPE_TO_CLASS[name](**given[name])
        tracker.main_process_only = False  # this is the main process, and accelerate need not look for others
        tracker.start()
        if settings is not None:
            tracker.store_init_configuration(dict(_dotted(settings)))
        self.open[name] = tracker
        identity = {"wandb": lambda: tracker.run.id, "mlflow": lambda: tracker.active_run.info.run_id}.get(name)
        if identity is not None:
            write_json(self.folder / KEPT, {**kept, name: identity()})

    def _kept(self) -> dict[str, str]:
        path = self.folder / KEPT
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _log(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.log(values, step=step))  # type: ignore[misc]

    def _show(self, picture: Path, step: int) -> None:
        import matplotlib.image

        pixels = matplotlib.image.imread(picture)[None, :, :, :3].transpose(0, 3, 1, 2)
        if (tracker := self.open.get("tensorboard")) is not None:
            self._try("tensorboard", lambda: tracker.log_images({"report": pixels}, step=step))

    def _try(self, name: str, do: Callable[[], Any]) -> None:
        """A tracker that fails is said and left out: hours of training are worth more than its curves."""
        try:
            do()
        except Exception as fault:  # of a service, its network or its account
            self.open.pop(name, None)
            said = f"train: {name} is left out from here on: {type(fault).__name__}: {fault}"
            console.print(said, markup=False, highlight=False, soft_wrap=True)


def _dotted(tree: dict[str, Any], above: str = "") -> Any:
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{name}.")
        else:
            yield name, value if isinstance(value, bool | int | float | str) else json.dumps(value)
