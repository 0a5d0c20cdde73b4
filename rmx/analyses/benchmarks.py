"""Accuracy on named benchmarks, reasoning-gym tasks and files of problems, without and with an adapter.

The samples are stored beside the results, so a start with other intervals, or with another adapter, samples only
what is missing. docs/benchmarks.md lists sources and rules.
"""

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

import rmx_kernels
from rmx.artefacts import ArtefactError, fingerprint, parser, read_lines, remove, write_json
from rmx.config import EvaluateConfig
from rmx.errors import RmxError, close_to
from rmx.grading import metrics
from rmx.grading.data import DataError, load_rows, plain_text
from rmx.grading.problems import folded, generate, read_jsonl
from rmx.models import lora
from rmx.progress import console
from rmx.records import Accuracy, Interval, Problem, Rollout, Verdict
from rmx.reports.charts import interval_lines
from rmx.reports.report import COLOURS, new_figure, plot_bars, save_png
from rmx.runs import evaluate
from rmx.runs.pipeline import Run
from rmx.runs.rundir import meant
from rmx.sampling.remote import check_served
from rmx.tables import new_table

HELD_OUT = "held-out"  # the run's own held-out problems
GYM = "gym:"
GYM_COUNT = 200  # questions of a reasoning-gym task, where no limit is given
GYM_SEED = 2**40  # far from the seeds that training problems are drawn from: rmx.grading.problems.SEED_STRIDE
Samples = tuple[list[Rollout], list[Verdict]]


class BenchmarkError(RmxError):
    """A benchmark is unknown, cannot be loaded, or has unexpected content."""


def _behind_hashes(value: Any) -> str:
    _, mark, answer = plain_text(value).rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("expected a solution that ends with #### and the answer")
    return answer.strip().replace(",", "")


def _listed(value: Any) -> str:
    if not isinstance(value, list) or not value:
        raise ValueError("expected a list of answers")
    return ", ".join(map(plain_text, value))


@dataclass(frozen=True)
class Source:
    """Where a benchmark's problems are, and how they are read."""

    hub: str  # data set on the Hugging Face hub
    config: str | None
    split: str
    question: str  # fields
    answer: str
    samples: int = 1  # of each problem, unless told otherwise
    read: Callable[[Any], str] = plain_text  # the ground truth from its field


BENCHMARKS = {
    "gsm8k": Source("openai/gsm8k", "main", "test", "question", "answer", read=_behind_hashes),
    "math500": Source("HuggingFaceH4/MATH-500", None, "test", "problem", "answer"),
    "aime24": Source("HuggingFaceH4/aime_2024", None, "train", "problem", "answer", samples=8),
    "amc23": Source("math-ai/amc23", None, "test", "question", "answer", samples=8),
    "minerva": Source("math-ai/minervamath", None, "test", "question", "answer"),
    "olympiadbench": Source(
        "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer", read=_listed
    ),
}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems to evaluate on."""

    name: str  # of its files
    problems: list[Problem]
    samples: int | None = None  # of each problem; None: as the configuration says


@dataclass(frozen=True, slots=True)
class Result:
    """What is written to NAME.json."""

    name: str
    settings: dict[str, Any]  # all that it depends on, the prompts' fingerprint among them
    base: Accuracy
    tuned: Accuracy | None = None  # with the adapter
    gain: Interval | None = None  # of pass@1, tuned - base, paired over problems
    gain_at_k: dict[int, Interval] | None = None  # of pass@k, the same, k as in base.pass_at_k
    lengths: evaluate.Lengths | None = None  # of both, and the gain where neither is cut off
    trained_on: int | None = None  # questions among the run's training problems; None: not the run's own adapter


def read_benchmark(name: str, limit: int | None = None, data: Path | None = None) -> Benchmark:
    """A benchmark by its name, a reasoning-gym task as ``gym:TASK``, or a JSONL file by its path.

    Args:
        limit: take only this many problems: the first of one fixed shuffle, the same ones in every run.
        data: a directory that holds NAME.jsonl, or a data set in a directory NAME, to use instead of the hub.

    Raises:
        BenchmarkError: an unknown name, no data, or a row without a question or an answer. ArtefactError: a file that
            is not JSONL. ProblemsError: no such task.
    """
    if name.startswith(GYM):
        task = name.removeprefix(GYM)
        return Benchmark(f"gym-{task}", generate(task, {}, GYM_COUNT if limit is None else limit, GYM_SEED))
    if name in BENCHMARKS:
        source = BENCHMARKS[name]
        found = Benchmark(name, list(_problems(name, source, _rows(name, source, data))), source.samples)
        if not found.problems:
            raise BenchmarkError(f"{name}: contains no problems")
    elif name.endswith(".jsonl"):
        path = Path(name).expanduser()
        found = Benchmark(path.stem, read_jsonl(path))
    else:
        known = ", ".join((*BENCHMARKS, HELD_OUT))
        raise BenchmarkError(
            f"unknown benchmark {name!r}; expected {known}, {GYM}TASK or a path that ends with .jsonl"
            f"{close_to(name, BENCHMARKS)}"
        )
    if len({problem.problem_id for problem in found.problems}) < len(found.problems):
        raise BenchmarkError(f"{name}: two problems share a problem_id")
    if limit is not None:
        random.Random(0).shuffle(found.problems)
        del found.problems[limit:]
    return found


def _held_out(home: Run, limit: int | None) -> Benchmark:
    home.need("problems")
    return Benchmark(HELD_OUT, home.problems("evaluate")[:limit])


def _problems(name: str, source: Source, rows: Iterable[tuple[str, Any]]) -> Iterator[Problem]:
    for number, (where, row) in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise BenchmarkError(f"{where}: expected a JSON object, got {type(row).__name__}")
        question = _field(where, row, source.question, plain_text)
        answer = _field(where, row, source.answer, source.read)
        yield Problem(f"{name}-{number}", question, answer, name, "evaluate")


def _field(where: str, row: dict[str, Any], key: str, read: Callable[[Any], str]) -> str:
    if key not in row:
        raise BenchmarkError(f"{where}: no field {key!r}; fields: {', '.join(map(repr, row))}")
    try:
        return read(row[key])
    except ValueError as fault:
        raise BenchmarkError(f"{where}: {key}: {fault}, got {row[key]!r}") from fault


def _rows(name: str, source: Source, data: Path | None) -> Iterator[tuple[str, Any]]:
    """(where it stands, row) of each problem."""
    if data is None:
        yield from _from_hub(source.hub, source.config, source.split)
    elif (file := data.expanduser() / f"{name}.jsonl").is_file():
        yield from ((f"{file}:{number}", row) for number, row in read_lines(file, plain=True))
    elif (folder := data.expanduser() / name).is_dir():
        yield from _from_hub(str(folder), source.config, source.split)
    else:
        raise BenchmarkError(f"--data {data}: contains neither {name}.jsonl nor a directory {name}")


def _from_hub(hub: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    try:
        rows = load_rows(hub, config, split=split)
    except DataError as fault:
        raise BenchmarkError(f"{fault}; --data DIR reads the problems from files") from fault
    yield from ((f"{hub} {split}:{number}", row) for number, row in enumerate(rows, start=1))


def run_benchmarks(
    home: Run,
    names: Sequence[str],
    *,
    tuned: bool = False,
    adapter: Path | None = None,
    limit: int | None = None,
    samples: int | None = None,
    data: Path | None = None,
    out: Path | None = None,
) -> list[Result]:
    """Evaluate the model of ``home``, without and with an adapter, on each benchmark; write JSON and a picture.

    Sampling follows ``evaluate`` of the configuration, except for the number of samples, with the same random numbers
    on both sides. A benchmark with results for the same settings is not sampled again.

    Args:
        names: see :func:`read_benchmark`, as are ``limit`` and ``data``; or "held-out", the run's own problems.
        tuned: with the run's own adapter. adapter: with this one.
        samples: of each problem; default: the benchmark's own number, else that of the configuration.
        out: where NAME.json and benchmarks.png go; default: benchmarks/ in the run directory.

    Raises:
        BenchmarkError: a bad argument, or problems that cannot be loaded. AdapterError: the adapter is of another
            model. RunError: the run has no finished adapter.
    """
    for key, value in (("limit", limit), ("samples", samples)):
        if value is not None and value < 1:
            raise BenchmarkError(f"--{key}: expected at least 1, got {value}")
    if tuned and adapter is not None:
        raise BenchmarkError("expected --tuned or --adapter, got both")
    if tuned:
        home.check_adapter()
    found = [_held_out(home, limit) if name == HELD_OUT else read_benchmark(name, limit, data) for name in names]
    for name, count in Counter(benchmark.name for benchmark in found).items():
        if count > 1:
            raise BenchmarkError(f"{count} benchmarks are called {name!r}: their files would be the same")
    trained = home.problems("train") if tuned else None
    folder = (out or home.path("benchmarks")).absolute()
    run = Run(home.config.model_copy(update={"run_dir": str(folder), "model": home.model_settings}))
    path = home.path("adapter") if tuned else adapter
    with ExitStack() as stack:
        stack.enter_context(run.locked())
        worn = None
        if path is not None:
            wearing = stack.enter_context(lora.worn(run.lm.model, path, run.renderer.fingerprint))
            worn = wearing, lora.adapter_mark(path), path
            if run.config.evaluate.engine == "openai":
                check_served(run.lm, run.config.evaluate, path)
        results = [_evaluate(run, benchmark, samples, worn, trained) for benchmark in found]
    plot(results, run.path("benchmarks.png"))
    if several := [result for result in results if result.base.samples > 1]:
        plot_at_k(several, run.path("pass_at_k.png"))
    console.print(f"benchmark: written to {run.dir}", markup=False, soft_wrap=True)
    return results


def _evaluate(
    run: Run,
    benchmark: Benchmark,
    samples: int | None,
    worn: tuple[lora.Adapter, str, Path] | None,
    trained: Sequence[Problem] | None,
) -> Result:
    """``worn``: the adapter on the model, its mark and its directory; ``trained``: what it learned from, if known."""
    name, problems, config = benchmark.name, benchmark.problems, run.config
    sampling = config.evaluate.model_copy(update={"samples": samples or benchmark.samples or config.evaluate.samples})
    origin = {
        "rmx": rmx_kernels.__version__,
        "prompt": run.renderer.fingerprint,
        "model": config.model.model_dump(),
        "weights": run.weights,
        "problems": fingerprint(json.dumps([[p.problem_id, p.question, p.answer] for p in problems]).encode()),
        "sampling": sampling.model_dump(exclude={"bootstrap"}),
        "seed": config.seed,
    }
    mark = None if worn is None else worn[1]
    known = None if trained is None else {folded(p) for p in trained}
    settings = {
        **origin,
        "adapter": mark,
        "trained": None if known is None else fingerprint(json.dumps(sorted(known)).encode()),
        "bootstrap": sampling.bootstrap,
        "timeout_s": config.verify.timeout_s,
    }
    path = run.path(f"{name}.json")
    if path.exists() and meant((old := _read(path)).settings) == settings:
        console.print(f"{name}: is done", markup=False, soft_wrap=True)
        return old
    if worn is None:
        base = _sampled(run, f"{name}.base", problems, sampling, origin)
        result = Result(name, settings, metrics.accuracy(problems, *base, draws=sampling.bootstrap, seed=config.seed))
    else:
        with worn[0].off():
            base = _sampled(run, f"{name}.base", problems, sampling, origin)
        own = _sampled(run, f"{name}.tuned", problems, sampling, {**origin, "adapter": mark}, worn[2])
        both = evaluate.compare(problems, base, own, draws=sampling.bootstrap, seed=config.seed)
        seen = None if known is None else sum(folded(p) in known for p in problems)
        if seen:
            said = f"{name}: {seen} of {len(problems)} questions are among the run's training problems"
            console.print(said, markup=False, soft_wrap=True)
        interval: dict[str, Any] = {"draws": sampling.bootstrap, "seed": config.seed}
        at_k = evaluate.gains_at_k(problems, base, own, list(both.base.pass_at_k), **interval)
        cut = evaluate.lengths(problems, base, [own], **interval)
        result = Result(name, settings, both.base, both.tuned, both.gain, at_k, cut, seen)
    write_json(path, dataclasses.asdict(result))
    return result


def _sampled(
    run: Run,
    name: str,
    problems: list[Problem],
    sampling: EvaluateConfig,
    origin: dict[str, Any],
    adapter: Path | None = None,
) -> Samples:
    """Rollouts and verdicts of the model as it is; the rollouts of an earlier start are taken up."""
    found = run.generated(name, problems, sampling, run.config.seed, origin, adapter)
    remove(run.path(f"{name}.journal.jsonl"))
    return found, run.judge(name, problems, found)


def _read(path: Path) -> Result:
    try:
        return parser(Result)(json.loads(path.read_bytes()))
    except (ValueError, ArtefactError) as fault:
        raise ArtefactError(f"{path}: cannot be read: {fault}; delete it to evaluate again") from fault


def table(results: Sequence[Result]) -> Table:
    """One block a benchmark: base, tuned, gain."""
    caption = "n samples a problem; s.e. of pass@1 over problems; cut at the length limit"
    headings = ("", "avg@n [95 % interval]", "s.e.", "pass@n", "maj@n", "boxed", "tokens", "cut")
    grid = new_table(headings, caption=caption, padding=(0, 0, 0, 1))

    def add(label: str, side: Accuracy) -> None:
        error = "-" if side.standard_error is None else f"{side.standard_error:.3f}"
        n = side.samples
        shown = n > 1 and n in side.pass_at_k  # a single sample has no more to tell, nor have problems without all n
        votes = [f"{own[n].mean:.3f}" if shown else "-" for own in (side.pass_at_k, side.maj_at_k)]
        lengths = f"{side.boxed:.0%}", f"{side.tokens:.0f}", f"{side.truncated:.0%}"
        grid.add_row(f"  {label}", str(side.pass_at_1), error, *votes, *lengths)
        if side.unverified:
            grid.add_row("", f"{side.unverified} not verified")

    for result in results:
        grid.add_row(f"[bold]{escape(result.name)}[/]", f"{result.base.problems} problems x {result.base.samples}")
        add("base", result.base)
        if result.tuned is not None:
            add("tuned", result.tuned)
            grid.add_row("  gain", f"[bold]{result.gain}[/]")
            n = result.base.samples
            if n > 1 and result.gain_at_k and n in result.gain_at_k:
                grid.add_row(f"  gain @{n}", str(result.gain_at_k[n]))
    return grid


def plot(results: Sequence[Result], path: Path) -> None:
    """PNG: pass@1 of each benchmark, base beside tuned, with 95 % intervals."""
    figure = new_figure(max(5.0, 2 + 1.5 * len(results)), 4.4)
    axes = figure.subplots()
    names = [f"{r.name}\n{r.base.problems} x {r.base.samples}" for r in results]
    sides = {"base": [r.base.pass_at_1 for r in results]}
    if tuned := [r.tuned.pass_at_1 for r in results if r.tuned is not None]:
        sides["tuned"] = tuned
    plot_bars(axes, names, sides)
    axes.set(title="pass@1 [95 % interval]", xlabel="problems x samples")
    save_png(figure, path)


def plot_at_k(results: Sequence[Result], path: Path) -> None:
    """PNG: pass@k against k with 95 % intervals, a panel for each benchmark."""
    figure = new_figure(max(5.0, 4.2 * len(results)), 4.2)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        sides = {"base": result.base, **({} if result.tuned is None else {"tuned": result.tuned})}
        interval_lines(axes, {name: list(own.pass_at_k.items()) for name, own in sides.items()}, COLOURS)
        axes.set(title=f"{result.name}: {result.base.problems} problems", xlabel="k", ylabel="pass@k", ylim=(0, None))
    save_png(figure, path)
