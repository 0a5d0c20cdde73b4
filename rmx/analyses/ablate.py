"""The same training with one thing changed: which tokens are gated, what the advantages say, how large the adapter is.

Every variant trains on the run's own rollouts and scores, in a run directory of its own below the run's, and is judged
on the same held-out problems with the same random numbers, so that differences are paired (arXiv 2605.06241, sections 4
and 5). ``random`` and ``lowest`` gate as many tokens of each sequence as ``budget`` does, but others.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from rich.table import Table

from rmx.artefacts import write_json
from rmx.config import Config
from rmx.errors import AnalysisError
from rmx.grading.metrics import bootstrap, pass_rates
from rmx.models.quantization import parameter_count
from rmx.progress import console
from rmx.records import Interval
from rmx.reports.report import BASE, GATE, TUNED, new_figure, save_png
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES
from rmx.tables import new_table
from rmx.training.select import gated_share

OWN = "own"  # the run's settings as they are
SHARED = ("problems", "rollouts", "verify", "score")
TRAINED = ("select", "train", "choose", "evaluate")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Variant:
    changes: dict[str, dict[str, Any]]  # section -> settings
    against: str = OWN  # the variant that it is compared with


def variants(budget: float, quantile: float) -> dict[str, Variant]:
    """By name; ``budget`` and ``quantile`` as in the select section."""
    none = {"tau": None, "quantile": None, "budget": None, "gate": "entropy"}
    share = {**none, "budget": budget}
    return {
        OWN: Variant({}),
        "quantile": Variant({"select": {**none, "quantile": quantile}}),
        "budget": Variant({"select": share}),
        "random": Variant({"select": {**share, "gate": "random"}}, "budget"),
        "lowest": Variant({"select": {**share, "gate": "lowest"}}, "budget"),
        "all": Variant({"select": {"gate": "all"}}),
        "shuffled": Variant({"select": {"shuffle_advantages": True}}),
        "positives": Variant({"train": {"negative_weight": 0.0}}),
        "r8-o": Variant({"lora": {"r": 8, "alpha": 16.0, "targets": ["o_proj"], "start": None}}),
        "r32-qkvo": Variant({"lora": {"r": 32, "alpha": 64.0, "targets": QKVO, "start": None}}),
    }


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


@dataclass(frozen=True)
class Ablation:
    problems: int
    samples: int
    base: Interval  # pass@1
    budget: float
    quantile: float
    training_seeds: list[int]
    outcomes: dict[str, Outcome]
    prompt: str  # fingerprint


def ablate(
    run: Run, out: Path, names: Sequence[str] = (), *, budget: float = 0.2, quantile: float = 0.5, seeds: int = 1
) -> Ablation:
    """Train and judge the variants ``names`` (none: all of them), each with ``seeds`` training seeds.

    Killed and started again, it goes on in the stage under way; what is done with the same settings stays.

    Raises:
        AnalysisError: an unknown name; a share outside (0, 1); a run whose training set is not its own selection.
        RunError: a stage of the run is not done.
    """
    known = variants(budget, quantile)
    if unknown := [name for name in names if name not in known]:
        raise AnalysisError(f"ablate: no variant {unknown[0]!r}; expected some of {', '.join(known)}")
    if not (0 < budget < 1 and 0 < quantile < 1):
        raise AnalysisError(f"ablate: expected budget and quantile between 0 and 1, got {budget} and {quantile}")
    if seeds < 1:
        raise AnalysisError(f"ablate: expected at least one seed, got {seeds}")
    if run.config.evaluate.engine == "openai":
        raise AnalysisError("ablate: a server has one tuned model, not every variant: set another evaluate.engine")
    run.need("evaluate")
    if "imported" in run.stages()["select"]:
        raise AnalysisError(
            "ablate: the training set was imported; variants of it would be selected anew, by other rules"
        )
    if run.config.select.shuffle_advantages:
        raise AnalysisError("ablate: the run itself has shuffled advantages")
    chosen = {name: known[name] for name in known if not names or name in names}
    first = run.config.train_seed
    trainings = {
        name: [_training(run, out, name, variant, first + n) for n in range(seeds)] for name, variant in chosen.items()
    }
    problems = run.problems("evaluate")
    base_rates = _rates(run, "base")
    rates = {name: [_rates(own, "tuned") for own in runs] for name, runs in trainings.items()}
    judged = [p.problem_id for p in problems if p.problem_id in base_rates]
    judged = [p for p in judged if all(p in own for runs in rates.values() for own in runs)]
    if not judged:
        raise AnalysisError("ablate: no problem has a judged sample in every variant; raise verify.timeout_s")
    base = np.array([base_rates[p] for p in judged])
    means = {name: np.array([[own[p] for p in judged] for own in runs]) for name, runs in rates.items()}
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
            gain=bootstrap(mean - base, draws, seed),
            against=variant.against,
            difference=None if other is None or name == OWN else bootstrap(mean - other.mean(0), draws, seed),
            seeds=[float((own - base).mean()) for own in means[name]],
        )
    return Ablation(
        problems=len(judged),
        samples=run.config.evaluate.samples,
        base=bootstrap(base, draws, seed),
        budget=budget,
        quantile=quantile,
        training_seeds=[first + n for n in range(seeds)],
        outcomes=outcomes,
        prompt=run.meta()["prompt"],
    )


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
        _share(run, made)
        for stage in TRAINED:
            record = made.stages().get(stage)
            if (
                record is None
                or record["settings"] != made.settings(stage)
                or not made.path(STAGES[stage].output).exists()
            ):
                console.print(f"ablate: {name}, seed {seed}", markup=False, highlight=False)
                made.execute(stage)
    return made


def _share(run: Run, made: Run) -> None:
    """Let ``made`` read the stages before selection from ``run``; its own stages count only if those are the same."""
    made.dir.mkdir(parents=True, exist_ok=True)
    for name in [*(STAGES[stage].output.split("/")[0] for stage in SHARED), "evaluation.base.jsonl"]:
        link, target = made.path(name), os.path.relpath(run.path(name).resolve(), made.dir.resolve())
        if not link.is_symlink() or os.readlink(link) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    theirs = {stage: run.stages()[stage] for stage in SHARED}
    mine = made.stages()
    kept = mine if all(mine.get(stage) == theirs[stage] for stage in SHARED) else {}
    write_json(made.path("stages.json"), {**theirs, **{s: kept[s] for s in STAGES if s in kept and s not in SHARED}})


def _rates(run: Run, side: str) -> dict[str, float]:
    problems = run.problems("evaluate")
    return pass_rates(problems, run.evaluated(side)[1])


def _size(run: Run) -> int:
    with safetensors.safe_open(run.path("adapter/adapter_model.safetensors"), "np") as file:
        return sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118  not a dict


def write(result: Ablation, out: Path) -> None:
    """``ablate.json`` and ``ablate.png``."""
    write_json(out / "ablate.json", asdict(result))
    plot(result, out / "ablate.png")
    console.print(f"ablate: written {out / 'ablate.json'} and ablate.png", markup=False, soft_wrap=True)


def table(result: Ablation) -> Table:
    """Gain of each variant, and how far it is from the one it is compared with."""
    seeds = len(result.training_seeds)
    title = f"{result.problems} problems x {result.samples}, base {result.base}"
    caption = (
        f"size: of the adapter; mean of {seeds} training{'s' if seeds > 1 else ''} each; pass@1 [95 % over problems]"
    )
    headings = ("", "gated", "size", "gain", "difference to")
    grid = new_table(headings, left=headings[-1:], title=title, caption=caption, padding=0, pad_edge=True)
    for name, found in result.outcomes.items():
        against = "" if found.difference is None else f"{_short(found.difference)} {found.against}"
        grid.add_row(name, f"{found.gated:.0%}", f"{found.share:.2%}", _short(found.gain), against)
    return grid


def _short(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:.3f}, {interval.high:.3f}]"


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
