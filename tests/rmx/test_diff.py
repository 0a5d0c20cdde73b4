"""Two runs side by side: paired intervals counted by hand, what is missing, what is wrong, and a safe page."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_html import Reader
from typer.testing import CliRunner

from rmx.artefacts import read_records, write_records
from rmx.cli import app
from rmx.config import Config
from rmx.errors import RmxError
from rmx.grading.metrics import EvaluationError, bootstrap, of_each, pass_rates
from rmx.records import Problem, Rollout, StepMetrics, Verdict
from rmx.reports import difference
from rmx.runs.diff import compare, open_side
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES


@pytest.fixture
def other(finished: Run, tmp_path: Path) -> Run:
    """A copy with another learning rate on record, whose first ten tuned completions end with 7."""
    shutil.copytree(finished.dir, tmp_path / "other")
    run = Run(finished.config.model_copy(update={"run_dir": str(tmp_path / "other")}))
    stages = run.stages()
    stages["train"]["settings"]["train"]["learning_rate"] = 0.5
    run.path("stages.json").write_text(json.dumps(stages))
    meta, found = read_records(run.path("evaluation.tuned.jsonl"), Rollout)
    changed = [replace(r, text="Answer: 7") if n < 10 else r for n, r in enumerate(found)]
    write_records(run.path("evaluation.tuned.jsonl"), changed, meta)
    return run


def drop(run: Run, *stages: str) -> None:
    """As if they had never run."""
    kept = {name: record for name, record in run.stages().items() if name not in stages}
    run.path("stages.json").write_text(json.dumps(kept))


def of(found: difference.Difference, metric: str) -> difference.Row:
    return next(row for row in found.metrics if row.metric == metric)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["diff", *map(str, arguments)])


def test_metrics_are_paired_by_problem(finished: Run, other: Run) -> None:
    found = compare(finished, other)
    problems = finished.problems("evaluate")
    rates = [pass_rates(problems, run.evaluated("tuned")[1]) for run in (finished, other)]
    changes = np.array([rates[1][p.problem_id] - rates[0][p.problem_id] for p in problems])
    assert np.abs(changes).max() > 0
    expected = bootstrap(changes, finished.config.evaluate.bootstrap, finished.config.seed)
    row = of(found, "tuned pass@1")
    assert row.change == expected and row.problems == len(problems)
    assert row.first.mean == pytest.approx(finished.evaluation().tuned.pass_at_1.mean)
    assert of(found, "gain").change == expected  # the bases are the same,
    base = of(found, "base pass@1").change
    assert (base.mean, base.low, base.high) == (0, 0, 0)  # and a paired interval of no difference has no width
    assert {row.metric for row in found.metrics} >= {"tuned pass@2", "tuned maj@2", "tokens"}
    assert found.notes == []


def test_values_of_each_problem() -> None:
    verdicts = [Verdict("p", n, o, "5") for n, o in enumerate(("right", "wrong", "wrong", "crash"))]  # type: ignore[arg-type]
    rollouts = [Rollout("p", n, [1], [1] * (n + 1), "length" if n else "stop", "\\boxed{5}") for n in range(4)]
    found = of_each(rollouts, [*verdicts, Verdict("q", 0, "timeout", None)])
    assert {metric: own["p"] for metric, own in found.items()} == {
        "pass@1": pytest.approx(1 / 3),
        "pass@2": pytest.approx(2 / 3),  # of the pairs of three judged samples, two have the right one
        "maj@2": pytest.approx(1 / 3),  # a tie in those two pairs
        "tokens": 2.5,
        "truncated": 0.75,
        "boxed": 1.0,
    }
    assert all("q" not in own for own in found.values())


def test_settings_that_differ_by_key(finished: Run, other: Run) -> None:
    assert compare(finished, other).settings == [("train.learning_rate", 0.01, 0.5)]
    stages = other.stages()
    stages["problems"]["settings"]["problems"]["sources"][0]["split"] = "train"
    other.path("stages.json").write_text(json.dumps(stages))
    assert ("problems.sources.0.split", "both", "train") in compare(finished, other).settings


def test_only_common_problems_count(finished: Run, other: Run) -> None:
    meta, problems = read_records(other.path("problems.jsonl"), Problem)
    held_out = [p for p in problems if p.split == "evaluate"]
    gone = {p.problem_id for p in held_out[:5]}
    changed = [replace(p, question=f"another {p.question}") if p.problem_id in gone else p for p in problems]
    changed = [replace(p, answer="77") if p.problem_id == held_out[5].problem_id else p for p in changed]
    spaced = held_out[6].problem_id
    changed = [replace(p, question=f"  {p.question}") if p.problem_id == spaced else p for p in changed]
    write_records(other.path("problems.jsonl"), changed, meta)
    found = compare(finished, other)
    assert of(found, "tuned pass@1").problems == len(held_out) - 6
    (note,) = found.notes
    assert note.startswith("The held-out problems differ: 14 are in both, of the judged 20 of run and 20 of other")

    strangers = [replace(p, question=f"strange {p.question}") for p in problems]
    write_records(other.path("problems.jsonl"), strangers, meta)
    with pytest.raises(EvaluationError, match=r"no held-out problem was judged in both runs \(20 of run and 20 of oth"):
        compare(finished, other)


@pytest.mark.parametrize("kept", range(1, len(STAGES)))
def test_a_run_that_is_not_finished(kept: int, finished: Run, other: Run, tmp_path: Path) -> None:
    """Compared in what it has, given by its directory; the page says what is missing."""
    missing = list(STAGES)[kept:]
    drop(other, *missing)
    first, second = open_side(finished.dir), open_side(other.dir)
    found = compare(first, second)
    assert found.notes == [f"other: not done: {', '.join(missing)}."]
    assert bool(found.metrics) == (kept >= 8) and bool(found.second.history) == (kept >= 6)
    assert (found.second.gate is not None) == (kept >= 5)
    assert [cost.stage for cost in found.second.costs] == list(STAGES)[:kept]
    difference.write_html(tmp_path / "page.html", found)
    text = Reader((tmp_path / "page.html").read_text()).text
    assert found.notes[0] in text and ("no accuracy to compare" in text) == (kept < 8)
    assert len(difference.tables(found)) >= 1


def test_the_command_prints_and_writes_one_page(finished: Run, other: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(finished.config.model_dump(mode="json")))
    before = {path: path.read_bytes() for path in other.dir.rglob("*") if path.is_file()}
    done = command(config, other.dir, "-o", tmp_path / "new" / "diff.html")
    assert done.exit_code == 0, done.output
    for said in ("train.learning_rate", "tuned pass@1", "20 held-out problems", "gated share", "other against run"):
        assert said in done.output
    assert {path: path.read_bytes() for path in other.dir.rglob("*") if path.is_file()} == before
    page = Reader((tmp_path / "new" / "diff.html").read_text())
    assert {a["id"] for tag, a in page.elements if tag == "section"} == {"settings", "accuracy", "training", "cost"}
    assert not any("src" in a for _, a in page.elements)
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    lines = [a["class"] for tag, a in page.elements if tag == "path"]
    assert {"first", "first faint", "second", "second faint"} <= set(lines)  # both curves, in each chart
    assert str(tmp_path) not in page.text  # it can be mailed


def test_both_curves_lie_in_one_chart_of_their_own_steps(finished: Run, other: Run, tmp_path: Path) -> None:
    whole = other.path("metrics.jsonl").read_text().splitlines(keepends=True)
    other.path("metrics.jsonl").write_text("".join(whole[:2]))
    found = compare(finished, other)
    difference.write_html(tmp_path / "page.html", found)
    paths = [a for tag, a in Reader((tmp_path / "page.html").read_text()).elements if tag == "path"]
    long, short = (next(a["d"] for a in paths if a["class"] == name) for name in ("first", "second"))
    assert long.count("L") == len(whole) - 1 and short.count("L") == 1
    assert float(short.rpartition("L")[2].split()[0]) == pytest.approx(1000 / (len(whole) - 1), abs=1)


def test_a_page_is_safe_against_names_and_settings(finished: Run, other: Run, tmp_path: Path) -> None:
    found = compare(finished, other)
    evil = "<script>alert(1)</script>\x1b[2J'\""
    address = "https://user@secret.example/v1"
    found = replace(
        found,
        second=replace(found.second, name=evil),
        settings=[("a", evil, "/home/me/x"), ("b", address, None)],
        notes=[evil],
    )
    difference.write_html(tmp_path / "page.html", found)
    text = (tmp_path / "page.html").read_text()
    Reader(text)
    assert "<script" not in text and "\x1b" not in text and "/home/me" not in text and "secret.example" not in text
    assert "&lt;script&gt;" in text


def test_the_sentence_follows_the_interval(finished: Run, other: Run) -> None:
    found = compare(finished, other)
    row = of(found, "tuned pass@1")

    def said(low: float, high: float, problems: int = 50) -> str:
        change = replace(row.change, mean=(low + high) / 2, low=low, high=high)
        return difference.verdict(replace(found, metrics=[replace(row, change=change, problems=problems)]))

    assert "better" in said(0.1, 0.2) and "worse" in said(-0.2, -0.1) and "no clear difference" in said(-0.1, 0.1)
    assert "too few" in said(0.1, 0.2, problems=3)


def test_wrong_runs_are_errors_that_say_what_to_give(finished: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**finished.config.model_dump(mode="json"), "run_dir": str(tmp_path / "none")}))
    (tmp_path / "empty").mkdir()
    cases = {
        (
            finished.dir,
            tmp_path / "rum",
        ): "no such run: expected the YAML file of a run, or its directory; did you mean",
        (finished.dir, tmp_path / "empty"): "no run has begun there: expected a run directory",
        (finished.dir, config): "no run has begun there",
        (finished.dir, finished.dir): "expected two runs",
        (finished.dir, tmp_path / "empty", "-o", "page.txt"): "expected the name of a file that ends in .html",
        (finished.dir, tmp_path / "empty", "-o", tmp_path): "expected the name of a file that ends in .html",
        (finished.dir, finished.path("stages.json")): "unknown key",
    }
    for arguments, said in cases.items():
        fault = command(*arguments).exception
        assert isinstance(fault, RmxError) and said in str(fault), (arguments, fault)
    shutil.copytree(finished.dir, tmp_path / "torn")
    (tmp_path / "torn" / "gate.json").write_text("{")
    assert "gate.json: cannot be read" in str(command(finished.dir, tmp_path / "torn").exception)


def test_a_reward_function_comes_from_the_users_file(finished: Run, other: Run, tmp_path: Path) -> None:
    """A run directory may be anybody's: what it names is not run."""
    stages = other.stages()
    stages["verify"]["settings"]["verify"]["reward"] = "os:system"
    other.path("stages.json").write_text(json.dumps(stages))
    fault = command(finished.dir, other.dir).exception
    assert isinstance(fault, RmxError) and "verify.reward=os:system: give the YAML file" in str(fault)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(other.config.model_dump(mode="json")))
    assert "verify.reward was os:system, is now None" in str(command(finished.dir, config).exception)


def test_a_run_with_its_price(finished: Run, other: Run, tmp_path: Path) -> None:
    priced: dict[str, Any] = finished.config.model_dump(mode="json") | {"cost": {"per_hour": 3.6, "currency": "EUR"}}
    found = compare(Run(Config.model_validate(priced)), other)
    (price,) = (both for label, *both in difference.facts(found) if label == "price")
    seconds = sum(own.seconds for own in found.first.costs)
    amount, unit = price[0].split()
    assert float(amount) == pytest.approx(seconds / 1000, abs=1.1e-4) and unit == "EUR"  # seconds are rounded, too
    assert price[1] == "–"


def test_long_histories_keep_their_ends() -> None:
    """The means are over the last steps alone."""
    steps = [StepMetrics(n, float(n > 5), 0.0, 0.0, None, None, 1.0, 1e-4, 10, 0.1) for n in range(1, 11)]
    side = difference.Side("a", (), None, steps, (), "USD")
    assert difference.facts(difference.Difference(side, side, (), (), ()))[1][1] == "+1.0000"
