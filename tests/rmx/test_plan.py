"""The plan of a run: what can be counted is what the run then does, whole or in part; what does not fit is named."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import changed, write_yaml
from torch import nn
from typer.testing import CliRunner

from rmx.cli import app
from rmx.config import Config, CostConfig
from rmx.cost import GIB, stage_costs
from rmx.models import model
from rmx.models.model import CausalLM
from rmx.models.prompts import PromptError
from rmx.runs import plan
from rmx.runs.pipeline import Run
from rmx.runs.plan import make
from rmx.runs.plan_table import Figure, Plan, StagePlan, say, table, total
from rmx.runs.rates import Training, training
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES
from rmx.tables import show
from rmx.training.train import TrainingError

QUICK = 0.1  # seconds of a measurement


def by_stage(made: Plan) -> dict[str, StagePlan]:
    assert [stage.stage for stage in made.stages] == list(STAGES)
    return {stage.stage: stage for stage in made.stages}


@pytest.fixture
def recorded(finished: Run) -> dict[str, Any]:
    return {row.stage: row for row in stage_costs(finished.path("costs.jsonl"), list(STAGES), CostConfig())}


def undone(run: Run, kept: int) -> Run:
    """The same run after its first ``kept`` stages."""
    stages = run.stages()
    run.path("stages.json").write_text(json.dumps(dict(list(stages.items())[:kept])))
    return Run(run.config)


def test_prompts_are_counted_before_anything_runs(tiny_config: Config, finished: Run, recorded: dict[str, Any]) -> None:
    fresh = tiny_config.model_copy(update={"run_dir": tiny_config.run_dir + "-not-yet"})
    made = make(Run(fresh), QUICK)
    stages = by_stage(made)
    for name, sides in (("rollouts", 1), ("evaluate", 2)):
        assert stages[name].tokens_read == Figure(recorded[name].tokens_read, "counted")
        sampling = getattr(tiny_config, name)
        most = sides * 20 * sampling.samples * sampling.max_new_tokens
        assert stages[name].tokens_generated == Figure(most / 2, "assumed")
        assert most / 4 < recorded[name].tokens_generated <= most
    assert stages["score"].tokens_read is not None and stages["score"].tokens_read.kind == "assumed"
    for name in ("rollouts", "score", "train", "evaluate"):
        figures = stages[name]
        assert figures.seconds is not None and 0 < figures.seconds.value < 600
        assert figures.host_bytes is not None and 0.05 < figures.host_bytes.value / GIB < 20
        assert figures.disk_bytes is not None and figures.disk_bytes.value > 0
        assert (figures.done, figures.device_bytes) == (False, None)
    assert not Path(fresh.run_dir).exists()  # nothing was written
    assumed = [line for line in made.assumptions if "busy" not in line]
    assert len(assumed) == 3 and "half of rollouts.max_new_tokens" in assumed[0]
    assert made.advice == [] and say(made)[-1] == "fits this machine"


def test_the_disk_is_that_of_the_files(finished: Run) -> None:
    stages = by_stage(make(undone(finished, 3), QUICK))
    files = sum(path.stat().st_size for path in finished.path("scores").glob("*.safetensors"))
    score = stages["score"].disk_bytes
    assert score is not None and score.kind == "counted"
    assert score.value <= files < score.value + 20_000  # headers
    adapter = finished.path("adapter/adapter_model.safetensors").stat().st_size
    train = stages["train"].disk_bytes
    assert train is not None and adapter < train.value < 6 * adapter


def test_with_rollouts_the_rest_is_counted(finished: Run, recorded: dict[str, Any]) -> None:
    stages = by_stage(make(undone(finished, 3), QUICK))
    assert [stage.done for stage in stages.values()] == [True] * 3 + [False] * 6
    assert stages["rollouts"] == StagePlan("rollouts", True)
    for name in ("score", "train"):
        assert stages[name].tokens_read == Figure(recorded[name].tokens_read, "counted")
        assert stages[name].seconds is not None and stages[name].seconds.kind == "measured"
    lengths = [len(r.completion_ids) for r in finished.rollouts()]
    generated = stages["evaluate"].tokens_generated
    assert generated is not None and generated.kind == "assumed"
    assert generated.value == pytest.approx(2 * 20 * 2 * sum(lengths) / len(lengths))
    stages = by_stage(make(undone(finished, 5), QUICK))
    assert stages["train"].tokens_read == Figure(recorded["train"].tokens_read, "counted")


def test_a_finished_run_needs_no_model(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load", lambda *_: pytest.fail("nothing is left to measure"))
    made = make(Run(finished.config))
    assert all(stage.done for stage in made.stages)
    assert total(made.stages) == StagePlan("in all", False)


def test_mistakes_are_the_errors_that_the_run_would_be(finished: Run) -> None:
    with pytest.raises(RunError, match=r"train.epochs was 1.0, is now 3.0"):
        make(Run(changed(finished.config, train={"epochs": 3})))
    config = undone(finished, 1).config
    with pytest.raises(PromptError, match=r"only 2048 positions: lower evaluate\.max_new_tokens"):
        make(Run(changed(config, evaluate={"max_new_tokens": 3000})))
    with pytest.raises(TrainingError, match="warm-up takes 13 steps, the training at most 12: lower"):
        make(Run(changed(config, train={"warmup_steps": 13})))


def test_what_does_not_fit_is_named_with_its_keys(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = changed(undone(finished, 3).config, score={"cache_gib": 0.0})
    cpu = plan.machine.cpu()
    with monkeypatch.context() as patch:
        patch.setattr(plan.machine, "cpu", lambda: dataclasses.replace(cpu, memory_free=50_000))
        made = make(Run(run), QUICK)
    (line,) = [line for line in made.advice if line.startswith("model:")]
    assert "so nothing was measured: set model.dtype" in line
    assert by_stage(made)["train"].seconds is None
    monkeypatch.setattr(plan, "SAFE", -1.0)  # nothing fits
    monkeypatch.setattr(plan._Planner, "too_large", lambda _: None)
    made = make(Run(run), QUICK)
    named = {line.split(":")[0]: line for line in made.advice}
    assert set(named) == {"score", "train", "evaluate", "disk"}
    assert (
        "train.activation_checkpointing=true (or offload)" in named["train"]
        and "evaluate.batch_size" in named["evaluate"]
    )
    kept = [line for line in made.advice if "score.cache_gib=0" in line]
    assert len(kept) == 1 and "are not kept" in kept[0]
    assert [line for line in say(made) if line.startswith("to change: ")] == [f"to change: {a}" for a in made.advice]


def test_checkpointing_keeps_a_layer_and_the_inputs_of_all(finished: Run) -> None:
    need = {}
    for checkpointing in (False, True):
        config = changed(undone(finished, 3).config, train={"activation_checkpointing": checkpointing})
        planner = plan._Planner(Run(config), QUICK)
        planner.training = Training(tokens_per_second=1000.0, bytes_per_token=5e5, bytes_fixed=3e6, tokens=16)
        found = planner._train()
        need[checkpointing] = found["memory"].value
        assert found["seconds"] == Figure(found["tokens_read"].value / 1000, "measured")
    lengths, adapter = planner.trained[0], 2 * 2 * (4 * 32 + 32 + 16 + 16 + 32)  # r, layers, widths of q, k, v and o
    in_pass = max(max(lengths), 8 * sum(lengths) / len(lengths))
    assert need[False] == pytest.approx(in_pass * 5e5 + 3e6 + 16 * adapter)
    assert need[True] == pytest.approx(in_pass * (5e5 / 2 + 2 * 32 * 4) + 3e6 + 16 * adapter)


def test_activations_are_counted_apart_from_what_does_not_grow(tiny: CausalLM, tiny_config: Config) -> None:
    """The same from few tokens and from many; no weight is among them."""
    found = []
    for count in (4, 16):
        config = changed(tiny_config, train={"sequences_per_step": count})
        found.append(training(tiny, config, None, 16, 10.0, 1e9))
    assert [one.tokens for one in found] == [4 * 16, 16 * 16]
    assert found[0].bytes_per_token == pytest.approx(found[1].bytes_per_token, rel=0.05)
    assert found[0].bytes_fixed == pytest.approx(found[1].bytes_fixed, abs=20_000)
    least = 2 * (4 * 32 + 2 * 48) * 4  # states around attention and MLP of two layers
    assert least < found[1].bytes_per_token < 30 * least
    assert all(one.bytes_fixed < 1e6 for one in found)
    assert isinstance(tiny.model.model.layers[0].self_attn.q_proj, nn.Linear)  # the adapter is taken off


def test_a_busy_machine_is_told(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for load, told in ((0.5, False), (1000.0, True)):
        monkeypatch.setattr(plan.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        said = make(Run(finished.config), QUICK).assumptions
        assert any("stays as busy with other work as it is (load 1000 on" in line for line in said) == told


def test_a_server_s_time_is_not_known(tiny_config: Config) -> None:
    config = changed(tiny_config, rollouts={"engine": "openai", "base_url": "http://localhost:1/v1"})
    stages = by_stage(make(Run(config), QUICK))
    assert stages["rollouts"].seconds is stages["rollouts"].host_bytes is None
    assert stages["evaluate"].seconds is not None


def test_the_table_cuts_no_number(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    large = StagePlan("rollouts", False, Figure(123_456_789, "counted"), Figure(9_876_543_210, "assumed"))
    made = Plan([large], "cpu", "float32", 1, None, 1, [], [], {})
    show(table(made))
    out = capsys.readouterr().out
    assert "123,456,789 c" in out and "9,876,543,210 a" in out
    gpu = StagePlan("train", False, device_bytes=Figure(3.5 * GIB, "measured"))
    show(table(Plan([gpu, StagePlan("report", True)], "cuda", "bfloat16", 1, 1, 1, [], [], {})))
    out = capsys.readouterr().out
    assert "device GiB" in out and "3.50 m" in out and "done" in out


def test_the_command_prints_json(finished: Run, tmp_path: Path) -> None:
    path = write_yaml(undone(finished, 4).config, tmp_path / "run.yaml")
    result = CliRunner().invoke(app, ["plan", str(path), "--json", "--seconds", "0.1"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert [stage["done"] for stage in said["stages"]] == [True] * 4 + [False] * 5
    assert said["measured"]["training"]["tokens_per_second"] > 0
    assert said["stages"][5]["tokens_read"]["kind"] == "counted"
