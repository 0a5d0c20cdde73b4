"""The training set: problems of mixed outcome, advantages, and the entropy gate."""

import math
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from rmx.config import SelectConfig
from rmx.errors import RmxError
from rmx.records import Rollout, Scores, TrainingSequence, Verdict

EPS = 1e-6  # lower bound of the standard deviation in an advantage


class SelectionError(RmxError):
    """No problem can be trained on."""


def advantages(rewards: Sequence[float], clip: float) -> list[float]:
    r"""Standardised rewards of one problem's rollouts.

    .. math:: A_i = \mathrm{clip}\!\left(\frac{r_i - \bar r}{\max(\sigma_r, \epsilon)}, -c, c\right)

    with the population standard deviation over the rollouts that are trained on (arXiv 2605.06241, section 3).
    """
    r = np.asarray(rewards, dtype=np.float64)
    return [float(a) for a in np.clip((r - r.mean()) / max(r.std(), EPS), -clip, clip)]


def gate_threshold(entropy: np.ndarray, config: SelectConfig) -> float:
    """tau in nats: as given, or such that a share ``budget`` of these entropies lies strictly above it."""
    if config.tau is not None:
        return config.tau
    assert config.budget is not None
    above = math.floor(config.budget * entropy.size)
    if above == entropy.size:
        return -1.0  # entropies are >= 0: every token is gated
    return float(np.sort(entropy)[entropy.size - above - 1])


def mixed_problems(verdicts: Sequence[Verdict]) -> set[str]:
    """Problems with at least one right and one wrong rollout: only these can be trained on."""
    rewards: dict[str, set[float]] = defaultdict(set)
    for verdict in verdicts:
        if verdict.reward is not None:
            rewards[verdict.problem_id].add(verdict.reward)
    return {problem_id for problem_id, seen in rewards.items() if len(seen) > 1}


def choose_rollouts(
    rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], config: SelectConfig
) -> dict[str, list[int]]:
    """Indices of the rollouts to train on, by problem: right and wrong ones, nearest to a pass rate of one half first.

    Rollouts that the verifier could not judge are left out; the length trim comes before the pass rate. The cut by
    ``max_sequences`` takes whole problems, so that advantages keep their mean of zero.

    Raises:
        SelectionError: nothing is left; says how many problems had mixed outcomes and what to change.
    """
    usable: dict[str, list[int]] = defaultdict(list)
    judged: dict[str, list[float]] = defaultdict(list)
    for i, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True)):
        if verdict.reward is None or not rollout.completion_ids:
            continue
        judged[rollout.problem_id].append(verdict.reward)
        if config.max_completion_tokens is None or len(rollout.completion_ids) <= config.max_completion_tokens:
            usable[rollout.problem_id].append(i)

    def rate(problem_id: str) -> Fraction:  # exact, so that 14 and 6 of 20 are equally far from one half
        return Fraction(sum(verdicts[i].reward == 1 for i in usable[problem_id]), len(usable[problem_id]))

    mixed = [p for p in usable if 0 < rate(p) < 1]
    eligible = [p for p in mixed if config.min_pass_rate < float(rate(p)) < config.max_pass_rate]
    if not eligible:
        solved = sum(all(rewards) for rewards in judged.values())
        failed = sum(not any(rewards) for rewards in judged.values())
        raise SelectionError(
            f"select: nothing to train on: {len(mixed)} of {len(judged)} problems had mixed outcomes, {solved} were "
            f"always solved, {failed} never"
            + (
                f"; select.min_pass_rate and max_pass_rate leave none of the {len(mixed)}: widen them"
                if mixed
                else "; take harder problems, raise rollouts.samples or rollouts.temperature"
                if solved > failed
                else "; take easier problems, raise rollouts.samples or rollouts.max_new_tokens"
            )
        )
    eligible.sort(key=lambda p: abs(rate(p) - Fraction(1, 2)))  # stable: ties stay in the order of the problems
    chosen: list[str] = []
    count = 0
    for problem_id in eligible[: config.max_problems]:
        if chosen and count + len(usable[problem_id]) > config.max_sequences:
            break
        chosen.append(problem_id)
        count += len(usable[problem_id])
    return {problem_id: usable[problem_id] for problem_id in chosen}


def select_sequences(
    rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], scores: Sequence[Scores], config: SelectConfig
) -> tuple[list[TrainingSequence], float]:
    """(training set, tau): the rollouts of :func:`choose_rollouts` with their advantages and decision tokens.

    Args:
        scores: of at least those rollouts, in any order.
    """
    usable = choose_rollouts(rollouts, verdicts, config)
    scored = {(s.problem_id, s.sample): s for s in scores}
    of = {i: scored[rollouts[i].problem_id, rollouts[i].sample] for own in usable.values() for i in own}
    tau = gate_threshold(np.concatenate([s.entropy.numpy() for s in of.values()]), config)
    sequences = []
    for own in usable.values():
        rewards = [float(verdicts[i].reward or 0.0) for i in own]
        for i, reward, advantage in zip(own, rewards, advantages(rewards, config.advantage_clip), strict=True):
            gate = (of[i].entropy > tau).nonzero().squeeze(1).tolist()
            sequences.append(
                TrainingSequence(
                    problem_id=rollouts[i].problem_id,
                    sample=rollouts[i].sample,
                    prompt_ids=rollouts[i].prompt_ids,
                    completion_ids=rollouts[i].completion_ids,
                    reward=reward,
                    advantage=advantage,
                    decision_tokens=gate,
                    base_logprob=of[i].logprob.tolist(),
                )
            )
    return sequences, tau
