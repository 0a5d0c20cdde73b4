"""Which of a training's candidates becomes the adapter: chosen on problems that are neither trained nor reported on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rmx.grading.metrics import EvaluationError, bootstrap, pass_rates
from rmx.models import lora
from rmx.records import Interval

if TYPE_CHECKING:
    from rmx.runs.pipeline import Run

FOLDER = "candidates"


@dataclass(frozen=True, slots=True)
class Candidate:
    step: int  # after which it was saved
    pass_at_1: Interval  # on the problems to choose on


@dataclass(frozen=True, slots=True)
class Choice:
    """choice.json"""

    prompt: str  # fingerprint
    problems: int  # with a judged sample
    samples: int
    candidates: list[Candidate]  # by step
    step: int  # of the chosen one


def candidate_steps(steps: int, candidates: int) -> list[int]:
    """After which of ``steps`` steps an adapter is kept: equally distant ones, the last among them."""
    return sorted({max(1, round(steps * n / candidates)) for n in range(1, candidates + 1)})


def candidate_path(run_dir: Path, step: int) -> Path:
    return run_dir / FOLDER / f"step-{step:05d}"


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of the candidates that are there, ascending."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / FOLDER).glob("step-*"))


def best(candidates: Sequence[Candidate]) -> Candidate:
    """The highest pass@1; of equal ones the earliest, which is nearest to the base."""
    return max(candidates, key=lambda c: (c.pass_at_1.mean, -c.step))


def choose(run: "Run") -> Choice:
    """Sample every candidate on the problems to choose on, as the evaluation does, and take the best.

    Raises:
        EvaluationError: no problem has a judged sample, or a candidate is not there.
    """
    problems, sampling = run.problems("choose"), run.config.evaluate
    last = run.history()[-1].step  # fewer where it stopped early
    steps = candidate_steps(run.steps(), run.config.train.candidates)
    steps = sorted({step for step in steps if step < last} | {last})
    if missing := sorted(set(steps) - set(saved_steps(run.dir))):
        raise EvaluationError(
            f"choose: the candidate of step {missing[0]} is not in {run.dir / FOLDER}: run `rmx train` with --again"
        )
    candidates, judged = [], 0
    for step in steps:
        path = candidate_path(run.dir, step)
        with lora.worn(run.lm.model, path):
            _, verdicts = run.sampled(f"choosing/step-{step:05d}", problems, 2, path)
        rates = np.array(list(pass_rates(problems, verdicts).values()))
        if not len(rates):
            raise EvaluationError(
                f"choose: none of {len(problems)} problems to choose on has a judged sample; raise verify.timeout_s"
            )
        judged = max(judged, len(rates))
        candidates.append(Candidate(step, bootstrap(rates, sampling.bootstrap, run.config.seed)))
    prompt = run.meta()["prompt"]
    return Choice(prompt, judged, sampling.samples, candidates, best(candidates).step)
