"""The command line: one command for each stage, ``run`` for all stages, ``demo`` for a first look."""

import signal
import sys
from importlib import resources
from typing import Annotated

import typer

from rmx.commands import analyses, files, stages, start
from rmx.commands.shared import PANELS, Overrides, app
from rmx.errors import Interrupted, RmxError, visible
from rmx.openmp import let_threads_sleep


@app.command(rich_help_panel=PANELS[0], epilog="Example: rmx demo --seed 1 --size small")
def demo(
    seed: Annotated[int, typer.Option(help="random seed of problems, sampling, adapter and order")] = 0,
    run_dir: Annotated[str, typer.Option(help="directory to write; default: runs/demo-SEED")] = "",
    size: Annotated[
        str, typer.Option(help="size of the run: full, small, or auto (small if full takes over 10 minutes)")
    ] = "auto",
    set_: Overrides = None,
) -> None:
    """Train SmolLM2-135M-Instruct on small arithmetic problems and show what it gained. Takes minutes on two cores."""
    from rmx.demo import demo_config

    if size not in ("auto", "full", "small"):
        raise RmxError(f"--size {size}: expected auto, full or small")
    with resources.as_file(resources.files("rmx") / "demo.yaml") as path:
        config = demo_config(path, seed, run_dir or f"runs/demo-{seed}", set_ or [], size)  # type: ignore[arg-type]
        from rmx.runs.pipeline import Run

        stages.finish(Run(config))


@app.command("doctor", rich_help_panel=PANELS[4], epilog="Example: rmx doctor --json")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    no_rates: Annotated[bool, typer.Option("--no-rates", help="do not measure copies and matrix products")] = False,
) -> None:
    """Describe this machine: devices, the implementation of every operator, measured rates, and warnings."""
    from rmx_kernels import doctor

    print(doctor.report(as_json=as_json, rates=not no_rates))


@app.command("backends", rich_help_panel=PANELS[4], epilog="Example: rmx backends")
def backends_command() -> None:
    """List the kernel implementations: which ones run on this machine, and why the others do not."""
    from rmx_kernels import backends

    for backend in backends().values():
        state = f"runs here, {len(backend.operators)} operators" if backend.available else f"no: {backend.reason}"
        print(f"{backend.name:<10} {state}")


MODULES = (analyses, files, stages, start)  # which register their commands when they are imported
app.registered_commands.sort(
    key=lambda command: (PANELS.index(str(command.rich_help_panel)), command.callback is not demo)
)


def main() -> None:
    """Entry point. An error that the user can fix is printed as one line on standard error; the exit code is 1."""
    let_threads_sleep()
    try:
        app()
    except RmxError as fault:
        if isinstance(fault, Interrupted):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C: the work has ended already
        print(visible(f"rmx: error: {fault}"), file=sys.stderr)
        signum = getattr(fault, "signum", None)
        sys.exit(1 if signum is None else 128 + signum)  # as a shell reports a signal
    except OSError as fault:  # a full disk, a folder that cannot be written: nothing half-written is left behind
        print(visible(f"rmx: error: {fault}"), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
