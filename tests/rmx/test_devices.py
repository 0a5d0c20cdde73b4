"""Every stage on a GPU gives what it gives on a CPU, up to rounding: a tiny model in float32.

`pytest -m gpu tests/rmx/test_devices.py`; the same comparisons of the CPU with itself: `pytest -m slow`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from test_pipeline import changed

from rmx.config import Config
from rmx.models import lora
from rmx.runs.pipeline import Run
from rmx.runs.plan import make
from rmx.runs.stages import STAGES

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def on(device: str, run: Run, kept: int, folder: Path, **sections: Any) -> Run:
    """A copy of ``run`` with its first ``kept`` stages done, to go on with on ``device``."""
    shutil.copytree(run.dir, folder)
    stages = dict(list(run.stages().items())[:kept])
    if "rollouts" in stages:
        stages["rollouts"]["settings"]["model"]["device"] = device
    (folder / "stages.json").write_text(json.dumps(stages))
    config = changed(run.config, model={"device": device}, **sections)
    return Run(config.model_copy(update={"run_dir": str(folder)}))


def share_alike(ours: list[Any], theirs: list[Any]) -> float:
    """Of two lists, the share of the places where both have the same."""
    assert len(ours) == len(theirs)
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def ids(run: Run) -> list[Any]:
    return [(r.problem_id, r.sample, r.prompt_ids, r.completion_ids, r.finish_reason) for r in run.rollouts()]


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_of_all_stages_is_that_of_the_cpu(device: str, finished: Run, tmp_path: Path) -> None:
    run = on(device, finished, 0, tmp_path / "there")
    for path in run.dir.iterdir():  # nothing to take up
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.run()
    assert run.lm.device.type == device
    assert list(run.stages()) == list(STAGES)
    assert run.problems("train") == finished.problems("train")
    assert share_alike(ids(run), ids(finished)) > 0.98  # a draw at the edge of two tokens may fall on the other side
    assert share_alike([v.outcome for v in run.verdicts()], [v.outcome for v in finished.verdicts()]) > 0.95
    ours, theirs = run.evaluation(), finished.evaluation()
    assert ours.base.pass_at_1.mean == pytest.approx(theirs.base.pass_at_1.mean, abs=0.06)
    assert ours.tuned.pass_at_1.mean == pytest.approx(theirs.tuned.pass_at_1.mean, abs=0.2)
    assert ("batch_size" in run.stages()["rollouts"]) == (device == "cuda")
    assert run.path("report.html").stat().st_size > 10_000


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"activation_checkpointing": "offload"}])
@pytest.mark.parametrize("device", DEVICES)
def test_scores_and_training_of_the_same_rollouts(
    device: str, options: dict[str, Any], finished: Run, tmp_path: Path
) -> None:
    run = on(device, finished, 3, tmp_path / "there", train=options)
    for name in ("scores", "adapter", "candidates", "training_set.jsonl", "metrics.jsonl"):
        path = run.path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for stage in list(STAGES)[3:7]:
        run.execute(stage)
    for ours, theirs in zip(run.scores(), finished.scores(), strict=True):
        for name in ("entropy", "logprob", "lse"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4)
    chosen = [[s.problem_id, s.sample, s.decision_tokens] for s in run.training_set()]
    assert share_alike(chosen, [[s.problem_id, s.sample, s.decision_tokens] for s in finished.training_set()]) > 0.98
    steps, expected = run.history(), finished.history()
    assert [m.tokens for m in steps] == [m.tokens for m in expected]
    for name in ("loss", "anchor_kl", "gradient_norm"):
        found, wanted = ([getattr(m, name) for m in history] for history in (steps, expected))
        assert found == pytest.approx(wanted, rel=2e-2, abs=2e-3), name
    ours, theirs = (safetensors.torch.load_file(r.path("adapter") / lora.WEIGHTS) for r in (run, finished))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert float((tensor - theirs[name]).norm() / theirs[name].norm()) < 0.05, name


@pytest.mark.parametrize("device", DEVICES)
def test_the_adapter_of_one_device_evaluates_alike_on_the_other(device: str, finished: Run, tmp_path: Path) -> None:
    run = on(device, finished, 7, tmp_path / "there")
    run.execute("evaluate", again=True)
    for side in ("base", "tuned"):
        (ours, verdicts), (theirs, expected) = run.evaluated(side), finished.evaluated(side)
        assert share_alike([r.completion_ids for r in ours], [r.completion_ids for r in theirs]) > 0.95
        assert share_alike([v.outcome for v in verdicts], [v.outcome for v in expected]) > 0.95


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_for_the_device_is_made(device: str, tiny_config: Config) -> None:
    made = make(Run(changed(tiny_config, model={"device": device})), 0.1)
    assert made.device == device and (made.device_free is not None) == (device == "cuda")
    memory = "device_bytes" if device == "cuda" else "host_bytes"
    for stage in made.stages:
        if stage.stage in ("rollouts", "score", "train", "evaluate"):
            figure, seconds = getattr(stage, memory), stage.seconds
            assert figure is not None and figure.value > 0 and seconds is not None and seconds.value > 0
