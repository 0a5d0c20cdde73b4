"""The best of several candidates: which steps, which one, from which problems, and after a kill."""

import json
import shutil
from pathlib import Path

import pytest
from test_pipeline import changed

from rmx.config import Config
from rmx.grading.metrics import EvaluationError
from rmx.models.lora_layers import Adapter
from rmx.records import Interval, Problem, Rollout, Verdict
from rmx.runs import training_stage
from rmx.runs.choose import Candidate, best, candidate_path, candidate_steps, saved_steps
from rmx.runs.merge import merge
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError
from rmx.runs.stages import STAGES


@pytest.fixture
def config(tiny_config: Config) -> Config:
    problems = {"train_count": 20, "choose_count": 8, "evaluate_count": 10}
    return changed(tiny_config, train={"epochs": 2, "candidates": 3}, problems=problems)


def test_candidates_are_equally_distant_and_end_with_the_last_step() -> None:
    assert candidate_steps(40, 4) == [10, 20, 30, 40]
    assert candidate_steps(40, 1) == [40]
    assert candidate_steps(7, 3) == [2, 5, 7]
    assert candidate_steps(2, 5) == [1, 2]  # no more than there are steps


def test_the_highest_pass_rate_wins_and_of_equal_ones_the_earliest() -> None:
    found = [Candidate(step, Interval(mean, 0, 1)) for step, mean in ((10, 0.2), (20, 0.4), (30, 0.4))]
    assert best(found).step == 20


@pytest.mark.thorough
def test_the_best_candidate_becomes_the_adapter(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(config)
    judged: list[set[str]] = []
    judge = Run.judge

    def watched(self: Run, title: str, problems: list[Problem], found: list[Rollout]) -> list[Verdict]:
        verdicts = judge(self, title, problems, found)
        if not title.startswith("step"):
            return verdicts
        judged.append({p.problem_id for p in problems})
        right = title == f"step-{saved_steps(self.dir)[1]:05d}"  # the second of three, whatever they say
        return [Verdict(v.problem_id, v.sample, "right" if right else "wrong", None) for v in verdicts]

    monkeypatch.setattr(Run, "judge", watched)
    run.run()
    steps = saved_steps(run.dir)
    assert len(steps) == 3
    assert steps[-1] == run.history()[-1].step
    choose = {p.problem_id for p in run.problems("choose")}
    assert judged == [choose] * 3 and len(choose) == 8
    assert not choose & {p.problem_id for p in (*run.problems("train"), *run.problems("evaluate"))}
    choice = json.loads(run.path("choice.json").read_text())
    assert choice["step"] == steps[1] and choice["prompt"] == run.meta()["prompt"]
    assert [c["pass_at_1"]["mean"] for c in choice["candidates"]] == [float(step == steps[1]) for step in steps]
    weights = "adapter_model.safetensors"
    assert run.path(f"adapter/{weights}").read_bytes() == (candidate_path(run.dir, steps[1]) / weights).read_bytes()
    assert json.loads(run.path("adapter/rmx.json").read_text()) == {"prompt": run.meta()["prompt"], "dtype": "float32"}
    assert not run.path("choosing").exists()


@pytest.mark.thorough
def test_candidates_of_an_interrupted_training_are_those_of_an_undisturbed_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = changed(config, train={"checkpoint_seconds": 0.0})
    whole = Run(config.model_copy(update={"run_dir": str(tmp_path / "whole")}))
    whole.run()
    run = Run(config)
    for stage in list(STAGES)[:5]:
        run.execute(stage)
    save = training_stage._save

    def full(run: Run, adapter: Adapter, path: Path) -> None:
        if path == candidate_path(run.dir, second):
            raise OSError(28, "No space left on device", str(path))
        save(run, adapter, path)

    second = saved_steps(whole.dir)[1]
    monkeypatch.setattr(training_stage, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        run.execute("train")
    monkeypatch.undo()
    Run(config).run()
    assert saved_steps(run.dir) == saved_steps(whole.dir)
    for step in saved_steps(run.dir):
        files = (candidate_path(r.dir, step) / "adapter_model.safetensors" for r in (run, whole))
        assert next(files).read_bytes() == next(files).read_bytes()
    assert run.path("choice.json").read_bytes() == whole.path("choice.json").read_bytes()


def test_one_candidate_needs_no_choice(finished: Run) -> None:
    assert json.loads(finished.path("choice.json").read_text())["candidates"] == []
    assert not finished.path("candidates").exists()


def test_candidates_without_problems_to_choose_on_are_refused(tiny_config: Config) -> None:
    with pytest.raises(ValueError, match=r"train\.candidates > 1 needs problems\.choose_count > 0"):
        changed(tiny_config, train={"candidates": 2})


@pytest.mark.thorough
def test_an_adapter_that_is_not_chosen_yet_is_not_merged(config: Config, tmp_path: Path) -> None:
    run = Run(config)
    for stage in list(STAGES)[:6]:
        run.execute(stage)
    with pytest.raises(RunError, match="stage 'choose' is not done"):
        merge(run, tmp_path / "merged")


@pytest.mark.thorough
def test_an_absent_candidate_is_named(config: Config) -> None:
    run = Run(config)
    run.run()
    step = saved_steps(run.dir)[1]
    shutil.rmtree(candidate_path(run.dir, step))
    with pytest.raises(EvaluationError, match=f"the candidate of step {step} is not in .*run `rmx train` with --again"):
        run.execute("choose", again=True)
