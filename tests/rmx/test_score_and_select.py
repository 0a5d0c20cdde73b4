"""Scores against full logits; the files; selection, advantages and the gate."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rmx.artefacts import ArtefactError
from rmx.config import ScoreConfig, SelectConfig
from rmx.models.model import CausalLM, ModelError
from rmx.records import Rollout, Scores, Verdict
from rmx.training.score import Keep, ScoreStore, affordable, score_rollouts
from rmx.training.select import (
    SelectionError,
    advantages,
    decisions,
    describe_gate,
    gate_threshold,
    select_sequences,
)


def rollout(problem: str, sample: int, prompt: list[int], completion: list[int]) -> Rollout:
    return Rollout(problem, sample, prompt, completion, "stop", "")


ROLLOUTS = [
    rollout("a", 0, [1, 5, 6], [7, 8, 2]),
    rollout("a", 1, [1, 5, 6], [9]),
    rollout("b", 0, [1, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 2]),
]


def test_scores_are_those_of_full_logits(tiny: CausalLM) -> None:
    for r, (s, _) in zip(ROLLOUTS, score_rollouts(tiny, ROLLOUTS, top_k=3), strict=True):
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
    for (a, _), (b, _) in zip(together, alone, strict=True):
        torch.testing.assert_close(a.entropy, b.entropy, rtol=1e-5, atol=1e-5)
        assert (a.problem_id, a.sample) == (b.problem_id, b.sample)


def test_an_empty_completion_has_no_scores(tiny: CausalLM) -> None:
    (scores, base), *_ = score_rollouts(tiny, [rollout("a", 0, [1, 5], [])], keep=Keep("completion", 1))
    assert scores.entropy.shape == (0,)
    assert base.hidden.shape == (0, 32)


def test_a_broken_model_is_noticed(tiny: CausalLM) -> None:
    with torch.no_grad():
        tiny.weight[3] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        score_rollouts(tiny, ROLLOUTS)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("rows", ["none", "completion", "all"])
def test_kept_states_are_those_of_the_model(tiny: CausalLM, rows: str, layer: int) -> None:
    keep = Keep(rows, layer)  # type: ignore[arg-type]
    total = 0
    for r, (_, base) in zip(ROLLOUTS, score_rollouts(tiny, ROLLOUTS, keep=keep), strict=True):
        out = tiny.model(torch.tensor([r.prompt_ids + r.completion_ids]), output_hidden_states=True)
        P, T = len(r.prompt_ids), len(r.completion_ids)
        first = {"none": P + T - 1, "completion": P - 1, "all": 0}[rows]
        final = tiny.hidden(torch.tensor([r.prompt_ids + r.completion_ids]), use_cache=False)[0]
        torch.testing.assert_close(base.hidden, final[first:-1], rtol=1e-5, atol=1e-5)
        assert (base.entry is None) == (layer == 0)
        if base.entry is not None:
            torch.testing.assert_close(base.entry, out.hidden_states[1][0], rtol=1e-5, atol=1e-5)
        total += base.hidden.nbytes + (0 if base.entry is None else base.entry.nbytes)
    assert total == keep.bytes(ROLLOUTS, 32, torch.float32)


KEEP = Keep("completion", 1)


def store(path: Path, **origin: object) -> ScoreStore:
    return ScoreStore(path, ROLLOUTS, 10, {"weights": "w", "keep": ["completion", 1], **origin})


def test_shards_round_trip_and_only_the_absent_and_the_torn_are_made_again(
    tiny: CausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ScoreConfig(top_k=2, token_budget=8)
    first = store(tmp_path)
    assert [list(members) for members in first.shards] == [[0, 1], [2]]
    heard: list[int] = []
    assert first.fill(tiny, settings, KEEP, lambda done, _: heard.append(done)) == 2
    assert heard == [0, 2, 3]
    expected = score_rollouts(tiny, ROLLOUTS[:2], top_k=2, token_budget=8, keep=KEEP)
    expected += score_rollouts(tiny, ROLLOUTS[2:], top_k=2, token_budget=8, keep=KEEP)
    again = store(tmp_path)
    for (s, base), got, r in zip(expected, again.scores(), ROLLOUTS, strict=True):
        kept = again.states(r.problem_id, r.sample, KEEP)
        assert all(torch.equal(getattr(s, n), getattr(got, n)) for n in ("entropy", "logprob", "lse", "topk_ids"))
        assert torch.equal(kept.hidden, base.hidden)
        assert kept.entry is not None
        assert torch.equal(kept.entry, base.entry)
    contents = [load_file(again.file(n)) for n in (0, 1)]
    whole = again.file(1).read_bytes()
    again.file(1).unlink()  # and not written over: it is mapped above
    again.file(1).write_bytes(whole[:-5])
    torn = store(tmp_path)
    with pytest.raises(ArtefactError, match=r"shard-00001.safetensors: cannot be read"):
        torn.scores()
    then = again.file(0).stat().st_mtime_ns
    assert store(tmp_path).fill(tiny, settings, KEEP) == 1
    for n in (0, 1):
        made = load_file(again.file(n))
        assert made.keys() == contents[n].keys()
        assert all(torch.equal(made[name], tensor) for name, tensor in contents[n].items())  # bit for bit
    assert again.file(0).stat().st_mtime_ns == then
    monkeypatch.setattr("rmx.training.score.score_rollouts", lambda *_, **__: pytest.fail("nothing is missing"))
    assert store(tmp_path).fill(tiny, settings, KEEP) == 0


def test_shards_of_something_else_are_named_never_read(tiny: CausalLM, tmp_path: Path) -> None:
    store(tmp_path).fill(tiny, ScoreConfig(), KEEP)
    with pytest.raises(ArtefactError, match=r"shard-00000.safetensors: belongs to another weights: 'w', not 'v'"):
        store(tmp_path, weights="v").scores()
    other = ScoreStore(tmp_path, ROLLOUTS[:2], 10, {"weights": "w", "keep": ["completion", 1]})
    with pytest.raises(ArtefactError, match="belongs to another rollouts"):
        other.missing()
    other.discard_others()
    assert not list(tmp_path.glob("*.safetensors"))
    with pytest.raises(ArtefactError, match=r"shard-00000.safetensors: cannot be read"):
        other.scores()


def test_the_budget_and_the_disk_decide_what_is_kept(tiny: CausalLM, tmp_path: Path) -> None:
    need = KEEP.bytes(ROLLOUTS, 32, torch.float32)
    assert affordable(KEEP, ROLLOUTS, tiny, ScoreConfig(), tmp_path)[0] == KEEP
    keep, said = affordable(KEEP, ROLLOUTS, tiny, ScoreConfig(cache_gib=(need - 1) / 2**30), tmp_path)
    assert keep == Keep()
    assert "over score.cache_gib" in said
    assert affordable(KEEP, ROLLOUTS, tiny, ScoreConfig(cache_gib=need / 2**30), tmp_path)[0] == KEEP


def test_advantages_by_hand() -> None:
    # mean 1/4, population standard deviation sqrt(3)/4
    assert advantages([1, 0, 0, 0], 2.5) == pytest.approx([math.sqrt(3), *[-1 / math.sqrt(3)] * 3])
    assert advantages([1, *[0] * 99], 2.5)[0] == 2.5
    assert advantages([1, 1], 2.5) == [0, 0]


def test_the_gate_is_strict_and_a_budget_is_met() -> None:
    entropy = np.array([0.1, 0.5, 0.5, 2.0], dtype=np.float32)
    assert gate_threshold(entropy, entropy, SelectConfig(tau=0.5)) == 0.5
    assert (entropy > gate_threshold(entropy, entropy, SelectConfig(budget=0.25))).sum() == 1
    assert (entropy > gate_threshold(entropy, entropy, SelectConfig(budget=1.0))).sum() == 4
    many = np.random.default_rng(0).gamma(1.0, size=10_001).astype(np.float32)
    assert (many > gate_threshold(many, many[:10], SelectConfig(budget=0.03))).sum() == 300
    assert gate_threshold(many[:10], many, SelectConfig(quantile=0.9)) == pytest.approx(np.sort(many)[9000])


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 9))
def test_control_gates_take_as_many_tokens(values: list[int], tau: int) -> None:
    entropy = np.array(values, dtype=np.float32)
    gates = {g: decisions(entropy, tau, g, np.random.default_rng(3)) for g in ("entropy", "random", "lowest", "all")}
    assert gates["entropy"] == [t for t, h in enumerate(values) if h > tau]
    count = len(gates["entropy"])
    for name in ("random", "lowest"):
        assert len(set(gates[name])) == count and gates[name] == sorted(gates[name])
    assert sorted(values[t] for t in gates["lowest"]) == sorted(values)[:count]
    assert gates["all"] == list(range(len(values)))
    assert gates["random"] == decisions(entropy, tau, "random", np.random.default_rng(3))


def test_random_gates_differ_by_seed_and_rollout_and_hit_every_token_alike() -> None:
    scored = case({"a": [1.0, 0.0] * 4})
    config = SelectConfig(tau=1.5, gate="random")
    first, _ = select_sequences(*scored, config, seed=0)
    second, _ = select_sequences(*scored, config, seed=1)
    assert [s.decision_tokens for s in first] != [s.decision_tokens for s in second]
    hits = np.zeros(6)
    for n in range(3000):
        hits[decisions(np.arange(6.0), 2.5, "random", np.random.default_rng([n, 0]))] += 1
    np.testing.assert_allclose(hits / 3000, 0.5, atol=0.04)


def test_shuffled_advantages_stay_with_their_problem() -> None:
    scored = case({"a": [1.0, 0, 0, 0, 0, 0], "b": [1.0, 1.0, 1.0, 0, 0, 0]})
    plain, _ = select_sequences(*scored, SelectConfig(tau=1.5))
    shuffled = [select_sequences(*scored, SelectConfig(tau=1.5, shuffle_advantages=True), seed)[0] for seed in range(9)]
    assert len({tuple(s.advantage for s in found) for found in shuffled}) > 5
    for found in shuffled:
        assert [s.decision_tokens for s in found] == [s.decision_tokens for s in plain]
        for problem in "ab":
            both = ([s.advantage for s in side if s.problem_id == problem] for side in (plain, found))
            assert sorted(next(both)) == sorted(next(both))


def test_the_gate_is_described_on_all_scored_tokens() -> None:
    rollouts, verdicts, scores = case({"a": [1.0, 0.0], "b": [0.0, 0.0]})
    chosen, tau = select_sequences(rollouts, verdicts, scores, SelectConfig(tau=0.5))
    gate = describe_gate(chosen, np.concatenate([s.entropy.numpy() for s in scores]), tau)
    assert (gate.gated, gate.tokens, sum(gate.counts)) == (3, 5, 10)
    assert gate.edges[-1] == 2 and gate.quantiles[0.5] == 0.5 + 0.5


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
