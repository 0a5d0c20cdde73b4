"""Each variant changes one thing, on the run's own rollouts; what is done stays; refusals; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import command
from rich.console import Console
from test_pipeline import changed, write_yaml

from rmx.analyses.ablate import OWN, TRAINED, Ablation, Options, Outcome, ablate, tables, variants
from rmx.config import Config
from rmx.errors import AnalysisError, Interrupted
from rmx.models.lora import load_adapter
from rmx.records import Interval
from rmx.runs.evaluate import Lengths
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError


@pytest.fixture
def run(finished: Run) -> Run:
    return finished


def part(run: Run, name: str, seed: int = 0) -> Run:
    """The run of one variant, as ``ablate`` left it."""
    folder = run.path("ablate") / f"{name}-{seed}"
    tree = run.config.model_dump()
    for section, settings in variants(0.2, 0.5)[name].changes.items():
        tree[section] |= settings
    return Run(Config.model_validate({**tree, "run_dir": str(folder), "training_seed": seed}))


@pytest.mark.thorough
def test_every_variant_changes_one_thing(run: Run) -> None:
    before = {path: path.read_bytes() for path in run.dir.rglob("*") if path.is_file()}
    result = ablate(run, run.path("ablate"))
    assert all(path.read_bytes() == then for path, then in before.items())
    assert list(result.outcomes) == list(variants(0.2, 0.5))
    own = {(s.problem_id, s.sample): s for s in run.training_set()}
    entropy = {(s.problem_id, s.sample): s.entropy.numpy() for s in run.scores()}
    gates = {}
    for name in list(result.outcomes)[1:]:
        made = part(run, name)
        assert made.rollouts() == run.rollouts() and list(made.stages())[-1] == "evaluate"
        sequences = made.training_set()
        expected = [(*key, s.reward) for key, s in own.items() if name != "rft" or s.reward == 1]
        assert [(s.problem_id, s.sample, s.reward) for s in sequences] == expected
        shuffled = [s.advantage for s in sequences] != [own[s.problem_id, s.sample].advantage for s in sequences]
        assert shuffled == (name in ("shuffled", "rft"))
        gates[name] = {(s.problem_id, s.sample): s.decision_tokens for s in sequences}
        count = sum(map(len, gates[name].values()))
        assert result.outcomes[name].gated == count / sum(len(s.completion_ids) for s in sequences)
        assert result.outcomes[name].decisions == pytest.approx(count / len(sequences))
        assert len(made.history()) == len(run.history())  # rft too: as many steps
    for key in own:
        h, taken = entropy[key], gates["budget"][key]
        assert len(gates["random"][key]) == len(gates["lowest"][key]) == len(taken)
        assert gates["all"][key] == list(range(len(h)))
        rest = sorted(set(range(len(h))) - set(taken))
        assert not taken or not rest or h[taken].min() > h[rest].max()
        low = gates["lowest"][key]
        assert sorted(h[low]) == sorted(h)[: len(low)]
        for name in ("shuffled", "positives", "r8-o", "r32-qkvo"):
            assert gates[name][key] == own[key].decision_tokens
    assert gates["random"] != gates["budget"] != gates["quantile"]
    for gate in ("random", "lowest", "all"):
        assert gates[f"{gate}-mass"] == gates[gate]
        mass = {name: result.outcomes[name].gradient for name in ("budget", gate, f"{gate}-mass")}
        assert mass[f"{gate}-mass"] == pytest.approx(mass["budget"], rel=1e-6) != mass[gate]
    for name, r, targets in (("r8-o", 8, {"o_proj"}), ("r32-qkvo", 32, {"q_proj", "k_proj", "v_proj", "o_proj"})):
        adapter = load_adapter(part(run, name).lm.model, part(run, name).path("adapter"))
        assert (adapter.config.r, set(adapter.config.targets)) == (r, targets)
        assert adapter.size == result.outcomes[name].parameters
    assert json.loads(part(run, "positives").path("stages.json").read_text())["train"]["settings"]["train"][
        "negative_weight"
    ] == 0  # fmt: skip


@pytest.mark.thorough
def test_differences_are_paired_and_averaged_over_trainings(run: Run) -> None:
    result = ablate(run, run.path("ablate"), ["own", "random", "budget"], Options(seeds=2))
    assert result.training_seeds == [0, 1]
    problems = [p.problem_id for p in run.problems("evaluate")]

    def rates(own: Run, side: str = "tuned") -> np.ndarray:
        found = {p: [v.reward for v in own.evaluated(side)[1] if v.problem_id == p] for p in problems}
        return np.array([np.mean(found[p]) for p in problems])  # type: ignore[arg-type]

    means = {name: (rates(part(run, name, 0)) + rates(part(run, name, 1))) / 2 for name in ("random", "budget")}
    means[OWN] = (rates(run) + rates(part(run, OWN, 1))) / 2
    base = rates(run, "base")
    for name, mean in means.items():
        found = result.outcomes[name]
        assert found.gain.mean == pytest.approx((mean - base).mean())
        assert np.mean(found.seeds) == pytest.approx(found.gain.mean)
        against = {"random": "budget", "budget": OWN}.get(name)
        if against is not None:
            assert found.difference is not None and found.against == against
            assert found.difference.mean == pytest.approx((mean - means[against]).mean())
    assert result.outcomes[OWN].difference is None
    random = [part(run, "random", n).training_set()[0].decision_tokens for n in (0, 1)]
    whole = [[s.decision_tokens for s in part(run, "random", n).training_set()] for n in (0, 1)]
    assert len(random[0]) == len(random[1]) and whole[0] != whole[1]
    assert [s.decision_tokens for s in part(run, OWN, 1).training_set()] == [
        s.decision_tokens for s in run.training_set()
    ]


@pytest.mark.thorough
def test_what_is_done_stays_and_what_changed_is_done_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    execute = Run.execute

    def watched(self: Run, stage: str, *rest: object) -> None:
        made.append(f"{self.dir.name} {stage}")
        if len(made) == stop:
            raise KeyboardInterrupt
        execute(self, stage, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "execute", watched)

    def again(source: Run, **options: object) -> Ablation:
        made.clear()
        return ablate(source, run.path("ablate"), ["random", "all"], Options(**options))  # type: ignore[arg-type]

    stop = 6
    with pytest.raises(Interrupted):
        again(run)
    assert made == [*(f"random-0 {stage}" for stage in TRAINED), "all-0 select", "all-0 train"]
    stop = 0
    whole = again(run)
    assert made == [f"all-0 {stage}" for stage in TRAINED[1:]]
    assert again(run) == whole and made == []
    again(run, budget=0.3)
    assert made == [f"random-0 {stage}" for stage in TRAINED]
    other = Run(changed(run.config, train={"learning_rate": 0.02}))
    execute(other, "train", again=True)
    for stage in TRAINED[2:]:
        execute(other, stage)
    again(other, budget=0.3)
    assert made == [f"{name}-0 {stage}" for name in ("random", "all") for stage in TRAINED[1:]]
    redone = Run(changed(other.config, rollouts={"temperature": 0.9}))
    redone.dir.joinpath("stages.json").write_text("{}")
    redone.run()
    again(redone, budget=0.3)
    assert made == [f"{name}-0 {stage}" for name in ("random", "all") for stage in TRAINED]


def test_what_cannot_be_done_is_refused(tiny_config: Config, tmp_path: Path) -> None:
    run = Run(tiny_config)
    with pytest.raises(RunError, match=r"stage 'problems' is not done: run `rmx problems` first"):
        ablate(run, tmp_path)
    with pytest.raises(
        AnalysisError, match=r"unknown variant 'fullseq'; expected one or more of own, quantile, budget"
    ):
        ablate(run, tmp_path, ["fullseq"])
    with pytest.raises(AnalysisError, match=r"budget and quantile between 0 and 1, got 1\.2"):
        ablate(run, tmp_path, options=Options(budget=1.2))
    with pytest.raises(AnalysisError, match=r"shares between 0 and 1, got 2\.0"):
        ablate(run, tmp_path, options=Options(shares=(0.1, 2.0)))
    with pytest.raises(AnalysisError, match="at least one new token, got 0"):
        ablate(run, tmp_path, options=Options(max_new_tokens=0))
    with pytest.raises(AnalysisError, match="at least one seed, got 0"):
        ablate(run, tmp_path, options=Options(seeds=0))


def test_a_run_that_is_a_control_itself_or_was_imported(run: Run, tmp_path: Path) -> None:
    for name in ("quantile", "budget"):
        assert variants(0.2, 0.5)[name].changes["select"]["gate"] == "entropy"
    stages = json.loads(run.path("stages.json").read_text())
    stages["select"]["imported"] = "elsewhere"
    run.path("stages.json").write_text(json.dumps(stages))
    with pytest.raises(AnalysisError, match="the training set was imported"):
        ablate(run, tmp_path)


def test_the_table_fits_a_terminal() -> None:
    interval = Interval(-0.123, -0.234, -0.012)
    length = Interval(8123.4, 8000.1, 8190.5)
    cut = Lengths(length, length, 0.123, 0.456, 0.5, interval)
    more = (12345.67, 1.2345, 12_345_678.0, 54_321.0, cut)
    outcome = Outcome({}, 1.0, 8, 0.0137, interval, interval, "entropy-0.5", interval, [0.1], *more)
    names = dict.fromkeys(variants(0.2, 0.5), outcome)
    console = Console(width=80, record=True)
    for table in tables(Ablation(200, 3, 8192, interval, 0.2, 0.5, [0], names, "")):
        console.print(table)
    text = console.export_text()
    assert "…" not in text and text.count("-0.123 [-0.234, -0.012] entropy-0.5") == len(names)


@pytest.mark.thorough
def test_the_command_writes_table_json_and_picture(run: Run, tmp_path: Path) -> None:
    path = write_yaml(run.config, tmp_path / "run.yaml")
    done = command("ablate", path, "--only", "own", "--only", "shuffled", "--only", "r8-o")
    assert done.returncode == 0, done.stderr
    for words in ("shuffled", "r8-o", "difference to", "own"):
        assert words in done.stdout
    assert list(json.loads(run.path("ablate/ablate.json").read_text())["outcomes"]) == ["own", "shuffled", "r8-o"]
    assert run.path("ablate/ablate.png").read_bytes()[:4] == b"\x89PNG"
