"""pass@k and majority votes against every subset, the standard error against numpy, boxes, and what is left out."""

import dataclasses
import itertools
import json
from math import comb

import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmx.grading.metrics import (
    EvaluationError,
    accuracy,
    bootstrap,
    has_box,
    majority,
    pass_at_k,
    pass_rates,
    share_of_gap,
)
from rmx.records import Accuracy, Interval, Problem, Rollout, Verdict

PROBLEMS = [Problem(f"p{i}", "q", "1") for i in range(6)]


def judged(answers: dict[str, list[str | None]]) -> tuple[list[Rollout], list[Verdict]]:
    """Samples of each problem: "1" is right, None has no answer, "timeout" no verdict."""
    outcome = {"1": "right", None: "no_answer", "timeout": "timeout"}
    verdicts = [
        Verdict(p, n, outcome.get(a, "wrong"), None if a == "timeout" else a)  # type: ignore[arg-type]
        for p, own in answers.items()
        for n, a in enumerate(own)
    ]
    return [Rollout(v.problem_id, v.sample, [1], [1, 2], "stop", "") for v in verdicts], verdicts


def measured(answers: dict[str, list[str | None]]) -> Accuracy:
    return accuracy(PROBLEMS, *judged(answers), draws=50, seed=0)


def by_enumeration(ballots: list[str | None], k: int) -> float:
    """Of all subsets of k: the share of tied winners that are "1"; a subset in which nobody votes is wrong."""
    chances = []
    for subset in itertools.combinations(ballots, k):
        votes = {answer: subset.count(answer) for answer in subset if answer is not None}
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        chances.append(winners.count("1") / len(winners) if winners else 0.0)
    return float(np.mean(chances))


@given(st.lists(st.sampled_from(["1", "2", "3", "4", None]), min_size=1, max_size=8))
def test_votes_are_those_of_every_subset(ballots: list[str | None]) -> None:
    wrong = [ballots.count(answer) for answer in ("2", "3", "4")]
    sizes = range(1, len(ballots) + 1)
    found = majority(ballots.count("1"), wrong, ballots.count(None), sizes)
    assert found == pytest.approx([by_enumeration(ballots, k) for k in sizes])


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(case: tuple[int, int, int]) -> None:
    n, right, k = case
    subsets = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(np.mean([any(s) for s in subsets]))
    assert pass_at_k(n, right, k) == pytest.approx(1 - comb(n - right, k) / comb(n, k))


def test_pass_at_k_refuses_more_than_there_is() -> None:
    with pytest.raises(ValueError, match=r"k: expected 1 \.\. 4 samples, got 5"):
        pass_at_k(4, 1, 5)


def test_many_samples_stay_exact() -> None:
    """Of 3000 samples there are more subsets than a float can count."""
    assert majority(2, [2, 1], 2995, [1, 3000]) == [2 / 3000, 0.5]
    assert pass_at_k(3000, 2, 1500) == pytest.approx(1 - 1499 / 2999 / 2)


def test_one_model_in_numbers() -> None:
    answers: dict[str, list[str | None]] = {
        "p0": ["1", "1", "2", "3", "1", None],
        "p1": ["2", "2.0", "$2$", "1", "1", "4"],  # one wrong answer, spelled in three ways
        "p2": ["3", "4", "5", "6", "7", "8"],
    }
    result = measured(answers)
    rates = np.array([3 / 6, 2 / 6, 0])
    assert (result.problems, result.samples, result.unverified) == (3, 6, 0)
    assert result.pass_at_1.mean == pytest.approx(rates.mean())
    assert result.standard_error == pytest.approx(rates.std(ddof=1) / np.sqrt(3))
    assert list(result.pass_at_k) == list(result.maj_at_k) == [1, 2, 4, 6]
    assert result.pass_at_k[1] == result.pass_at_1
    assert result.maj_at_k[1].mean == pytest.approx(result.pass_at_1.mean)
    assert result.pass_at_k[6].mean == pytest.approx(2 / 3)
    assert result.maj_at_k[6].mean == pytest.approx(1 / 3)
    grouped = [by_enumeration(own, 4) for own in (answers["p0"], ["2", "2", "2", "1", "1", "4"], answers["p2"])]
    assert result.maj_at_k[4].mean == pytest.approx(np.mean(grouped))
    assert result.pass_at_k[4].low <= result.pass_at_k[4].mean <= result.pass_at_k[4].high


def test_wrong_answers_that_look_alike_are_one() -> None:
    same = ["\\dfrac{1}{2}", "\\frac{1}{2}", "$\\frac 1 2$".replace(" 1 2", "{1} {2}"), "\\left( \\frac{1}{2} \\right)"]
    result = measured({"p0": ["1", "1", *same[:3]], "p1": ["1", "1", "1,234", "1234.00", "1 234"]})
    assert result.maj_at_k[5].mean == 0.0
    assert measured({"p0": ["1", "1", "1,23", "123", "-123"]}).maj_at_k[5].mean == 1.0


def test_one_sample_of_one_problem() -> None:
    result = measured({"p0": ["1"]})
    assert result.pass_at_k == result.maj_at_k == {1: result.pass_at_1}
    assert (result.pass_at_1.mean, result.samples, result.standard_error) == (1.0, 1, None)


def test_what_has_no_verdict_is_left_out_and_counted() -> None:
    """p1 has too few judged samples for k = 4, and votes with the three that it has; p2 has none."""
    answers: dict[str, list[str | None]] = {
        "p0": ["2", "2", "2", "1"],
        "p1": ["1", "1", "1", "timeout"],
        "p2": ["timeout"] * 4,
    }
    result = measured(answers)
    assert (result.problems, result.unverified) == (2, 5)
    assert result.pass_at_1.mean == pytest.approx((1 / 4 + 1) / 2)
    assert result.pass_at_k[4].mean == 1.0
    assert result.pass_at_k[2].mean == pytest.approx((1 / 2 + 1) / 2)
    assert result.maj_at_k[4].mean == 0.5
    assert list(measured({"p0": ["1", "1", "timeout"]}).pass_at_k) == [1, 2]  # no problem has three
    assert pass_rates(PROBLEMS, judged(answers)[1]) == {"p0": 0.25, "p1": 1.0}
    with pytest.raises(EvaluationError, match=r"no problem has a judged sample; raise verify.timeout_s"):
        measured({"p0": ["timeout"]})


def test_lengths_and_boxes_are_of_all_samples() -> None:
    rollouts = [
        Rollout("p0", 0, [1], [1] * 3, "stop", "so \\boxed{\\frac{1}{2}}."),
        Rollout("p0", 1, [1], [1] * 9, "length", "so \\boxed{\\frac{1}{2}"),
    ]
    verdicts = [Verdict("p0", 0, "right", "1"), Verdict("p0", 1, "crash", None)]
    result = accuracy(PROBLEMS, rollouts, verdicts, draws=10, seed=0)
    assert (result.tokens, result.truncated, result.boxed, result.unverified) == (6.0, 0.5, 0.5, 1)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{7}", True),
        ("\\boxed {x_{1}} and more {", True),
        ("{ \\boxed{7}", True),
        ("\\boxed{\\{1, 2\\}}", True),
        ("\\boxed{1} then \\boxed{2", True),
        ("\\boxed{}", False),
        ("\\boxed{7", False),
        ("\\boxed{\\{7}\\", True),
        ("\\boxed{\\{7\\}", False),
        ("boxed{7}", False),
        ("the answer is 7", False),
    ],
)
def test_a_box_is_one_that_is_closed(text: str, boxed: bool) -> None:
    assert has_box(text) is boxed


def test_a_record_survives_json() -> None:
    result = measured({"p0": ["1", "2", "1"], "p1": ["1", "timeout", None]})
    text = json.dumps(dataclasses.asdict(result))
    assert pydantic.TypeAdapter(Accuracy).validate_json(text) == result


def test_a_share_of_a_gap_has_an_interval_where_the_gap_has_a_sign() -> None:
    random = np.random.default_rng(0)
    gap = random.choice([0.0, 1 / 3, 2 / 3, 1.0, -1 / 3], 200)
    gain = 0.6 * gap + random.normal(0, 0.1, 200)
    share, plain = share_of_gap(gain, gap, 4000, 0), bootstrap(gain, 4000, 0, per=gap)
    assert share is not None
    for end in ("mean", "low", "high"):  # far from zero it is the interval of the ratio
        assert getattr(share, end) == pytest.approx(getattr(plain, end), abs=2e-3)
    flipped = share_of_gap(gain, -gap, 4000, 0)
    assert (
        flipped is not None and flipped.low == pytest.approx(-share.high) and flipped.high == pytest.approx(-share.low)
    )
    assert share_of_gap(gap, gap, 4000, 0) == Interval(1.0, pytest.approx(1.0), pytest.approx(1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(30))
def test_a_share_of_a_barely_clear_gap_stays_a_number(seed: int) -> None:
    """Where some resamples of the gap are zero or negative, the ratio's own quantiles are NaN or wrong."""
    random = np.random.default_rng(seed)
    gap = random.choice([-1.0, 0.0, 0.0, 0.0, 1.0, 1.0], 40)
    gain = gap * random.choice([0.0, 1.0], 40)
    share, known = share_of_gap(gain, gap, 1000, 0), bootstrap(gap, 1000, 0)
    assert (share is None) == (known.low <= 0 <= known.high)
    if share is not None:
        assert np.isfinite([share.low, share.high]).all() and share.low <= share.mean <= share.high


@pytest.mark.thorough
def test_the_interval_of_a_share_covers_it() -> None:
    """Of 200 samples of problems with a true share of one half, about 95 % of the intervals hold it."""
    random, hits, seen = np.random.default_rng(1), 0, 0
    for seed in range(200):
        gap = random.choice([-1.0, 0.0, 0.0, 1.0, 1.0], 150)
        gain = np.where(random.random(150) < 0.5, gap, 0.0)
        if (share := share_of_gap(gain, gap, 400, seed)) is not None:
            seen += 1
            hits += share.low <= 0.5 <= share.high
    assert seen > 150 and 0.89 < hits / seen < 0.99
