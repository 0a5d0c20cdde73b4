"""The command line: one command for each stage, ``run`` for all stages, ``demo`` for a first look."""

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
    from rmx.runs.pipeline import Run

app = typer.Typer(
    help="Train an adapter that makes a language model reason better, from the model's own rollouts (ReasonMaxxer).",
    epilog="Example: rmx demo. `rmx COMMAND --help` explains a command.",
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
        bool, typer.Option("--version", help="print the version and exit", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


ConfigPath = Annotated[Path, typer.Argument(help="YAML file with the configuration of the run")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="setting that replaces the configuration's, as in --set train.epochs=2; may be given several times; "
        "relative paths start at the current directory",
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(help="sampling engine: auto, loop, generate_batch, openai or vllm; default: rollouts.engine"),
]
TrustOther = Annotated[bool, typer.Option("--trust-other-code", help="run Python code that comes with the model OTHER")]
BaseUrl = Annotated[
    str | None, typer.Option(help="address of an OpenAI-compatible server, as http://localhost:8000/v1")
]
Again = Annotated[bool, typer.Option(help="redo the stage even if it is done")]


def _open(config: Path, overrides: list[str] | None) -> "Run":
    """Errors of the configuration first: what comes after them imports torch, which takes seconds."""
    from rmx.config import load_config
    from rmx.models.source import locate

    settings = load_config(config, overrides)
    locate(settings.located_model)
    from rmx.runs.pipeline import Run

    return Run(settings)


def _execute(name: str, config: Path, overrides: list[str] | None, again: bool) -> None:
    from rmx.config import load_config

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


def _stage(name: str, help_text: str) -> None:
    def command(config: ConfigPath, set_: Overrides = None, again: Again = False) -> None:
        _execute(name, config, set_, again)

    app.command(name, help=help_text, epilog=f"Example: rmx {name} config.yaml")(command)


def _with_engine(overrides: list[str] | None, engine: str | None, base_url: str | None) -> list[str]:
    given = {"engine": engine, "base_url": base_url}
    return [*(overrides or []), *(f"rollouts.{key}={json.dumps(v)}" for key, v in given.items() if v is not None)]


@app.command("rollouts", epilog="Example: rmx rollouts config.yaml --engine openai --base-url http://localhost:8000/v1")
def rollouts_command(
    config: ConfigPath,
    set_: Overrides = None,
    again: Again = False,
    engine: Engine = None,
    base_url: BaseUrl = None,
) -> None:
    """Sample completions of the training problems with the base model."""
    _execute("rollouts", config, _with_engine(set_, engine, base_url), again)


_stage("problems", "Collect the training problems and the held-out problems.")
_stage("verify", "Compare the answer of each completion with the true answer: reward 1 or 0.")
_stage("score", "Compute the base model's entropy, log-prob and top-k at every completion token.")
_stage("select", "Select problems with right and wrong completions, and their decision tokens, for training.")
_stage("train", "Train the adapter on the selected completions.")
_stage("choose", "Choose the best of the adapters kept by train.candidates, on problems set apart for that.")
_stage("evaluate", "Measure accuracy on the held-out problems, without and with the adapter.")
_stage("report", "Write report.html and report.png from the files of the run.")


def _run(run: "Run") -> None:
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


@app.command("run", epilog="Example: rmx run config.yaml --set train.epochs=2")
def run_command(config: ConfigPath, set_: Overrides = None, engine: Engine = None, base_url: BaseUrl = None) -> None:
    """Run all stages. Started again, it continues where it was stopped."""
    _run(_open(config, _with_engine(set_, engine, base_url)))


@app.command(epilog="Example: rmx plan config.yaml --set rollouts.samples=16")
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
    seconds: Annotated[
        float, typer.Option(min=0.1, max=600, help="time limit of each of the four measurements, in seconds")
    ] = 2.0,
) -> None:
    """Print what each stage of `rmx run` will take here, and what to change if it does not fit. Runs nothing."""
    run = _open(config, set_)
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


@app.command(epilog="Example: rmx merge config.yaml merged")
def merge(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="directory to write")],
    adapter: Annotated[Path | None, typer.Option(help="adapter directory; default: the run's own adapter")] = None,
    set_: Overrides = None,
) -> None:
    """Write the model with the adapter merged into its weights: a plain Hugging Face model."""
    _open(config, set_).merged(out, adapter)


@app.command("export", epilog="Example: rmx export config.yaml exported")
def export_command(
    config: ConfigPath, out: Annotated[Path, typer.Argument(help="directory to write")], set_: Overrides = None
) -> None:
    """Write problems, scored rollouts and training set as the JSON files of the method's released code."""
    run = _open(config, set_)
    from rmx.interchange.transfer import export_run
    from rmx.progress import console

    for path in export_run(run, out):
        console.print(f"export: wrote {path}", markup=False, soft_wrap=True)


@app.command("import", epilog="Example: rmx import config.yaml released")
def import_command(
    config: ConfigPath,
    source: Annotated[Path, typer.Argument(help="directory with records.json, rollouts.json, training_set.json")],
    set_: Overrides = None,
    any_prompt: Annotated[
        bool, typer.Option(help="accept prompts that differ from those that this configuration would render")
    ] = False,
) -> None:
    """Start a run from JSON files of the method's released code. `rmx run` continues from there."""
    run = _open(config, set_)
    from rmx.interchange.transfer import import_run

    import_run(run, source, any_prompt=any_prompt)


@app.command(epilog="Example: rmx compare config.yaml")
def compare(
    config: Annotated[
        Path, typer.Argument(metavar="BASE", help="YAML file of a run, whose model and rollouts are used")
    ],
    other: Annotated[
        str, typer.Argument(help="directory of an adapter, or name of a model; default: the run's own adapter")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="directory to write; default: compare/ in the run directory")] = None,
    set_: Overrides = None,
    trust_other: TrustOther = False,
) -> None:
    """Find where the most probable token of OTHER differs from that of BASE: how often, at which entropy and rank."""
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


@app.command(epilog="Example: rmx coverage config.yaml --draws 500")
def coverage(
    config: ConfigPath,
    tau: Annotated[
        float | None, typer.Option(help="entropy in nats above which a token is a decision; default: the run's tau")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="number of random small sets of each size")] = 200,
    out: Annotated[
        Path | None, typer.Option(help="directory to write; default: coverage/ in the run directory")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Count how many of the decision points of all rollouts a few of the rollouts already contain."""
    run = _open(config, set_)
    from rmx.analyses import coverage
    from rmx.tables import show

    with run.locked():
        result = coverage.cover_run(run, tau, draws)
    coverage.write(result, out or run.path("coverage"), run.meta())
    show(coverage.table(result))


@app.command("benchmark", epilog="Example: rmx benchmark config.yaml gsm8k gym:gcd --tuned --limit 100")
def benchmark_command(
    config: ConfigPath,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="gsm8k, math500, aime24, amc23, minerva, olympiadbench, gym:TASK (reasoning-gym), or a JSONL file",
        ),
    ],
    tuned: Annotated[bool, typer.Option("--tuned", help="evaluate with the run's own adapter, too")] = False,
    adapter: Annotated[Path | None, typer.Option(help="evaluate with the adapter in this directory, too")] = None,
    limit: Annotated[
        int | None, typer.Option(help="number of problems of each benchmark, by a fixed shuffle; default: all")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="completions of each problem; default: 8 for aime24 and amc23, 1 for the other named ones, else "
            "evaluate.samples"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="directory with NAME.jsonl, which is read instead of the hub")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory to write; default: benchmarks/ in the run directory")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Measure the accuracy of the model on benchmarks, without and with an adapter."""
    run = _open(config, set_)
    from rmx.analyses.benchmarks import run_benchmarks, table
    from rmx.tables import show

    show(
        table(
            run_benchmarks(run, names, tuned=tuned, adapter=adapter, limit=limit, samples=samples, data=data, out=out)
        )
    )


@app.command(epilog="Example: rmx ablate config.yaml --only budget --only random --seeds 3")
def ablate(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option(help="variant to train; may be given several times; default: all variants")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="share of gated tokens in the variants budget, random and lowest")
    ] = 0.2,
    quantile: Annotated[float, typer.Option(help="quantile of the scored entropies in the variant quantile")] = 0.5,
    seeds: Annotated[int, typer.Option(help="number of trainings of each variant")] = 1,
    out: Annotated[Path | None, typer.Option(help="directory to write; default: ablate/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """Repeat the training with one change: another gate, shuffled advantages, positives only, another adapter."""
    run = _open(config, set_)
    from rmx.analyses import ablate
    from rmx.tables import show

    folder = out or run.path("ablate")
    with run.locked():
        result = ablate.ablate(run, folder, only or (), budget=budget, quantile=quantile, seeds=seeds)
    ablate.write(result, folder)
    show(ablate.table(result))


@app.command(epilog="Example: rmx intervene config.yaml --gate entropy --tau 2.5")
def intervene(
    config: Annotated[
        Path, typer.Argument(metavar="BASE", help="YAML file of a run, whose model and held-out problems are used")
    ],
    other: Annotated[
        str, typer.Argument(help="directory of an adapter, or name of a model; default: the run's own adapter")
    ] = "",
    gate: Annotated[
        str, typer.Option(help="where tokens are replaced: disagreement (of the two models) or entropy (of the base)")
    ] = "disagreement",
    tau: Annotated[
        float | None, typer.Option(help="threshold of --gate entropy in nats; default: the run's tau")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory to write; default: intervene/ in the run directory")
    ] = None,
    set_: Overrides = None,
    trust_other: TrustOther = False,
) -> None:
    """Measure how much accuracy BASE gains if it takes the tokens of OTHER at a few positions, against controls."""
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


@app.command(epilog="Example: rmx demo --seed 1 --size small")
def demo(
    seed: Annotated[int, typer.Option(help="random seed of problems, sampling, adapter and order")] = 0,
    run_dir: Annotated[str, typer.Option(help="directory to write; default: runs/demo-SEED")] = "",
    size: Annotated[
        str, typer.Option(help="size of the run: full, small, or auto (small where full takes over 10 minutes)")
    ] = "auto",
    set_: Overrides = None,
) -> None:
    """Train SmolLM2-135M-Instruct on small arithmetic problems and show what it gained. Takes minutes on two cores."""
    from rmx.demo import demo_config

    if size not in ("auto", "full", "small"):
        raise RmxError(f"--size {size}: expected auto, full or small")
    with as_file(files("rmx") / "demo.yaml") as path:
        config = demo_config(path, seed, run_dir or f"runs/demo-{seed}", set_ or [], size)  # type: ignore[arg-type]
        from rmx.runs.pipeline import Run

        _run(Run(config))


@app.command("cache", epilog="Example: rmx cache --clear")
def cache_command(
    clear: Annotated[bool, typer.Option("--clear", help="delete all kept models")] = False,
) -> None:
    """List the models that were converted from GGUF files and are kept in the cache, or delete them."""
    from rmx import digests
    from rmx.models import converted

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


@app.command("doctor", epilog="Example: rmx doctor --json")
def doctor_command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    no_rates: Annotated[bool, typer.Option("--no-rates", help="do not measure memory and products")] = False,
) -> None:
    """Describe this machine: devices, what every operator runs on, measured rates, and known traps."""
    from rmx_kernels import doctor

    print(doctor.report(as_json=as_json, rates=not no_rates))


@app.command("backends", epilog="Example: rmx backends")
def backends_command() -> None:
    """List the kernel implementations: which run on this machine, and why the others do not."""
    from rmx_kernels import backends

    for backend in backends().values():
        state = f"runs here, {len(backend.operators)} operators" if backend.available else f"no: {backend.reason}"
        print(f"{backend.name:<10} {state}")


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
