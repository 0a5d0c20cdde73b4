"""Interrupted trainings end with the same bits; memory that runs out; values that are not finite; process groups."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rmx.config import LoraConfig, TrainConfig
from rmx.models import lora
from rmx.models.lora import Adapter
from rmx.models.model import CausalLM
from rmx.records import TrainingSequence
from rmx.training import train
from rmx.training.checkpoint import Checkpoint, Interrupted
from rmx.training.train import MetricsLog, StepMetrics, TrainingError, train_adapter

SETTINGS: dict[str, object] = {
    "epochs": 4, "sequences_per_step": 4, "learning_rate": 0.01, "warmup_steps": 2, "anchor_fraction": 0.5,
    "token_budget": 30, "checkpoint_seconds": 0.0,
}  # fmt: skip
CONFIG = TrainConfig.model_validate(SETTINGS)


def sequences(count: int = 10) -> list[TrainingSequence]:
    g = torch.Generator().manual_seed(0)
    found = []
    for n in range(count):
        P, T = 2 + n % 4, 3 + n % 5
        ids = torch.randint(3, 21, (P + T,), generator=g).tolist()
        advantage = 1.0 if n % 2 else -0.7
        found.append(TrainingSequence(f"p{n}", 0, ids[:P], ids[P:], float(n % 2), advantage, [0, 2], [-1.0] * T))
    return found


@pytest.fixture
def fresh(tiny: CausalLM) -> Callable[[], Adapter]:
    attached: list[Adapter] = []

    def make(dropout: float = 0.0) -> Adapter:
        if attached:
            lora.detach(tiny.model, attached.pop())
        attached.append(lora.attach(tiny.model, LoraConfig(r=2, alpha=4, dropout=dropout), seed=0))
        return attached[0]

    return make


def values(adapter: Adapter) -> list[Tensor]:
    return [p.detach().clone() for p in adapter.parameters()]


class Killed(Exception):
    pass


@pytest.mark.thorough
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_a_training_killed_at_any_step_ends_with_the_same_bits(
    tiny: CausalLM, fresh: Callable[..., Adapter], tmp_path: Path, seconds: float, dropout: float
) -> None:
    adapter = fresh(dropout)
    whole = train_adapter(tiny, adapter, sequences(), CONFIG, 0)
    expected = values(adapter)
    for killed_at in range(1, len(whole)):
        path = tmp_path / f"{seconds}-{killed_at}"

        def kill(metrics: StepMetrics, total: int, at: int = killed_at) -> None:
            if metrics.step == at:
                raise Killed

        with pytest.raises(Killed):
            train_adapter(
                tiny, fresh(dropout), sequences(), CONFIG, 0, checkpoint=Checkpoint(path, "a", seconds), on_step=kill
            )
        adapter, rest = fresh(dropout), Checkpoint(path, "a", seconds)
        kept = killed_at - 1 if seconds == 0 else 0  # the kill comes before the step's checkpoint
        assert rest.peek() == kept
        history = train_adapter(tiny, adapter, sequences(), CONFIG, 0, checkpoint=rest)
        assert all(torch.equal(a, b) for a, b in zip(values(adapter), expected, strict=True))
        assert [m.loss for m in history] == [m.loss for m in whole[kept:]]


def test_a_checkpoint_of_another_training_or_a_torn_one_is_not_taken_up(
    tiny: CausalLM, fresh: Callable[..., Adapter], tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint"
    train_adapter(tiny, fresh(), sequences(), CONFIG, 0, checkpoint=Checkpoint(path, "a"))
    assert Checkpoint(path, "a").peek() == 10
    assert Checkpoint(path, "b").peek() == 0
    path.write_bytes(path.read_bytes()[:-3])
    assert Checkpoint(path, "a").peek() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_it_ends_the_training(
    tiny: CausalLM, fresh: Callable[..., Adapter], tmp_path: Path, number: signal.Signals
) -> None:
    expected = fresh()
    train_adapter(tiny, expected, sequences(), CONFIG, 0)
    bits = values(expected)
    before = signal.getsignal(number)
    checkpoint = Checkpoint(tmp_path / "checkpoint", "a", seconds=1e9)

    def strike(metrics: StepMetrics, total: int) -> None:
        if metrics.step == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(
        Interrupted, match=rf"{number.name} after step [34]; checkpoint of step [34] in .*checkpoint"
    ) as fault:
        train_adapter(tiny, fresh(), sequences(), CONFIG, 0, checkpoint=checkpoint, on_step=strike)
    assert fault.value.signum == number
    assert signal.getsignal(number) is before
    adapter = fresh()
    train_adapter(tiny, adapter, sequences(), CONFIG, 0, checkpoint=Checkpoint(tmp_path / "checkpoint", "a"))
    assert all(torch.equal(a, b) for a, b in zip(values(adapter), bits, strict=True))


def test_out_of_memory_halves_the_budget_and_says_so(
    tiny: CausalLM,
    fresh: Callable[..., Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A device with room for 12 tokens a pass: the step is done again, with the same gradient up to rounding."""
    adapter = fresh()
    plenty = train_adapter(tiny, adapter, sequences(), CONFIG, 0)
    expected = values(adapter)
    inner = train.forward.final_hidden

    def tight(lm: CausalLM, ids: list[list[int]], *rest: object) -> Tensor:
        if sum(map(len, ids)) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4.60 GiB")
        return inner(lm, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(train.forward, "final_hidden", tight)
    adapter = fresh()
    history = train_adapter(tiny, adapter, sequences(), CONFIG, 0)
    assert "out of memory at step 1; goes on with train.token_budget=15" in capsys.readouterr().err
    assert [m.loss for m in history] == pytest.approx([m.loss for m in plenty], abs=1e-5)
    for a, b in zip(values(adapter), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(
        train.forward, "final_hidden", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room"))
    )
    with pytest.raises(TrainingError, match=r"step 1 with a single sequence of 1\d tokens: .*activation_checkpointing"):
        train_adapter(tiny, fresh(), sequences(), CONFIG, 0)
    monkeypatch.setattr(train.forward, "final_hidden", lambda *_: (_ for _ in ()).throw(RuntimeError("another fault")))
    with pytest.raises(RuntimeError, match="another fault"):
        train_adapter(tiny, fresh(), sequences(), CONFIG, 0)


def test_a_loss_that_is_not_finite_names_step_rows_and_checkpoint(
    tiny: CausalLM, fresh: Callable[..., Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, calls = train.forward.final_hidden, []

    def breaking(lm: CausalLM, ids: list[list[int]], *rest: object) -> Tensor:
        hidden = inner(lm, ids, *rest)  # type: ignore[arg-type]
        calls.append(len(ids))
        return hidden * float("nan") if len(calls) == 5 else hidden

    monkeypatch.setattr(train.forward, "final_hidden", breaking)
    checkpoint = Checkpoint(tmp_path / "checkpoint", "a", 0.0)
    with pytest.raises(
        TrainingError, match=r"not finite at step 3: p\d/0 position \d+, .*; checkpoint of step 2 in .*checkpoint"
    ):
        train_adapter(tiny, fresh(), sequences(), CONFIG, 0, checkpoint=checkpoint)
    assert Checkpoint(tmp_path / "checkpoint", "a").peek() == 2


def test_the_metrics_log_keeps_the_steps_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in (1, 2, 3)) + '{"st')
    MetricsLog(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    MetricsLog(path).close()
    assert path.read_text() == ""


@pytest.mark.thorough
@pytest.mark.parametrize("option", ["activation_checkpointing", "compile"])
def test_layer_options_change_nothing_but_the_cost(tiny: CausalLM, fresh: Callable[..., Adapter], option: str) -> None:
    short = CONFIG.model_copy(update={"epochs": 0.8})
    adapter = fresh()
    expected = train_adapter(tiny, adapter, sequences(), short, 0)
    bits = values(adapter)
    adapter = fresh()
    history = train_adapter(tiny, adapter, sequences(), short.model_copy(update={option: True}), 0)
    assert [m.loss for m in history] == pytest.approx([m.loss for m in expected], abs=1e-6)
    for a, b in zip(values(adapter), bits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in tiny.model.modules() if not isinstance(module, lora.LoraLinear))


@pytest.mark.thorough
def test_two_processes_under_torchrun_equal_one(tiny_path: Path, tmp_path: Path) -> None:
    """gloo on two processes: the same global batch, so the same adapter up to the order of sums."""
    script = tmp_path / "one.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_checkpoint import CONFIG, sequences\n"
        "from rmx.models import lora, model\n"
        "from rmx.config import LoraConfig, ModelConfig\n"
        "from rmx.training.distributed import processes\n"
        "from rmx.training.train import train_adapter\n"
        f"lm = model.load(ModelConfig(name={str(tiny_path)!r}, dtype='float32', device='cpu'))\n"
        "adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4), seed=0)\n"
        "with processes() as group:\n"
        "    history = train_adapter(lm, adapter, sequences(), CONFIG, 0, group=group)\n"
        "    torch.save(([p.detach() for p in adapter.parameters()], [m.loss for m in history],\n"
        "               [m.anchor_kl for m in history]), f'{sys.argv[1]}-{group.rank}')\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(script), str(tmp_path / "alone")]
    subprocess.run(run, check=True, env=environment, timeout=200)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, str(script), str(tmp_path / "two")], check=True, env=environment, timeout=200)
    alone, *two = (torch.load(tmp_path / name) for name in ("alone-0", "two-0", "two-1"))
    for found in two:
        for a, b in zip(found[0], alone[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert found[1] == pytest.approx(alone[1], abs=1e-5)
        assert found[2] == pytest.approx(alone[2], abs=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(two[0][0], two[1][0], strict=True))
