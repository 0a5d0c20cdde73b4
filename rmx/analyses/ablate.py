"""The same training with one thing changed: which tokens are gated, what the advantages say, how large the adapter is.

Every variant trains on the run's own rollouts and scores, in a run directory of its own below the run's, and is judged
on the same held-out problems with the same random numbers, so that differences are paired (arXiv 2605.06241, sections 4
and 5). ``random`` and ``lowest`` gate as many tokens of each sequence as ``budget`` does, but others; with ``-mass``
their gradient is as large, too. :mod:`rmx.analyses.variants` has them all.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from rich.table import Table

from rmx.analyses.variants import OWN, Variant, curve_variants, variants
from rmx.artefacts import remove, write_json
from rmx.config import Config
from rmx.errors import AnalysisError
from rmx.grading.metrics import bootstrap, pass_rates
from rmx.models.quantization import parameter_count
from rmx.progress import console
from rmx.records import Interval
from rmx.reports.charts import interval_lines
from rmx.reports.report import BASE, GATE, TUNED, new_figure, save_png
from rmx.runs.evaluate import Lengths, lengths
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES
from rmx.tables import new_table
from rmx.training.select import gated_share, gradient_mass, gradient_norms

SHARED = ("problems", "rollouts", "verify", "score")
TRAINED = ("select", "train", "choose", "evaluate")
ARTEFACTS = ("training_set.jsonl", "gate.json", "metrics.jsonl", "adapter")  # of select and train


@dataclass(frozen=True)
class Outcome:
    """One variant, on average over its trainings; intervals are over held-out problems."""

    changes: dict[str, dict[str, Any]]
    gated: float  # share of the training set's completion tokens
    parameters: int  # of the adapter
    share: float  # of all parameters, the adapter's among them
    accuracy: Interval  # pass@1
    gain: Interval  # over the base
    against: str
    difference: Interval | None  # accuracy - that of ``against``; None for that itself, and where it was not run
    seeds: list[float]  # gain of each training
    decisions: float  # gated tokens of a rollout, on average
    gradient: float  # mass of a rollout: rmx.training.select.gradient_mass, on average
    tokens_read: float  # by one training
    seconds: float  # of one training
    lengths: Lengths  # of the base's and all trainings' samples


@dataclass(frozen=True)
class Ablation:
    problems: int
    samples: int
    max_new_tokens: int  # of the judged samples
    base: Interval  # pass@1
    budget: float
    quantile: float
    training_seeds: list[int]
    outcomes: dict[str, Outcome]
    prompt: str  # fingerprint


@dataclass(frozen=True)
class Options:
    """What :func:`ablate` varies."""

    budget: float = 0.2
    quantile: float = 0.5
    seeds: int = 1  # trainings of each variant
    shares: Sequence[float] = ()  # of a curve, whose variants replace the others
    max_new_tokens: int | None = None  # of base and variants where they are judged; None: evaluate.max_new_tokens

    def check(self) -> None:
        if not (0 < self.budget < 1 and 0 < self.quantile < 1):
            said = f"{self.budget} and {self.quantile}"
            raise AnalysisError(f"ablate: expected budget and quantile between 0 and 1, got {said}")
        if wrong := [share for share in self.shares if not 0 < share < 1]:
            raise AnalysisError(f"ablate: expected shares between 0 and 1, got {wrong[0]}")
        if self.seeds < 1:
            raise AnalysisError(f"ablate: expected at least one seed, got {self.seeds}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise AnalysisError(f"ablate: expected at least one new token, got {self.max_new_tokens}")

    def variants(self, epochs: float = 1.0) -> dict[str, Variant]:
        return curve_variants(self.shares) if self.shares else variants(self.budget, self.quantile, epochs)


def ablate(run: Run, out: Path, names: Sequence[str] = (), options: Options = Options()) -> Ablation:
    """Train and judge the variants ``names`` (none: all of them).

    If it was killed, a new start continues in the current stage; results with the same settings are kept.

    Raises:
        AnalysisError: an unknown name; a share outside (0, 1); a run whose training set is not its own selection.
        RunError: a stage of the run is not done.
    """
    options.check()
    known = options.variants()
    if unknown := [name for name in names if name not in known]:
        raise AnalysisError(f"ablate: unknown variant {unknown[0]!r}; expected one or more of {', '.join(known)}")
    _check(run)
    known = options.variants(_imitation_epochs(run))
    if options.max_new_tokens is not None:
        run = _judged_longer(run, out, options.max_new_tokens)
    chosen = {name: known[name] for name in known if not names or name in names}
    seeds = [run.config.train_seed + n for n in range(options.seeds)]
    trainings = {name: [_training(run, out, name, own, seed) for seed in seeds] for name, own in chosen.items()}
    problems, base = run.problems("evaluate"), run.evaluated("base")
    base_rates = pass_rates(problems, base[1])
    sides = {name: [own.evaluated("tuned") for own in runs] for name, runs in trainings.items()}
    rates = {name: [pass_rates(problems, verdicts) for _, verdicts in own] for name, own in sides.items()}
    judged = [p for p in problems if p.problem_id in base_rates]
    judged = [p for p in judged if all(p.problem_id in own for runs in rates.values() for own in runs)]
    if not judged:
        raise AnalysisError("ablate: no problem has a judged sample in every variant; raise verify.timeout_s")
    before = np.array([base_rates[p.problem_id] for p in judged])
    means = {name: np.array([[own[p.problem_id] for p in judged] for own in runs]) for name, runs in rates.items()}
    draws, seed = run.config.evaluate.bootstrap, run.config.seed
    total = parameter_count(run.lm.model)
    outcomes = {}
    for name, variant in chosen.items():
        mean, runs = means[name].mean(0), trainings[name]
        other = means.get(variant.against)
        size = _size(runs[0])
        outcomes[name] = Outcome(
            changes=variant.changes,
            gated=gated_share(runs[0].training_set()),
            parameters=size,
            share=size / (total + size),
            accuracy=bootstrap(mean, draws, seed),
            gain=bootstrap(mean - before, draws, seed),
            against=variant.against,
            difference=None if other is None or name == OWN else bootstrap(mean - other.mean(0), draws, seed),
            seeds=[float((own - before).mean()) for own in means[name]],
            **_pulled(runs),
            tokens_read=float(np.mean([sum(m.tokens for m in own.history()) for own in runs])),
            seconds=float(np.mean([sum(m.seconds for m in own.history()) for own in runs])),
            lengths=lengths(judged, base, sides[name], draws=draws, seed=seed),
        )
    return Ablation(
        problems=len(judged),
        samples=run.config.evaluate.samples,
        max_new_tokens=run.config.evaluate.max_new_tokens,
        base=bootstrap(before, draws, seed),
        budget=options.budget,
        quantile=options.quantile,
        training_seeds=seeds,
        outcomes=outcomes,
        prompt=run.meta()["prompt"],
    )


def _check(run: Run) -> None:
    """Whether variants of this run would differ in one thing alone."""
    if run.config.evaluate.engine == "openai":
        raise AnalysisError("ablate: a server has one tuned model, not every variant: set another evaluate.engine")
    run.need("evaluate")
    if "imported" in run.stages()["select"]:
        raise AnalysisError("ablate: the training set was imported; its variants would be selected by other rules")
    if run.config.select.shuffle_advantages:
        raise AnalysisError("ablate: expected a run with select.shuffle_advantages=false, got true")
    if run.config.select.right_only:
        raise AnalysisError("ablate: expected a run without select.right_only, got true")


def _imitation_epochs(run: Run) -> float:
    """Over the right rollouts, for as many sequences as the run's training reads, and thus as many steps."""
    rewards = [s.reward for s in run.training_set()]
    return max(1, round(run.config.train.epochs * len(rewards))) / max(1, rewards.count(1))


def _pulled(runs: Sequence[Run]) -> dict[str, float]:
    """Decision tokens and gradient mass of a rollout, on average over rollouts and trainings."""
    counts, masses = [], []
    for run in runs:
        scores = {(s.problem_id, s.sample): s for s in run.scores()}
        for s in run.training_set():
            norms = gradient_norms(scores[s.problem_id, s.sample], s.completion_ids)
            counts.append(len(s.decision_tokens))
            masses.append(gradient_mass(s, norms, run.config.train.negative_weight))
    return {"decisions": float(np.mean(counts)), "gradient": float(np.mean(masses))}


def _judged_longer(run: Run, out: Path, max_new_tokens: int) -> Run:
    """The run with its own adapter, evaluated at another limit."""
    tree = run.config.model_dump()
    tree["evaluate"]["max_new_tokens"] = max_new_tokens
    tree |= {"model": run.model_settings.model_dump(), "run_dir": str((out / f"judged-{max_new_tokens}").absolute())}
    made = Run(Config.model_validate(tree).at(run.config.folder))
    made.lm, made.judged = run.lm, run.judged
    chosen = run.config.train.candidates > 1  # by an evaluation, which is another one now: trained again
    with made.locked():
        _share(run, made, SHARED if chosen else (*SHARED, "select", "train"))
        _execute(made, f"at most {max_new_tokens} new tokens")
    return made


def _training(run: Run, out: Path, name: str, variant: Variant, seed: int) -> Run:
    """The finished run of one variant; the run itself where nothing is changed."""
    if name == OWN and seed == run.config.train_seed:
        return run
    tree = run.config.model_dump()
    for section, settings in variant.changes.items():
        tree[section] |= settings
    tree["model"] = run.model_settings.model_dump()
    tree |= {"run_dir": str((out / f"{name}-{seed}").absolute()), "training_seed": seed}
    made = Run(Config.model_validate(tree).at(run.config.folder))
    made.lm, made.judged = run.lm, run.judged  # one model for all, and one verdict for the same answer
    with made.locked():
        _share(run, made, SHARED)
        link(run, made, "evaluation.base.jsonl")
        _execute(made, f"{name}, seed {seed}")
    return made


def _execute(made: Run, said: str) -> None:
    """The stages that are not done with these settings."""
    for stage in TRAINED:
        record = made.stages().get(stage)
        if record is None or record["settings"] != made.settings(stage) or not made.path(STAGES[stage].output).exists():
            console.print(f"ablate: {said}", markup=False, highlight=False)
            made.execute(stage)


def _share(run: Run, made: Run, stages: Sequence[str]) -> None:
    """Let ``made`` read the first ``stages`` from ``run``; its own later ones count only if those are the same."""
    made.dir.mkdir(parents=True, exist_ok=True)
    for name in [*(STAGES[stage].output.split("/")[0] for stage in SHARED), *(ARTEFACTS if "train" in stages else ())]:
        link(run, made, name)
    theirs = {stage: run.stages()[stage] for stage in stages}
    mine = made.stages()
    kept = mine if all(mine.get(stage) == theirs[stage] for stage in stages) else {}
    write_json(made.path("stages.json"), {**theirs, **{s: kept[s] for s in STAGES if s in kept and s not in stages}})


def link(run: Run, made: Run, name: str) -> None:
    """Let ``made`` read a file or directory of ``run`` under the same name."""
    here, target = made.path(name), os.path.relpath(run.path(name).resolve(), made.dir.resolve())
    if not here.is_symlink() or os.readlink(here) != target:
        remove(here)
        here.symlink_to(target)


def _size(run: Run) -> int:
    with safetensors.safe_open(run.path("adapter/adapter_model.safetensors"), "np") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118  not a dict


def write(result: Ablation, out: Path, name: str = "ablate") -> None:
    """``NAME.json`` and ``NAME.png``."""
    write_json(out / f"{name}.json", asdict(result))
    (plot_curve if name == "curve" else plot)(result, out / f"{name}.png")
    console.print(f"ablate: written {out / name}.json and {name}.png", markup=False, soft_wrap=True)


def tables(result: Ablation) -> list[Table]:
    """Gain of each variant, and how far it is from the one it is compared with; what it took; lengths."""
    seeds = len(result.training_seeds)
    title = f"{result.problems} problems x {result.samples}, base {result.base}"
    caption = f"mean of {seeds} training{'s' if seeds > 1 else ''} each; pass@1 [95 % over problems]"
    headings = ("", "gated", "gain", "difference to")
    gains = new_table(headings, left=headings[-1:], title=title, caption=caption, padding=0, pad_edge=True)
    caption = "of a rollout: gated tokens, gradient mass; of a training: adapter's size, tokens read, seconds"
    costs = new_table(
        ("", "tokens", "gradient", "adapter", "read", "seconds"), title="What each takes", caption=caption
    )
    title = f"Lengths at most {result.max_new_tokens} tokens"
    caption = "cut: at the limit; gain of the pairs of samples that neither side cuts, their share"
    long = new_table(("", "tokens [95 %]", "cut", "uncut gain", "pairs"), title=title, caption=caption)
    for name, found in result.outcomes.items():
        against = "" if found.difference is None else f"{_short(found.difference)} {found.against}"
        gains.add_row(name, f"{found.gated:.0%}", _short(found.gain), against)
        read = f"{found.tokens_read:,.0f}"
        costs.add_row(
            name, f"{found.decisions:.2f}", f"{found.gradient:.4f}", f"{found.share:.2%}", read, f"{found.seconds:.0f}"
        )
        own = found.lengths
        if not long.rows:
            long.add_row("base", _tokens(own.base_tokens), f"{own.base_truncated:.1%}")
        uncut = "-" if own.gain is None else _short(own.gain)
        long.add_row(name, _tokens(own.tuned_tokens), f"{own.tuned_truncated:.1%}", uncut, f"{own.kept:.0%}")
    return [gains, costs, long]


def _tokens(interval: Interval) -> str:
    return format(interval, ".4g")


def _short(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def plot_curve(result: Ablation, path: Path) -> None:
    """PNG: gain with its interval against the share of gated tokens, of both gates and of all tokens."""
    lines: dict[str, list[tuple[float, Interval]]] = {"entropy": [], "random": [], "all": []}
    for name, found in result.outcomes.items():
        gate, _, percent = name.partition("-")
        lines[gate].append((float(percent or 100), found.gain))
    figure = new_figure(7, 4.4)
    axes = figure.subplots()
    colours = {"entropy": GATE, "random": BASE, "all": TUNED}
    interval_lines(axes, {name: line for name, line in lines.items() if line}, colours)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="Gain by the share of gated tokens", xlabel="gated tokens (%)", ylabel="gain in held-out pass@1")
    save_png(figure, path)


def plot(result: Ablation, path: Path) -> None:
    """PNG: gain of every variant with its interval, and the single trainings as dots."""
    figure = new_figure(9, 0.55 * len(result.outcomes) + 1.6)
    axes = figure.subplots()
    names = list(result.outcomes)
    for y, name in enumerate(names):
        found = result.outcomes[name]
        colour = GATE if name in (OWN, "quantile", "budget") else TUNED if found.against == OWN else BASE
        gain = found.gain
        axes.barh(y, gain.mean, 0.62, color=colour)
        axes.errorbar(
            [gain.mean], [y], xerr=[[gain.mean - gain.low], [gain.high - gain.mean]], color="black", capsize=3
        )
        if len(found.seeds) > 1:
            axes.plot(found.seeds, [y] * len(found.seeds), "o", color="white", markeredgecolor="black", markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    labels = [f"{name}  ({found.gated:.0%} gated)" for name, found in result.outcomes.items()]
    axes.set_yticks(range(len(names)), labels)
    axes.invert_yaxis()
    axes.set(title="The same training with one thing changed", xlabel="gain in held-out pass@1 over the base")
    save_png(figure, path)
