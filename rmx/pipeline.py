"""All stages in one run directory.

A stage is done when ``stages.json`` lists it, which is written after its artefact.
"""

import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import pydantic

import rmx_kernels
from rmx import evaluate, lora, model, report, rollouts, score, select, train
from rmx.artefacts import (
    ArtefactError,
    fingerprint,
    parser,
    read_lines,
    read_meta,
    read_records,
    write_json,
    write_records,
)
from rmx.config import Config, Sampling
from rmx.errors import RmxError
from rmx.problems import build_problems, fingerprints
from rmx.progress import console, progress
from rmx.prompts import Renderer
from rmx.records import Evaluation, Problem, Rollout, Scores, TrainingSequence, Verdict
from rmx.verify import verify

# Each stage in order, with the settings that it depends on beyond those of the stages before it.
OUTPUTS = {
    "problems": "problems.jsonl",
    "rollouts": "rollouts.jsonl",
    "verify": "verdicts.jsonl",
    "score": "scores.safetensors",
    "select": "training_set.jsonl",
    "train": "adapter/adapter_model.safetensors",
    "evaluate": "evaluation.json",
    "report": "report.png",
}
STAGES: dict[str, tuple[str, ...]] = {
    "problems": ("seed", "problems"),
    "rollouts": ("seed", "model", "prompt", "rollouts"),
    "verify": ("verify",),
    "score": ("score",),
    "select": ("select",),
    "train": ("seed", "lora", "train"),
    "evaluate": ("seed", "evaluate"),
    "report": (),
}


class RunError(RmxError):
    """The run directory and the request do not go together."""


class Run:
    """One run directory and the configuration that made it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dir = Path(config.run_dir).expanduser()

    def path(self, name: str) -> Path:
        return self.dir / name

    # The model is loaded once, and only by a stage that needs it.
    @cached_property
    def lm(self) -> model.CausalLM:
        console.print(f"loading {self.config.model.name}", markup=False, highlight=False)
        return model.load(self.config.model)

    @cached_property
    def renderer(self) -> Renderer:
        return Renderer(self.lm.tokenizer, self.config.prompt)

    # Which stages are done, and with which settings.
    def stages(self) -> dict[str, Any]:
        path = self.path("stages.json")
        if not path.exists():
            return {}
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, dict) or not all("settings" in record for record in value.values()):
                raise ValueError("not a record of stages")
        except (ValueError, TypeError) as fault:
            raise RunError(f"{path}: cannot be understood: {fault}; delete it to start the run again") from fault
        return value

    def settings(self, stage: str) -> dict[str, Any]:
        """All that the stage depends on from outside the run directory."""
        found = {name: self.config.model_dump(mode="json")[name] for name in STAGES[stage]}
        return {**found, **self.inputs.get(stage, {})}

    @cached_property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """The content of files that settings name, so that a change of theirs is noticed too."""
        return {
            "problems": {"files": fingerprints(self.config.problems)},
            "rollouts": {"weights": model.fingerprint(self.config.model)},
        }

    def is_done(self, stage: str) -> bool:
        """Whether the stage is finished, with these settings, and its artefact is there.

        Raises:
            RunError: it was finished with other settings; the message names them.
        """
        record = self.stages().get(stage)
        if record is None or not self.path(OUTPUTS[stage]).exists():
            return False
        changed = list(_differences(record["settings"], self.settings(stage)))
        if changed:
            raise RunError(
                f"{self.dir}: stage {stage!r} was run with other settings: {'; '.join(changed)}. Set another run_dir "
                f"(rmx demo: --run-dir), or redo it and what follows with `rmx {stage} CONFIG --again`"
            )
        return True

    def execute(self, stage: str, again: bool = False) -> None:
        """Run one stage whose predecessors are done; with ``again`` even if it is done itself."""
        order = list(STAGES)
        for earlier in order[: order.index(stage)]:
            if not self.is_done(earlier):
                raise RunError(f"{self.dir}: stage {stage!r} needs stage {earlier!r}: run `rmx {earlier}` first")
        old = self.stages().get(stage)
        if again and stage == "evaluate" and old is not None and old["settings"] == self.settings(stage):
            for name in ("base", "tuned"):  # with new settings, what still fits them is kept
                self.path(f"evaluation.{name}.jsonl").unlink(missing_ok=True)
        # From here on neither this stage nor a later one counts as done, should it be interrupted.
        write_json(
            self.path("stages.json"), {k: v for k, v in self.stages().items() if order.index(k) < order.index(stage)}
        )
        started = time.perf_counter()
        summary: dict[str, Any] = getattr(self, f"_{stage}")()
        record = {"settings": self.settings(stage), "seconds": round(time.perf_counter() - started, 1), **summary}
        write_json(self.path("stages.json"), {**self.stages(), stage: record})
        words = ", ".join(f"{key} {value}" for key, value in summary.items())
        console.print(f"{stage}: {words} ({record['seconds']:.0f} s)", highlight=False, markup=False, soft_wrap=True)

    def run(self) -> Evaluation:
        """Every stage that is not done yet, in order."""
        with self.locked():
            done = [stage for stage in STAGES if self.is_done(stage)]  # changed settings are an error before any work
            if done:
                console.print(f"{self.dir}: continues after {', '.join(done)}", markup=False, soft_wrap=True)
            for stage in STAGES:
                if stage == "report" or not self.is_done(stage):  # a stage that is redone undoes those behind it
                    self.execute(stage)
            return self.evaluation()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time in a run directory."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with self.path(".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as fault:
                raise RunError(f"{self.dir}: another process is running in it") from fault
            yield

    # What the stages wrote.
    def meta(self, **more: Any) -> dict[str, Any]:
        """Written into every artefact after the rollouts: the same prompts all along, or an error."""
        prompt = read_meta(self.path("rollouts.jsonl"))["prompt"]
        return {"rmx": rmx_kernels.__version__, "prompt": prompt, **more}

    def problems(self, split: str) -> list[Problem]:
        return [p for p in read_records(self.path("problems.jsonl"), Problem)[1] if p.split == split]

    def rollouts(self) -> list[Rollout]:
        return read_records(self.path("rollouts.jsonl"), Rollout)[1]

    def verdicts(self) -> list[Verdict]:
        return self._records("verdicts.jsonl", Verdict)

    def to_score(self) -> list[Rollout]:
        """The rollouts that the score stage looks at."""
        if self.config.score.problems == "all":
            return self.rollouts()
        mixed = select.mixed_problems(self.verdicts())
        return [rollout for rollout in self.rollouts() if rollout.problem_id in mixed]

    def scores(self) -> list[Scores]:
        return score.read_scores(self.path("scores.safetensors"), self.to_score())[1]

    def training_set(self) -> list[TrainingSequence]:
        return self._records("training_set.jsonl", TrainingSequence)

    def tau(self) -> float:
        return float(read_meta(self.path("training_set.jsonl"))["tau"])

    def history(self) -> list[train.StepMetrics]:
        parse = parser(train.StepMetrics)
        return [parse(value) for _, value in read_lines(self.path("metrics.jsonl"))]

    def evaluation(self) -> Evaluation:
        path = self.path("evaluation.json")
        try:
            return pydantic.TypeAdapter(Evaluation).validate_json(path.read_bytes())
        except (OSError, pydantic.ValidationError) as fault:
            raise ArtefactError(f"{path}: cannot be read: {fault}") from fault

    def _records(self, name: str, cls: type[Any]) -> list[Any]:
        meta, records = read_records(self.path(name), cls)
        if meta.get("prompt") != self.meta()["prompt"]:
            raise ArtefactError(f"{self.path(name)}: was made with other prompts than rollouts.jsonl")
        return records

    # The stages. Each returns what to say of it.
    def _problems(self) -> dict[str, Any]:
        problems = build_problems(self.config.problems, self.config.seed)
        write_records(self.path("problems.jsonl"), problems, {"seed": self.config.seed})
        return {split: sum(p.split == split for p in problems) for split in ("train", "evaluate")}

    def _rollouts(self) -> dict[str, Any]:
        sampling = self.config.rollouts
        found = self._generate("rollouts", self.problems("train"), sampling, self.config.seed)
        meta = {"prompt": self.renderer.fingerprint, "model": self.config.model.name, **sampling.model_dump()}
        write_records(self.path("rollouts.jsonl"), found, {"rmx": rmx_kernels.__version__, **meta})
        return {"rollouts": len(found), "truncated": sum(r.finish_reason == "length" for r in found)}

    def _generate(self, title: str, problems: list[Problem], sampling: Sampling, seed: int) -> list[Rollout]:
        renderer = self.renderer  # loads the model before the bar appears
        with progress(title, len(problems) * sampling.samples, "rollouts") as update:
            return rollouts.generate_rollouts(
                self.lm, renderer, problems, sampling, seed, on_done=lambda n: update(n, "")
            )

    def _verify(self) -> dict[str, Any]:
        verdicts = self._judge("verify", self.problems("train"), self.rollouts())
        write_records(self.path("verdicts.jsonl"), verdicts, self.meta())
        outcomes = [v.outcome for v in verdicts]
        return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}

    def _judge(self, title: str, problems: list[Problem], found: list[Rollout]) -> list[Verdict]:
        limits = {"workers": self.config.verify.workers, "timeout_s": self.config.verify.timeout_s}
        distinct = len({(r.problem_id, r.text) for r in found})
        with progress(title, distinct, "answers") as update:
            return verify(problems, found, on_done=lambda n: update(n, ""), **limits)  # type: ignore[arg-type]

    def _score(self) -> dict[str, Any]:
        found, settings = self.to_score(), self.config.score
        lm = self.lm
        with progress("score", len(found), "rollouts") as update:
            scores = score.score_rollouts(
                lm, found, top_k=settings.top_k, token_budget=settings.token_budget, on_done=lambda n: update(n, "")
            )
        score.write_scores(self.path("scores.safetensors"), scores, {k: str(v) for k, v in self.meta().items()})
        return {"rollouts": len(found), "tokens": sum(len(s.entropy) for s in scores)}

    def _select(self) -> dict[str, Any]:
        chosen, tau = select.select_sequences(self.rollouts(), self.verdicts(), self.scores(), self.config.select)
        write_records(self.path("training_set.jsonl"), chosen, self.meta(tau=tau))
        tokens = sum(len(s.completion_ids) for s in chosen)
        gated = sum(len(s.decision_tokens) for s in chosen)
        return {
            "problems": len({s.problem_id for s in chosen}),
            "sequences": len(chosen),
            "tau": round(tau, 3),
            "gated": f"{gated} of {tokens} tokens",
        }

    def _train(self) -> dict[str, Any]:
        sequences = self.training_set()
        adapter = lora.attach(self.lm.model, self.config.lora, self.config.seed)
        try:
            share = adapter.size / sum(p.numel() for p in self.lm.model.parameters())
            log = train.MetricsLog(self.path("metrics.jsonl"))
            steps = len(train.step_order(len(sequences), self.config.train, self.config.seed))
            with progress("train", steps, "steps") as update:

                def on_step(metrics: train.StepMetrics, total: int) -> None:
                    log(metrics)
                    update(metrics.step, f"loss {metrics.loss:+.3f} KL {metrics.anchor_kl:.4f}")

                try:
                    train.train_adapter(
                        self.lm, adapter, sequences, self.config.train, self.config.seed, on_step=on_step
                    )
                finally:
                    log.close()
            lora.save_adapter(adapter, self.path("adapter"), self.config.model.name)
        finally:
            lora.detach(self.lm.model, adapter)
        return {"steps": steps, "adapter": f"{adapter.size:,} parameters ({share:.2%})"}

    def _evaluate(self) -> dict[str, Any]:
        problems = self.problems("evaluate")
        if self.meta()["prompt"] != self.renderer.fingerprint:
            raise ArtefactError(
                f"{self.path('rollouts.jsonl')}: was made with other prompts than this model and style give now "
                "(a chat template that writes today's date? fix it with prompt.template)"
            )
        adapter = lora.load_adapter(self.lm.model, self.path("adapter"))
        try:
            with adapter.off():
                base = self._sampled("base", problems)
            tuned = self._sampled("tuned", problems)
        finally:
            lora.detach(self.lm.model, adapter)
        result = evaluate.compare(problems, base, tuned, draws=self.config.evaluate.bootstrap, seed=self.config.seed)
        write_json(self.path("evaluation.json"), dataclasses.asdict(result))
        return {"base": str(result.base), "tuned": str(result.tuned), "gain": str(result.gain)}

    def _sampled(self, name: str, problems: list[Problem]) -> tuple[list[Rollout], list[Verdict]]:
        """Rollouts and verdicts of one side; taken from its file where an interrupted evaluation left one."""
        path = self.path(f"evaluation.{name}.jsonl")
        adapter = self.path("adapter/adapter_model.safetensors").stat().st_mtime_ns if name == "tuned" else None
        sampling = self.config.evaluate
        asked = fingerprint(json.dumps([dataclasses.asdict(p) for p in problems]).encode())
        weights = self.inputs["rollouts"]["weights"]
        origin = {"model": self.config.model.model_dump(), "weights": weights, "problems": asked, "adapter": adapter}
        meta = self.meta(**sampling.model_dump(exclude={"bootstrap"}), seed=self.config.seed, **origin)
        if path.exists():
            old, found = read_records(path, Rollout)
            if old == meta:
                return found, self._judge(name, problems, found)
        # The same seed for both sides: common random numbers make the paired difference sharper.
        found = self._generate(name, problems, sampling, self.config.seed + 1)
        write_records(path, found, meta)
        return found, self._judge(name, problems, found)

    def _report(self) -> dict[str, Any]:
        path = self.path("report.png")
        gate = score.entropies(self.scores()), self.tau()
        report.plot(path, *gate, self.history(), self.evaluation())
        return {"written": str(path)}


def _differences(old: Any, new: Any, where: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield f"{where} was {old!r}, is now {new!r}"
