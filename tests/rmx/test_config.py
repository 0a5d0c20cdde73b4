"""Configuration errors name the key; overrides reach every section."""

from importlib.resources import files
from pathlib import Path

import pytest

from rmx.config import ConfigError
from rmx.config_file import load_config
from rmx.grading.problems import build_problems

MINIMAL = "run_dir: r\nmodel: {name: m}\nproblems: {sources: [{jsonl: p.jsonl}]}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_defaults_are_the_published_settings(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.lora.r, config.lora.alpha) == (32, 64)
    assert (config.train.learning_rate, config.train.warmup_steps, config.train.sequences_per_step) == (1e-4, 50, 8)
    assert (config.train.anchor_weight, config.select.tau, config.rollouts.samples) == (0.2, 1.4, 20)


def test_overrides_are_yaml_and_reach_into_lists(tmp_path: Path) -> None:
    overrides = ["train.learning_rate=3e-4", "problems.sources.0.split=train", "lora.targets=[o_proj]", "seed=7"]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.train.learning_rate == 3e-4
    assert config.problems.sources[0].split == "train"
    assert config.lora.targets == ["o_proj"]
    assert config.seed == 7


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ("trian: {epochs: 2}", "trian: unknown key"),
        ("train: {epohcs: 2}", "train.epohcs: unknown key"),
        ("train: {epochs: many}", "train.epochs: .*got 'many'"),
        ("train: {sequences_per_step: 1.5}", "train.sequences_per_step: .*got 1.5"),
        ("rollouts: {top_p: 1.5}", "rollouts.top_p: "),
        ("select: {tau: 1.0, budget: 0.1}", "select: .*exactly one of tau, quantile and budget"),
        ("prompt: {style: haiku}", "prompt.style: .*got 'haiku'"),
        ("seed: true", "seed: .*got True"),
        ("lora: {use_dora: true}", "lora: .*use_dora: DoRA .*is not supported; leave it out"),
        ("lora: {rank_patern: {q_proj: 4}}", "lora.rank_patern: unknown key.*rank_pattern"),
        ("lora: {rank_pattern: {q_proj: 0}}", "lora.rank_pattern.q_proj: .*got 0"),
        ("lora: {alpha_pattern: {q_proj: wide}}", "lora.alpha_pattern.q_proj: .*got 'wide'"),
        ("lora: {rank_pattern: {'q_(': 4}}", r"lora.rank_pattern.*'q_\(' is not a regular expression"),
        ("lora: {rank_pattern: {'(a|aa)+': 4}}", "lora.rank_pattern.*repeats a group"),
        ("lora: {alpha_pattern: {'.*.*.*.*': 4.0}}", "lora.alpha_pattern.*at most 3 repeats"),
    ],
)
def test_an_error_names_the_file_and_the_key(tmp_path: Path, extra: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"run.yaml: .*{named}"):
        load_config(write(tmp_path, MINIMAL + extra))


def test_a_partial_selection_keeps_the_published_gate_unless_another_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path, ["select.max_problems=20"]).select.tau == 1.4
    budgeted = load_config(path, ["select.budget=0.1"]).select
    assert (budgeted.tau, budgeted.budget) == (None, 0.1)
    with pytest.raises(ConfigError, match="exactly one of tau, quantile and budget"):
        load_config(path, ["select.tau=null"])


def test_a_key_that_stands_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="duplicate key 'train'"):
        load_config(write(tmp_path, MINIMAL + "train: {epochs: 2}\ntrain: {clip: 0.5}\n"))


def test_other_faults_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"not YAML"):
        load_config(write(tmp_path, "a: [1"))
    with pytest.raises(ConfigError, match=r"expected a mapping"):
        load_config(write(tmp_path, "- 1"))
    with pytest.raises(ConfigError, match=r"model.name: missing"):
        load_config(write(tmp_path, MINIMAL.replace("name: m", "dtype: float32")))
    for override in ("train.epochs", "=3", "seed.x=1"):
        with pytest.raises(ConfigError, match="--set"):
            load_config(write(tmp_path, MINIMAL + "seed: 1\n"), [override])


def test_the_demo_configuration_is_valid() -> None:
    config = load_config(Path(str(files("rmx") / "demo.yaml")))
    assert config.problems.evaluate_count >= 200
    assert config.evaluate.samples >= 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollouts.engine=openai", "expected base_url with engine openai"),
        ("rollouts.base_url='http://localhost/v1'", "expected base_url with engine openai"),
        ("evaluate={engine: openai, base_url: 'http://localhost/v1'}", "evaluate: .*expected tuned_model"),
        ("train={compile: true, activation_checkpointing: true}", "cannot be combined"),
        ("train.anchor_fraction=0", "train.anchor_fraction"),
        ("lora.dropout=1.0", "lora.dropout"),
    ],
)
def test_settings_that_contradict_each_other_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])


def test_relative_paths_start_at_the_file_and_overrides_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, here = tmp_path / "configs", tmp_path / "here"
    for made in (folder / "weights", here):
        made.mkdir(parents=True)
    path = write(folder, MINIMAL.replace("name: m", "name: weights").replace("p.jsonl", "data/p.jsonl"))
    monkeypatch.chdir(here)
    config = load_config(path)
    assert config.path(config.run_dir) == folder / "r"
    assert config.path(config.problems.sources[0].jsonl or "") == folder / "data/p.jsonl"
    assert config.located_model.name == str(folder / "weights")
    assert (config.run_dir, config.model.name) == ("r", "weights")  # as written: what a run's record is compared by
    (here / "own").mkdir()
    given = ["run_dir=r2", "problems.sources=[{jsonl: q.jsonl}]", "model={name: own}", "seed=3"]
    config = load_config(path, given)
    assert config.path(config.run_dir) == here / "r2"
    assert config.path(config.problems.sources[0].jsonl or "") == here / "q.jsonl"
    assert config.located_model.name == str(here / "own")
    assert load_config(path, ["model.name=a/hub-name"]).located_model.name == "a/hub-name"
    assert load_config(path, ["model.name=./absent"]).located_model.name == str(here / "absent")
    monkeypatch.chdir(folder)  # one and the same: nothing is rewritten
    assert load_config(Path("run.yaml"), ["run_dir=r2"]).run_dir == "r2"
    assert load_config(Path("run.yaml"), ["run_dir=r2"]).path("r2") == Path("r2")


@pytest.mark.parametrize("name", ["~/weights", "/weights", "package:weights", "weights"])
def test_other_names_of_models_stay(tmp_path: Path, name: str) -> None:
    config = load_config(write(tmp_path, MINIMAL.replace("name: m", f'name: "{name}"')))
    assert config.located_model.name == str(Path(name).expanduser())


def test_what_earlier_versions_put_into_the_current_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    path = write(tmp_path / "configs", MINIMAL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").touch()
    (tmp_path / "r").mkdir()
    assert load_config(path).path("p.jsonl") == Path("p.jsonl")
    assert load_config(path).path("r", "stages.json") == tmp_path / "configs/r"  # no run
    (tmp_path / "r/stages.json").touch()
    assert load_config(path).path("r", "stages.json") == Path("r")
    for name in ("p.jsonl", "r"):
        (tmp_path / "configs" / name).mkdir()
    (tmp_path / "configs/r/stages.json").touch()
    assert load_config(path).path("p.jsonl") == tmp_path / "configs/p.jsonl"
    assert load_config(path).path("r", "stages.json") == tmp_path / "configs/r"


def test_completions_are_evaluated_as_long_as_they_were_sampled(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path).evaluate.max_new_tokens == 8192
    config = load_config(path, ["rollouts.max_new_tokens=2048", "evaluate.samples=2"])
    assert (config.evaluate.max_new_tokens, config.evaluate.samples, config.evaluates_as_long) == (2048, 2, True)
    config = load_config(path, ["rollouts.max_new_tokens=2048", "evaluate.max_new_tokens=8192"])
    assert (config.evaluate.max_new_tokens, config.evaluates_as_long) == (8192, False)


def test_the_steps_of_a_training_are_bounded_by_its_settings(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path).most_steps == 150  # 1.2 epochs of 1000 sequences, 8 a step
    assert load_config(path, ["problems.train_count=10", "rollouts.samples=6", "train.epochs=1"]).most_steps == 8
    assert load_config(path, ["select.max_problems=2", "train.epochs=0.01"]).most_steps == 1


EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_configurations_with_problems_enough(path: Path) -> None:
    config = load_config(path)
    problems = build_problems(config.problems, config.seed)
    counts = [sum(p.split == split for p in problems) for split in ("train", "evaluate")]
    assert counts == [config.problems.train_count, config.problems.evaluate_count]


def test_there_are_examples() -> None:
    assert EXAMPLES
