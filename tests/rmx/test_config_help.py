"""The first configuration and the JSON schema: complete, and what the settings themselves say."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from rmx import config_help
from rmx.cli import app
from rmx.config import Config
from rmx.config_file import load_config

RUN = CliRunner()


def init(*arguments: str, **options: Any) -> Any:
    return RUN.invoke(app, ["init", *arguments], **options)


def test_a_first_configuration_has_the_defaults(tmp_path: Path) -> None:
    out = tmp_path / "new" / "config.yaml"
    done = init(str(out), "--model", "org/model", "--dataset", "openai/gsm8k", "--answer", "answer: after ####")
    assert done.exit_code == 0 and f"rmx run {out}" in done.output.replace("\n", "")
    loaded = load_config(out)
    (source,) = loaded.problems.sources
    assert (source.dataset, source.answer) == ("openai/gsm8k", "answer: after ####")
    given = {"run_dir": "runs/first", "model": {"name": "org/model"}, "problems": {"sources": [source.model_dump()]}}
    assert loaded.model_dump() == Config.model_validate(given).model_dump()
    text = out.read_text()
    for line in text.splitlines()[1:]:
        assert "#" in line or line.endswith(":") or "sources" in line or line.startswith("    - "), line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --model: there is no terminal on which to ask for it"),
        (["--model", "m"], "expected --dataset, --jsonl or --task"),
        (["--model", "m", "--task", "gcd", "--jsonl", "x"], "exactly one of jsonl, task and dataset"),
        (["--model", "m", "--task", "gcd", "--answer", "x"], "answer is a setting of a dataset"),
    ],
)
def test_what_is_missing_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    out = tmp_path / "config.yaml"
    done = init(str(out), *arguments)
    assert done.exit_code == 1 and message in str(done.exception) and not out.exists()


def test_a_file_is_not_replaced_without_force(tmp_path: Path) -> None:
    out = tmp_path / "config.yaml"
    out.write_text("mine")
    given = (str(out), "--model", "m", "--task", "gcd")
    assert "--force replaces it" in str(init(*given).exception) and out.read_text() == "mine"
    assert init(*given, "--force").exit_code == 0 and load_config(out).problems.sources[0].task == "gcd"


def test_on_a_terminal_it_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmx.commands import start

    answers = iter(["org/model", "mine.jsonl"])
    monkeypatch.setattr(start.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(start.typer, "prompt", lambda _: next(answers))
    start.init_command(tmp_path / "config.yaml")
    loaded = load_config(tmp_path / "config.yaml")
    assert loaded.model.name == "org/model" and loaded.problems.sources[0].jsonl == "mine.jsonl"


def test_every_setting_has_a_meaning_in_the_schema() -> None:
    made = json.loads(RUN.invoke(app, ["schema"]).output)
    parts = {"Config": made, **made["$defs"]}
    without = [
        f"{name}.{field}"
        for name, part in parts.items()
        for field, described in part["properties"].items()
        if "description" not in described and "$ref" not in described and name != "Config"
    ]
    assert not without
    rate = parts["TrainConfig"]["properties"]["learning_rate"]["description"]
    assert rate == "peak of the learning rate; it then falls linearly to 0"
    assert "0: greedy" in parts["EvaluateConfig"]["properties"]["temperature"]["description"]
    assert parts["TrainConfig"]["additionalProperties"] is False


def test_the_schema_takes_the_demo_and_refuses_a_typing_mistake() -> None:
    schema = config_help.schema()
    demo = yaml.safe_load((Path(config_help.__file__).parent / "demo.yaml").read_text())
    demo["train"]["learning_rate"] = float(demo["train"]["learning_rate"])  # YAML 1.1 has no 4e-4
    jsonschema.validate(demo, schema)
    demo["train"]["epoch"] = 2
    with pytest.raises(jsonschema.ValidationError, match="epoch"):
        jsonschema.validate(demo, schema)


def test_comments_above_and_behind_a_setting_are_its_meaning() -> None:
    assert "graphs" not in config_help.meanings()["ModelConfig"]
    assert config_help.meanings()["ModelConfig"]["cuda_graphs"].startswith("On a GPU, decode steps")
    assert config_help.meanings()["PromptConfig"]["style"].startswith("auto: depends on the model")
