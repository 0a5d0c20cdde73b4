"""What all commands share: the application, its options, and opening a run."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit("rmx: error: the pipeline needs more packages: pip install 'rmx[train]'") from missing

if TYPE_CHECKING:  # commands import what they use: `rmx --help` needs no torch
    from rmx.runs.pipeline import Run

app = typer.Typer(
    help="Train an adapter that makes a language model reason better, from the model's own rollouts (ReasonMaxxer).",
    epilog="Example: rmx demo. `rmx COMMAND --help` explains a command.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


PANELS = ("Start here", "One stage", "Look at a run", "Files", "This machine")  # of the help, in this order


def _version(asked: bool) -> None:
    if asked:
        print(f"rmx {metadata.version('rmx')}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


ConfigPath = Annotated[Path, typer.Argument(help="YAML file with the configuration of the run")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="change a setting of the configuration: --set train.epochs=2; may be given several times; "
        "relative paths start at the current directory",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(help="sampling engine: auto, loop, generate_batch, openai or vllm; default: rollouts.engine"),
]
TrustOther = Annotated[bool, typer.Option("--trust-other-code", help="run Python code that comes with the model OTHER")]
BaseUrl = Annotated[
    str | None, typer.Option(help="address of an OpenAI-compatible server, such as http://localhost:8000/v1")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="check the settings, print what would be done, and write nothing")
]
Again = Annotated[bool, typer.Option(help="redo the stage even if it is done")]


def open_run(config: Path, overrides: list[str] | None) -> "Run":
    """Check the configuration before the imports of torch, which take seconds."""
    from rmx.config_file import load_config
    from rmx.models.source import locate

    settings = load_config(config, overrides)
    locate(settings.located_model)
    from rmx.runs.pipeline import Run

    return Run(settings)
