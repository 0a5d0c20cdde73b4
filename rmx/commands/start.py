"""Commands that come before a run: a first configuration, and what a configuration may hold."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rmx.commands.shared import PANELS, app
from rmx.errors import RmxError


@app.command(
    "init",
    rich_help_panel=PANELS[0],
    epilog='Example: rmx init --model Qwen/Qwen2.5-1.5B --dataset openai/gsm8k --answer "answer: after ####"',
)
def init_command(
    out: Annotated[Path, typer.Argument(help="YAML file to write")] = Path("config.yaml"),
    model: Annotated[str, typer.Option(help="Hugging Face name, directory or .gguf file of the model")] = "",
    dataset: Annotated[
        str | None, typer.Option(help="problems: a data set on the hub, a directory, or a Parquet, JSON or CSV file")
    ] = None,
    dataset_config: Annotated[str | None, typer.Option(help="configuration of the data set, such as main")] = None,
    question: Annotated[str | None, typer.Option(help="column of the questions, or an expression")] = None,
    answer: Annotated[
        str | None, typer.Option(help='column of the answers, or an expression such as "answer: after ####"')
    ] = None,
    jsonl: Annotated[str | None, typer.Option(help='problems: lines of {"question": ..., "answer": ...}')] = None,
    task: Annotated[str | None, typer.Option(help="problems: a reasoning-gym task, such as gcd")] = None,
    run_dir: Annotated[str, typer.Option(help="directory of the run")] = "runs/first",
    force: Annotated[bool, typer.Option("--force", help="replace the file if it exists")] = False,
) -> None:
    """Write a commented configuration. On a terminal, it asks for what the options do not give."""
    import pydantic

    from rmx.artefacts import describe
    from rmx.config import ProblemSource
    from rmx.config_file import load_config
    from rmx.config_help import first_config

    if out.exists() and not force:
        raise RmxError(f"{out}: already exists; --force replaces it")
    model = model or _asked("model (Hugging Face name, directory or .gguf file)", "--model")
    given: dict[str, Any] = {"dataset": dataset, "jsonl": jsonl, "task": task}
    if not any(given.values()):
        given["dataset"] = _asked("problems (data set on the hub, or a file)", "--dataset, --jsonl or --task")
        if Path(given["dataset"]).suffix == ".jsonl":
            given = {"jsonl": given["dataset"]}
    given |= {"dataset_config": dataset_config, "question": question, "answer": answer}
    try:
        source = ProblemSource.model_validate(given)
    except pydantic.ValidationError as fault:
        raise RmxError(f"init: {describe(fault, ProblemSource)}") from fault
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(first_config(run_dir, model, source), encoding="utf-8")
    load_config(out)
    print(f"{out}: written; `rmx plan {out}` estimates the run, `rmx run {out}` starts it")


def _asked(what: str, option: str) -> str:
    if not sys.stdin.isatty():
        raise RmxError(f"init: expected {option}: there is no terminal on which to ask for it")
    found: str = typer.prompt(what)
    return found.strip()


@app.command("schema", rich_help_panel=PANELS[3], epilog="Example: rmx schema")
def schema_command() -> None:
    """Print the JSON schema of the configuration. Editors use it to complete and check the file."""
    from rmx.config_help import schema_text

    print(schema_text())
