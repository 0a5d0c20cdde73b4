"""The recipe of the GRPO baseline on the tiny model: rewards, counted tokens, an adapter that rmx judges."""

import json
from pathlib import Path

import grpo_baseline
import pytest
from test_pipeline import changed, write_yaml

from rmx.analyses.benchmarks import HELD_OUT, run_benchmarks
from rmx.runs.pipeline import Run


def test_rewards_are_the_runs_verdicts(finished: Run) -> None:
    verifier = grpo_baseline.Verifier(finished)
    rollouts = finished.rollouts()[:30]
    rewards = verifier(
        [r.text for r in rollouts], [r.completion_ids for r in rollouts], [r.problem_id for r in rollouts]
    )
    assert rewards == [v.reward for v in finished.verdicts()[:30]] and len(set(rewards)) == 2
    assert verifier.tokens == sum(len(r.completion_ids) for r in rollouts)


@pytest.mark.thorough
def test_it_trains_and_its_adapter_is_judged(finished: Run, tmp_path: Path) -> None:
    config, out = write_yaml(finished.config, tmp_path / "run.yaml"), tmp_path / "grpo"
    options = ["--steps", "2", "--generations", "4", "--learning-rate", "0.5"]
    cost = grpo_baseline.main([str(config), str(out), *options])
    assert json.loads((out / "cost.json").read_text()) == cost
    assert len(cost["rewards"]) == 2 and 2 * 4 <= cost["generated_tokens"] <= 2 * 4 * 4
    run = Run(changed(finished.config, evaluate={"samples": 1}))
    (result,) = run_benchmarks(run, [HELD_OUT], adapter=out, limit=3)
    assert result.gain is not None
