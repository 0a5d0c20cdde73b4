"""The command line: one command a stage, ``run`` for all of them, ``demo`` for a first look."""

import dataclasses
import json
import signal
import sys
from contextlib import nullcontext
from importlib import metadata
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit("rmx: error: the pipeline needs more packages: pip install 'rmx[train]'") from missing

from rmx.errors import Interrupted, RmxError, visible
from rmx.openmp import let_threads_sleep

if TYPE_CHECKING:  # commands import what they use: `rmx --help` needs no torch
    from rmx.pipeline import Run

app = typer.Typer(
    help="ReasonMaxxer: rollouts of a base model become a small adapter that reasons better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"rmx {metadata.version('rmx')}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", help="say the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


ConfigPath = Annotated[Path, typer.Argument(help="YAML configuration")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="setting to change, as in --set train.epochs=2; its paths start at the current directory"
    ),
]
Engine = Annotated[str | None, typer.Option(help="of the rollouts: auto, loop, generate_batch, openai or vllm")]
TrustOther = Annotated[bool, typer.Option("--trust-other-code", help="run code that comes with the model OTHER")]
BaseUrl = Annotated[str | None, typer.Option(help="of an OpenAI-compatible server, as http://localhost:8000/v1")]
Again = Annotated[bool, typer.Option(help="redo the stage even if it is done")]


def _open(config: Path, overrides: list[str] | None) -> "Run":
    """Errors of the configuration first: what comes after them imports torch, which takes seconds."""
    from rmx.config import load_config
    from rmx.source import locate

    settings = load_config(config, overrides)
    locate(settings.located_model)
    from rmx.pipeline import Run

    return Run(settings)


def _execute(name: str, config: Path, overrides: list[str] | None, again: bool) -> None:
    from rmx.config import load_config

    settings = load_config(config, overrides)
    from rmx.distributed import processes
    from rmx.progress import console
    from rmx.rundir import RunDirectory

    directory = RunDirectory(settings)
    with processes() as group:
        if group.size > 1 and name != "train":
            raise RmxError(f"rmx {name} runs in one process; torchrun is for rmx train")
        with directory.locked() if group.leads else nullcontext():
            done = group.leads and not again and name != "report" and directory.is_done(name)
            if group.largest(int(done)):
                if group.leads:
                    console.print(f"{directory.dir}: {name} is done; --again redoes it", markup=False, soft_wrap=True)
                return
            if group.leads:
                directory.check_order(name)
            from rmx.pipeline import Run  # imports torch, which takes seconds

            run = Run(directory.config)
            if group.leads:
                with run.stoppable():
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
_stage("choose", "Choose the best of train.candidates on problems of their own.")
_stage("evaluate", "Held-out accuracy, base against tuned.")
_stage("report", "Draw report.png and write report.html.")


def _run(run: "Run") -> None:
    from rich.console import Console

    from rmx import cost, report
    from rmx.tables import show

    result = run.run()
    out = Console()
    show(report.table(result))
    out.print(report.verdict(result), highlight=False)
    show(cost.table(cost.stage_costs(run.path("costs.jsonl"), list(run.stages()), run.config.cost), run.config.cost))
    out.print(f"adapter: {run.path('adapter')}   report: {run.path('report.html')}", highlight=False, soft_wrap=True)


@app.command("run")
def run_command(config: ConfigPath, set_: Overrides = None, engine: Engine = None, base_url: BaseUrl = None) -> None:
    """Run all stages; started again, go on where the last start ended."""
    _run(_open(config, _with_engine(set_, engine, base_url)))


@app.command()
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, max=600, help="that each of four measurements may take")] = 2.0,
) -> None:
    """What each stage of `rmx run` will take here, and what to change if it does not fit; nothing is run."""
    run = _open(config, set_)
    from rmx import plan_table
    from rmx.plan import make
    from rmx.tables import show

    made = make(run, seconds)
    if as_json:
        print(json.dumps(dataclasses.asdict(made), indent=2))
        return
    show(plan_table.table(made))
    for line in plan_table.say(made):
        print(visible(line))


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
    run = _open(config, set_)
    from rmx.progress import console
    from rmx.transfer import export_run

    for path in export_run(run, out):
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
    run = _open(config, set_)
    from rmx.transfer import import_run

    import_run(run, source, any_prompt=any_prompt)


@app.command()
def compare(
    config: Annotated[Path, typer.Argument(metavar="BASE", help="YAML of a run: its model, its rollouts")],
    other: Annotated[str, typer.Argument(help="adapter directory or model; default: the run's adapter")] = "",
    out: Annotated[Path | None, typer.Option(help="default: compare/ in the run directory")] = None,
    set_: Overrides = None,
    trust_other: TrustOther = False,
) -> None:
    """Where OTHER's most probable token is not BASE's: how often, at which entropy, from which rank."""
    run = _open(config, set_)
    from rmx.analyses import compare
    from rmx.analyses.pair import paired
    from rmx.tables import show

    folder = out or run.path("compare")
    run.need("rollouts")
    if not other:
        run.check_adapter()
    theirs, prompt = other or run.path("adapter"), run.meta()["prompt"]
    with run.locked(), paired(run.lm, theirs, run.model_settings, prompt, trust=trust_other) as pair:
        with pair.as_base():
            base = run.base_scores()
        result = compare.compare_models(pair, base, run.rollouts(), folder, run.config)
    compare.write(result, folder, run.meta())
    show(compare.table(result))


@app.command()
def coverage(
    config: ConfigPath,
    tau: Annotated[float | None, typer.Option(help="nats; default: the run's own")] = None,
    draws: Annotated[int, typer.Option(min=1, help="random small sets of each size")] = 200,
    out: Annotated[Path | None, typer.Option(help="default: coverage/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """Of the decision points in all rollouts, how many do a few of the rollouts already contain."""
    run = _open(config, set_)
    from rmx.analyses import coverage
    from rmx.tables import show

    with run.locked():
        result = coverage.cover_run(run, tau, draws)
    coverage.write(result, out or run.path("coverage"), run.meta())
    show(coverage.table(result))


@app.command("benchmark")
def benchmark_command(
    config: ConfigPath,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="gsm8k, math500, aime24, amc23, minerva, olympiadbench, gym:TASK of reasoning-gym, or a path to JSONL",
        ),
    ],
    tuned: Annotated[bool, typer.Option("--tuned", help="with the run's own adapter too")] = False,
    adapter: Annotated[Path | None, typer.Option(help="with this adapter too")] = None,
    limit: Annotated[int | None, typer.Option(help="so many problems of each, by a fixed shuffle")] = None,
    samples: Annotated[int | None, typer.Option(help="of each problem; default: 8 of aime24 and amc23")] = None,
    data: Annotated[Path | None, typer.Option(help="directory with NAME.jsonl, to use instead of the hub")] = None,
    out: Annotated[Path | None, typer.Option(help="default: benchmarks/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """Accuracy of the model, and with an adapter, on benchmarks."""
    run = _open(config, set_)
    from rmx.benchmarks import run_benchmarks, table
    from rmx.tables import show

    show(
        table(
            run_benchmarks(run, names, tuned=tuned, adapter=adapter, limit=limit, samples=samples, data=data, out=out)
        )
    )


@app.command()
def ablate(
    config: ConfigPath,
    only: Annotated[list[str] | None, typer.Option(help="a variant; may be given again; default: all of them")] = None,
    budget: Annotated[float, typer.Option(help="share of tokens gated by budget, random and lowest")] = 0.2,
    quantile: Annotated[float, typer.Option(help="of the scored entropies, for the variant of that name")] = 0.5,
    seeds: Annotated[int, typer.Option(help="trainings of each variant")] = 1,
    out: Annotated[Path | None, typer.Option(help="default: ablate/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """The run's training with one thing changed: other gates, shuffled advantages, positives only, other adapters."""
    run = _open(config, set_)
    from rmx.analyses import ablate
    from rmx.tables import show

    folder = out or run.path("ablate")
    with run.locked():
        result = ablate.ablate(run, folder, only or (), budget=budget, quantile=quantile, seeds=seeds)
    ablate.write(result, folder)
    show(ablate.table(result))


@app.command()
def intervene(
    config: Annotated[Path, typer.Argument(metavar="BASE", help="YAML of a run: its model, its held-out problems")],
    other: Annotated[str, typer.Argument(help="adapter directory or model; default: the run's adapter")] = "",
    gate: Annotated[str, typer.Option(help="disagreement (of the two models) or entropy (of the base alone)")] = (
        "disagreement"
    ),
    tau: Annotated[float | None, typer.Option(help="of the entropy gate, nats; default: the run's")] = None,
    out: Annotated[Path | None, typer.Option(help="default: intervene/ in the run directory")] = None,
    set_: Overrides = None,
    trust_other: TrustOther = False,
) -> None:
    """How much of OTHER's accuracy BASE gains by taking its tokens at a few positions, against controls."""
    from rich.console import Console

    if gate not in ("disagreement", "entropy"):
        raise RmxError(f"--gate {gate}: expected disagreement or entropy")
    run = _open(config, set_)
    from rmx.analyses import intervene
    from rmx.analyses.pair import paired
    from rmx.tables import show

    folder = out or run.path("intervene")
    run.need("problems")
    if gate == "entropy" and tau is None:
        run.need("select", ", or give --tau")
        tau = run.tau()
    if not other:
        run.check_adapter()
    theirs = other or run.path("adapter")
    prompt = run.renderer.fingerprint
    with run.locked(), paired(run.lm, theirs, run.model_settings, prompt, trust=trust_other) as pair:
        result = intervene.intervene(run, pair, folder, gate, tau)  # type: ignore[arg-type]
    intervene.write(result, folder)
    show(intervene.table(result))
    Console().print(intervene.verdict(result), highlight=False)


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="of problems, sampling, adapter and order")] = 0,
    run_dir: Annotated[str, typer.Option(help="default: runs/demo-SEED")] = "",
    size: Annotated[
        str, typer.Option(help="size of the run: full, small, or auto (small where full takes over 10 minutes)")
    ] = ("auto"),
    set_: Overrides = None,
) -> None:
    """Train SmolLM2-135M-Instruct on small arithmetic and show what it gained; some minutes on two cores."""
    from rmx.demo import demo_config

    if size not in ("auto", "full", "small"):
        raise RmxError(f"--size {size}: expected auto, full or small")
    with as_file(files("rmx") / "demo.yaml") as path:
        config = demo_config(path, seed, run_dir or f"runs/demo-{seed}", set_ or [], size)  # type: ignore[arg-type]
        from rmx.pipeline import Run

        _run(Run(config))


@app.command("cache")
def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="delete all of it")] = False,
) -> None:
    """Models that were converted from GGUF files once and are kept, or with --clear their removal."""
    from rmx import converted, digests

    cache = digests.place()
    if cache is None:
        print("off: RMX_CACHE=off")
        return
    kept = converted.listed(cache)
    for entry in kept:
        print(f"{entry.bytes / 2**20:8,.0f} MiB  {entry.dtype:<9} {entry.path.name}  {entry.source}")
    total = f"{sum(entry.bytes for entry in kept) / 2**20:,.0f} MiB in {cache}"
    if clear:
        converted.clear(cache)
    print(f"deleted: {total}" if clear else total)


@app.command("doctor")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="the same as JSON")] = False,
    no_rates: Annotated[bool, typer.Option("--no-rates", help="skip the rates")] = False,
) -> None:
    """What this machine is, what every operator runs on and how fast, and known traps."""
    from rmx_kernels import doctor

    print(doctor.report(as_json=as_json, rates=not no_rates))


@app.command("backends")
def backends_command() -> None:
    """Which kernel implementations run here, and why the others do not."""
    from rmx_kernels import backends

    for backend in backends().values():
        state = f"runs here, {len(backend.operators)} operators" if backend.available else f"no: {backend.reason}"
        print(f"{backend.name:<10} {state}")


def main() -> None:
    """Entry point: errors that the user can mend are one line on standard error, exit code 1."""
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
