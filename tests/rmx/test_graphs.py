"""Training passes by CUDA graphs give the gradients of plain ones; on a CPU with a stand-in that repeats the work."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import save_tiny_model

from rmx.attention.packing import Frame
from rmx.config import LoraConfig, ModelConfig, TrainConfig
from rmx.models import forward, lora
from rmx.models.lora_layers import Masters
from rmx.models.model import CausalLM, load
from rmx.records import BaseStates, Rollout, StepMetrics, TrainingSequence
from rmx.training import graphs
from rmx.training.loss import prepare, prepared_loss
from rmx.training.score import Keep, score_rollouts
from rmx.training.train import train_adapter

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PLACES = ["cpu", pytest.param("cuda", marks=GPU)]


class Repeated:
    """Stands for a captured graph where there is no GPU: the same work on the same tensors."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        pass

    new_pool = staticmethod(object)

    def capture(self, function: Callable[[], None]) -> None:
        self.replay = function


def model(folder: Path, device: str, **config: Any) -> CausalLM:
    """Of half precision on a GPU, whose attention of packed sequences can be captured."""
    dtype = "float32" if device == "cpu" else "bfloat16"
    path = save_tiny_model(folder / device, hidden_size=64, num_hidden_layers=3, **config)
    return load(ModelConfig(name=str(path), dtype=dtype, device=device))


def sequences(count: int, seed: int) -> list[TrainingSequence]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for n in range(count):
        P, T = torch.randint(3, 40, (2,), generator=g).tolist()
        ids = torch.randint(3, 21, (P + T,), generator=g).tolist()
        advantage = 1.0 if n % 2 else -0.5
        made.append(
            TrainingSequence(f"p{n}", n, ids[:P], ids[P:], float(n % 2), advantage, sorted({0, T // 2}), [-1.0] * T)
        )
    return made


def base_states(lm: CausalLM, chosen: list[TrainingSequence], first: int) -> dict[int, BaseStates]:
    rollouts = [Rollout("", s.sample, s.prompt_ids, s.completion_ids, "stop", "") for s in chosen]
    found = score_rollouts(lm, rollouts, top_k=0, token_budget=1000, keep=Keep("all", first))
    return {scores.sample: states for scores, states in found if states is not None}


def trained(
    lm: CausalLM, chosen: list[TrainingSequence], first: int, config: TrainConfig
) -> tuple[list[StepMetrics], torch.Tensor]:
    """The metrics of a training and the adapter after it."""
    adapter = lora.attach(lm.model, LoraConfig(r=4, alpha=8, first_layer=first), seed=0)
    try:
        with adapter.off():
            kept = base_states(lm, chosen, first)
        history = train_adapter(lm, adapter, chosen, config, 0, base=lambda s: kept[s.sample])
        return history, torch.cat([p.detach().flatten().cpu() for p in adapter.parameters()])
    finally:
        lora.detach(lm.model, adapter)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often graphs are captured and replayed; without a GPU by their stand-in."""
    counts: Counter[str] = Counter()

    class Counted(graphs.Graph if torch.cuda.is_available() else Repeated):  # type: ignore[misc]
        def capture(self, function: Callable[[], None]) -> None:
            super().capture(function)
            counts["captured"] += 1
            replay = self.replay
            self.replay = lambda: (counts.update(["replayed"]), replay())[1]

    monkeypatch.setattr(graphs, "Graph", Counted)
    if not torch.cuda.is_available():
        monkeypatch.setattr(graphs, "capturable", lambda lm, *_: lm.graphs)
        plain = Frame._now.fget  # type: ignore[attr-defined]

        def now(self: Frame) -> Any:
            found = plain(self)
            self.read_on_host = False  # what cannot be captured can be repeated
            return found

        monkeypatch.setattr(Frame, "_now", property(now))
    return counts


@pytest.mark.thorough
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("device", PLACES)
def test_a_training_with_graphs_is_that_without(device: str, first: int, tmp_path: Path, counted: Counter[str]) -> None:
    lm, chosen = model(tmp_path, device), sequences(24, 1)
    config = TrainConfig(epochs=3, sequences_per_step=6, warmup_steps=1, learning_rate=0.01, token_budget=160)
    assert lm.graphs
    plain, without = trained(replace(lm, graphs=False), chosen, first, config)
    assert not counted
    history, found = trained(lm, chosen, first, config)
    assert counted["captured"] >= 4 and counted["replayed"] >= 2 * len(history)
    assert [m.tokens for m in history] == [m.tokens for m in plain]
    tolerance, alike = (1e-4, len(history)) if device == "cpu" else (0.05, 4)  # rounding grows from step to step
    for name in ("loss", "anchor_kl", "gradient_norm"):
        ours, theirs = ([getattr(m, name) for m in steps[:alike]] for steps in (history, plain))
        assert ours == pytest.approx(theirs, rel=tolerance, abs=tolerance / 10), name
    assert float((found - without).norm() / without.norm()) < (1e-3 if device == "cpu" else 0.1)


@pytest.mark.parametrize("sizes", [1, 2])
@pytest.mark.parametrize("device", PLACES)
def test_a_replayed_pass_has_the_bits_of_its_plain_one(
    device: str, sizes: int, tmp_path: Path, counted: Counter[str]
) -> None:
    """The first pass of a size is plain, later ones are replayed; other sequences come between them."""
    lm = model(tmp_path, device)
    adapter = lora.attach(lm.model, LoraConfig(r=4, alpha=8), seed=0)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 8)
    masters = Masters(adapter)
    one, other = ([s.ids for s in sequences(5, seed)] for seed in (3, 4))
    passes = graphs.Passes(
        lm, adapter, TrainConfig(), [list(map(len, ids)) for ids in (one, other)] * (1 if sizes == 1 else 30)
    )
    upstream = torch.randn(sum(map(len, one)), 64, generator=torch.Generator().manual_seed(0)).to(lm.weight)
    found = []
    for ids in (one, other, one, other, one):
        masters.flat.grad = None
        with masters.lent(lm.weight.dtype):
            states = passes.final_hidden(lm, ids)
            assert states.shape == (sum(map(len, ids)), 64)
            states.backward(upstream if ids is one else torch.zeros_like(states))
        assert masters.flat.grad is not None
        if ids is one:
            found.append((states.detach().clone(), masters.flat.grad.clone()))
        else:
            assert not masters.flat.grad.any()  # what was copied for the pass before is gone
    assert counted["captured"] == 2 * len(passes.chosen) == 2 * sizes
    for states, gradient in found[1:]:
        assert states.equal(found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-5, atol=1e-6)  # attention adds up in any order
    with masters.lent(lm.weight.dtype), torch.no_grad():
        plain = forward.final_hidden(lm, one)
    limit = 1e-5 if device == "cpu" else 2e-2
    assert float((found[0][0] - plain).norm() / plain.norm()) < limit
    assert passes.close() and not passes.close() and not passes.sizes
    with masters.lent(lm.weight.dtype):
        assert passes.final_hidden(lm, one).equal(plain)


@pytest.mark.parametrize("device", PLACES)
def test_what_follows_the_sequences_reaches_nothing(device: str, tmp_path: Path) -> None:
    """A frame's own last sequence has other tokens and positions; the states before it keep their bits."""
    lm = model(tmp_path, device)
    frame = Frame(128, 8, 64, lm.device)
    ids = [s.ids for s in sequences(2, 5)]
    tokens = sum(map(len, ids))
    frame.fill(ids)
    before = forward.frame_hidden(lm, frame)[:tokens]
    frame.ids[:, tokens:] = 7
    assert forward.frame_hidden(lm, frame)[:tokens].equal(before)
    assert frame.position_ids[0, tokens] == 0 and frame.offsets.tolist()[-3:] == [128, 128, 128]


def test_a_frame_refuses_what_does_not_fit() -> None:
    frame = Frame(64, 2, 40, torch.device("cpu"))
    for ids in ([[1] * 65], [[1] * 41], [[1] * 20, [1] * 20]):
        with pytest.raises(ValueError, match="do not fit"):
            frame.fill(ids)


@pytest.mark.parametrize("seed", range(20))
def test_sizes_take_the_least_time(seed: int) -> None:
    """Against all subsets of the sizes that can be."""
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 64 * random.integers(2, 10), random.integers(1, 30)).tolist()
    possible = sorted({-(-n // 64) * 64 for n in tokens})

    def cost(sizes: Sequence[int]) -> float:
        used = [min(size for size in sizes if size >= n) for n in tokens]
        return sum(used) + graphs.PREPARATION * sum(sizes)

    least = min(cost((*some, possible[-1])) for r in range(len(possible)) for some in combinations(possible[:-1], r))
    found = graphs.chosen_sizes(tokens)
    assert set(found) <= set(possible) and cost(found) == least
    assert graphs.chosen_sizes([]) == []


def test_where_passes_are_not_captured(tmp_path: Path) -> None:
    lm = model(tmp_path, "cpu")
    adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4), seed=0)
    assert not graphs.capturable(lm, adapter, TrainConfig())  # a CPU


@pytest.mark.parametrize("device", PLACES[1:])
def test_a_capture_that_fails_is_said_and_training_goes_on(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, chosen = model(tmp_path, device), sequences(12, 2)
    config = TrainConfig(epochs=6, sequences_per_step=12, warmup_steps=1, learning_rate=0.01)
    plain = forward.frame_hidden

    def waits(*args: Any) -> torch.Tensor:
        states = plain(*args)
        if torch.cuda.is_current_stream_capturing():
            float(states.sum())  # which cannot be captured
        return states

    monkeypatch.setattr(forward, "frame_hidden", waits)
    history, _ = trained(lm, chosen, 0, config)
    assert len(history) == 6 and "goes on without CUDA graphs" in "".join(capsys.readouterr())


def test_memory_that_runs_out_lets_the_graphs_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], counted: Counter[str]
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, chosen = model(tmp_path, device), sequences(12, 2)
    config = TrainConfig(epochs=6, sequences_per_step=12, warmup_steps=1, learning_rate=0.01)
    plain, without = trained(replace(lm, graphs=False), chosen, 0, config)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for a graph")

    monkeypatch.setattr(graphs._Size, "capture", full)
    history, found = trained(lm, chosen, 0, config)
    assert "out of memory at step" in (said := "".join(capsys.readouterr())) and "without CUDA graphs" in said
    assert "token_budget" not in said
    assert [m.loss for m in history] == pytest.approx([m.loss for m in plain], rel=1e-4 if device == "cpu" else 0.05)
    assert float((found - without).norm() / without.norm()) < 0.1


def test_the_loss_of_a_frame_is_that_of_its_sequences(tmp_path: Path, counted: Counter[str]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm, chosen, config = model(tmp_path, device), sequences(5, 6), TrainConfig()
    adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4), seed=0)
    prepared = prepare(lm, adapter, chosen, config, 5)
    passes = graphs.Passes(lm, adapter, config, [[len(s.ids) for s in chosen]])
    plain = prepared_loss(lm, adapter, prepared, config)
    framed = prepared_loss(lm, adapter, prepared, config, passes.final_hidden)
    torch.testing.assert_close(framed.loss, plain.loss, rtol=1e-5 if device == "cpu" else 2e-2, atol=1e-6)
