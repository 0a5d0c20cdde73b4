"""Shares covered against sets and loops in plain Python; what must hold of them; the command on a finished run."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import command
from test_pipeline import write_yaml

from rmx.analyses.coverage import DRAWS, KEYS, Coverage, Curve, cover
from rmx.config import Config
from rmx.errors import AnalysisError
from rmx.records import Interval, Rollout, Scores
from rmx.runs.pipeline import Run

TAU = 1.0
Text = tuple[list[Rollout], list[Scores]]


def sample(problems: int = 15, samples: int = 4, seed: int = 0, words: int = 6) -> Text:
    """Random text and scores; some problems have more rollouts than others, and some completions are empty."""
    draw, rollouts, scores = random.Random(seed), [], []
    for p in range(problems):
        for n in range(samples + p % 3):
            T = draw.randrange(9)
            prompt = [draw.randrange(words) for _ in range(1 + p % 3)]
            rollouts.append(Rollout(f"p{p}", n, prompt, [draw.randrange(words) for _ in range(T)], "stop", ""))
            best = torch.tensor([draw.sample(range(words), 5) for _ in range(T)], dtype=torch.int32).reshape(T, 5)
            entropy = torch.tensor([draw.random() * 2 for _ in range(T)])
            scores.append(Scores(f"p{p}", n, entropy, entropy, entropy, best, best.float()))
    return rollouts, scores


def kind(name: str, rollout: Rollout, scores: Scores, t: int) -> object:
    first, second = scores.topk_ids[t, :2].tolist()
    before = [None, None, *rollout.prompt_ids, *rollout.completion_ids[:t]]
    return {
        "context": (before[-2], before[-1], first),
        "candidates": frozenset((first, second)),
        "token": first,
    }[name]


def points(text: Text, name: str, which: list[int]) -> list[object]:
    """Keys of the decision points in these rollouts."""
    rollouts, scores = text
    return [
        kind(name, rollouts[i], scores[i], t)
        for i in which
        for t in range(len(rollouts[i].completion_ids))
        if scores[i].entropy[t] > TAU
    ]


def covered(text: Text, name: str, small: list[int], rest: list[int]) -> tuple[float, float]:
    known, asked = set(points(text, name, small)), points(text, name, rest)
    kinds = set(asked)
    return sum(key in known for key in asked) / len(asked), len(kinds & known) / len(kinds)


def curve(result: Coverage, draw: str, key: str, control: bool = False) -> Curve:
    return next(c for c in result.curves if (c.draw, c.key, c.control) == (draw, key, control))


def summary(values: list[float]) -> Interval:
    return Interval(float(np.mean(values)), *(float(x) for x in np.quantile(values, [0.025, 0.975])))


def near(a: Interval, b: Interval) -> bool:
    return [a.mean, a.low, a.high] == pytest.approx([b.mean, b.low, b.high])


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("key", KEYS)
def test_shares_are_those_of_sets_and_loops(draw: str, key: str) -> None:
    text = rollouts, _ = sample()
    result = cover(*text, TAU, draws=7, seed=3)
    unit = [r.problem_id for r in rollouts] if draw == "problems" else list(range(len(rollouts)))
    names = sorted(set(unit))  # type: ignore[type-var]
    found = curve(result, draw, key).shares
    sizes = [n for n in (25, 50) if n < len(rollouts)]
    assert [s.units for s in found] == [n * len(names) // len(rollouts) for n in sizes]
    assert [s.rollouts for s in found] == [s.units * len(rollouts) / len(names) for s in found]
    for share in found:
        shuffler, of_points, of_keys = np.random.default_rng(3), [], []
        for _ in range(7):
            place = shuffler.permutation(len(names))
            first = {names[i] for i in range(len(names)) if place[i] < share.units}
            small = [i for i in range(len(rollouts)) if unit[i] in first]
            rest = [i for i in range(len(rollouts)) if unit[i] not in first]
            if draw == "problems":
                assert not {rollouts[i].problem_id for i in small} & {rollouts[i].problem_id for i in rest}
            a, b = covered(text, key, small, rest)
            of_points.append(a)
            of_keys.append(b)
        assert near(share.points, summary(of_points))
        assert near(share.keys, summary(of_keys))


def test_counts_and_control() -> None:
    text = rollouts, scores = sample()
    result = cover(*text, TAU, draws=3)
    everything = list(range(len(rollouts)))
    entropy = torch.cat([s.entropy for s in scores])
    assert (result.rollouts, result.problems, result.tokens) == (len(rollouts), 15, entropy.numel())
    assert result.decisions == int((entropy > TAU).sum())
    assert result.distinct == {key: len(set(points(text, key, everything))) for key in KEYS}
    assert result.control == min(result.decisions, result.tokens - result.decisions)
    assert sum(c.control for c in result.curves) == len(DRAWS) * len(KEYS)
    # With a gate that leaves fewer positions below it than above, the control is all of those: cover() of them alone.
    low = cover(*text, 0.5, draws=3)
    assert low.control == int((entropy <= 0.5).sum()) < low.decisions
    turned = [Scores(s.problem_id, s.sample, -s.entropy, s.logprob, s.lse, s.topk_ids, s.topk_logprobs) for s in scores]
    flipped = cover(rollouts, turned, float(np.nextafter(np.float32(-0.5), np.float32(-1))), draws=3)
    assert flipped.decisions == low.control
    for draw in DRAWS:
        for key in KEYS:
            assert curve(low, draw, key, control=True).shares == curve(flipped, draw, key).shares


def test_a_gate_below_every_entropy_leaves_no_control() -> None:
    result = cover(*sample(), -1.0, draws=3)
    assert result.control == 0 and not any(c.control for c in result.curves)
    assert result.decisions == result.tokens


def test_draws_are_those_of_the_seed() -> None:
    text = sample()
    assert cover(*text, TAU, draws=5, seed=1) == cover(*text, TAU, draws=5, seed=1)
    assert cover(*text, TAU, draws=5, seed=1).curves != cover(*text, TAU, draws=5, seed=2).curves


def test_more_rollouts_cover_more_on_average() -> None:
    result = cover(*sample(problems=60, words=12), TAU, draws=100)
    for c in result.curves:
        means = [share.points.mean for share in c.shares]
        assert len(means) == 4 and means == sorted(means) and means[0] < means[-1]


def test_decisions_that_no_two_problems_share_are_covered_by_rollouts_of_the_same_problem_alone() -> None:
    rollouts, scores = sample()
    apart = [
        Scores(s.problem_id, s.sample, s.entropy, s.logprob, s.lse, s.topk_ids + 10 * n, s.topk_logprobs)
        for s in scores
        for n in [int(s.problem_id[1:])]
    ]
    result = cover(rollouts, apart, TAU, trained={("p0", 0), ("p1", 0)}, draws=20)
    assert result.training is not None
    for key in KEYS:
        assert all(s.points == s.keys == Interval(0, 0, 0) for s in curve(result, "problems", key).shares)
        assert all(s.points.mean > 0 for s in curve(result, "rollouts", key).shares)
        assert result.training.decisions[key] == (0, 0)


def test_a_set_with_the_same_texts_covers_all() -> None:
    (one,), (score,) = sample(problems=1, samples=1, seed=1)
    assert (score.entropy > TAU).any() and (score.entropy <= TAU).any()
    # 40 problems of the same text
    rollouts = [Rollout(f"p{p}", 0, one.prompt_ids, one.completion_ids, "stop", "") for p in range(40)]
    result = cover(rollouts, [score] * 40, TAU, trained={("p3", 0)}, draws=4)
    for c in result.curves:
        if not c.control:
            assert [(s.points, s.keys) for s in c.shares] == [(Interval(1, 1, 1), Interval(1, 1, 1))]
    assert result.training is not None
    assert result.training.decisions == dict.fromkeys(KEYS, (1.0, 1.0))


def test_the_training_set_covers_rollouts_of_other_problems() -> None:
    text = rollouts, _ = sample()
    small = [i for i, r in enumerate(rollouts) if r.problem_id in ("p1", "p4") and r.sample < 3]
    rest = [i for i, r in enumerate(rollouts) if r.problem_id not in ("p1", "p4")]
    training = cover(*text, TAU, trained=[(rollouts[i].problem_id, rollouts[i].sample) for i in small]).training
    assert training is not None
    assert (training.rollouts, training.problems, training.other_rollouts) == (6, 2, len(rest))
    for key in KEYS:
        assert training.decisions[key] == pytest.approx(covered(text, key, small, rest))
    assert set(training.control) == set(KEYS)
    everything = {(r.problem_id, r.sample) for r in rollouts}
    assert cover(*text, TAU, trained=everything).training is None  # no other problem
    assert cover(*text, TAU).training is None


def test_draws_whose_rest_has_no_decision_points_are_left_out() -> None:
    rollouts, scores = sample(problems=30, samples=1)
    at = next(i for i, s in enumerate(scores) if len(s.entropy) > 2)
    for i, s in enumerate(scores):
        s.entropy.fill_(2.0 if i == at else 0.0)
    found = curve(cover(rollouts, scores, TAU, draws=100), "rollouts", "token").shares
    assert all(s.points == Interval(0, 0, 0) for s in found)  # where it is in the rest, nothing is known of it


def test_what_has_no_answer_is_refused() -> None:
    rollouts, scores = sample()
    entropy = max(float(s.entropy.max()) for s in scores if len(s.entropy))
    with pytest.raises(
        AnalysisError, match=rf"tau=9: no decision points: the largest entropy .* is {entropy:.3f} nats"
    ):
        cover(rollouts, scores, 9.0)
    with pytest.raises(AnalysisError, match="expected at least 2 problems, got 1"):
        cover(*sample(problems=1, samples=30), TAU)
    with pytest.raises(AnalysisError, match="expected more than 25, got 3"):
        cover(*sample(problems=2, samples=1), TAU)
    with pytest.raises(AnalysisError, match="draws: expected at least 1, got 0"):
        cover(rollouts, scores, TAU, draws=0)


@pytest.mark.thorough
def test_the_command_writes_table_json_and_picture(tiny_config: Config, tmp_path: Path) -> None:
    run, config = Run(tiny_config), write_yaml(tiny_config, tmp_path / "run.yaml")
    early = command("coverage", config)
    assert (early.returncode, early.stdout) == (1, "")
    assert "run `rmx problems` first" in early.stderr
    for stage in ("problems", "rollouts"):
        run.execute(stage)
    early = command("coverage", config)  # the gate is a budget, which select will turn into tau
    assert early.returncode == 1 and "tau: not known before the select stage" in early.stderr
    assert command("coverage", config, "--tau", 0.5, "--out", tmp_path / "early").returncode == 0
    assert json.loads((tmp_path / "early/coverage.json").read_text())["training"] is None
    run.run()
    done = command("coverage", config, "--draws", 20)
    assert done.returncode == 0, done.stderr
    for words in (*KEYS, "problems at random", "control", "distinct keys", "training set"):
        assert words in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = json.loads(run.path("coverage/coverage.json").read_text())
    assert (found["tau"], found["draws"], found["seed"]) == (run.tau(), 20, tiny_config.seed)
    assert (found["rollouts"], found["problems"], found["prompt"]) == (240, 20, run.meta()["prompt"])
    assert found["training"]["rollouts"] == len(run.training_set())
    assert [share["units"] for share in found["curves"][0]["shares"]] == [25, 50, 100, 200]
    assert run.path("coverage/coverage.png").read_bytes()[:4] == b"\x89PNG"
