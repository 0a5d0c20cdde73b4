"""`rmx COMMAND --help`: what every option is, and an example that the command accepts."""

import shlex

import pytest
import typer

from rmx.cli import app

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    command = COMMANDS[name]
    verb, *_ = command.help.split()
    assert verb[0].isupper() and not verb.endswith(("ing", "s")) and command.help.strip().endswith(".")
    for param in command.params:
        text = getattr(param, "help", None)
        assert text, f"{name} {param.name}: no help"
        assert text.split()[0] not in ("of", "with", "default:", "so"), f"{name} {param.name}: {text}"


@pytest.mark.parametrize("name", COMMANDS)
def test_its_example_is_one(name: str) -> None:
    command = COMMANDS[name]
    program, called, *arguments = shlex.split(command.epilog.removeprefix("Example: "))
    assert (program, called) == ("rmx", name)
    command.make_context(name, arguments)  # raises for an option that does not exist
