"""pass@k of two models: paired gains over all subsets, the run's held-out problems, the picture."""

import itertools
import json

import numpy as np
import pytest

from rmx.analyses.benchmarks import HELD_OUT, run_benchmarks
from rmx.grading.metrics import pass_rates_at
from rmx.records import Problem, Rollout, Verdict
from rmx.runs.evaluate import gains_at_k
from rmx.runs.pipeline import Run


def side(rows: dict[str, str]) -> tuple[list[Rollout], list[Verdict]]:
    """A word for each problem: r right, w wrong, x not judged."""
    outcome = {"r": "right", "w": "wrong", "x": "crash"}
    return [], [Verdict(p, n, outcome[c], None) for p, word in rows.items() for n, c in enumerate(word)]  # type: ignore[arg-type]


def naive(word: str, k: int) -> float:
    return float(np.mean(["r" in subset for subset in itertools.combinations(word.replace("x", ""), k)]))


def test_gains_are_over_all_subsets_of_k_samples() -> None:
    base, tuned = {"a": "rwwww", "b": "wwwwx", "c": "rrrrr"}, {"a": "rrwww", "b": "rwwww", "c": "rrrwx"}
    problems = [Problem(p, "", "") for p in base]
    for k in (1, 2, 4, 5):
        whole = [p for p in base if min(len(own[p].replace("x", "")) for own in (base, tuned)) >= k]
        expected = np.mean([naive(tuned[p], k) - naive(base[p], k) for p in whole])
        found = gains_at_k(problems, side(base), side(tuned), [k], draws=200, seed=0)[k]
        assert found.mean == pytest.approx(expected)
        assert found.low <= found.mean <= found.high
        assert pass_rates_at(problems, side(base)[1], k) == pytest.approx(
            {p: naive(word, k) for p, word in base.items() if len(word.replace("x", "")) >= k}
        )
    assert gains_at_k(problems, side(base), side(tuned), [6], draws=200, seed=0) == {}


def test_the_runs_held_out_problems_are_a_benchmark(finished: Run) -> None:
    (result,) = run_benchmarks(finished, [HELD_OUT], tuned=True, samples=5, limit=7)
    assert (result.name, result.base.problems, result.base.samples, result.trained_on) == ("held-out", 7, 5, 0)
    assert result.tuned is not None and result.gain_at_k is not None and result.lengths is not None
    assert list(result.gain_at_k) == [1, 2, 4, 5]
    for k, gain in result.gain_at_k.items():
        assert gain.mean == pytest.approx(result.tuned.pass_at_k[k].mean - result.base.pass_at_k[k].mean)
    assert result.gain_at_k[1] == result.gain
    assert result.lengths.base_tokens.mean == pytest.approx(result.base.tokens)
    assert finished.path("benchmarks/pass_at_k.png").read_bytes()[:4] == b"\x89PNG"
    assert list(json.loads(finished.path("benchmarks/held-out.json").read_text())["gain_at_k"]) == ["1", "2", "4", "5"]
    assert run_benchmarks(finished, [HELD_OUT], tuned=True, samples=5, limit=7) == [result]
