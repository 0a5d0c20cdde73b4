"""What README.md and docs/ tell to type: commands with options that exist, a valid configuration, code that runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml

from rmx.cli import app
from rmx.config import Config
from rmx.models.model import CausalLM

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md")}
PAGES["README"] = README
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
TYPED = re.compile(r"(?:`|^    |^)rmx ([a-z][^`\n]*)", re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    for typed in TYPED.findall(PAGES[page]):
        name, *arguments = shlex.split(typed.replace("[OTHER]", "").replace("NAME...", "NAME"), comments=True)
        if arguments and not {"-h", "--help"} & set(arguments):
            COMMANDS[name].make_context(name, arguments)  # raises for what the command does not take
        assert name in COMMANDS, typed


def test_the_configuration_is_valid() -> None:
    (text,) = blocks("yaml")
    config = Config.model_validate(yaml.safe_load(text))
    assert (config.select.tau, config.train.candidates, config.problems.choose_count) == (1.4, 4, 100)


@pytest.mark.thorough
def test_the_code_runs(tiny: CausalLM) -> None:
    first, second = blocks("python")
    found = {"model": tiny.model, "input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": None, "advantage": 1.0}
    exec(first, found)
    assert found["loss"].shape == () and found["stats"].entropy.shape == (1, 3)
    shown: dict[str, Any] = {}
    exec(second, shown)
    assert shown["result"].loss.isfinite() and shown["student"].grad.shape == (512, 576)
    assert shown["gate"].sum() == 16


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
