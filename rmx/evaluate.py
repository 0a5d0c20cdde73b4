"""Held-out accuracy of the base and the tuned model, with bootstrap intervals over problems."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from rmx.errors import RmxError
from rmx.records import Evaluation, Interval, Problem, Rollout, Verdict


class EvaluationError(RmxError):
    """There is nothing to compare."""


def pass_rates(problems: Sequence[Problem], verdicts: Sequence[Verdict]) -> dict[str, float]:
    """pass@1 of each problem that has a judged sample: the mean of its rewards."""
    rewards: dict[str, list[float]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.reward is not None:
            rewards[verdict.problem_id].append(verdict.reward)
    return {p.problem_id: float(np.mean(rewards[p.problem_id])) for p in problems if p.problem_id in rewards}


def bootstrap(values: np.ndarray, draws: int, seed: int, per: np.ndarray | None = None) -> Interval:
    """Mean of per-problem values, or sum(values) / sum(per), and its 95 % percentile interval.

    The interval is over ``draws`` resamples of the problems.
    """
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, 1000):
        drawn = random.integers(0, len(values), (min(1000, draws - start), len(values)))
        found.append(values[drawn].mean(-1) if per is None else values[drawn].sum(-1) / per[drawn].sum(-1))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    mean = values.mean() if per is None else values.sum() / per.sum()
    return Interval(float(mean), float(low), float(high))


def compare(
    problems: Sequence[Problem],
    base: tuple[Sequence[Rollout], Sequence[Verdict]],
    tuned: tuple[Sequence[Rollout], Sequence[Verdict]],
    *,
    draws: int,
    seed: int,
) -> Evaluation:
    """Base against tuned; the gain is paired, over the problems that both have a judged sample for.

    Raises:
        EvaluationError: there is no such problem.
    """
    before, after = pass_rates(problems, base[1]), pass_rates(problems, tuned[1])
    both = [p for p in problems if p.problem_id in before and p.problem_id in after]
    if not both:
        raise EvaluationError("evaluate: no problem has a judged sample on both sides; raise verify.timeout_s")
    b = np.array([before[p.problem_id] for p in both])
    t = np.array([after[p.problem_id] for p in both])
    categories = {
        category: tuple(
            float(np.mean([rates[p.problem_id] for p in both if p.category == category])) for rates in (before, after)
        )
        for category in sorted({p.category for p in both})
    }

    def length(rollouts: Sequence[Rollout]) -> float:
        return float(np.mean([len(r.completion_ids) for r in rollouts]))

    def truncated(rollouts: Sequence[Rollout]) -> float:
        return float(np.mean([r.finish_reason == "length" for r in rollouts]))

    return Evaluation(
        problems=len(both),
        samples=max(v.sample for v in base[1]) + 1,
        base=bootstrap(b, draws, seed),
        tuned=bootstrap(t, draws, seed),
        gain=bootstrap(t - b, draws, seed),
        base_tokens=length(base[0]),
        tuned_tokens=length(tuned[0]),
        base_truncated=truncated(base[0]),
        tuned_truncated=truncated(tuned[0]),
        unverified=sum(v.reward is None for v in [*base[1], *tuned[1]]),
        categories=categories,  # type: ignore[arg-type]
    )
