"""Accuracy of the base with other decodings and majority votes, compared with the tuned model, with the cost.

All on the run's held-out problems with the evaluation's random numbers, so that differences are paired over problems.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

import rmx_kernels
from rmx.artefacts import remove, write_json
from rmx.config import EvaluateConfig
from rmx.errors import AnalysisError
from rmx.grading.metrics import bootstrap, pass_rates, vote_rates
from rmx.models import lora
from rmx.progress import console
from rmx.records import Interval
from rmx.reports.charts import interval_lines
from rmx.reports.report import COLOURS, new_figure, save_png
from rmx.runs.evaluate import Samples
from rmx.runs.pipeline import Run
from rmx.sampling.remote import check_served
from rmx.tables import new_table

TUNED = "tuned"


@dataclass(frozen=True)
class Options:
    """The decodings of the base, in addition to that of the evaluation and to greedy."""

    temperatures: Sequence[float] = (0.3,)
    top_ps: Sequence[float] = (0.8,)
    samples: int | None = None  # of a problem, for the votes; None: evaluate.samples
    both: bool = False  # the tuned model by all these, too
    max_new_tokens: int | None = None  # None: evaluate.max_new_tokens


@dataclass(frozen=True)
class Arm:
    """One way of answering a question; intervals are over problems."""

    accuracy: Interval  # pass@1, or of a vote
    behind: Interval | None  # accuracy of the tuned model, decoded as the evaluation does, - this; None for that itself
    tokens: Interval  # generated for one question: mean length of a completion, times the votes
    votes: int  # completions of one answer
    samples: int  # of each problem that this was measured with


@dataclass(frozen=True)
class Baselines:
    problems: int
    sampling: dict[str, Any]  # of the evaluation
    arms: dict[str, Arm]
    prompt: str  # fingerprint


def baselines(run: Run, out: Path, options: Options = Options()) -> Baselines:
    """Sample what is missing, judge it, and compare.

    Raises:
        AnalysisError: a bad option, or no problem was judged in every arm. RunError: the run is not evaluated.
    """
    decodings = _decodings(run.config.evaluate, options)
    run.need("evaluate")
    problems, sides = run.problems("evaluate"), _Sides(run, out)
    base = {name: sides.sampled("base", name, sampling) for name, sampling in decodings.items()}
    with lora.worn(run.lm.model, run.path("adapter"), run.renderer.fingerprint):
        if run.config.evaluate.engine == "openai":
            check_served(run.lm, run.config.evaluate, run.path("adapter"))
        own = decodings if options.both else {"": _limited(run.config.evaluate, options)}
        tuned = {name: sides.sampled(TUNED, name, sampling) for name, sampling in own.items()}
    found: dict[str, tuple[Samples, int]] = {}
    for model, decoded in (("base", base), (TUNED, tuned)):
        for name, samples in decoded.items():
            found[f"{model} {name}".strip()] = samples, 1
        n = max(v.sample for v in decoded[""][1]) + 1
        sizes = sorted({*(2**i for i in range(1, n.bit_length())), n} - {1})
        found |= {f"{model} vote {k}": (decoded[""], k) for k in sizes}
    rates = {
        name: pass_rates(problems, side[1]) if k == 1 else vote_rates(problems, side[1], k)
        for name, (side, k) in found.items()
    }
    judged = [p.problem_id for p in problems if all(p.problem_id in own for own in rates.values())]
    if not judged:
        raise AnalysisError("baselines: no problem has a judged sample in every arm; raise verify.timeout_s")
    draws, seed = run.config.evaluate.bootstrap, run.config.seed
    best = np.array([rates[TUNED][p] for p in judged])
    arms = {}
    for name, (side, k) in found.items():
        own_rates = np.array([rates[name][p] for p in judged])
        lengths: dict[str, list[int]] = {p: [] for p in judged}
        for r in side[0]:
            if r.problem_id in lengths:
                lengths[r.problem_id].append(len(r.completion_ids))
        arms[name] = Arm(
            accuracy=bootstrap(own_rates, draws, seed),
            behind=None if name == TUNED else bootstrap(best - own_rates, draws, seed),
            tokens=bootstrap(k * np.array([np.mean(lengths[p]) for p in judged]), draws, seed),
            votes=k,
            samples=max(v.sample for v in side[1]) + 1,
        )
    sampling = _limited(run.config.evaluate, options).model_dump(mode="json", exclude={"base_url"})
    return Baselines(len(judged), sampling, arms, run.meta()["prompt"])


def _limited(sampling: EvaluateConfig, options: Options) -> EvaluateConfig:
    """The evaluation's decoding at the limit in use."""
    most = options.max_new_tokens
    return sampling if most is None else sampling.model_copy(update={"max_new_tokens": most})


def _decodings(sampling: EvaluateConfig, options: Options) -> dict[str, EvaluateConfig]:
    """By name; the evaluation's own, with the samples that votes are taken from, has none."""
    for name, value in (("samples", options.samples), ("max-new-tokens", options.max_new_tokens)):
        if value is not None and value < 1:
            raise AnalysisError(f"baselines: --{name}: expected at least 1, got {value}")
    if wrong := [t for t in options.temperatures if t < 1e-3]:
        raise AnalysisError(f"baselines: --temperature: expected at least 0.001 (0 is always included), got {wrong[0]}")
    if wrong := [p for p in options.top_ps if not 0 < p <= 1]:
        raise AnalysisError(f"baselines: --top-p: expected above 0 and at most 1, got {wrong[0]}")
    own = _limited(sampling, options)
    found = {"": own.model_copy(update={"samples": options.samples or own.samples})}
    found["greedy"] = own.model_copy(update={"temperature": 0.0, "samples": 1})
    found |= {f"T {t:g}": own.model_copy(update={"temperature": t}) for t in options.temperatures}
    return {**found, **{f"top-p {p:g}": own.model_copy(update={"top_p": p}) for p in options.top_ps}}


class _Sides:
    """Samples of either model, in ``out``, or the evaluation's where it sampled with the same settings."""

    def __init__(self, run: Run, out: Path) -> None:
        self.home, self.problems = run, run.problems("evaluate")
        folder = str(out.absolute())
        self.run = Run(run.config.model_copy(update={"run_dir": folder, "model": run.model_settings}))
        self.run.lm, self.run.judged = run.lm, run.judged

    def sampled(self, side: str, name: str, sampling: EvaluateConfig) -> Samples:
        if sampling == self.home.config.evaluate:
            return self.home.evaluated(side)
        adapter = self.home.path("adapter") if side == TUNED else None
        origin = {
            "rmx": rmx_kernels.__version__,
            "prompt": self.run.renderer.fingerprint,
            "model": self.run.config.model.model_dump(),
            "weights": self.run.weights,
            "adapter": adapter and lora.adapter_mark(adapter),
            "problems": [p.problem_id for p in self.problems],
            "sampling": sampling.model_dump(exclude={"bootstrap"}),
        }
        file = f"{side}.{name.replace(' ', '-') or 'evaluate'}"
        found = self.run.generated(file, self.problems, sampling, self.run.config.seed + 1, origin, adapter)
        remove(self.run.path(f"{file}.journal.jsonl"))
        return found, self.run.judge(file, self.problems, found)


def write(result: Baselines, out: Path) -> None:
    """``baselines.json`` and ``baselines.png``."""
    write_json(out / "baselines.json", asdict(result))
    plot(result, out / "baselines.png")
    console.print(f"baselines: written {out / 'baselines.json'} and baselines.png", markup=False, soft_wrap=True)


def table(result: Baselines) -> Table:
    """Accuracy of each arm, how far the tuned model is above it, and the tokens of one answer."""
    title = f"{result.problems} held-out problems [95 % interval]"
    caption = "tokens: generated for one answer; a vote takes several completions"
    grid = new_table(("", "accuracy", "tuned is above by", "tokens"), title=title, caption=caption)
    for name, arm in result.arms.items():
        grid.add_row(name, str(arm.accuracy), "" if arm.behind is None else str(arm.behind), f"{arm.tokens:.4g}")
    return grid


def plot(result: Baselines, path: Path) -> None:
    """PNG: accuracy against the tokens of one answer; the votes of a model are one line."""
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for name, arm in result.arms.items():
        label = f"{name.split()[0]}, votes" if arm.votes > 1 or name in ("base", TUNED) else name
        lines.setdefault(label, []).append((arm.tokens.mean, arm.accuracy))
    figure = new_figure(8, 4.8)
    axes = figure.subplots()
    colours = dict(zip(lines, [*COLOURS.values(), *(f"C{n}" for n in range(len(lines)))], strict=False))
    interval_lines(axes, lines, colours, ticks=False)
    axes.set(title="What an answer costs", xlabel="generated tokens of one answer", ylabel="held-out accuracy")
    save_png(figure, path)
