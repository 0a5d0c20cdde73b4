"""Accuracy of the base and the tuned model on held-out problems, with bootstrap intervals over problems."""

from collections.abc import Sequence

import numpy as np

from rmx.grading.metrics import EvaluationError, accuracy, bootstrap, pass_rates
from rmx.records import Evaluation, Problem, Rollout, Verdict


def compare(
    problems: Sequence[Problem],
    base: tuple[Sequence[Rollout], Sequence[Verdict]],
    tuned: tuple[Sequence[Rollout], Sequence[Verdict]],
    *,
    draws: int,
    seed: int,
) -> Evaluation:
    """Compare base and tuned on the problems with a judged sample on both sides; the gain is paired by problem.

    Raises:
        EvaluationError: there is no such problem.
    """
    before, after = pass_rates(problems, base[1]), pass_rates(problems, tuned[1])
    both = [p for p in problems if p.problem_id in before and p.problem_id in after]
    if not both:
        raise EvaluationError("evaluate: no problem has a judged sample on both sides; raise verify.timeout_s")
    differences = np.array([after[p.problem_id] - before[p.problem_id] for p in both])
    categories = {
        category: tuple(
            float(np.mean([rates[p.problem_id] for p in both if p.category == category])) for rates in (before, after)
        )
        for category in sorted({p.category for p in both})
    }
    return Evaluation(
        problems=len(both),
        samples=max(v.sample for v in base[1]) + 1,
        base=accuracy(both, *base, draws=draws, seed=seed),
        tuned=accuracy(both, *tuned, draws=draws, seed=seed),
        gain=bootstrap(differences, draws, seed),
        categories=categories,  # type: ignore[arg-type]
    )
