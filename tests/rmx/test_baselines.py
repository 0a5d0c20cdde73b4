"""Untrained decodings beside the tuned model: accuracy, votes and tokens counted from the files; refusals."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from command_line import command
from test_pipeline import write_yaml

from rmx.analyses.baselines import Options, baselines
from rmx.errors import AnalysisError
from rmx.grading.metrics import vote_rates
from rmx.records import Problem, Verdict
from rmx.runs.pipeline import Run


def test_votes_of_each_problem_are_counted_over_all_subsets() -> None:
    answers = {"a": ["7", "7", "5", "5", None], "b": ["1", "2", "3", "4", "9"]}  # 7 and 9 are right
    verdicts = [
        Verdict(p, n, "no_answer" if a is None else "right" if a in "79" else "wrong", a)
        for p, own in answers.items()
        for n, a in enumerate(own)
    ]
    problems = [Problem(p, "", "") for p in (*answers, "unknown")]
    for k in (1, 2, 3, 5):
        expected = {}
        for p, own in answers.items():
            shares = []
            for subset in itertools.combinations(own, k):
                counts = {a: subset.count(a) for a in subset if a is not None}
                most = [a for a, n in counts.items() if n == max(counts.values())]
                shares.append(sum(a in "79" for a in most) / max(1, len(most)))
            expected[p] = np.mean(shares)
        assert vote_rates(problems, verdicts, k) == pytest.approx(expected)


def test_arms_are_those_of_their_files(finished: Run) -> None:
    run = finished
    options = Options(temperatures=(0.5,), top_ps=(0.7,), samples=3)
    result = baselines(run, run.path("baselines"), options)
    names = ["base", "base greedy", "base T 0.5", "base top-p 0.7"]
    assert list(result.arms) == [*names, "base vote 2", "base vote 3", "tuned", "tuned vote 2"]
    problems = [p.problem_id for p in run.problems("evaluate")]
    tuned = run.evaluated("tuned")
    assert result.arms["tuned"].accuracy.mean == pytest.approx(np.mean([v.reward for v in tuned[1]]))  # type: ignore[arg-type]
    assert result.arms["tuned"].behind is None
    files = ["base.evaluate", "base.greedy", "base.T-0.5", "base.top-p-0.7"]
    for name, file, samples in zip(names, files, (3, 1, 2, 2), strict=True):
        arm = result.arms[name]
        rows = run.path(f"baselines/{file}.jsonl").read_text().splitlines()[1:]
        counts = [len(json.loads(row)["completion_ids"]) for row in rows]
        assert len(counts) == samples * len(problems) and (arm.samples, arm.votes) == (samples, 1)
        assert arm.tokens.mean == pytest.approx(np.mean(counts))
        assert arm.behind is not None
        assert arm.behind.mean == pytest.approx(result.arms["tuned"].accuracy.mean - arm.accuracy.mean)
    assert result.arms["base vote 3"].tokens.mean == pytest.approx(3 * result.arms["base"].tokens.mean)
    first = [json.loads(row) for row in run.path("baselines/base.evaluate.jsonl").read_text().splitlines()[1:]]
    same = {(r.problem_id, r.sample): r.completion_ids for r in run.evaluated("base")[0]}
    assert all(same.get((r["problem_id"], r["sample"]), r["completion_ids"]) == r["completion_ids"] for r in first)


@pytest.mark.thorough
def test_the_command_and_both_models(finished: Run, tmp_path: Path) -> None:
    run = finished
    path = write_yaml(run.config, tmp_path / "run.yaml")
    done = command("baselines", path, "--both", "--max-new-tokens", 6)
    assert done.returncode == 0, done.stderr
    for words in ("tuned greedy", "base vote 2", "tuned is above by"):
        assert words in done.stdout
    found = json.loads(run.path("baselines/baselines.json").read_text())
    assert found["sampling"]["max_new_tokens"] == 6 and found["arms"]["base"]["tokens"]["mean"] > 4
    assert run.path("baselines/baselines.png").read_bytes()[:4] == b"\x89PNG"


def test_what_cannot_be_decoded_is_refused(finished: Run, tmp_path: Path) -> None:
    for options, words in (
        (Options(temperatures=(0.0,)), "--temperature: expected at least 0.001"),
        (Options(top_ps=(1.5,)), "--top-p: expected above 0 and at most 1, got 1.5"),
        (Options(samples=0), "--samples: expected at least 1, got 0"),
    ):
        with pytest.raises(AnalysisError, match=words):
            baselines(finished, tmp_path, options)
