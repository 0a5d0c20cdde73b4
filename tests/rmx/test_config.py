"""Configuration errors name the key; overrides reach every section."""

from importlib.resources import files
from pathlib import Path

import pytest

from rmx.config import ConfigError, load_config

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
    with pytest.raises(ConfigError, match="the key 'train' stands twice"):
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
        ("rollouts.engine=openai", "expected base_url for engine openai"),
        ("rollouts.base_url='http://localhost/v1'", "expected base_url for engine openai"),
        ("evaluate={engine: openai, base_url: 'http://localhost/v1'}", "evaluate samples the base and the tuned model"),
        ("train={compile: true, activation_checkpointing: true}", "do not go together"),
        ("train.anchor_fraction=0", "train.anchor_fraction"),
        ("lora.dropout=1.0", "lora.dropout"),
    ],
)
def test_settings_that_contradict_each_other_are_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), [override])
