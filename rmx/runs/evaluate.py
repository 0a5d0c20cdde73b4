"""Accuracy of the base and the tuned model on held-out problems, with bootstrap intervals over problems."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmx.grading.metrics import EvaluationError, accuracy, bootstrap, pass_rates, pass_rates_at
from rmx.records import Evaluation, Interval, Problem, Rollout, Verdict

Samples = tuple[Sequence[Rollout], Sequence[Verdict]]


def compare(
    problems: Sequence[Problem],
    base: Samples,
    tuned: Samples,
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


def gains_at_k(
    problems: Sequence[Problem], base: Samples, tuned: Samples, sizes: Sequence[int], *, draws: int, seed: int
) -> dict[int, Interval]:
    """pass@k of the tuned model - that of the base, over the problems with k judged samples on both sides."""
    gains = {}
    for k in sizes:
        before, after = (pass_rates_at(problems, side[1], k) for side in (base, tuned))
        if both := [p for p in before if p in after]:
            gains[k] = bootstrap(np.array([after[p] - before[p] for p in both]), draws, seed)
    return gains


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whether a gain may be one of length alone; intervals are over problems."""

    base_tokens: Interval  # mean length of a completion, all samples
    tuned_tokens: Interval
    base_truncated: float  # share of the samples that hit the length limit
    tuned_truncated: float
    kept: float  # share of the pairs of judged samples that neither side truncates
    gain: Interval | None  # of pass@1 among these pairs; None where there are none


def lengths(problems: Sequence[Problem], base: Samples, tuned: Sequence[Samples], *, draws: int, seed: int) -> Lengths:
    """Compare samples of the same problem and number: the base's with those of each of the models ``tuned``.

    The gain is the mean over problems of the mean difference of its pairs that neither side truncates. Which these are
    depends on both models, so it is a check beside the gain, not a measure of it: a limit that truncates neither side
    (both shares 0) needs no such choice.
    """
    before = _by_sample(base)
    pairs = [(key, before[key], after) for side in tuned for key, after in _by_sample(side).items() if key in before]
    judged = [(key, b, t) for key, b, t in pairs if b[1] is not None and t[1] is not None]
    kept = [(key, t[1] - b[1]) for key, b, t in judged if not (b[0].truncated or t[0].truncated)]  # type: ignore[operator]
    changes: dict[str, list[float]] = {}
    for (problem, _), change in kept:
        changes.setdefault(problem, []).append(change)
    gains = np.array([np.mean(changes[p.problem_id]) for p in problems if p.problem_id in changes])

    def tokens(rollouts: Sequence[Rollout]) -> Interval:
        counts: dict[str, list[int]] = {}
        for r in rollouts:
            counts.setdefault(r.problem_id, []).append(len(r.completion_ids))
        return bootstrap(np.array([np.mean(counts[p.problem_id]) for p in problems]), draws, seed)

    after = [r for side in tuned for r in side[0]]
    return Lengths(
        base_tokens=tokens(base[0]),
        tuned_tokens=tokens(after),
        base_truncated=float(np.mean([r.truncated for r in base[0]])),
        tuned_truncated=float(np.mean([r.truncated for r in after])),
        kept=len(kept) / max(1, len(judged)),
        gain=bootstrap(gains, draws, seed) if len(gains) else None,
    )


def _by_sample(side: Samples) -> dict[tuple[str, int], tuple[Rollout, float | None]]:
    return {(r.problem_id, r.sample): (r, v.reward) for r, v in zip(*side, strict=True)}
