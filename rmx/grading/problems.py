"""Problems from JSONL files and reasoning-gym tasks; no question is used both for training and for evaluation."""

import random
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rmx.artefacts import ArtefactError, fingerprint, read_lines
from rmx.config import ProblemsConfig, ProblemSource
from rmx.errors import RmxError, close_to
from rmx.grading.data import content, plain_text, read_dataset
from rmx.grading.numerals import number, plain
from rmx.records import Problem, Split

STALE_DRAWS = 300  # a generator that repeats itself this often in a row has no new question left
CHUNK = 100
SEED_STRIDE = 10_000_019  # between the first items of two seeds,
SOURCE_STRIDE = 1_000_003  # and of two sources of one task


class ProblemsError(RmxError):
    """The sources do not give the requested problems."""


def build_problems(config: ProblemsConfig, seed: int, locate: Callable[[str], Path] = Path) -> list[Problem]:
    """The problems for training, for the choice of a checkpoint, and for evaluation; disjoint by question text.

    Questions that differ only in white space or Unicode form are equal. A source with split "both" is divided between
    the splits in proportion to their counts; within each split the sources take turns until the count is reached.

    Args:
        locate: where a source's file is.

    Raises:
        ProblemsError: a source gives too few questions. ArtefactError: a broken file, with its line.
    """
    wanted: dict[Split, int] = {
        "train": config.train_count,
        "choose": config.choose_count,
        "evaluate": config.evaluate_count,
    }
    total = sum(wanted.values())
    pools: dict[Split, list[list[Problem]]] = {split: [] for split in wanted}
    seen: dict[str, Problem] = {}
    kinds: list[str] = []
    # Files with a split of their own speak first: a shared source may not take a question away from them.
    for source in sorted(config.sources, key=lambda s: s.split == "both"):
        kind = source.task or Path(source.jsonl or source.dataset or "").stem
        fresh = _unique(_read(source, total, seed, kinds.count(kind), locate), seen)
        kinds.append(kind)
        random.Random(seed).shuffle(fresh)
        if source.split != "both":
            pools[source.split].append(fresh)
            continue
        start = before = 0
        for split, count in wanted.items():
            before += count
            stop = round(len(fresh) * before / total)
            pools[split].append(fresh[start:stop])
            start = stop
    problems = []
    for split, count in wanted.items():
        taken = _take_turns(pools[split], count)
        if len(taken) < count:
            raise ProblemsError(
                f"problems: {count} {split} problems needed, but the sources have only {len(taken)} distinct "
                f"questions for it; lower problems.{split}_count or add a source"
            )
        problems += [replace(problem, split=split) for problem in taken]
    if len({problem.problem_id for problem in problems}) < len(problems):
        raise ProblemsError("problems: two questions share a problem_id")
    return problems


def _take_turns(pools: Sequence[Sequence[Problem]], count: int) -> list[Problem]:
    turns = [pool[i] for i in range(max(map(len, pools), default=0)) for pool in pools if i < len(pool)]
    return turns[:count]


def folded(problem: Problem) -> str:
    """The key of a question: its text with normalised white space and Unicode form, and its signs."""
    seen = "".join(char for char in plain(problem.question) if unicodedata.category(char) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen).split())


def _unique(problems: Iterable[Problem], seen: dict[str, Problem]) -> list[Problem]:
    """Those whose question is new.

    Raises:
        ProblemsError: a question comes again with another answer.
    """
    fresh = []
    for problem in problems:
        first = seen.setdefault(folded(problem), problem)
        if first is problem:
            fresh.append(problem)
        elif contradict(first, problem):
            raise ProblemsError(
                f"problems: {first.problem_id!r} and {problem.problem_id!r} ask the same question and give the answers "
                f"{first.answer[:80]!r} and {problem.answer[:80]!r}: correct one of them, or remove it"
            )
    return fresh


def contradict(one: Problem, other: Problem) -> bool:
    """Whether two problems with the same question have different answers; a generator's may have several right ones."""
    if one.entry or other.entry or one.answer.split() == other.answer.split():
        return False
    values = [number(plain(answer.strip())) for answer in (one.answer, other.answer)]
    worth = [value and (value.value * value.factor, value.unit, value.percent) for value in values]
    return None in worth or worth[0] != worth[1]


def _read(source: ProblemSource, limit: int, seed: int, repeat: int, locate: Callable[[str], Path]) -> list[Problem]:
    """repeat: how many sources of the same task or file name came before; keeps their draws and ids apart."""
    if source.jsonl is not None:
        problems = read_jsonl(locate(source.jsonl), consistent=True)
    elif source.dataset is not None:
        problems = read_dataset(source, seed, locate)
    else:
        assert source.task is not None
        problems = generate(source.task, source.params, limit, seed * SEED_STRIDE + repeat * SOURCE_STRIDE)
    return [replace(p, problem_id=f"{repeat}-{p.problem_id}") for p in problems] if repeat else problems


def fingerprints(config: ProblemsConfig, locate: Callable[[str], Path] = Path) -> dict[str, str]:
    """Fingerprints of the content of each file among the sources; ``locate`` finds the file.

    Raises:
        ArtefactError: a file cannot be read.
    """
    found = {}
    for source in config.sources:
        name = source.jsonl or source.dataset
        if name is None or (source.dataset is not None and not locate(name).exists()):
            continue  # of the hub: its name and revision tell it from others
        try:
            file = locate(name).read_bytes() if source.jsonl else b"".join(content(locate(name)))
        except OSError as fault:
            raise ArtefactError(f"{locate(name)}: cannot be read: {fault.strerror}") from fault
        found[name] = fingerprint(file)
    return found


def read_jsonl(path: Path, *, consistent: bool = False) -> list[Problem]:
    """Lines of {"question": str, "answer": str or number, optional "problem_id", "category"}.

    Args:
        consistent: refuse a question that appears again with another answer.

    Raises:
        ArtefactError: a line is not a problem, or the file has none; the message names file and line.
    """
    problems = []
    first: dict[str, tuple[int, Problem]] = {}
    for line, row in read_lines(path, plain=True):
        if not isinstance(row, dict):
            raise ArtefactError(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
        for key in ("question", "answer"):
            if key not in row:
                raise ArtefactError(f"{path}:{line}: no field {key!r}; fields: {', '.join(map(repr, row)) or 'none'}")
            try:
                plain_text(row[key])
            except ValueError as fault:
                raise ArtefactError(f"{path}:{line}: {key}: {fault}, got {row[key]!r}") from fault
        problem_id, category = (row.get(key) for key in ("problem_id", "category"))
        problem_id = f"{path.stem}-{line}" if problem_id is None else problem_id
        category = path.stem if category is None else category
        if str(category).startswith("reasoning_gym:"):
            raise ArtefactError(f"{path}:{line}: category: the prefix reasoning_gym: is reserved for its tasks")
        problem = Problem(str(problem_id), str(row["question"]), str(row["answer"]), str(category))
        before, same = first.setdefault(folded(problem), (line, problem))
        if consistent and contradict(same, problem):
            raise ArtefactError(
                f"{path}:{line}: the question of line {before} has another answer: {same.answer[:80]!r} there, "
                f"{problem.answer[:80]!r} here"
            )
        problems.append(problem)
    if not problems:
        raise ArtefactError(f"{path}: contains no problems")
    return problems


def generate(task: str, params: dict[str, Any], limit: int, first_seed: int) -> list[Problem]:
    """Up to ``limit`` distinct questions of a reasoning-gym task; fewer where the task has no more."""
    import reasoning_gym  # imports dozens of task modules, so only where a task is used
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ProblemsError(f"problems: reasoning-gym has no task {task!r}{close_to(task, DATASETS)}")

    problems: list[Problem] = []
    seen: set[str] = set()
    stale = 0
    for chunk in range(limit + STALE_DRAWS):
        try:
            # item i of a data set is drawn from seed + i, so chunks must lie CHUNK seeds apart
            data = reasoning_gym.create_dataset(task, seed=first_seed + chunk * CHUNK, size=CHUNK, **params)
        except (TypeError, ValueError, AssertionError) as fault:
            raise ProblemsError(f"problems: reasoning-gym task {task!r} with {params}: {fault}") from fault
        for entry in data:
            if entry["question"] in seen:
                stale += 1
                if stale >= STALE_DRAWS:
                    return problems
                continue
            stale = 0
            seen.add(entry["question"])
            name = f"{task}-{len(problems)}"
            problems.append(
                Problem(name, entry["question"], str(entry["answer"]), f"reasoning_gym:{task}", entry=entry)
            )
            if len(problems) == limit:
                return problems
    return problems
