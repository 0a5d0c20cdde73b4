"""The JSON files of the method's released reference code, read and written: records, scored rollouts, training sets.

The index rule is the same there: ``entropies[i]`` belongs to predicting position ``prompt_length - 1 + i``, so to
completion token i, and ``decision_positions`` are absolute predicting positions, ``prompt_length - 1 + t``. What differs:

* ``tokens`` and ``input_ids`` are the prompt's and the completion's ids, end to end.
* ``completion_tokens`` is written as a count, like ``prompt_length`` beside it. It is read as a count or as the list of
  the completion's ids, and must agree with ``tokens``.
* Completions there were tokenised from text, so most do not end with EOS. They are taken as they are.
* ``correct`` is true or false: a rollout that the verifier could not judge is not written.
* A training set there does not hold the base's log-probs: :func:`import_training_set` gives NaN, :func:`import_run`
  takes them from its scores.

Every field of the format must be there; others are not read. Floats keep their value both ways.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BeforeValidator, FiniteFloat, NonNegativeInt

import rmx_kernels
from rmx.artefacts import ArtefactError, describe, read_meta, write_json, write_records
from rmx.pipeline import Run
from rmx.problems import build_problems
from rmx.progress import console
from rmx.records import Problem, Rollout, Split, TrainingSequence, Verdict
from rmx.rundir import STAGES, RunDirectory, RunError

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
            raise ArtefactError(f"{where}: {keys}: the same as of {name}[{list(found).index(made.key)}]")
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
        verdicts.append(_verdict(*e.key, e.correct))
    return ScoredRollouts(rollouts, verdicts, [e.entropies for e in entries], meta)


def _verdict(problem_id: str, sample: int, right: bool) -> Verdict:
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
            "tokens": r.prompt_ids + r.completion_ids,
            "prompt_length": len(r.prompt_ids),
            "completion_tokens": len(r.completion_ids),
            "entropies": entropy,
            "correct": v.reward == 1,
            "truncated": r.finish_reason == "length",
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
            "input_ids": s.prompt_ids + s.completion_ids,
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


def export_run(run: RunDirectory, out: Path) -> list[Path]:
    """Write records.json (training problems), held_out.json, rollouts.json and training_set.json into ``out``.

    rollouts.json holds the rollouts that were scored and judged: with ``score.problems=mixed`` those of problems of
    mixed outcome.

    Returns:
        The files.

    Raises:
        RunError: a stage before training is not done.
    """
    order = list(STAGES)
    for stage in order[: order.index("train")]:
        if not run.is_done(stage):
            raise RunError(f"{run.dir}: export needs stage {stage!r}: run `rmx {stage}` first")
    entropy: dict[tuple[str, int], list[float]] = {(s.problem_id, s.sample): s.entropy.tolist() for s in run.scores()}
    both = zip(run.rollouts(), run.verdicts(), strict=True)
    scored = [(r, v) for r, v in both if (r.problem_id, r.sample) in entropy]
    rollouts, verdicts = [r for r, _ in scored], [v for _, v in scored]
    own = [entropy[r.problem_id, r.sample] for r in rollouts]
    sequences = run.training_set()
    gated = [entropy[s.problem_id, s.sample] for s in sequences]
    files = [out.expanduser() / name for name in (RECORDS, HELD_OUT, ROLLOUTS, TRAINING_SET)]
    export_records(files[0], run.problems("train"))
    export_records(files[1], run.problems("evaluate"))
    export_rollouts(files[2], ScoredRollouts(rollouts, verdicts, own, read_meta(run.path("rollouts.jsonl"))))
    export_training_set(files[3], TrainingSet(sequences, gated, read_meta(run.path("training_set.jsonl"))))
    return files


def import_run(run: Run, source: Path, *, any_prompt: bool = False) -> None:
    """Fill a run directory from the files of :func:`export_run`, so that ``rmx run`` goes on from there.

    ======================  =================================  ==========================================
    in ``source``           stages that are then done          what goes on
    ======================  =================================  ==========================================
    records.json            problems                           rollouts
    and rollouts.json       problems to verify                 score: entropies are those of this model
    and training_set.json   problems to select                 train
    ======================  =================================  ==========================================

    The score stage runs here where there is a training set: its sequences, advantages and decision tokens stay as they
    are, the base's log-probs and kept states are this model's. Without rollouts.json its sequences are the rollouts.
    Held-out problems come from held_out.json, else from ``problems`` of the configuration. No stage counts as done
    before all are; an import that was killed is done again, and keeps the shards of scores that it made.

    Args:
        any_prompt: take prompts that this configuration would write otherwise. Held-out problems get its own.

    Raises:
        ArtefactError: a file is wrong, see the readers; the files do not agree with each other, or with the model.
        RunError: the run directory has stages that are done.
    """
    source = source.expanduser()
    with run.locked():
        if done := run.stages():
            raise RunError(f"{run.dir}: has stages that are done ({', '.join(done)}): import into another run_dir")
        summary = {"problems": _import_problems(run, source)}
        training = import_training_set(source / TRAINING_SET) if (source / TRAINING_SET).exists() else None
        if training is not None or (source / ROLLOUTS).exists():
            summary["rollouts"] = summary["verify"] = _import_rollouts(run, source, training, any_prompt)
        if training is not None:
            summary |= _import_training_set(run, source, training)
        records = {
            stage: {"settings": run.settings(stage), "seconds": 0.0, "imported": str(source), **said}
            for stage, said in summary.items()
        }
        write_json(run.path("stages.json"), records)
    words = ", ".join(f"{key} {value}" for said in summary.values() for key, value in said.items() if key != "seconds")
    console.print(f"import: {words}", highlight=False, markup=False, soft_wrap=True)


def _import_problems(run: Run, source: Path) -> dict[str, Any]:
    train = import_records(source / RECORDS)
    trained = {_folded(p) for p in train}
    if (source / HELD_OUT).exists():
        held_out = import_records(source / HELD_OUT, "evaluate")
        for i, problem in enumerate(held_out):
            if _folded(problem) in trained:
                raise ArtefactError(f"{source / HELD_OUT}: records[{i}]: problem_text: stands in {RECORDS} too")
    else:
        built = build_problems(run.config.problems, run.config.seed)
        held_out = [p for p in built if p.split == "evaluate" and _folded(p) not in trained]
        if not held_out:
            raise ArtefactError(
                f"{source}: no problem to evaluate on: without {HELD_OUT} they come from the configuration's problems, "
                f"all of which stand in {RECORDS}"
            )
    write_records(run.path("problems.jsonl"), train + held_out, {"seed": run.config.seed})
    return {"train": len(train), "evaluate": len(held_out)}


def _folded(problem: Problem) -> str:
    return " ".join(problem.question.split())


def _import_rollouts(run: Run, source: Path, training: TrainingSet | None, any_prompt: bool) -> dict[str, Any]:
    decode = partial(run.lm.tokenizer.decode, skip_special_tokens=True)
    path = source / ROLLOUTS
    if path.exists():
        scored = import_rollouts(path, decode)
        if training is not None:
            _check_sequences(source / TRAINING_SET, training, scored)
    else:
        assert training is not None
        path = source / TRAINING_SET
        scored = _rollouts_of(training, decode)
    _check_prompts(path, run, scored.rollouts, any_prompt)
    versions = {"rmx": rmx_kernels.__version__, "prompt": run.renderer.fingerprint}
    write_records(run.path("rollouts.jsonl"), scored.rollouts, {**scored.meta, **versions})
    write_records(run.path("verdicts.jsonl"), scored.verdicts, run.meta())
    return {"rollouts": len(scored.rollouts), "right": sum(v.reward == 1 for v in scored.verdicts)}


def _rollouts_of(training: TrainingSet, decode: Callable[[list[int]], str]) -> ScoredRollouts:
    rollouts, verdicts = [], []
    for s in training.sequences:
        text = decode(s.completion_ids)
        rollouts.append(Rollout(s.problem_id, s.sample, s.prompt_ids, s.completion_ids, "stop", text))
        verdicts.append(_verdict(s.problem_id, s.sample, s.reward == 1))
    return ScoredRollouts(rollouts, verdicts, training.entropies, {})


def _check_sequences(path: Path, training: TrainingSet, scored: ScoredRollouts) -> None:
    """Each sequence is one of the rollouts."""
    known = {(r.problem_id, r.sample): (r, v) for r, v in zip(scored.rollouts, scored.verdicts, strict=True)}
    for i, s in enumerate(training.sequences):
        where = f"{path}: rollouts[{i}]"
        if (s.problem_id, s.sample) not in known:
            raise ArtefactError(f"{where}: problem_id, gen_index: {s.problem_id!r}, {s.sample} is not in {ROLLOUTS}")
        rollout, verdict = known[s.problem_id, s.sample]
        if (rollout.prompt_ids, rollout.completion_ids) != (s.prompt_ids, s.completion_ids):
            raise ArtefactError(f"{where}: input_ids, prompt_length: not what {ROLLOUTS} has for this rollout")
        if verdict.reward != s.reward:
            raise ArtefactError(f"{where}: correct: not what {ROLLOUTS} has for this rollout")


def _check_prompts(path: Path, run: Run, rollouts: Sequence[Rollout], any_prompt: bool) -> None:
    """Problems are known, ids are the model's, and prompts those of the configuration."""
    ids = "tokens" if path.name == ROLLOUTS else "input_ids"
    rendered = {p.problem_id: run.renderer(p.question) for p in run.problems("train")}
    V = run.lm.weight.shape[0]
    for i, rollout in enumerate(rollouts):
        where = f"{path}: rollouts[{i}]"
        if rollout.problem_id not in rendered:
            raise ArtefactError(f"{where}: problem_id: {rollout.problem_id!r} is not in {RECORDS}")
        if (largest := max(rollout.prompt_ids + rollout.completion_ids)) >= V:
            raise ArtefactError(f"{where}: {ids}: {largest} is not among the {V} tokens of {run.config.model.name}")
        wanted, given = rendered[rollout.problem_id], rollout.prompt_ids
        if given != wanted and not any_prompt:
            raise ArtefactError(
                f"{where}: {ids}: the prompt is {run.lm.tokenizer.decode(given)!r}, where this configuration writes "
                f"{run.lm.tokenizer.decode(wanted)!r}: set `prompt` to match, or import with any prompt"
            )


def _import_training_set(run: Run, source: Path, training: TrainingSet) -> dict[str, dict[str, Any]]:
    to_score = {(r.problem_id, r.sample) for r in run.to_score()}
    for i, s in enumerate(training.sequences):
        if (s.problem_id, s.sample) not in to_score:
            raise ArtefactError(
                f"{source / TRAINING_SET}: rollouts[{i}]: score.problems={run.config.score.problems} leaves it out: "
                "set score.problems=all"
            )
    started = time.perf_counter()
    summary = run._score()
    summary["seconds"] = round(time.perf_counter() - started, 1)
    logprob = {(s.problem_id, s.sample): s.logprob for s in run.scores()}
    chosen = [replace(s, base_logprob=logprob[s.problem_id, s.sample].tolist()) for s in training.sequences]
    write_records(run.path("training_set.jsonl"), chosen, {**training.config, **run.meta(tau=_tau(training))})
    selected = {"problems": len({s.problem_id for s in chosen}), "sequences": len(chosen)}
    return {"score": summary, "select": selected}


def _tau(training: TrainingSet) -> float:
    """The threshold of the file, else the highest entropy below the gate, nats; it is drawn, and not applied again."""
    for key in ("tau_pos", "tau"):  # where tau_pos is given, tau is a default that was not used
        value = training.config.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    below = [-1.0]
    for s, own in zip(training.sequences, training.entropies, strict=True):
        gate = set(s.decision_tokens)
        below += [h for t, h in enumerate(own) if t not in gate]
    return max(below)
