"""A run directory from the files of the released code (:mod:`rmx.interchange.files`), and such files from one."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import rmx_kernels
from rmx.artefacts import ArtefactError, read_meta, write_json, write_records
from rmx.grading.problems import build_problems, folded
from rmx.interchange.files import (
    HELD_OUT,
    RECORDS,
    ROLLOUTS,
    TRAINING_SET,
    ScoredRollouts,
    TrainingSet,
    export_records,
    export_rollouts,
    export_training_set,
    import_records,
    import_rollouts,
    import_training_set,
    verdict,
)
from rmx.progress import console
from rmx.records import Rollout
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunDirectory, RunError
from rmx.runs.stages import STAGES


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
    sequences = run.training_set()
    training = TrainingSet(
        sequences, [entropy[s.problem_id, s.sample] for s in sequences], read_meta(run.path("training_set.jsonl"))
    )
    both = zip(run.rollouts(), run.verdicts(), strict=True)
    scored = [(r, v, entropy[r.problem_id, r.sample]) for r, v in both if (r.problem_id, r.sample) in entropy]
    rollouts = ScoredRollouts(
        [r for r, _, _ in scored],
        [v for _, v, _ in scored],
        [h for _, _, h in scored],
        read_meta(run.path("rollouts.jsonl")),
    )
    files = [out.expanduser() / name for name in (RECORDS, HELD_OUT, ROLLOUTS, TRAINING_SET)]
    export_records(files[0], run.problems("train"))
    export_records(files[1], run.problems("evaluate"))
    export_rollouts(files[2], rollouts)
    export_training_set(files[3], training)
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
            raise RunError(f"{run.dir}: stages are done already ({', '.join(done)}): import into another run_dir")
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
    trained = {folded(p) for p in train}
    if (source / HELD_OUT).exists():
        held_out = import_records(source / HELD_OUT, "evaluate")
        for i, problem in enumerate(held_out):
            if folded(problem) in trained:
                raise ArtefactError(f"{source / HELD_OUT}: records[{i}]: problem_text: is also in {RECORDS}")
    else:
        built = build_problems(run.config.problems, run.config.seed, run.config.path)
        held_out = [p for p in built if p.split == "evaluate" and folded(p) not in trained]
        if not held_out:
            raise ArtefactError(
                f"{source}: no problem to evaluate on: without {HELD_OUT} they come from the configuration's problems, "
                f"and all of these are also in {RECORDS}"
            )
    choose = []
    if run.config.problems.choose_count:
        taken = trained | {folded(p) for p in held_out}
        built = build_problems(run.config.problems, run.config.seed, run.config.path)
        choose = [p for p in built if p.split == "choose" and folded(p) not in taken]
        if not choose:
            raise ArtefactError(
                f"{source}: no problem to choose a candidate on: they come from the configuration's problems, and all "
                f"of these are also in the files; set problems.choose_count=0 and train.candidates=1"
            )
    write_records(run.path("problems.jsonl"), train + choose + held_out, {"seed": run.config.seed})
    found = {"train": len(train), "choose": len(choose), "evaluate": len(held_out)}
    return {split: count for split, count in found.items() if count}


def _import_rollouts(run: Run, source: Path, training: TrainingSet | None, any_prompt: bool) -> dict[str, Any]:
    decode = partial(run.vocabulary.tokenizer.decode, skip_special_tokens=True)
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
        verdicts.append(verdict(s.problem_id, s.sample, s.reward == 1))
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
            raise ArtefactError(f"{where}: input_ids, prompt_length: differ from this rollout in {ROLLOUTS}")
        if verdict.reward != s.reward:
            raise ArtefactError(f"{where}: correct: differs from this rollout in {ROLLOUTS}")


def _check_prompts(path: Path, run: Run, rollouts: Sequence[Rollout], any_prompt: bool) -> None:
    """Problems are known, ids are the model's, and prompts those of the configuration."""
    ids = "tokens" if path.name == ROLLOUTS else "input_ids"
    rendered = {p.problem_id: run.renderer(p.question) for p in run.problems("train")}
    V = run.vocabulary.size
    for i, rollout in enumerate(rollouts):
        where = f"{path}: rollouts[{i}]"
        if rollout.problem_id not in rendered:
            raise ArtefactError(f"{where}: problem_id: {rollout.problem_id!r} is not in {RECORDS}")
        if (largest := max(rollout.ids)) >= V:
            raise ArtefactError(f"{where}: {ids}: {largest} is not among the {V} tokens of {run.config.model.name}")
        wanted, given = rendered[rollout.problem_id], rollout.prompt_ids
        if given != wanted and not any_prompt:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(given, wanted, strict=False))
            n = sum(1 for _ in same)
            theirs, ours = (run.vocabulary.tokenizer.decode(prompt[n : n + 16]) for prompt in (given, wanted))
            raise ArtefactError(
                f"{where}: {ids}.{n}: the prompt continues with {theirs!r}, the configuration's with {ours!r}: "
                f"set `prompt` to match (its style is {run.renderer.style}), or import with --any-prompt"
            )


def _import_training_set(run: Run, source: Path, training: TrainingSet) -> dict[str, dict[str, Any]]:
    to_score = {(r.problem_id, r.sample) for r in run.to_score()}
    for i, s in enumerate(training.sequences):
        if (s.problem_id, s.sample) not in to_score:
            raise ArtefactError(
                f"{source / TRAINING_SET}: rollouts[{i}]: score.problems={run.config.score.problems} excludes it: "
                "set score.problems=all"
            )
    started = time.perf_counter()
    summary = run.perform("score")  # not run.execute: until the training set is there, no stage counts as done
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
