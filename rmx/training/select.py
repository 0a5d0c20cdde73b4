"""The training set: problems of mixed outcome, advantages, and the entropy gate."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from rmx.config import SelectConfig
from rmx.errors import RmxError
from rmx.records import Rollout, Scores, TrainingSequence, Verdict

EPS = 1e-6  # lower bound of the standard deviation in an advantage
SHUFFLE, GATE = 1 << 30, (1 << 30) + 1  # streams of random numbers; those of training count steps from 0
MOST_SCALE = 1000.0  # of a control's weights: tokens that the base is sure of have next to no gradient
BINS = 30  # of the entropy histogram
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.8, 0.9, 0.95, 0.97, 0.99)


class SelectionError(RmxError):
    """No problem can be trained on."""


def advantages(rewards: Sequence[float], clip: float) -> list[float]:
    r"""Standardised rewards of one problem's rollouts.

    .. math:: A_i = \mathrm{clip}\!\left(\frac{r_i - \bar r}{\max(\sigma_r, \epsilon)}, -c, c\right)

    with the population standard deviation over the rollouts used for training (arXiv 2605.06241, section 3).
    """
    r = np.asarray(rewards, dtype=np.float64)
    return [float(a) for a in np.clip((r - r.mean()) / max(r.std(), EPS), -clip, clip)]


def gate_threshold(trained: np.ndarray, scored: np.ndarray, config: SelectConfig) -> float:
    """tau in nats.

    ``tau`` is used as given. ``quantile`` q: tau is the q-quantile of the entropies of all ``scored`` tokens, also of
    those that are not used for training. ``budget`` b: a share b of the ``trained`` tokens is strictly above tau.
    """
    if config.tau is not None:
        return config.tau
    if config.quantile is not None:
        return float(np.quantile(scored, config.quantile))
    assert config.budget is not None
    above = math.floor(config.budget * trained.size)
    if above == trained.size:
        return -1.0  # entropies are >= 0: every token is gated
    return float(np.sort(trained)[trained.size - above - 1])


def decisions(entropy: np.ndarray, tau: float, gate: str, draw: np.random.Generator) -> list[int]:
    """Ascending decision tokens of one completion with entropies [T], nats.

    ``entropy``: those above ``tau``. The controls take as many: ``random`` at random, ``lowest`` those of the lowest
    entropy; ``all`` takes every token.
    """
    above = np.flatnonzero(entropy > tau)
    if gate == "random":
        above = np.sort(draw.choice(entropy.size, above.size, replace=False))
    elif gate == "lowest":
        above = np.sort(np.argsort(entropy, kind="stable")[: above.size])
    elif gate == "all":
        above = np.arange(entropy.size)
    return [int(t) for t in above]


def gradient_norms(scores: Scores, completion_ids: Sequence[int]) -> np.ndarray:
    r"""[T] norms of the gradient of -log p(y) with respect to the base's logits, from the kept statistics.

    .. math:: \sqrt{(1 - p_y)^2 + \sum_{v \neq y} p_v^2}

    with the sum over only the K most probable tokens that were stored. The missing terms lower the norm by at most the
    share 1 / (8 (K - 1)), 1.8 % for K = 8: with r = 1 - p_y, tokens behind the K-th have a mass t and at most the
    probability (r - t) / (K - 1) each, so their squares sum up to at most r^2 / (4 (K - 1)).
    """
    target = np.asarray(completion_ids)
    other = np.where(scores.topk_ids.numpy() == target[:, None], 0.0, np.exp(scores.topk_logprobs.double().numpy()))
    return np.sqrt(np.expm1(scores.logprob.double().numpy()) ** 2 + (other**2).sum(1))


def gradient_mass(sequence: TrainingSequence, norms: np.ndarray, beta: float = 1.0) -> float:
    """Sum over the decision tokens of |advantage| x weight x ``norms`` [T]; ``beta`` is train.negative_weight.

    It measures how strongly the decision tokens change the logits in the first step, when the student is the base.
    """
    if not sequence.decision_tokens:
        return 0.0
    pull = abs(sequence.advantage) * (beta if sequence.advantage < 0 else 1.0)
    return float(pull * sequence.scale * norms[sequence.decision_tokens].mean())


def matched_scale(norms: np.ndarray, wanted: Sequence[int], taken: Sequence[int]) -> float:
    """The factor that gives the tokens ``taken`` the gradient mass of ``wanted``; at most MOST_SCALE."""
    if not wanted or not taken:
        return 0.0
    own = norms[list(taken)].mean()
    return float(min(norms[list(wanted)].mean() / own, MOST_SCALE)) if own else MOST_SCALE


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate of a training set on the entropies of the tokens that it was chosen from."""

    tau: float  # nats
    gated: int  # decision tokens
    tokens: int  # completion tokens of the training set
    edges: list[float]  # B + 1 edges of the histogram, nats
    counts: list[int]  # B, of all scored tokens
    quantiles: dict[float, float]  # of all scored tokens: share -> nats


def gated_share(sequences: Sequence[TrainingSequence]) -> float:
    """Share of decision tokens among the completion tokens of a training set."""
    tokens = sum(len(s.completion_ids) for s in sequences)
    return sum(len(s.decision_tokens) for s in sequences) / max(tokens, 1)


def describe_gate(sequences: Sequence[TrainingSequence], scored: np.ndarray, tau: float) -> Gate:
    """Statistics of the gate that ``rmx select`` stores and shows, to judge tau."""
    counts, edges = np.histogram(scored, BINS, (0, max(float(scored.max()), tau, 1e-6)))
    return Gate(
        tau=tau,
        gated=sum(len(s.decision_tokens) for s in sequences),
        tokens=sum(len(s.completion_ids) for s in sequences),
        edges=edges.tolist(),
        counts=counts.tolist(),
        quantiles={q: float(np.quantile(scored, q)) for q in QUANTILES},
    )


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

    def rewards_of(problem_id: str) -> list[float]:
        return [verdicts[i].reward or 0.0 for i in usable[problem_id]]

    def rate(problem_id: str) -> Fraction:  # exact, so that 14 and 6 of 20 are equally far from one half
        return sum(map(Fraction, rewards_of(problem_id)), Fraction(0)) / len(usable[problem_id])

    mixed = [p for p in usable if len(set(rewards_of(p))) > 1]
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
    rollouts: Sequence[Rollout],
    verdicts: Sequence[Verdict],
    scores: Sequence[Scores],
    config: SelectConfig,
    seed: int = 0,
) -> tuple[list[TrainingSequence], float]:
    """(training set, tau): the rollouts of :func:`choose_rollouts` with their advantages and decision tokens.

    Args:
        scores: of at least those rollouts, in any order.
        seed: of the random gate and of shuffled advantages; each rollout and problem has a stream of its own.

    With ``matched_gradient`` each sequence's scale gives its decision tokens the gradient mass of those above tau. With
    ``right_only`` the rollouts of reward 1 are left, each with the advantage 1.
    """
    usable = choose_rollouts(rollouts, verdicts, config)
    known = {(s.problem_id, s.sample): s for s in scores}
    entropy = {key: s.entropy.numpy() for key, s in known.items()}
    of = {i: (rollouts[i].problem_id, rollouts[i].sample) for own in usable.values() for i in own}
    tau = gate_threshold(
        np.concatenate([entropy[key] for key in of.values()]), np.concatenate(list(entropy.values())), config
    )
    sequences = []
    for own in usable.values():
        rewards = [float(verdicts[i].reward or 0.0) for i in own]
        weights = advantages(rewards, config.advantage_clip)
        if config.shuffle_advantages:
            weights = [float(a) for a in np.random.default_rng([seed, SHUFFLE, own[0]]).permutation(weights)]
        if config.right_only:
            own, weights = [i for i, reward in zip(own, rewards, strict=True) if reward == 1], [1.0] * rewards.count(1)
            rewards = weights
        for i, reward, advantage in zip(own, rewards, weights, strict=True):
            taken = decisions(entropy[of[i]], tau, config.gate, np.random.default_rng([seed, GATE, i]))
            scale = 1.0
            if config.matched_gradient:
                above = decisions(entropy[of[i]], tau, "entropy", np.random.default_rng())
                scale = matched_scale(gradient_norms(known[of[i]], rollouts[i].completion_ids), above, taken)
            sequences.append(
                TrainingSequence(
                    problem_id=rollouts[i].problem_id,
                    sample=rollouts[i].sample,
                    prompt_ids=rollouts[i].prompt_ids,
                    completion_ids=rollouts[i].completion_ids,
                    reward=reward,
                    advantage=advantage,
                    decision_tokens=taken,
                    base_logprob=known[of[i]].logprob.tolist(),
                    scale=scale,
                )
            )
    if not sequences:
        raise SelectionError("select: right_only leaves nothing: no rollout of the chosen problems has the reward 1")
    return sequences, tau
