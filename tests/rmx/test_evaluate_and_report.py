"""Paired bootstrap, the table's sentence, and a picture that is a picture."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from rmx.grading.metrics import EvaluationError, bootstrap
from rmx.records import Accuracy, Evaluation, Interval, Problem, Rollout, Verdict
from rmx.reports import report
from rmx.runs.evaluate import compare
from rmx.training.train import StepMetrics

PROBLEMS = [Problem(f"p{i}", f"q{i}", "1", "even" if i % 2 == 0 else "odd", "evaluate") for i in range(40)]


def side(rates: dict[str, list[float | None]], length: int) -> tuple[list[Rollout], list[Verdict]]:
    outcome = {1.0: "right", 0.0: "wrong", None: "crash"}
    verdicts = [
        Verdict(p, n, outcome[reward], None)  # type: ignore[arg-type]
        for p, rewards in rates.items()
        for n, reward in enumerate(rewards)
    ]
    reason = "stop" if length < 5 else "length"
    return [Rollout(v.problem_id, v.sample, [1], [1] * length, reason, "") for v in verdicts], verdicts  # type: ignore[arg-type]


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        interval = bootstrap(random.random(60), 400, seed=trial)
        assert interval.low <= interval.mean <= interval.high
        hits += interval.low <= 0.5 <= interval.high
    assert 0.90 < hits / 300 < 0.98


def test_the_gain_is_paired_over_problems() -> None:
    """Every problem gains exactly 0.5, though problems differ widely: a paired interval has no width."""
    base = {p.problem_id: [float(i % 2), 0.0] for i, p in enumerate(PROBLEMS)}
    tuned = {p.problem_id: [float(i % 2), 1.0] for i, p in enumerate(PROBLEMS)}
    result = compare(PROBLEMS, side(base, 4), side(tuned, 5), draws=500, seed=0)
    assert (result.gain.mean, result.gain.low, result.gain.high) == (0.5, 0.5, 0.5)
    assert result.base.pass_at_1.high - result.base.pass_at_1.low > 0.1
    assert (result.problems, result.samples) == (40, 2)
    assert result.categories == {"even": (0.0, 0.5), "odd": (0.5, 1.0)}
    assert [(side.tokens, side.truncated) for side in (result.base, result.tuned)] == [(4, 0), (5, 1)]


def test_unverified_samples_are_counted_and_left_out() -> None:
    base: dict[str, list[float | None]] = {"p0": [1.0, None], "p1": [None, None], "p2": [0.0, 0.0]}
    tuned: dict[str, list[float | None]] = {"p0": [1.0, 1.0], "p1": [1.0, 1.0], "p2": [0.0, 1.0]}
    result = compare(PROBLEMS[:3], side(base, 2), side(tuned, 2), draws=50, seed=0)
    assert (result.problems, result.base.unverified, result.tuned.unverified) == (2, 3, 0)
    assert (result.base.pass_at_1.mean, result.tuned.pass_at_1.mean, result.gain.mean) == (0.5, 0.75, 0.25)


def evaluation(low: float, high: float, problems: int = 30) -> Evaluation:
    one, more = Interval(0.3, 0.2, 0.4), Interval(0.5, 0.4, 0.6)
    base = Accuracy(problems, 4, one, 0.05, {1: one, 2: one, 4: more}, {1: one, 2: one, 4: one}, 9, 0.1, 0.5, 1)
    tuned = Accuracy(problems, 4, more, 0.05, {1: more, 2: more, 4: more}, {1: more, 2: more, 4: more}, 8, 0.2, 0.9, 0)
    return Evaluation(problems, 4, base, tuned, Interval((low + high) / 2, low, high), {"sum": (0.2, 0.6)})


@pytest.mark.parametrize(
    ("low", "high", "words"), [(0.1, 0.2, "is better"), (-0.2, -0.1, "is worse"), (-0.1, 0.2, "No clear difference")]
)
def test_the_sentence_follows_the_interval(low: float, high: float, words: str) -> None:
    assert words in report.verdict(evaluation(low, high))


def test_the_table_has_every_number_and_fits_a_terminal() -> None:
    out = Console(width=80, file=io.StringIO())
    out.print(report.table(evaluation(0.1, 0.2)))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "30 held-out problems x 4 samples" in lines[0]
    rows = {" ".join(line.split()) for line in lines}
    assert {
        "all 0.300 [0.200, 0.400] 0.500 [0.400, 0.600] 0.150 [0.100, 0.200]",
        "sum 0.200 0.600 +0.400",
        "pass@4 0.500 [0.400, 0.600] 0.500 [0.400, 0.600] +0.000",
        "maj@4 0.300 [0.200, 0.400] 0.500 [0.400, 0.600] +0.200",
        "boxed 50.0% 90.0% +40.0 pt",
        "mean tokens 9.0 8.0 -1.0",
        "truncated 10.0% 20.0% +10.0 pt",
        "not verified 1 0",
    } <= rows


def test_one_sample_a_problem_has_no_vote_to_show() -> None:
    base = {p.problem_id: [1.0] for p in PROBLEMS}
    assert report.table(compare(PROBLEMS, side(base, 4), side(base, 5), draws=10, seed=0)).row_count == 6


def test_too_few_problems_are_not_called_a_result() -> None:
    assert "too few" in report.verdict(evaluation(0.1, 0.2, problems=3))
    nothing: dict[str, list[float | None]] = {"p0": [None, None]}
    with pytest.raises(EvaluationError, match="no problem has a judged sample"):
        compare(PROBLEMS, side(nothing, 2), side(nothing, 2), draws=10, seed=0)


@pytest.mark.thorough
def test_the_picture_shows_gate_curves_and_accuracy(tmp_path: Path) -> None:
    history = [StepMetrics(i, 1.0, 1.0, 0.1, None if i == 2 else 0.1, -0.1, 1.0, 1e-4, 10, 0.1) for i in range(1, 6)]
    path = tmp_path / "report.png"
    report.plot(path, np.random.default_rng(0).gamma(1.0, size=500), 1.4, history, evaluation(0.1, 0.2))
    image = np.asarray(Image.open(path).convert("RGB"))
    assert image.shape[1] > 2 * image.shape[0]
    for colour in (report.BASE, report.TUNED, report.GATE):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (image == rgb).all(-1).sum() > 100, colour


def test_legends_and_exponents_lie_on_nothing() -> None:
    """Changes of 1e-6 and long names of tasks: what stood in the way of curves, bars and titles."""
    history = [StepMetrics(i, 1.0, 1.0, 1e-6 * i, 1e-6, -2e-6 * i, 1.0, 1e-4, 10, 0.1) for i in range(1, 30)]
    result = evaluation(0.1, 0.2)
    result.categories.update(dict.fromkeys(("base_conversion", "spell_backward"), (1.0, 1.0)))
    figure = report.new_figure(15, 4.6)
    gate, curves, bars = figure.subplots(1, 3)
    report._plot_gate(gate, np.random.default_rng(0).gamma(1.0, size=500), 1.4)
    report._plot_training(curves, history)
    report._plot_accuracy(bars, result)
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.yaxis.get_offset_text().get_text() == ""
        if (legend := axes.get_legend()) is not None:
            box = legend.get_window_extent()
            assert not box.overlaps(axes.get_window_extent())
            assert not any(box.overlaps(label.get_window_extent()) for label in axes.get_xticklabels())
            assert not box.overlaps(axes.xaxis.label.get_window_extent())
            assert figure.bbox.y0 <= box.y0 and box.x0 >= figure.bbox.x0
    assert sum(axes.get_legend() is not None for axes in figure.axes) == 3
    assert {line.get_color() for line in curves.get_lines()} >= {report.COLOURS["right"], report.COLOURS["wrong"]}
