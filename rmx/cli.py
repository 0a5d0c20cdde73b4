"""The command line: one command a stage, ``run`` for all of them, ``demo`` for a first look."""

import json
import sys
from contextlib import nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit("rmx: error: the pipeline needs more packages: pip install 'rmx[train]'") from missing

from rmx.errors import RmxError

if TYPE_CHECKING:  # commands import what they use: `rmx --help` needs no torch
    from rmx.pipeline import Run

app = typer.Typer(
    help="ReasonMaxxer: rollouts of a base model become a small adapter that reasons better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override, as in --set train.epochs=2")]
Engine = Annotated[str | None, typer.Option(help="of the rollouts: auto, loop, generate_batch or openai")]
BaseUrl = Annotated[str | None, typer.Option(help="of an OpenAI-compatible server, as http://localhost:8000/v1")]
Again = Annotated[bool, typer.Option(help="redo the stage even if it is done")]


def _open(config: Path, overrides: list[str] | None) -> "Run":
    from rmx.config import load_config
    from rmx.pipeline import Run

    return Run(load_config(config, overrides))


def _execute(name: str, config: Path, overrides: list[str] | None, again: bool) -> None:
    from rmx.distributed import processes
    from rmx.progress import console

    run = _open(config, overrides)
    with processes() as group:
        if group.size > 1 and name != "train":
            raise RmxError(f"rmx {name} runs in one process; torchrun is for rmx train")
        with run.locked() if group.leads else nullcontext():
            done = group.leads and not again and name != "report" and run.is_done(name)
            if group.largest(int(done)):
                if group.leads:
                    console.print(f"{run.dir}: {name} is done; --again redoes it", markup=False, soft_wrap=True)
            elif group.leads:
                run.execute(name, again, group)
            else:
                run.follow_training(group)


def _stage(name: str, help_text: str) -> None:
    def command(config: ConfigPath, set_: Overrides = None, again: Again = False) -> None:
        _execute(name, config, set_, again)

    app.command(name, help=help_text)(command)


def _with_engine(overrides: list[str] | None, engine: str | None, base_url: str | None) -> list[str]:
    given = {"engine": engine, "base_url": base_url}
    return [*(overrides or []), *(f"rollouts.{key}={json.dumps(v)}" for key, v in given.items() if v is not None)]


@app.command("rollouts")
def rollouts_command(
    config: ConfigPath,
    set_: Overrides = None,
    again: Again = False,
    engine: Engine = None,
    base_url: BaseUrl = None,
) -> None:
    """Sample completions of the training problems from the base model."""
    _execute("rollouts", config, _with_engine(set_, engine, base_url), again)


_stage("problems", "Build the training and the held-out problems.")
_stage("verify", "Reward each completion 0 or 1.")
_stage("score", "Base entropy, log-prob and top-k at every completion token.")
_stage("select", "Choose mixed problems, advantages and decision tokens.")
_stage("train", "Train the adapter.")
_stage("evaluate", "Held-out accuracy, base against tuned.")
_stage("report", "Draw report.png.")


def _run(config: Path, overrides: list[str] | None) -> None:
    from rich.console import Console

    from rmx import report

    run = _open(config, overrides)
    result = run.run()
    out = Console()
    out.print(report.table(result))
    out.print(report.verdict(result), highlight=False)
    spent = {name: stage["seconds"] for name, stage in run.stages().items()}
    words = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items() if seconds >= 0.5)
    out.print(f"{words}; {sum(spent.values()):.0f} s in all", highlight=False, soft_wrap=True)
    out.print(f"adapter: {run.path('adapter')}   picture: {run.path('report.png')}", highlight=False, soft_wrap=True)


@app.command("run")
def run_command(config: ConfigPath, set_: Overrides = None, engine: Engine = None, base_url: BaseUrl = None) -> None:
    """Run all stages; started again, go on where the last start ended."""
    _run(config, _with_engine(set_, engine, base_url))


@app.command()
def merge(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="directory to write")],
    adapter: Annotated[Path | None, typer.Option(help="default: the run's own")] = None,
    set_: Overrides = None,
) -> None:
    """Write the model with the adapter merged into its weights: a plain Hugging Face model."""
    _open(config, set_).merged(out, adapter)


@app.command("export")
def export_command(
    config: ConfigPath, out: Annotated[Path, typer.Argument(help="directory to write")], set_: Overrides = None
) -> None:
    """Write problems, scored rollouts and training set as JSON of the method's released code."""
    from rmx.progress import console
    from rmx.transfer import export_run

    for path in export_run(_open(config, set_), out):
        console.print(f"export: written {path}", markup=False, soft_wrap=True)


@app.command("import")
def import_command(
    config: ConfigPath,
    source: Annotated[Path, typer.Argument(help="directory with records.json, rollouts.json, training_set.json")],
    set_: Overrides = None,
    any_prompt: Annotated[
        bool, typer.Option(help="take prompts that this configuration would write otherwise")
    ] = False,
) -> None:
    """Start a run from JSON of the method's released code; `rmx run` goes on from there."""
    from rmx.transfer import import_run

    import_run(_open(config, set_), source, any_prompt=any_prompt)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="BASE", help="YAML of a run: its model, its rollouts")],
    other: Annotated[str, typer.Argument(help="adapter directory or model; default: the run's adapter")] = "",
    out: Annotated[Path | None, typer.Option(help="default: compare/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """Where OTHER's most probable token is not BASE's: how often, at which entropy, from which rank."""
    from rich.console import Console

    from rmx.analyses import compare
    from rmx.analyses.pair import paired

    run = _open(config, set_)
    folder = out or run.path("compare")
    base = run.base_scores()
    with paired(run.lm, other or run.path("adapter")) as pair:
        result = compare.compare_models(pair, base, run.rollouts(), folder, run.config.score)
    compare.write(result, folder)
    Console().print(compare.table(result))


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="of problems, sampling, adapter and order")] = 0,
    run_dir: Annotated[str, typer.Option(help="default: runs/demo-SEED")] = "",
    set_: Overrides = None,
) -> None:
    """Train SmolLM2-135M-Instruct on small arithmetic and show what it gained; some minutes on two cores."""
    with as_file(files("rmx") / "demo.yaml") as config:
        _run(config, [f"seed={seed}", f"run_dir={json.dumps(run_dir or f'runs/demo-{seed}')}", *(set_ or [])])


@app.command("backends")
def backends_command() -> None:
    """Which kernel implementations run here, and why the others do not."""
    from rmx_kernels import backends

    for backend in backends().values():
        state = f"runs here, {len(backend.operators)} operators" if backend.available else f"no: {backend.reason}"
        print(f"{backend.name:<10} {state}")


def main() -> None:
    """Entry point: errors that the user can mend are one line on standard error, exit code 1."""
    try:
        app()
    except RmxError as fault:
        print(f"rmx: error: {fault}", file=sys.stderr)
        signum = getattr(fault, "signum", None)
        sys.exit(1 if signum is None else 128 + signum)  # as a shell reports a signal
    except OSError as fault:  # a full disk, a folder that cannot be written: nothing half-written is left behind
        print(f"rmx: error: {fault}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
