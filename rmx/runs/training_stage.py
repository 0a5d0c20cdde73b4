"""The stage that trains: its inputs, checkpoint, log and adapters in the run directory."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rmx.artefacts import fingerprint, remove
from rmx.models import lora
from rmx.models.quantization import parameter_count
from rmx.progress import console, progress
from rmx.records import StepMetrics
from rmx.runs.choose import candidate_path, candidate_steps, saved_steps
from rmx.training import train
from rmx.training.checkpoint import Checkpoint
from rmx.training.distributed import ALONE, Group
from rmx.training.trackers import Trackers

if TYPE_CHECKING:
    from rmx.runs.pipeline import Run


def train_stage(run: "Run", group: Group = ALONE) -> dict[str, Any]:
    sequences, settings = run.training_set(), run.config.train
    train.check_warmup(settings, run.steps())
    if not group.leads:
        group.wait()  # for files that have to be made again
    base, keep = run.base_source()
    if group.leads:
        group.wait()
    start = None if run.config.lora.start is None else run.config.path(run.config.lora.start)
    adapter = lora.begin(run.lm.model, run.config.lora, run.config.train_seed, start)
    try:
        share = adapter.size / parameter_count(run.lm.model)
        origin = {
            "training_set": fingerprint(run.path("training_set.jsonl").read_bytes()),
            "settings": {**run.settings("train"), "checkpoint_seconds": None},
            "model": run.model_settings.model_dump(),
            "weights": run.weights,
            "base": None if base is None else dataclasses.asdict(keep),
        }
        mark = fingerprint(json.dumps(origin, sort_keys=True).encode())
        path = run.path("checkpoint.safetensors")
        checkpoint = Checkpoint(path, mark, settings.checkpoint_seconds, write=group.leads)
        steps = run.steps()
        with ExitStack() as stack:
            on_step = _log(run, stack, checkpoint, steps, adapter) if group.leads else lambda *_: None
            train.train_adapter(
                run.lm,
                adapter,
                sequences,
                settings,
                run.config.train_seed,
                base=base,
                checkpoint=checkpoint,
                group=group,
                on_step=on_step,
            )
        if group.leads:
            _save(run, adapter, run.path("adapter"))
            if settings.candidates > 1:
                _save(run, adapter, candidate_path(run.dir, run.history()[-1].step))
    finally:
        lora.detach(run.lm.model, adapter)
    made = run.history()[-1].step if group.leads else steps  # fewer where it stopped early
    return {"steps": made, "adapter": f"{adapter.size:,} parameters ({share:.2%})"}


def _save(run: "Run", adapter: lora.Adapter, path: Path) -> None:
    name, dtype = run.config.located_model.name, run.dtype[0]
    lora.save_adapter(adapter, path, name, prompt=run.meta()["prompt"], dtype=dtype)


def _log(
    run: "Run", stack: ExitStack, checkpoint: Checkpoint, steps: int, adapter: lora.Adapter
) -> Callable[[StepMetrics, int], None]:
    made = checkpoint.peek()
    if made:
        console.print(f"train: goes on after step {made} of {steps}")
    for step in saved_steps(run.dir):
        if step > made:  # of an earlier training, or of steps that are made again
            remove(candidate_path(run.dir, step))
    kept = candidate_steps(steps, run.config.train.candidates)[:-1]
    log = train.MetricsLog(run.path("metrics.jsonl"), made)
    stack.callback(log.close)
    hidden = {"rollouts": {"base_url"}, "evaluate": {"base_url"}}  # addresses of servers are nobody else's business
    shown = run.config.model_dump(mode="json", exclude=hidden)
    trackers = Trackers(run.config.train.trackers, run.dir, shown)
    stack.callback(trackers.close)
    update = stack.enter_context(progress("train", steps, "steps"))
    update(made, "")

    def on_step(metrics: StepMetrics, total: int) -> None:
        log(metrics)
        trackers.step(metrics, run.config.train.epochs * metrics.step / total)
        run.meter.read += metrics.tokens
        if metrics.step in kept:
            _save(run, adapter, candidate_path(run.dir, metrics.step))
        update(metrics.step, f"loss {metrics.loss:+.3f} KL {metrics.anchor_kl:.4f}")

    return on_step
