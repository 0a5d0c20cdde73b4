"""Scores against full logits; the files; selection, advantages and the gate."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rmx.artefacts import ArtefactError
from rmx.config import SelectConfig
from rmx.model import CausalLM, ModelError
from rmx.records import Rollout, Scores, Verdict
from rmx.score import read_scores, score_rollouts, write_scores
from rmx.select import SelectionError, advantages, gate_threshold, select_sequences


def rollout(problem: str, sample: int, prompt: list[int], completion: list[int]) -> Rollout:
    return Rollout(problem, sample, prompt, completion, "stop", "")


ROLLOUTS = [
    rollout("a", 0, [1, 5, 6], [7, 8, 2]),
    rollout("a", 1, [1, 5, 6], [9]),
    rollout("b", 0, [1, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 2]),
]


def test_scores_are_those_of_full_logits(tiny: CausalLM) -> None:
    for r, s in zip(ROLLOUTS, score_rollouts(tiny, ROLLOUTS, top_k=3), strict=True):
        logits = tiny.model(torch.tensor([r.prompt_ids + r.completion_ids])).logits[0].double()
        # the token at position P + t is predicted from position P - 1 + t
        P, T = len(r.prompt_ids), len(r.completion_ids)
        log_p = logits[P - 1 : P - 1 + T].log_softmax(-1)
        torch.testing.assert_close(s.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=1e-5)
        chosen = log_p.gather(1, torch.tensor(r.completion_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(s.logprob.double(), chosen, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(s.lse.double(), logits[P - 1 : P - 1 + T].logsumexp(-1), rtol=1e-5, atol=1e-5)
        assert s.topk_ids.tolist() == log_p.topk(3).indices.tolist()
        torch.testing.assert_close(s.topk_logprobs.double(), log_p.topk(3).values, rtol=1e-5, atol=1e-5)


def test_scores_do_not_depend_on_the_batch(tiny: CausalLM) -> None:
    together, alone = score_rollouts(tiny, ROLLOUTS), score_rollouts(tiny, ROLLOUTS, token_budget=1)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-5, atol=1e-5)
        assert (a.problem_id, a.sample) == (b.problem_id, b.sample)


def test_a_broken_model_is_noticed(tiny: CausalLM) -> None:
    with torch.no_grad():
        tiny.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        score_rollouts(tiny, ROLLOUTS)


def test_the_score_file_round_trips_and_a_torn_one_is_refused(tiny: CausalLM, tmp_path: Path) -> None:
    scores = score_rollouts(tiny, ROLLOUTS, top_k=2)
    path = tmp_path / "scores.safetensors"
    write_scores(path, scores, {"prompt": "x"})
    meta, again = read_scores(path, ROLLOUTS)
    assert meta["prompt"] == "x"
    for a, b in zip(scores, again, strict=True):
        assert torch.equal(a.topk_ids, b.topk_ids)
        assert torch.equal(a.entropy, b.entropy)
    with pytest.raises(ArtefactError, match="the scores of other rollouts"):
        read_scores(path, ROLLOUTS[:2])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_scores(path, ROLLOUTS)
    with pytest.raises(ArtefactError, match="cannot be read"):
        read_scores(tmp_path / "absent", ROLLOUTS)


def test_advantages_by_hand() -> None:
    # mean 1/4, population standard deviation sqrt(3)/4
    assert advantages([1, 0, 0, 0], 2.5) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert advantages([1, *[0] * 99], 2.5)[0] == 2.5
    assert advantages([1, 1], 2.5) == [0, 0]


def test_the_gate_is_strict_and_a_budget_is_met() -> None:
    entropy = np.array([0.1, 0.5, 0.5, 2.0], dtype=np.float32)
    assert gate_threshold(entropy, SelectConfig(tau=0.5)) == 0.5
    assert (entropy > gate_threshold(entropy, SelectConfig(budget=0.25))).sum() == 1
    assert (entropy > gate_threshold(entropy, SelectConfig(budget=1.0))).sum() == 4
    many = np.random.default_rng(0).gamma(1.0, size=10_001).astype(np.float32)
    assert (many > gate_threshold(many, SelectConfig(budget=0.03))).sum() == 300


def case(rewards: dict[str, list[float | None]]) -> tuple[list[Rollout], list[Verdict], list[Scores]]:
    rollouts, verdicts, scores = [], [], []
    for problem, own in rewards.items():
        for n, reward in enumerate(own):
            T = 2 + n
            rollouts.append(rollout(problem, n, [1], [3] * T))
            outcome = {1.0: "right", 0.0: "wrong", None: "timeout"}[reward]
            verdicts.append(Verdict(problem, n, outcome, "1"))  # type: ignore[arg-type]
            entropy = torch.arange(T) * 1.0
            scores.append(Scores(problem, n, entropy, -entropy, entropy, torch.empty(T, 0), torch.empty(T, 0)))
    return rollouts, verdicts, scores


def test_mixed_problems_nearest_to_one_half_first() -> None:
    rewards = {
        "all": [1.0] * 4,
        "one": [1.0, 0, 0, 0],
        "half": [1.0, 1.0, 0, 0],
        "none": [0.0] * 4,
        "odd": [0, 0, 1.0, 1.0],
    }
    chosen, tau = select_sequences(*case(rewards), SelectConfig(tau=1.5))
    assert list(dict.fromkeys(s.problem_id for s in chosen)) == ["half", "odd", "one"]
    assert tau == 1.5
    assert [s.decision_tokens for s in chosen[:3]] == [[], [2], [2, 3]]
    assert [s.advantage for s in chosen[:4]] == pytest.approx([1, 1, -1, -1])
    assert [s.base_logprob for s in chosen[:1]] == [[0.0, -1.0]]
    fewer, _ = select_sequences(*case(rewards), SelectConfig(tau=1.5, max_problems=2))
    assert {s.problem_id for s in fewer} == {"half", "odd"}
    whole, _ = select_sequences(*case(rewards), SelectConfig(tau=1.5, max_sequences=7))
    assert len(whole) == 4  # a second problem would exceed it; problems stay whole
    band, _ = select_sequences(*case(rewards), SelectConfig(tau=1.5, min_pass_rate=0.3))
    assert {s.problem_id for s in band} == {"half", "odd"}


def test_the_trim_comes_before_the_advantages_and_unverified_rollouts_are_left_out() -> None:
    rollouts, verdicts, scores = case({"a": [1.0, 0, 0, 0], "b": [1.0, None, 0, 1.0]})
    chosen, _ = select_sequences(rollouts, verdicts, scores, SelectConfig(tau=1, max_completion_tokens=4))
    a = [s.advantage for s in chosen if s.problem_id == "a"]
    assert a == pytest.approx([math.sqrt(2), -1 / math.sqrt(2), -1 / math.sqrt(2)])  # of three, not of four
    assert [s.sample for s in chosen if s.problem_id == "b"] == [0, 2]


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        (
            {"a": [1.0, 1.0], "b": [1.0]},
            {},
            "0 of 2 problems had mixed outcomes, 2 were always solved, 0 never; take harder",
        ),
        ({"a": [0.0, 0.0]}, {}, "0 of 1 .* 1 never; take easier problems"),
        ({"a": [1.0, 0.0]}, {"min_pass_rate": 0.6}, "1 of 1 .*leave none of the 1: widen them"),
        ({"a": [None, None]}, {}, "0 of 0 problems"),
    ],
)
def test_an_empty_selection_says_why(rewards: dict[str, list[float]], settings: dict[str, float], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        select_sequences(*case(rewards), SelectConfig(tau=1, **settings))  # type: ignore[arg-type]
