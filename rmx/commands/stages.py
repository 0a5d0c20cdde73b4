"""The commands of the single stages, ``run`` for all of them, ``plan`` and ``watch``."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rmx.commands.shared import PANELS, Again, BaseUrl, ConfigPath, DryRun, Engine, Overrides, app, open_run
from rmx.errors import RmxError, visible
from rmx.runs.stages import STAGES, Stage

if TYPE_CHECKING:
    from rmx.runs.pipeline import Run


def _execute(name: str, config: Path, overrides: list[str] | None, again: bool) -> None:
    from rmx.config_file import load_config

    settings = load_config(config, overrides)
    from rmx.progress import console
    from rmx.runs.rundir import RunDirectory
    from rmx.training.distributed import processes

    directory = RunDirectory(settings)
    with processes() as group:
        if group.size > 1 and name != "train":
            raise RmxError(
                f"rmx {name} runs in one process, but torchrun started {group.size}; only rmx train runs in several"
            )
        with directory.locked() if group.leads else nullcontext():
            done = group.leads and not again and name != "report" and directory.is_done(name)
            if group.largest(int(done)):
                if group.leads:
                    console.print(f"{directory.dir}: {name} is done; --again redoes it", markup=False, soft_wrap=True)
                return
            if group.leads:
                directory.check_order(name)
            from rmx.runs.pipeline import Run  # imports torch, which takes seconds

            run = Run(directory.config)
            if group.leads:
                with run.stoppable():
                    run.execute(name, again, group)
            else:
                run.follow_training(group)


def _rehearse(config: Path, overrides: list[str] | None, stage: str = "", again: bool = False) -> None:
    """Print what one stage, or all of them, would do."""
    from rmx.config_file import load_config
    from rmx.runs import dry
    from rmx.runs.rundir import RunDirectory
    from rmx.tables import show

    run = RunDirectory(load_config(config, overrides))
    steps = dry.run_one(run, stage, again) if stage else dry.run_all(run)
    show(dry.table(steps))
    for line in dry.notes(run, steps):
        print(visible(line))


def _with_engine(overrides: list[str] | None, engine: str | None, base_url: str | None) -> list[str]:
    given = {"engine": engine, "base_url": base_url}
    return [*(overrides or []), *(f"rollouts.{key}={json.dumps(v)}" for key, v in given.items() if v is not None)]


def _act(name: str, config: Path, overrides: list[str] | None, again: bool, dry_run: bool) -> None:
    if dry_run:
        _rehearse(config, overrides, name, again)
    else:
        _execute(name, config, overrides, again)


def _stage(stage: Stage) -> None:
    def command(config: ConfigPath, set_: Overrides = None, again: Again = False, dry_run: DryRun = False) -> None:
        _act(stage.name, config, set_, again, dry_run)

    app.command(
        stage.name, help=stage.help, rich_help_panel=PANELS[1], epilog=f"Example: rmx {stage.name} config.yaml"
    )(command)


def _sampling_stage(stage: Stage) -> None:
    def command(
        config: ConfigPath,
        set_: Overrides = None,
        again: Again = False,
        engine: Engine = None,
        base_url: BaseUrl = None,
        dry_run: DryRun = False,
    ) -> None:
        _act(stage.name, config, _with_engine(set_, engine, base_url), again, dry_run)

    example = f"Example: rmx {stage.name} config.yaml --engine openai --base-url http://localhost:8000/v1"
    app.command(stage.name, help=stage.help, rich_help_panel=PANELS[1], epilog=example)(command)


for _each in STAGES.values():
    (_sampling_stage if _each.name == "rollouts" else _stage)(_each)


def finish(run: "Run") -> None:
    from rich.console import Console

    from rmx import cost
    from rmx.reports import report
    from rmx.tables import show

    result = run.run()
    out = Console()
    show(report.table(result))
    out.print(report.verdict(result), highlight=False)
    show(cost.table(cost.stage_costs(run.path("costs.jsonl"), list(run.stages()), run.config.cost), run.config.cost))
    out.print(f"adapter: {run.path('adapter')}   report: {run.path('report.html')}", highlight=False, soft_wrap=True)


@app.command("run", rich_help_panel=PANELS[0], epilog="Example: rmx run config.yaml --set train.epochs=2")
def run_command(
    config: ConfigPath,
    set_: Overrides = None,
    engine: Engine = None,
    base_url: BaseUrl = None,
    dry_run: DryRun = False,
) -> None:
    """Run all stages. If it was stopped, start it again: it continues from there."""
    overrides = _with_engine(set_, engine, base_url)
    if dry_run:
        _rehearse(config, overrides)
        return
    finish(open_run(config, overrides))


@app.command(rich_help_panel=PANELS[0], epilog="Example: rmx plan config.yaml --set rollouts.samples=16")
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=600, help="time limit of each of the four measurements, in seconds")
    ] = 2.0,
) -> None:
    """Estimate time, memory and disk of each stage of `rmx run`, and say what to change if it does not fit."""
    run = open_run(config, set_)
    from rmx.runs import plan_table
    from rmx.runs.plan import make
    from rmx.tables import show

    made = make(run, seconds)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), indent=2))
        return
    show(plan_table.table(made))
    for line in plan_table.say(made):
        print(visible(line))


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx watch config.yaml --once")
def watch(
    config: ConfigPath,
    set_: Overrides = None,
    every: Annotated[float, typer.Option(min=0.1, help="seconds between two updates")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="show the state once and exit")] = False,
) -> None:
    """Show what a run is doing, until it stops: its stage, speed, loss and the time left. Only reads files."""
    from rich.console import Console
    from rich.live import Live

    from rmx.config_file import load_config
    from rmx.runs.rundir import RunDirectory
    from rmx.runs.watch import Line, changes, look

    run = RunDirectory(load_config(config, set_))
    if not run.dir.is_dir():
        raise RmxError(f"{run.dir}: no run has begun there")

    def shown(lines: list[Line]) -> str:
        return "\n".join(visible(f"{line.stage:<10}{line.state:<11}{line.text}".rstrip()) for line in lines)

    out = Console()
    if once or not out.is_terminal:
        said = ""
        for lines in [look(run)] if once else changes(run, every):
            if (text := shown(lines)) != said:  # into a pipe only what is new
                print(shown([line for line in lines if not said or line.state == "under way"]), flush=True)
                said = text
        return
    with Live(console=out, auto_refresh=False) as live:
        for lines in changes(run, every):
            live.update(shown(lines), refresh=True)
