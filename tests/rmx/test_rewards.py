"""Reward functions in Python: both forms, in workers that can be killed, and in a whole run."""

from pathlib import Path
from typing import Any

import pytest
from test_pipeline import changed

from rmx.artefacts import read_records, write_records
from rmx.config import Config
from rmx.grading.metrics import accuracy, pass_rates
from rmx.grading.rewards import PythonReward, RewardError
from rmx.grading.verify import verify
from rmx.records import Problem, Rollout, Verdict
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError

PROBLEM = Problem("p", "What is 2 + 2?", "4", "sums")
CODE = """
import time
def share(question, completion, answer):
    assert question == "What is 2 + 2?"
    return sum(c == answer for c in completion.split()) / max(1, len(completion.split())), "share of right words"
def exact(question, completion, answer):
    return completion == answer
def trl(completions, answer, **kwargs):
    assert kwargs == {"prompts": ["What is 2 + 2?"], "question": ["What is 2 + 2?"], "category": ["sums"],
                      "problem_id": ["p"]}
    return [1.0 if a in c else None for c, a in zip(completions, answer)]
def trl_plain(completions, answer): return [float(c == a) for c, a in zip(completions, answer)]
def slow(question, completion, answer):
    time.sleep(60 if completion == "4" else 0)
    return 0
def hungry(question, completion, answer): return len(bytearray(1 << 34))
def raises(question, completion, answer): return {}["nothing"]
def too_large(question, completion, answer): return 7
def not_a_number(question, completion, answer): return float("nan")
def words(question, completion, answer): return "good"
def pair(question, completion, answer): return 1.0, 2.0
def short(completions, **kwargs): return []
constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(CODE)
    return path


def judged(name: str, *texts: str, timeout_s: float = 30.0, chat: bool = False) -> list[tuple[Any, ...]]:
    rollouts = [Rollout("p", n, [1], [2], "stop", text) for n, text in enumerate(texts)]
    found = verify([PROBLEM], rollouts, workers=1, timeout_s=timeout_s, judge=PythonReward(name, chat))
    return [(v.outcome, v.score, v.reason) for v in found]


def test_the_form_of_three_texts(file: Path) -> None:
    assert judged(f"{file}:share", "4", "4 5", "") == [
        ("right", 1.0, "share of right words"),
        ("wrong", 0.5, "share of right words"),
        ("wrong", 0.0, "share of right words"),
    ]
    assert judged(f"{file}:exact", "4", "5") == [("right", 1.0, ""), ("wrong", 0.0, "reward 0")]


def test_the_form_of_trl(file: Path) -> None:
    assert judged(f"{file}:trl_plain", "4", "5") == [("right", 1.0, ""), ("wrong", 0.0, "reward 0")]
    assert judged(f"{file}:trl", "it is 4", "5") == [("right", 1.0, ""), ("crash", None, f"{file}:trl gave no reward")]


def test_a_function_of_trl_itself_reads_chats() -> None:
    name = "trl.rewards:think_format_reward"
    assert judged(name, "<think>\n2 + 2\n</think>\n4", "4", chat=True) == [
        ("right", 1.0, ""),
        ("wrong", 0.0, "reward 0"),
    ]


def test_what_it_does_to_its_worker_is_an_outcome(file: Path) -> None:
    late, fine = judged(f"{file}:slow", "4", "5", timeout_s=2.0)
    assert late == ("timeout", None, "no verdict within 2 s") and fine[:2] == ("wrong", 0.0)
    assert judged(f"{file}:hungry", "4")[0][0] == "crash"
    assert judged(f"{file}:raises", "4") == [("crash", None, "KeyError: 'nothing'")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_large", "expected a number from 0 to 1, got 7"),
        ("not_a_number", "expected a number from 0 to 1, got nan"),
        ("words", "expected a number from 0 to 1, got 'good'"),
        ("pair", r"expected \(reward, reason\), got \(1.0, 2.0\)"),
        ("short", "expected a list with a reward for each completion"),
        ("constant", "constant is not a function"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_wrong_function_stops_the_run(file: Path, name: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        judged(f"{file}:{name}", "4")


@pytest.mark.parametrize("name", ["no.such.module:f", "/nowhere/rewards.py:f", "rewards", "a:b c", ":f"])
def test_a_wrong_name_says_the_form(name: str) -> None:
    with pytest.raises(RewardError, match=r"expected `package.module:function` or `FILE.py:function`"):
        PythonReward(name).prepare()


def test_parts_of_a_reward_count_in_rates_and_are_kept(tmp_path: Path) -> None:
    verdicts = [Verdict("p", 0, "wrong", None, "", 0.5), Verdict("p", 1, "right", "4")]
    path = tmp_path / "verdicts.jsonl"
    write_records(path, verdicts, {})
    assert '"score": 0.5' in path.read_text() and path.read_text().count("score") == 1  # as before where there is none
    assert read_records(path, Verdict)[1] == verdicts
    rollouts = [Rollout("p", n, [1], [2], "stop", "4") for n in range(2)]
    assert pass_rates([PROBLEM], verdicts) == {"p": 0.75}
    assert accuracy([PROBLEM], rollouts, verdicts, draws=10, seed=0).pass_at_1.mean == 0.75


@pytest.mark.thorough
def test_a_run_trains_on_parts_of_a_reward_and_notices_a_change(tiny_config: Config, tmp_path: Path) -> None:
    file = tmp_path / "rewards.py"
    file.write_text("def reward(question, completion, answer):\n    return len(set(completion.split())) / 8\n")
    config = changed(tiny_config, verify={"reward": f"{file}:reward"}).model_copy(
        update={"run_dir": str(tmp_path / "r")}
    )
    run = Run(config)
    run.run()
    rewards = {s.reward for s in run.training_set()}
    assert len(rewards) > 2 and all(0 <= r <= 1 for r in rewards)
    assert all(v.score is not None for v in run.verdicts())
    file.write_text(file.read_text().replace("/ 8", "/ 9"))
    with pytest.raises(RunError, match="stage 'verify' was run with other settings: reward file"):
        Run(config).run()
