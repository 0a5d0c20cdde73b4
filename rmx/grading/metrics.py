"""Statistics of the samples of one model: pass@k, majority votes, lengths, boxes, with intervals over problems."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import comb

import numpy as np

from rmx.errors import RmxError
from rmx.grading.answers import BRACE
from rmx.records import Accuracy, Interval, Problem, Rollout, Verdict

SPACING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[,;:! ]|[\s$]")
NUMERAL = re.compile(r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+))(?:\.(\d*?)0*)?")


CENTRAL = (0.025, 0.975)  # quantiles of a 95 % interval


class EvaluationError(RmxError):
    """There is nothing to evaluate."""


def accuracy(
    problems: Sequence[Problem], rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], *, draws: int, seed: int
) -> Accuracy:
    """Pass rates and votes over those of ``problems`` that have a judged sample; lengths and boxes of all rollouts.

    With c of a problem's n judged samples right, pass@1 is the mean of c / n, its standard error the sample standard
    deviation of c / n over the root of the number of problems, pass@k the mean of :func:`pass_at_k` and maj@k that of
    :func:`majority`. A problem with fewer than k judged samples is left out of pass@k, and votes with all that it has
    in maj@k. Where a reward function gives parts of 1, pass@1 is the mean reward, and right is a reward of 1.

    Args:
        draws: resamples of the problems behind each 95 % interval. seed: of these draws.

    Raises:
        EvaluationError: no problem has a judged sample.
    """
    judged = _judged(verdicts)
    own = [judged[p.problem_id] for p in problems if p.problem_id in judged]
    if not own:
        raise EvaluationError("no problem has a judged sample; raise verify.timeout_s")
    rates = np.array([sum(v.reward or 0.0 for v in those) / len(those) for those in own])
    sizes = _sizes(verdicts)
    passed = {k: [_pass_at(k, those) for those in own if len(those) >= k] for k in sizes}
    votes = np.array([majority(*_ballots(those), sizes) for those in own])
    return Accuracy(
        problems=len(own),
        samples=sizes[-1],
        pass_at_1=bootstrap(rates, draws, seed),
        standard_error=float(rates.std(ddof=1) / np.sqrt(len(rates))) if len(rates) > 1 else None,
        pass_at_k={k: bootstrap(np.array(values), draws, seed) for k, values in passed.items() if values},
        maj_at_k={k: bootstrap(votes[:, i], draws, seed) for i, k in enumerate(sizes) if passed[k]},
        tokens=float(np.mean([len(r.completion_ids) for r in rollouts])),
        truncated=float(np.mean([r.truncated for r in rollouts])),
        boxed=float(np.mean([has_box(r.text) for r in rollouts])),
        unverified=sum(v.reward is None for v in verdicts),
    )


def pass_rates(problems: Sequence[Problem], verdicts: Iterable[Verdict]) -> dict[str, float]:
    """pass@1 of each problem that has a judged sample: the mean of its rewards."""
    judged = _judged(verdicts)
    return {
        p.problem_id: float(np.mean([v.reward for v in judged[p.problem_id]]))
        for p in problems
        if p.problem_id in judged
    }


def of_each(rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> dict[str, dict[str, float]]:
    """{metric: {problem_id: its value}} of the problems with a judged sample, to pair two models by problem.

    pass@1 is the mean reward. pass@k and maj@k have the sizes and the meaning that they have in :func:`accuracy`; both
    need k judged samples. Mean tokens and the shares truncated and boxed are of all samples of the problem.
    """
    judged, found = _judged(verdicts), defaultdict[str, dict[str, float]](dict)
    written = defaultdict[str, list[Rollout]](list)
    for rollout in rollouts:
        written[rollout.problem_id].append(rollout)
    all_sizes = _sizes(verdicts)
    for problem_id, own in judged.items():
        texts = written[problem_id]
        found["pass@1"][problem_id] = float(np.mean([v.reward for v in own]))
        sizes = [k for k in all_sizes if 1 < k <= len(own)]
        for k, share in zip(sizes, majority(*_ballots(own), sizes), strict=True):
            found[f"pass@{k}"][problem_id] = _pass_at(k, own)
            found[f"maj@{k}"][problem_id] = share
        found["tokens"][problem_id] = float(np.mean([len(r.completion_ids) for r in texts]))
        found["truncated"][problem_id] = float(np.mean([r.truncated for r in texts]))
        found["boxed"][problem_id] = float(np.mean([has_box(r.text) for r in texts]))
    return dict(found)


def _pass_at(k: int, judged: Sequence[Verdict]) -> float:
    """:func:`pass_at_k` of one problem's judged samples."""
    return pass_at_k(len(judged), sum(v.outcome == "right" for v in judged), k)


def _sizes(verdicts: Sequence[Verdict]) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that."""
    samples = max(v.sample for v in verdicts) + 1
    return sorted({*(2**i for i in range(samples.bit_length())), samples})


def pass_rates_at(problems: Sequence[Problem], verdicts: Iterable[Verdict], k: int) -> dict[str, float]:
    """:func:`pass_at_k` of each problem that has k judged samples."""
    judged = _judged(verdicts)
    return {p.problem_id: _pass_at(k, own) for p in problems if len(own := judged.get(p.problem_id, [])) >= k}


def vote_rates(problems: Sequence[Problem], verdicts: Iterable[Verdict], k: int) -> dict[str, float]:
    """maj@k of each problem that has a judged sample: :func:`majority`."""
    judged = _judged(verdicts)
    return {p.problem_id: majority(*_ballots(judged[p.problem_id]), [k])[0] for p in problems if p.problem_id in judged}


def bootstrap(values: np.ndarray, draws: int, seed: int, per: np.ndarray | None = None) -> Interval:
    """Mean of per-problem values, or sum(values) / sum(per) with per > 0, and its 95 % percentile interval.

    The interval is over ``draws`` resamples of the problems.
    """
    sums = _resampled(values, draws, seed)
    weights = np.full(draws, len(values)) if per is None else _resampled(per, draws, seed)
    low, high = np.quantile(sums / weights, CENTRAL)
    mean = values.mean() if per is None else values.sum() / per.sum()
    return Interval(float(mean), float(low), float(high))


def share_of_gap(gain: np.ndarray, gap: np.ndarray, draws: int, seed: int) -> Interval | None:
    r"""sum(gain) / sum(gap), paired over problems, and its 95 % interval by inversion of the bootstrap test:

    .. math:: \{ r : 0 \text{ lies in the central 95 \% of the resamples of } \sum gain - r \sum gap \}

    Resamples of the ratio itself have no bound if the gap may be zero. The result is None if the interval of the gap
    contains zero: then no share is excluded.
    """
    gains, gaps = _resampled(gain, draws, seed), _resampled(gap, draws, seed)
    low, high = np.quantile(gaps, CENTRAL)
    if low <= 0 <= high:
        return None
    if high < 0:
        gains, gaps = -gains, -gaps

    def end(quantile: float) -> float:
        """Where the quantile of gains - r gaps, which falls with r, is zero."""

        def value(r: float) -> float:
            return float(np.quantile(gains - r * gaps, quantile))

        below, above = -1.0, 1.0
        while value(below) < 0:
            below *= 2
        while value(above) > 0:
            above *= 2
        for _ in range(50):
            middle = (below + above) / 2
            below, above = (middle, above) if value(middle) > 0 else (below, middle)
        return (below + above) / 2

    return Interval(float(gain.sum() / gap.sum()), end(CENTRAL[0]), end(CENTRAL[1]))


def _resampled(values: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws] sums over problems drawn with replacement; the same problems for the same seed."""
    random = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, 1000):
        drawn = random.integers(0, len(values), (min(1000, draws - start), len(values)))
        found.append(values[drawn].sum(-1))
    return np.concatenate(found)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the probability that k of n samples, c of them right, contain a right one (unbiased).

    Raises:
        ValueError: k is not in 1 .. n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: expected 1 .. {samples} samples, got {k}")
    return (comb(samples, k) - comb(samples - right, k)) / comb(samples, k)


def majority(right: int, wrong: Sequence[int], silent: int, sizes: Sequence[int]) -> list[float]:
    """The probability that the most frequent answer of k samples is right, for each k in ``sizes``; exact.

    It is the mean over all subsets of k of the n = right + sum(wrong) + silent samples (of all n where k > n) of
    1 / (1 + t) where the right answer has the most votes and shares them with t wrong ones, else 0.

    Args:
        right: samples with the right answer. wrong: samples with each of the wrong answers. silent: without an answer,
            which do not vote.
    """
    n = right + sum(wrong) + silent
    chances = [0.0] * len(sizes)
    for votes in range(1, right + 1):  # of the right answer
        rivals = [size for size in wrong if size >= votes]
        others = n - right - sum(rivals)  # too few of each answer to reach that many votes
        ways = np.zeros((n - right + 1, len(rivals) + 1), dtype=object)  # [drawn samples, answers with as many votes]
        ways[: others + 1, 0] = [comb(others, drawn) for drawn in range(others + 1)]
        for size in rivals:
            grown = np.zeros_like(ways)
            for own in range(votes):
                grown[own:] += comb(size, own) * ways[: len(ways) - own]
            grown[votes:, 1:] += comb(size, votes) * ways[: len(ways) - votes, :-1]
            ways = grown
        for i, size in enumerate(sizes):
            k = min(size, n)
            if 0 <= k - votes < len(ways):
                for tied, count in enumerate(ways[k - votes]):
                    chances[i] += count * comb(right, votes) / ((tied + 1) * comb(n, k))
    return chances


def has_box(text: str) -> bool:
    """Whether it holds a \\boxed{...} (or \\fbox) whose braces are balanced, with something in it."""
    opened = []
    for token in BRACE.finditer(text):
        if token[1] or token[0] == "{":
            opened.append(token)
        elif token[0] == "}" and opened:
            begin = opened.pop()
            if begin[1] and text[begin.end() : token.start()].strip():
                return True
    return False


def _judged(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    judged = defaultdict(list)
    for verdict in verdicts:
        if verdict.reward is not None:
            judged[verdict.problem_id].append(verdict)
    return judged


def _ballots(verdicts: Sequence[Verdict]) -> tuple[int, list[int], int]:
    """The arguments of :func:`majority`. Right answers are one group, since each equals the ground truth; wrong ones
    are grouped by their normal form, as comparing them in pairs could take the verifier for ever.
    """
    right = sum(v.outcome == "right" for v in verdicts)
    wrong = Counter(_normal(v.answer) for v in verdicts if v.outcome == "wrong" and v.answer is not None)
    return right, list(wrong.values()), len(verdicts) - right - wrong.total()


def _normal(answer: str) -> str:
    """Without spacing, dollar signs, case, the commas of thousands and the zeros behind a decimal's last digit."""
    text = SPACING.sub("", answer).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").casefold()
    if number := NUMERAL.fullmatch(text):
        whole = number[1].replace(",", "")
        return f"{whole}.{number[2]}" if number[2] else whole
    return text
