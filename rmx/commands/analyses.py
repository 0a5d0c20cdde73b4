"""The commands of the analyses of a run."""

from pathlib import Path
from typing import Annotated

import typer

from rmx.commands.shared import PANELS, ConfigPath, Overrides, TrustOther, app, open_run
from rmx.errors import RmxError, visible


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx compare config.yaml")
def compare(
    config: Annotated[Path, typer.Argument(metavar="BASE", help="YAML file of a run; its model and rollouts are used")],
    other: Annotated[
        str, typer.Argument(help="directory of an adapter, or name of a model; default: the run's own adapter")
    ] = "",
    out: Annotated[Path | None, typer.Option(help="directory to write; default: compare/ in the run directory")] = None,
    set_: Overrides = None,
    trust_other: TrustOther = False,
) -> None:
    """Find where the most probable token of OTHER differs from that of BASE: how often, at which entropy and rank."""
    run = open_run(config, set_)
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


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx diff runs/first runs/second -o diff.html")
def diff(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="YAML file of a run, or its directory")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="the run to compare with it")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="page to write; default: none")
    ] = None,
) -> None:
    """Compare two runs: settings, accuracy paired by problem, gate, training curves, cost. Changes neither."""
    if out is not None and (out.suffix not in (".html", ".htm") or out.is_dir()):
        raise RmxError(f"-o {out}: expected the name of a file that ends in .html")
    from rich.console import Console

    from rmx.reports import difference
    from rmx.runs.diff import compare, open_side
    from rmx.tables import show

    found = compare(open_side(first), open_side(second), (first, second))
    for table in difference.tables(found):
        show(table)
    for line in (*found.notes, difference.verdict(found)):
        Console().print(visible(line), highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        difference.write_html(out, found)
        Console().print(f"diff: written {visible(str(out))}", highlight=False, markup=False, soft_wrap=True)


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx coverage config.yaml --draws 500")
def coverage(
    config: ConfigPath,
    tau: Annotated[
        float | None, typer.Option(help="entropy in nats above which a token is a decision; default: the run's tau")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="number of random sets of rollouts of each size")] = 200,
    out: Annotated[
        Path | None, typer.Option(help="directory to write; default: coverage/ in the run directory")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Measure how many decision points of all rollouts a small set of rollouts already contains."""
    run = open_run(config, set_)
    from rmx.analyses import coverage
    from rmx.tables import show

    with run.locked():
        result = coverage.cover_run(run, tau, draws)
    coverage.write(result, out or run.path("coverage"), run.meta())
    show(coverage.table(result))


@app.command(
    "benchmark",
    rich_help_panel=PANELS[2],
    epilog="Example: rmx benchmark config.yaml gsm8k gym:gcd --tuned --limit 100",
)
def benchmark_command(
    config: ConfigPath,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="gsm8k, math500, aime24, amc23, minerva, olympiadbench, gym:TASK (reasoning-gym), held-out (the run's "
            "own problems), or a JSONL file",
        ),
    ],
    tuned: Annotated[bool, typer.Option("--tuned", help="also evaluate with the run's own adapter")] = False,
    adapter: Annotated[Path | None, typer.Option(help="also evaluate with the adapter in this directory")] = None,
    limit: Annotated[
        int | None, typer.Option(help="number of problems of each benchmark, after a fixed shuffle; default: all")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="completions of each problem; default: 8 for aime24 and amc23, 1 for gsm8k, math500, "
            "minerva and olympiadbench, else evaluate.samples"
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="directory with NAME.jsonl files, read instead of the hub")] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory to write; default: benchmarks/ in the run directory")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Measure the accuracy of the model on benchmarks, without and with an adapter."""
    run = open_run(config, set_)
    from rmx.analyses.benchmarks import run_benchmarks, table
    from rmx.tables import show

    show(
        table(
            run_benchmarks(run, names, tuned=tuned, adapter=adapter, limit=limit, samples=samples, data=data, out=out)
        )
    )


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx ablate config.yaml --only budget --only random --seeds 3")
def ablate(
    config: ConfigPath,
    only: Annotated[
        list[str] | None, typer.Option(help="variant to train; may be given several times; default: all variants")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="share of gated tokens in the variants budget, random, lowest and *-mass")
    ] = 0.2,
    quantile: Annotated[float, typer.Option(help="quantile of the scored entropies in the variant quantile")] = 0.5,
    seeds: Annotated[int, typer.Option(help="number of seeds to train each variant with")] = 1,
    curve: Annotated[
        bool, typer.Option("--curve", help="train the entropy and random gates at several shares, and with all tokens")
    ] = False,
    share: Annotated[
        list[float] | None,
        typer.Option(help="share of gated tokens in the curve; may be given several times; default: 0.01 to 0.2"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="maximum tokens of a completion of base and variants; default: evaluate.max_new_tokens"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="directory to write; default: ablate/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """Repeat the training with one change each: gate, weights, advantages, supervised training, or adapter size."""
    if share and not curve:
        raise RmxError("--share: expected only together with --curve")
    run = open_run(config, set_)
    from rmx.analyses import ablate
    from rmx.analyses.variants import SHARES
    from rmx.tables import show

    folder = out or run.path("ablate")
    shares = (share or SHARES) if curve else ()
    options = ablate.Options(budget, quantile, seeds, shares, max_new_tokens)
    with run.locked():
        result = ablate.ablate(run, folder, only or (), options)
    ablate.write(result, folder, "curve" if curve else "ablate")
    for table in ablate.tables(result):
        show(table)


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx baselines config.yaml --samples 16 --temperature 0.3")
def baselines(
    config: ConfigPath,
    temperature: Annotated[
        list[float] | None, typer.Option(help="temperature to sample with; may be given several times; default: 0.3")
    ] = None,
    top_p: Annotated[
        list[float] | None, typer.Option(help="top-p to sample with; may be given several times; default: 0.8")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="completions of each problem for the majority votes; default: evaluate.samples"),
    ] = None,
    both: Annotated[bool, typer.Option("--both", help="also decode the tuned model in all these ways")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="maximum tokens of a completion of both models; default: evaluate.max_new_tokens")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="directory to write; default: baselines/ in the run directory")
    ] = None,
    set_: Overrides = None,
) -> None:
    """Compare the tuned model with the base in other decodings: greedy, low temperature, low top-p, majority vote."""
    run = open_run(config, set_)
    from rmx.analyses import baselines
    from rmx.tables import show

    folder, default = out or run.path("baselines"), baselines.Options()
    options = baselines.Options(
        temperature or default.temperatures, top_p or default.top_ps, samples, both, max_new_tokens
    )
    with run.locked():
        result = baselines.baselines(run, folder, options)
    baselines.write(result, folder)
    show(baselines.table(result))


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx drift config.yaml novel.txt --window 1024")
def drift(
    config: ConfigPath,
    text: Annotated[Path, typer.Argument(help="UTF-8 file of plain text that is not in the training data")],
    adapter: Annotated[Path | None, typer.Option(help="adapter directory; default: the run's own adapter")] = None,
    window: Annotated[int, typer.Option(help="number of tokens in each window of the text")] = 512,
    out: Annotated[Path | None, typer.Option(help="directory to write; default: drift/ in the run directory")] = None,
    set_: Overrides = None,
) -> None:
    """Measure how far the adapter moves the model on other text: KL(base || tuned), and the perplexity of both."""
    run = open_run(config, set_)
    from rmx.analyses import drift
    from rmx.tables import show

    try:
        content = text.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise RmxError(f"{text}: cannot be read as text: {fault}") from fault
    with run.locked():
        result = drift.drift(run, content, adapter, window)
    drift.write(result, out or run.path("drift"), run.meta(file=text.name, window=window))
    show(drift.table(result))


@app.command(rich_help_panel=PANELS[2], epilog="Example: rmx intervene config.yaml --gate entropy --tau 2.5")
def intervene(
    config: Annotated[
        Path, typer.Argument(metavar="BASE", help="YAML file of a run; its model and held-out problems are used")
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
    """Measure how much accuracy BASE gains with the tokens of OTHER at a few positions, compared with controls."""
    from rich.console import Console

    if gate not in ("disagreement", "entropy"):
        raise RmxError(f"--gate {gate}: expected disagreement or entropy")
    run = open_run(config, set_)
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
