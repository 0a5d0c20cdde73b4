"""Which of a training's candidates becomes the adapter: chosen on problems that are neither trained nor reported on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rmx.records import Interval

FOLDER = "candidates"


@dataclass(frozen=True, slots=True)
class Candidate:
    step: int  # after which it was saved
    pass_at_1: Interval  # on the problems to choose on


@dataclass(frozen=True, slots=True)
class Choice:
    """choice.json"""

    prompt: str  # fingerprint
    problems: int
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
