"""The loss and its gradient against a naive full-logits implementation, however sequences are batched; the loop."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmx.config import LoraConfig, ModelConfig, TrainConfig
from rmx.models import forward, lora
from rmx.models.lora import Adapter
from rmx.models.model import CausalLM, load
from rmx.records import Rollout, TrainingSequence
from rmx.training.loss import BaseSource, batch_loss, sequence_weights
from rmx.training.score import Keep, score_rollouts
from rmx.training.train import TrainingError, learning_rate, step_order, train_adapter

CONFIGS = [
    TrainConfig(anchor="completion", anchor_weight=0.3),
    TrainConfig(anchor="all", anchor_weight=0.2, negative_weight=0.5),
    TrainConfig(anchor_weight=0.0),
]


def sequence(n: int, P: int, T: int, advantage: float, decisions: list[int]) -> TrainingSequence:
    g = torch.Generator().manual_seed(n)
    ids = torch.randint(3, 21, (P + T,), generator=g).tolist()
    return TrainingSequence(f"p{n}", 0, ids[:P], ids[P:], float(advantage > 0), advantage, decisions, [-1.0] * T)


SEQUENCES = [
    sequence(0, 4, 6, 1.2, [0, 2, 5]),
    sequence(1, 7, 3, -0.8, [1]),
    sequence(2, 2, 9, -2.5, [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # everything gated
    sequence(3, 5, 4, 0.7, []),  # nothing gated
    sequence(4, 3, 1, 1.0, [0]),
]


@pytest.fixture
def adapter(tiny: CausalLM) -> Adapter:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4), seed=0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.2, generator=g)
    return adapter


def naive_loss(lm: CausalLM, adapter: Adapter, sequences: list[TrainingSequence], config: TrainConfig) -> Tensor:
    """Section 2 of the method, one sequence at a time, from full float64 log-softmaxes of both models."""
    losses = []
    for s in sequences:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        student = lm.model(ids).logits[0].double().log_softmax(-1)
        with torch.no_grad(), adapter.off():
            base = lm.model(ids).logits[0].double().log_softmax(-1)
        P, L = len(s.prompt_ids), ids.shape[1]
        gate = {P - 1 + t for t in s.decision_tokens}
        first = 0 if config.anchor == "all" else P - 1
        anchors = [p for p in range(first, L - 1) if p not in gate]
        beta = config.negative_weight if s.advantage < 0 else 1.0
        decision = [s.advantage * beta * -student[p, ids[0, p + 1]] for p in sorted(gate)]
        anchor = [(base[p].exp() * (base[p] - student[p])).sum() for p in anchors]
        parts = [sum(part) / len(part) if part else 0.0 for part in (decision, anchor)]
        losses.append(parts[0] + config.anchor_weight * parts[1])
    return torch.as_tensor(sum(losses) / len(losses))


def gradient(adapter: Adapter, losses: list[Tensor]) -> Tensor:
    for parameter in adapter.parameters():
        parameter.grad = None
    for loss in losses:
        loss.backward()
    return torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@pytest.mark.parametrize("config", CONFIGS, ids=["completion", "all", "no-anchor"])
@pytest.mark.parametrize("grouping", [[[0, 1, 2, 3, 4]], [[4], [2], [0], [3], [1]], [[3, 1], [0, 4, 2]]])
def test_loss_and_gradient_equal_the_naive_ones_in_any_batching(
    tiny: CausalLM, adapter: Adapter, config: TrainConfig, grouping: list[list[int]]
) -> None:
    expected = naive_loss(tiny, adapter, SEQUENCES, config)
    expected_gradient = gradient(adapter, [expected])
    losses = [batch_loss(tiny, adapter, [SEQUENCES[i] for i in g], config, len(SEQUENCES))[0].loss for g in grouping]
    torch.testing.assert_close(torch.stack(losses).sum().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(adapter, losses), expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.thorough
def test_the_real_model_agrees_with_the_naive_loss(demo_lm: CausalLM) -> None:
    adapter = lora.attach(demo_lm.model, LoraConfig(r=4, alpha=8), seed=0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.01, generator=g)
    try:
        expected = naive_loss(demo_lm, adapter, SEQUENCES[:3], CONFIGS[1])
        expected_gradient = gradient(adapter, [expected])
        loss = batch_loss(demo_lm, adapter, SEQUENCES[:3], CONFIGS[1], 3)[0].loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
        ours = gradient(adapter, [loss])
        assert (ours - expected_gradient).norm() < 1e-4 * expected_gradient.norm()
    finally:
        lora.detach(demo_lm.model, adapter)


@pytest.mark.thorough
def test_no_tensor_of_tokens_by_vocabulary_is_made(demo_lm: CausalLM) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, Tensor) and tensor.data_ptr() not in weights:
                    largest = max(largest, tensor.numel())
            return out

    adapter = lora.attach(demo_lm.model, LoraConfig(r=4, alpha=8), seed=0)
    weights = {p.untyped_storage().data_ptr() for p in demo_lm.model.parameters()}
    tokens = [sequence(n, 40, 120, 1.0, [3, 9]) for n in range(4)]
    try:
        with Watch():
            batch_loss(demo_lm, adapter, tokens, TrainConfig(), 4)[0].loss.backward()
    finally:
        lora.detach(demo_lm.model, adapter)
    assert largest < 4 * 159 * 49152 / 4


@pytest.mark.thorough
def test_training_moves_log_probs_the_right_way_and_the_metrics_say_so(tiny: CausalLM) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=4, alpha=8), seed=0)
    config = TrainConfig(epochs=12, sequences_per_step=5, learning_rate=0.01, warmup_steps=0, token_budget=20)
    seen = []
    base = batch_loss(tiny, adapter, SEQUENCES, config, 5)
    known = [replace(s, base_logprob=_base_logprob(tiny, adapter, s)) for s in SEQUENCES]
    history = train_adapter(tiny, adapter, known, config, seed=0, on_step=lambda m, total: seen.append((m.step, total)))
    assert seen == [(i + 1, 12) for i in range(12)]
    first, last = history[0], history[-1]
    assert first.loss == pytest.approx(float(base[0].loss.detach()), abs=1e-4)
    assert first.anchor_kl == pytest.approx(0, abs=1e-9)
    assert first.positive_shift == pytest.approx(0, abs=1e-5)
    assert first.negative_shift == pytest.approx(0, abs=1e-5)
    assert last.loss < first.loss
    assert last.positive_shift is not None
    assert last.positive_shift > 0.1
    assert last.negative_shift is not None
    assert last.negative_shift < -0.1
    assert last.anchor_kl > 0
    assert first.tokens == sum(len(s.prompt_ids) + len(s.completion_ids) for s in SEQUENCES)
    again = lora.attach(_fresh(tiny, adapter), LoraConfig(r=4, alpha=8), seed=0)
    train_adapter(tiny, again, known, config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def _fresh(lm: CausalLM, adapter: Adapter) -> torch.nn.Module:
    lora.detach(lm.model, adapter)
    return lm.model


def _base_logprob(lm: CausalLM, adapter: Adapter, s: TrainingSequence) -> list[float]:
    ids = torch.tensor([s.prompt_ids + s.completion_ids])
    with adapter.off():
        log_p = lm.model(ids).logits[0].log_softmax(-1)
    P = len(s.prompt_ids)
    return [float(log_p[P - 1 + t, token].detach()) for t, token in enumerate(s.completion_ids)]


def test_learning_rate_and_order() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(i, 10, config) for i in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rate(0, 1, TrainConfig(learning_rate=1.0, warmup_steps=0)) == 1
    order = step_order(10, TrainConfig(epochs=2.5, sequences_per_step=4), seed=0)
    assert [len(step) for step in order] == [4, 4, 4, 4, 4, 4, 1]
    flat = [i for step in order for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:20]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert order == step_order(10, TrainConfig(epochs=2.5, sequences_per_step=4), seed=0)


def test_a_set_without_decisions_and_a_loss_that_is_not_finite_stop_with_a_reason(
    tiny: CausalLM, adapter: Adapter
) -> None:
    with pytest.raises(TrainingError, match=r"none of the 1 sequences has a decision token: lower select.tau"):
        train_adapter(tiny, adapter, [SEQUENCES[3]], TrainConfig(), seed=0)
    before = [p.detach().clone() for p in adapter.parameters()]
    broken = sequence(9, 3, 4, math.inf, [1])
    with pytest.raises(TrainingError, match=r"not finite at step 1: p9/0"):
        train_adapter(tiny, adapter, [broken], TrainConfig(), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, adapter.parameters(), strict=True))


def kept(lm: CausalLM, sequences: list[TrainingSequence], keep: Keep) -> BaseSource:
    rollouts = [Rollout(s.problem_id, s.sample, s.prompt_ids, s.completion_ids, "stop", "") for s in sequences]
    found = {scores.problem_id: base for scores, base in score_rollouts(lm, rollouts, top_k=0, keep=keep)}
    return lambda s: found[s.problem_id]


@pytest.mark.parametrize("config", CONFIGS, ids=["completion", "all", "no-anchor"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("rows", ["completion", "all"])
def test_kept_base_states_give_the_same_loss_and_gradient(
    tiny: CausalLM, config: TrainConfig, first: int, rows: str
) -> None:
    if (rows, config.anchor) == ("completion", "all") and config.anchor_weight:
        pytest.skip("these rows are not kept then")
    base = kept(tiny, SEQUENCES, Keep(rows, first))  # type: ignore[arg-type]
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4, first_layer=first), seed=0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.2, generator=g)
    expected = naive_loss(tiny, adapter, SEQUENCES, config)
    expected_gradient = gradient(adapter, [expected])
    for source in (base, None):
        loss = batch_loss(tiny, adapter, SEQUENCES, config, len(SEQUENCES), base=source)[0].loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient(adapter, [loss]), expected_gradient, rtol=1e-4, atol=1e-6)


def test_with_kept_states_the_base_is_never_run_and_lower_layers_never_visited(
    tiny: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = kept(tiny, SEQUENCES, Keep("completion", 1))
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4, first_layer=1), seed=0)
    forward.check(tiny, 1)
    visited: list[int] = []
    for number, layer in enumerate(forward.decoder_layers(tiny.model)[1]):
        layer.register_forward_hook(lambda *_, number=number: visited.append(number))
    monkeypatch.setattr(Adapter, "off", lambda _: pytest.fail("a pass of the base"))
    config = TrainConfig(anchor="completion", epochs=2, sequences_per_step=5, token_budget=100)
    train_adapter(tiny, adapter, SEQUENCES, config, 0, base=base)
    assert visited == [1, 1]  # two steps, one pass each


def test_sampled_anchors_are_unbiased_and_do_not_depend_on_the_packing(tiny: CausalLM, adapter: Adapter) -> None:
    config = TrainConfig(anchor="all", anchor_weight=0.3, anchor_fraction=0.4)
    s = sequence(7, 6, 9, 1.0, [1, 4])
    exact = sequence_weights(s, config)
    draws = [sequence_weights(s, config, np.random.default_rng([0, step, 7])) for step in range(4000)]
    counts = {int((kl != 0).sum()) for _, kl in draws}
    assert counts == {math.ceil(0.4 * 12)}
    assert all(torch.equal(ce, exact[0]) for ce, _ in draws)
    mean = torch.stack([kl for _, kl in draws]).mean(0)
    torch.testing.assert_close(mean, exact[1], rtol=0.1, atol=0)
    streams = [[np.random.default_rng([3, 0, i]) for i in range(len(SEQUENCES))] for _ in range(2)]
    whole = batch_loss(tiny, adapter, SEQUENCES, config, 5, draws=streams[0])[0].loss
    alone = [
        batch_loss(tiny, adapter, [q], config, 5, draws=[g])[0].loss for q, g in zip(SEQUENCES, streams[1], strict=True)
    ]
    torch.testing.assert_close(torch.stack(alone).sum(), whole, rtol=1e-5, atol=1e-6)


def test_twenty_steps_follow_the_eager_trajectory(tiny: CausalLM) -> None:
    """AdamW on the naive loss, one sequence at a time with two full log-softmaxes, against train_adapter."""
    config = TrainConfig(epochs=8, sequences_per_step=2, learning_rate=3e-3, warmup_steps=3, anchor="all")
    adapter = lora.attach(tiny.model, LoraConfig(r=4, alpha=8, first_layer=1), seed=0)
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=0.0)
    order = step_order(len(SEQUENCES), config, 0)
    expected = []
    for step, chosen in enumerate(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(order), config)
        loss = naive_loss(tiny, adapter, [SEQUENCES[i] for i in chosen], config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.clip)
        optimizer.step()
        expected.append(float(loss.detach()))
    lora.detach(tiny.model, adapter)
    assert len(expected) == 20
    base = kept(tiny, SEQUENCES, Keep("all", 1))
    again = lora.attach(tiny.model, LoraConfig(r=4, alpha=8, first_layer=1), seed=0)
    history = train_adapter(tiny, again, SEQUENCES, config, 0, base=base)
    assert [m.loss for m in history] == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1


NEGATIVES: list[dict[str, object]] = [
    {"negatives": "ratio", "ratio_clip": 0.3},
    {"negatives": "hinge", "hinge_margin": 0.4},
    {"negative_floor": -3.0},
    {"negative_weight": 0.0},
]


@pytest.mark.parametrize("options", NEGATIVES, ids=str)
@pytest.mark.parametrize("grouping", [[[0, 1, 2, 3, 4]], [[2], [0, 4], [1, 3]]])
def test_bounded_negatives_equal_their_definitions(
    tiny: CausalLM, adapter: Adapter, options: dict[str, object], grouping: list[list[int]]
) -> None:
    """Value and gradient against full float64 log-softmaxes; some rows are on either side of each bound."""
    config = TrainConfig.model_validate({"anchor": "all", "anchor_weight": 0.3, "negative_weight": 0.8, **options})
    known = [replace(s, base_logprob=_base_logprob(tiny, adapter, s)) for s in SEQUENCES]
    terms, bounded, kept_rows = [], 0, 0
    for s in known:
        ids = torch.tensor([s.prompt_ids + s.completion_ids])
        student = tiny.model(ids).logits[0].double().log_softmax(-1)
        with torch.no_grad(), adapter.off():
            base = tiny.model(ids).logits[0].double().log_softmax(-1)
        P, L = len(s.prompt_ids), ids.shape[1]
        decision = []
        for t in s.decision_tokens:
            p = student[P - 1 + t, s.completion_ids[t]]
            since = p - s.base_logprob[t]
            if s.advantage > 0:
                decision.append(-s.advantage * p)
                continue
            if config.negatives == "ratio":
                term, free = torch.maximum(since.exp(), torch.tensor(0.7)), bool(since.exp() > 0.7)
            elif config.negatives == "hinge":
                term, free = torch.relu(since + 0.4), bool(since + 0.4 > 0)
            else:
                free = config.negative_floor is None or bool(p >= -3.0)
                term = p if free else 0 * p
            decision.append(-s.advantage * config.negative_weight * term)
            bounded, kept_rows = bounded + (not free), kept_rows + free
        anchors = [q for q in range(L - 1) if q - P + 1 not in s.decision_tokens]
        kl = [(base[q].exp() * (base[q] - student[q])).sum() for q in anchors]
        parts = [sum(part) / len(part) if part else 0.0 for part in (decision, kl)]
        terms.append(parts[0] + 0.3 * parts[1])
    assert kept_rows
    assert bounded or "negative_weight" in options
    expected = torch.as_tensor(sum(terms) / len(terms))
    expected_gradient = gradient(adapter, [expected])
    losses = [batch_loss(tiny, adapter, [known[i] for i in g], config, len(known))[0].loss for g in grouping]
    torch.testing.assert_close(torch.stack(losses).sum().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient(adapter, losses), expected_gradient, rtol=1e-4, atol=1e-6)


def test_training_ends_early_when_right_decisions_sink(tiny: CausalLM, capsys: pytest.CaptureFixture[str]) -> None:
    """Two sequences that differ in their last token only, and a reward against the one that weighs more."""
    right, wrong = sequence(0, 4, 3, 0.01, [2]), sequence(0, 4, 3, -1.0, [2])
    wrong = replace(wrong, problem_id="q")
    config = TrainConfig(epochs=30, sequences_per_step=2, learning_rate=0.01, warmup_steps=0, early_stop_steps=3)
    untouched = lora.attach(tiny.model, LoraConfig(r=4, alpha=8), seed=0)
    known = [replace(s, base_logprob=_base_logprob(tiny, untouched, s)) for s in (right, wrong)]
    history = train_adapter(tiny, untouched, known, config, seed=0)
    assert 3 <= len(history) < 30
    shifts = [m.positive_shift or 0.0 for m in history]
    assert sum(shifts[-3:]) < 0
    assert all(sum(shifts[i : i + 3]) >= 0 for i in range(len(shifts) - 3))
    assert f"stops early after step {len(history)}" in capsys.readouterr().err


class Operations(TorchDispatchMode):
    """Counts what is computed: about a kernel each on a GPU. Views and what reads no tensor are none."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"):
            self.seen[name] += 1
        return out


def test_operations_of_a_step(tmp_path: Path) -> None:
    """What a step does outside its layers, and in each layer without the compiler: so many operations, no more."""
    counts = {}
    for layers in (2, 4):
        path = save_tiny_model(tmp_path / str(layers), num_hidden_layers=layers, dtype="bfloat16")
        lm = load(ModelConfig(name=str(path), dtype="bfloat16", device="cpu"))
        adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4), seed=0)
        base = kept(lm, SEQUENCES, Keep("all", 0))
        forward.check(lm, 0)
        config = TrainConfig(epochs=2, sequences_per_step=5)
        marks: list[Counter[str]] = []
        with Operations() as operations:

            def mark(*_: object, marks: list[Counter[str]] = marks, seen: Counter[str] = operations.seen) -> None:
                marks.append(seen.copy())

            train_adapter(lm, adapter, SEQUENCES, config, 0, base=base, on_step=mark)
        counts[layers] = marks[1] - marks[0]  # the second step: the first makes the optimiser's state
    a_layer = (counts[4].total() - counts[2].total()) // 2
    others = counts[2].total() - 2 * a_layer
    assert counts[4]["_fused_adamw_"] == 1
    assert counts[4]["_local_scalar_dense"] <= 2  # the device is waited for in none of them: they read the host's rows
    assert counts[4]["select_backward"] == 0
    assert a_layer <= 165
    assert others <= 80
