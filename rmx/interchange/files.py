"""The JSON files of the method's released reference code, read and written: records, scored rollouts, training sets.

The index rule is the same there: ``entropies[i]`` belongs to predicting position ``prompt_length - 1 + i``, so to
completion token i; ``decision_positions`` are absolute predicting positions, ``prompt_length - 1 + t``. What differs:

* ``tokens`` and ``input_ids`` are the prompt's and the completion's ids, end to end.
* ``completion_tokens`` is written as a count, like ``prompt_length`` beside it. It is read as a count or as the list of
  the completion's ids, and must agree with ``tokens``.
* Completions there were tokenised from text, so most do not end with EOS. They are taken as they are.
* ``correct`` is true or false: a rollout that the verifier could not judge is not written.
* A training set there does not hold the base's log-probs: :func:`import_training_set` gives NaN, and
  :mod:`rmx.interchange.transfer` takes them from scores.

Every field of the format must be there; others are not read. Floats keep their value both ways.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BeforeValidator, FiniteFloat, NonNegativeInt

from rmx.artefacts import ArtefactError, describe, write_json
from rmx.records import Problem, Rollout, Split, TrainingSequence, Verdict

RECORDS, HELD_OUT, ROLLOUTS, TRAINING_SET = "records.json", "held_out.json", "rollouts.json", "training_set.json"


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts with their verdicts and entropies, in one order."""

    rollouts: list[Rollout]
    verdicts: list[Verdict]
    entropies: list[list[float]]  # T values each, nats
    meta: dict[str, Any]  # of the file: how they were made


@dataclass(frozen=True)
class TrainingSet:
    """Training sequences with their entropies, in one order."""

    sequences: list[TrainingSequence]
    entropies: list[list[float]]  # T values each, nats
    config: dict[str, Any]  # of the file: how they were chosen


def _text(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not (number or isinstance(value, str)) or not str(value).strip():
        raise ValueError("expected text or a number")
    return str(value)


Text = Annotated[str, BeforeValidator(_text)]


class _Entry(pydantic.BaseModel):
    """One entry of a file's list."""

    model_config = pydantic.ConfigDict(strict=True, extra="ignore")
    problem_id: Text

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, 0

    def faults(self) -> Iterator[str]:
        """What no field shows alone."""
        yield from ()


class _Record(_Entry):
    problem_text: Text
    ground_truth: Text
    category: str
    extra_info: Any = None  # of a reasoning-gym problem: the record that its scorer needs

    @property
    def gym(self) -> bool:
        return self.category.startswith("reasoning_gym:")

    def faults(self) -> Iterator[str]:
        if self.gym and not isinstance(self.extra_info, dict):
            yield f"extra_info: expected the reasoning-gym entry of this problem, got {self.extra_info!r}"


class _Sequence(_Entry):
    gen_index: NonNegativeInt
    prompt_length: NonNegativeInt
    entropies: list[FiniteFloat]
    correct: bool

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, self.gen_index

    def lengths(self, ids: list[int], shortest: int) -> Iterator[str]:
        P, T = self.prompt_length, len(ids) - self.prompt_length
        if P < 1 or shortest > T:
            yield f"prompt_length: expected 1 to {len(ids) - shortest} of {len(ids)} tokens, got {P}"
        elif len(self.entropies) != T:
            yield f"entropies: expected {T} values, one a completion token, got {len(self.entropies)}"


class _Rollout(_Sequence):
    tokens: list[NonNegativeInt]
    completion_tokens: Any
    truncated: bool

    def faults(self) -> Iterator[str]:
        yield from self.lengths(self.tokens, 0)
        given, own = self.completion_tokens, self.tokens[self.prompt_length :]
        if given != own and not (type(given) is int and given == len(own)):
            got = f"a list of {len(given)}" if isinstance(given, list) else repr(given)
            yield f"completion_tokens: expected {len(own)}, or the ids of tokens from prompt_length on, got {got}"


class _Trained(_Sequence):
    input_ids: list[NonNegativeInt]
    completion_length: NonNegativeInt
    advantage: FiniteFloat
    decision_positions: list[NonNegativeInt]

    def faults(self) -> Iterator[str]:
        yield from self.lengths(self.input_ids, 1)
        first, T = self.prompt_length - 1, len(self.input_ids) - self.prompt_length
        if self.completion_length != T:
            yield f"completion_length: expected {T}, the input_ids after prompt_length, got {self.completion_length}"
        least = first
        for n, position in enumerate(self.decision_positions):
            if not least <= position < first + T:
                yield (
                    f"decision_positions.{n}: expected ascending predicting positions of completion tokens, "
                    f"{first} to {first + T - 1}, got {position}"
                )
            least = position + 1


E = TypeVar("E", bound=_Entry)


def _read(path: Path, name: str, entry: type[E], about: str | None = None) -> tuple[dict[str, Any], list[E]]:
    """(the object ``about``, the checked entries of the list ``name``) of a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as fault:
        raise ArtefactError(f"{path}: cannot be read: {fault.strerror}") from fault
    except ValueError as fault:
        raise ArtefactError(f"{path}: not JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: expected a JSON object, got {type(value).__name__}")
    for key, kind in ((name, list), (about, dict)):
        if key is not None and not isinstance(value.get(key), kind):
            got = f"got {type(value[key]).__name__}" if key in value else "it is missing"
            raise ArtefactError(f"{path}: {key}: expected a {kind.__name__}, {got}")
    if not value[name]:
        raise ArtefactError(f"{path}: {name}: is empty")
    found: dict[tuple[str, int], E] = {}
    for i, item in enumerate(value[name]):
        where = f"{path}: {name}[{i}]"
        try:
            made = entry.model_validate(item)
        except pydantic.ValidationError as fault:
            raise ArtefactError(f"{where}: {describe(fault)}") from fault
        if problem := next(made.faults(), None):
            raise ArtefactError(f"{where}: {problem}")
        if made.key in found:
            keys = "problem_id and gen_index" if isinstance(made, _Sequence) else "problem_id"
            raise ArtefactError(f"{where}: {keys}: the same as in {name}[{list(found).index(made.key)}]")
        found[made.key] = made
    return value[about] if about else {}, list(found.values())


def import_records(path: Path, split: Split = "train") -> list[Problem]:
    """The problems of ``{records: [{problem_id, problem_text, ground_truth, category}]}``, as problems of ``split``.

    Raises:
        ArtefactError: a field is missing or wrong; names the file, the index in the list and the field.
    """
    return [
        Problem(r.problem_id, r.problem_text, r.ground_truth, r.category, split, r.extra_info if r.gym else {})
        for r in _read(path, "records", _Record)[1]
    ]


def export_records(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems as :func:`import_records` reads them; a reasoning-gym problem's entry is its ``extra_info``."""
    records = [
        {
            "problem_id": p.problem_id,
            "problem_text": p.question,
            "ground_truth": p.answer,
            "category": p.category,
            **({"extra_info": p.entry} if p.entry else {}),
        }
        for p in problems
    ]
    write_json(path, {"records": records})


def import_rollouts(path: Path, decode: Callable[[list[int]], str] = lambda _: "") -> ScoredRollouts:
    """The rollouts of ``{meta, rollouts: [...]}``, each of ``problem_id, gen_index, tokens, prompt_length,
    completion_tokens, entropies, correct, truncated``.

    Args:
        decode: gives a rollout's text from its completion ids.

    Returns:
        Rollouts whose finish reason is "length" where they were truncated, with verdicts "right" and "wrong".

    Raises:
        ArtefactError: a field is missing or wrong; names the file, the index in the list and the field.
    """
    meta, entries = _read(path, "rollouts", _Rollout, "meta")
    rollouts, verdicts = [], []
    for e in entries:
        prompt, completion = e.tokens[: e.prompt_length], e.tokens[e.prompt_length :]
        reason = "length" if e.truncated else "stop"
        rollouts.append(Rollout(*e.key, prompt, completion, reason, decode(completion)))  # type: ignore[arg-type]
        verdicts.append(verdict(*e.key, e.correct))
    return ScoredRollouts(rollouts, verdicts, [e.entropies for e in entries], meta)


def verdict(problem_id: str, sample: int, right: bool) -> Verdict:
    return Verdict(problem_id, sample, "right" if right else "wrong", None, "" if right else "imported as wrong")


def export_rollouts(path: Path, scored: ScoredRollouts) -> None:
    """Write rollouts as :func:`import_rollouts` reads them, without those that the verifier could not judge.

    Raises:
        ValueError: the lists are not of one length.
    """
    rollouts = [
        {
            "problem_id": r.problem_id,
            "gen_index": r.sample,
            "tokens": r.ids,
            "prompt_length": len(r.prompt_ids),
            "completion_tokens": len(r.completion_ids),
            "entropies": entropy,
            "correct": v.reward == 1,
            "truncated": r.truncated,
        }
        for r, v, entropy in zip(scored.rollouts, scored.verdicts, scored.entropies, strict=True)
        if v.reward is not None
    ]
    write_json(path, {"meta": scored.meta, "rollouts": rollouts})


def import_training_set(path: Path) -> TrainingSet:
    """The sequences of ``{rollouts: [...], config}``, each of ``problem_id, gen_index, input_ids, prompt_length,
    completion_length, correct, advantage, entropies, decision_positions``.

    Returns:
        Sequences whose ``base_logprob`` is NaN: the file does not hold it. A training reads it for its metrics alone.

    Raises:
        ArtefactError: a field is missing or wrong; names the file, the index in the list and the field.
    """
    config, entries = _read(path, "rollouts", _Trained, "config")
    sequences = [
        TrainingSequence(
            problem_id=e.problem_id,
            sample=e.gen_index,
            prompt_ids=e.input_ids[: e.prompt_length],
            completion_ids=e.input_ids[e.prompt_length :],
            reward=float(e.correct),
            advantage=e.advantage,
            decision_tokens=[position - (e.prompt_length - 1) for position in e.decision_positions],
            base_logprob=[math.nan] * e.completion_length,
        )
        for e in entries
    ]
    return TrainingSet(sequences, [e.entropies for e in entries], config)


def export_training_set(path: Path, training: TrainingSet) -> None:
    """Write sequences as :func:`import_training_set` reads them.

    Raises:
        ValueError: the lists are not of one length.
    """
    rollouts = [
        {
            "problem_id": s.problem_id,
            "gen_index": s.sample,
            "input_ids": s.ids,
            "prompt_length": len(s.prompt_ids),
            "completion_length": len(s.completion_ids),
            "correct": s.reward == 1,
            "advantage": s.advantage,
            "entropies": entropy,
            "decision_positions": [len(s.prompt_ids) - 1 + t for t in s.decision_tokens],
        }
        for s, entropy in zip(training.sequences, training.entropies, strict=True)
    ]
    write_json(path, {"rollouts": rollouts, "config": training.config})
