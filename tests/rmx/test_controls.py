"""Controls of a training against naive formulas on full logits: gradients, right rollouts alone, lengths, curves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import command
from test_pipeline import write_yaml

from rmx.analyses.ablate import Options, ablate
from rmx.analyses.variants import curve_variants
from rmx.config import SelectConfig, TrainConfig
from rmx.models.model import CausalLM
from rmx.records import Interval, Problem, Rollout, Scores, Verdict
from rmx.reports.charts import interval_lines
from rmx.reports.report import new_figure
from rmx.runs.evaluate import lengths
from rmx.runs.pipeline import Run
from rmx.training.loss import sequence_weights
from rmx.training.score import score_rollouts
from rmx.training.select import (
    MOST_SCALE,
    SelectionError,
    gradient_mass,
    gradient_norms,
    matched_scale,
    select_sequences,
)


def texts() -> tuple[list[Rollout], list[Verdict]]:
    """Two problems of four rollouts, half of them right."""
    g = torch.Generator().manual_seed(3)
    found, verdicts = [], []
    for n in range(8):
        ids = torch.randint(3, 21, (12 + n,), generator=g).tolist()
        found.append(Rollout(f"p{n // 4}", n % 4, ids[:2], ids[2:], "stop", ""))
        verdicts.append(Verdict(f"p{n // 4}", n % 4, "right" if n % 2 else "wrong", None))
    return found, verdicts


def scored(lm: CausalLM, rollouts: list[Rollout], top_k: int) -> list[Scores]:
    return [scores for scores, _ in score_rollouts(lm, rollouts, top_k=top_k)]


def naive_norms(lm: CausalLM, rollout: Rollout) -> np.ndarray:
    """Norms of d(-log p(y)) / d logits by automatic differentiation of full logits."""
    P, target = len(rollout.prompt_ids), torch.tensor(rollout.completion_ids)
    with torch.no_grad():
        logits = lm.model(torch.tensor([rollout.ids])).logits[0, P - 1 : -1].double()
    logits.requires_grad_()
    torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    assert logits.grad is not None
    return logits.grad.norm(dim=-1).numpy()


@pytest.mark.parametrize("top_k", [2, 4, 8, 21])
def test_gradient_norms_are_those_of_full_logits(tiny: CausalLM, top_k: int) -> None:
    rollouts = texts()[0]
    for rollout, scores in zip(rollouts, scored(tiny, rollouts, top_k), strict=True):
        exact, found = naive_norms(tiny, rollout), gradient_norms(scores, rollout.completion_ids)
        if top_k == 21:  # the whole vocabulary
            np.testing.assert_allclose(found, exact, rtol=1e-4)
        else:
            assert (found <= exact * (1 + 1e-5)).all()
            assert (found >= exact * (1 - 1 / (8 * (top_k - 1)) - 1e-5)).all()


@pytest.mark.parametrize("gate", ["random", "lowest", "all"])
def test_matched_gates_have_the_tokens_and_the_gradient_of_the_entropy_gate(tiny: CausalLM, gate: str) -> None:
    rollouts, verdicts = texts()
    scores, config = scored(tiny, rollouts, 21), {"budget": 0.3}
    by_entropy, tau = select_sequences(rollouts, verdicts, scores, SelectConfig.model_validate(config))
    given = SelectConfig.model_validate({**config, "gate": gate, "matched_gradient": True})
    matched, same = select_sequences(rollouts, verdicts, scores, given)
    assert same == tau and any(s.decision_tokens for s in by_entropy)
    norms = {(r.problem_id, r.sample): naive_norms(tiny, r) for r in rollouts}
    train = TrainConfig(negative_weight=0.5)
    for wanted, found in zip(by_entropy, matched, strict=True):
        if gate != "all":
            assert len(found.decision_tokens) == len(wanted.decision_tokens)
            assert set(found.decision_tokens) != set(wanted.decision_tokens) or not wanted.decision_tokens
        own = norms[found.problem_id, found.sample]
        pulled = []
        for s in (wanted, found):
            weights = sequence_weights(s, train)[0][len(s.prompt_ids) - 1 :].abs().double().numpy()
            pulled.append(float((weights * own).sum()))
            assert gradient_mass(s, own, 0.5) == pytest.approx(pulled[-1], rel=1e-5)
        assert pulled[1] == pytest.approx(pulled[0], rel=1e-4)


def test_a_scale_has_a_limit_and_nothing_has_none() -> None:
    norms = np.array([0.5, 1.0, 0.0, 1e-9])
    assert matched_scale(norms, [0, 1], [0]) == 1.5
    assert matched_scale(norms, [0], [2]) == matched_scale(norms, [0], [3]) == MOST_SCALE
    assert matched_scale(norms, [], [0]) == 0


def test_right_rollouts_alone(tiny: CausalLM) -> None:
    rollouts, verdicts = texts()
    scores = scored(tiny, rollouts, 8)
    config = SelectConfig(right_only=True, gate="all")
    found, _ = select_sequences(rollouts, verdicts, scores, config)
    assert [(s.problem_id, s.sample) for s in found] == [(p, n) for p in ("p0", "p1") for n in (1, 3)]
    for s in found:
        assert (s.reward, s.advantage, s.scale) == (1, 1, 1)
        ce, kl = sequence_weights(s, TrainConfig(anchor_weight=0))
        P, T = len(s.prompt_ids), len(s.completion_ids)
        expected = [0.0] * (P - 1) + [1 / T] * T  # the mean cross-entropy of the completion
        torch.testing.assert_close(ce, torch.tensor(expected))
        assert not kl.any()
    halves = [Verdict(v.problem_id, v.sample, "wrong", None, score=0.5 * v.reward) for v in verdicts]  # type: ignore[operator]
    with pytest.raises(SelectionError, match="no rollout of the chosen problems has the reward 1"):
        select_sequences(rollouts, halves, scores, config)


def sampled(rows: str) -> tuple[list[Rollout], list[Verdict]]:
    """Of problems p0, p1, ...: a word each, a letter a sample; r right, w wrong, R and W cut, x not judged."""
    rollouts, verdicts = [], []
    for n, word in enumerate(rows.split()):
        for sample, letter in enumerate(word):
            cut = "length" if letter.isupper() else "stop"
            rollouts.append(Rollout(f"p{n}", sample, [1], [5] * (n + sample + 1), cut, ""))  # type: ignore[arg-type]
            outcome = {"r": "right", "w": "wrong", "x": "timeout"}[letter.lower()]
            verdicts.append(Verdict(f"p{n}", sample, outcome, None))  # type: ignore[arg-type]
    return rollouts, verdicts


def test_lengths_by_hand() -> None:
    problems = [Problem(f"p{n}", "", "") for n in range(3)]
    found = lengths(problems, sampled("wwr Wrw Rxr"), [sampled("rwR rww rrW")], draws=100, seed=0)
    # p0: +1, 0 of its first two; p1: -1, 0 of its last two; p2: nothing is left
    assert found.gain is not None and found.gain.mean == pytest.approx((0.5 - 0.5) / 2)
    assert found.kept == 4 / 8
    assert (found.base_truncated, found.tuned_truncated) == pytest.approx((2 / 9, 2 / 9))
    assert found.base_tokens.mean == found.tuned_tokens.mean == pytest.approx((2 + 3 + 4) / 3)
    twice = lengths(problems, sampled("wwr Wrw Rxr"), [sampled("rrR rww rrW"), sampled("www www www")], draws=9, seed=0)
    assert twice.gain is not None
    assert twice.gain.mean == pytest.approx(np.mean([np.mean([1, 1, 0, 0, -1]), np.mean([-1, 0, -1, 0]), -1]))
    assert lengths(problems, sampled("W W W"), [sampled("r r r")], draws=9, seed=0).gain is None


def test_a_curve_pairs_both_gates_at_each_share() -> None:
    found = curve_variants((0.2, 0.01))
    assert list(found) == ["entropy-1", "random-1", "entropy-20", "random-20", "all"]
    assert found["random-1"].against == "entropy-1" and found["entropy-20"].against == "all"
    assert found["random-20"].changes["select"] == {
        "tau": None,
        "quantile": None,
        "budget": 0.2,
        "gate": "random",
    }


@pytest.mark.thorough
def test_a_longer_limit_judges_both_sides_again(finished: Run) -> None:
    run = finished
    before = {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file()}
    result = ablate(run, run.path("ablate"), ["own"], Options(max_new_tokens=7))
    assert all(path.read_bytes() == then for path, then in before.items())
    own = result.outcomes["own"]
    made = run.path("ablate/judged-7")
    assert (result.max_new_tokens, own.tokens_read) == (7, sum(m.tokens for m in run.history()))
    assert (made / "adapter").resolve() == run.path("adapter").resolve()
    for side, interval in (("base", own.lengths.base_tokens), ("tuned", own.lengths.tuned_tokens)):
        rows = [json.loads(line) for line in (made / f"evaluation.{side}.jsonl").read_text().splitlines()[1:]]
        counts = [len(row["completion_ids"]) for row in rows]
        assert interval.mean == pytest.approx(np.mean(counts)) and 4 < max(counts) <= 7
    again = ablate(run, run.path("ablate"), ["own"], Options(max_new_tokens=7))
    assert again == result


@pytest.mark.thorough
def test_the_command_makes_a_curve(finished: Run, tmp_path: Path) -> None:
    run = finished
    path = write_yaml(run.config, tmp_path / "run.yaml")
    only = [word for name in ("entropy-40", "random-40") for word in ("--only", name)]
    done = command("ablate", path, "--curve", "--share", "0.4", *only)
    assert done.returncode == 0, done.stderr
    for words in ("entropy-40", "gradient", "uncut gain"):
        assert words in done.stdout
    outcomes = json.loads(run.path("ablate/curve.json").read_text())["outcomes"]
    assert outcomes["entropy-40"]["decisions"] == outcomes["random-40"]["decisions"]
    assert run.path("ablate/curve.png").read_bytes()[:4] == b"\x89PNG"
    refused = command("ablate", path, "--share", "0.4")
    assert refused.returncode == 1 and "--share: expected only together with --curve" in refused.stderr


def test_the_points_of_a_curve_stand_where_they_are() -> None:
    one, two = Interval(0.1, 0.05, 0.2), Interval(0.3, 0.2, 0.35)
    for ticks in (True, False):
        axes = new_figure(4, 3).subplots()
        colours = {"a": "red", "b": "blue"}
        interval_lines(axes, {"a": [(1, one), (20, two)], "b": [(20, one)]}, colours, ticks)
        lines = [container.lines[0] for container in axes.containers]
        shift = 1.03**0.5 if ticks else 1
        np.testing.assert_allclose(lines[0].get_xdata(), [1 / shift, 20 / shift])
        np.testing.assert_allclose(lines[1].get_xdata(), [20 * shift])
        assert lines[0].get_ydata().tolist() == [0.1, 0.3]
        (ends,) = axes.containers[0].lines[2][0].get_segments()[:1]
        assert ends[:, 1].tolist() == pytest.approx([0.05, 0.2])
        assert not ticks or axes.get_xticks().tolist() == [1, 20]
