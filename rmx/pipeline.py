"""All stages in one run directory.

A stage is done when ``stages.json`` lists it, which is written after its artefact. One that was killed goes on where it
was: at the batch of rollouts, the shard of scores or the checkpoint of training that it was in.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rmx_kernels
from rmx import evaluate, forward, lora, model, report, rollouts, score, select, train
from rmx.artefacts import ArtefactError, Journal, fingerprint, read_records, remove, write_json, write_records
from rmx.checkpoint import Checkpoint
from rmx.config import Sampling
from rmx.distributed import ALONE, Group
from rmx.problems import build_problems
from rmx.progress import console, progress
from rmx.records import Evaluation, Problem, Rollout, Verdict
from rmx.rundir import STAGES, RunDirectory, RunError
from rmx.verify import verify

PARTIAL = {  # what a stage leaves behind when it is killed, and takes up again
    "rollouts": ("rollouts.journal.jsonl",),
    "score": ("scores",),
    "train": ("checkpoint.safetensors",),
    "evaluate": tuple(f"evaluation.{side}{kind}.jsonl" for side in ("base", "tuned") for kind in ("", ".journal")),
}

SPENT = {  # of these, what has no use once the stage is done
    "rollouts": PARTIAL["rollouts"],
    "train": PARTIAL["train"],
    "evaluate": tuple(name for name in PARTIAL["evaluate"] if ".journal" in name),
}


class Run(RunDirectory):
    """The stages of a run directory, one after the other or one alone."""

    def execute(self, stage: str, again: bool = False, group: Group = ALONE) -> None:
        """Run one stage whose predecessors are done; with ``again`` even if it is done itself, from its beginning.

        ``group`` is for training alone: the other processes call :meth:`follow_training`.
        """
        order = list(STAGES)
        for earlier in order[: order.index(stage)]:
            if not self.is_done(earlier):
                raise RunError(f"{self.dir}: stage {stage!r} needs stage {earlier!r}: run `rmx {earlier}` first")
        old = self.stages().get(stage)
        # From here on neither this stage nor a later one counts as done, should it be interrupted.
        write_json(
            self.path("stages.json"), {k: v for k, v in self.stages().items() if order.index(k) < order.index(stage)}
        )
        # with new settings, what still fits them is kept
        if again and (stage != "evaluate" or (old is not None and old["settings"] == self.settings(stage))):
            for name in PARTIAL.get(stage, ()):
                remove(self.path(name))
        started = time.perf_counter()
        summary: dict[str, Any] = self._train(group) if stage == "train" else getattr(self, f"_{stage}")()
        record = {"settings": self.settings(stage), "seconds": round(time.perf_counter() - started, 1), **summary}
        write_json(self.path("stages.json"), {**self.stages(), stage: record})
        for finished in order[: order.index(stage) + 1]:  # an earlier one may have been killed before it came here
            for name in SPENT.get(finished, ()):
                remove(self.path(name))
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

    # The stages. Each returns what to say of it.
    def _problems(self) -> dict[str, Any]:
        problems = build_problems(self.config.problems, self.config.seed)
        write_records(self.path("problems.jsonl"), problems, {"seed": self.config.seed})
        return {split: sum(p.split == split for p in problems) for split in ("train", "evaluate")}

    def _rollouts(self) -> dict[str, Any]:
        sampling = self.config.rollouts
        meta = {"prompt": self.renderer.fingerprint, "model": self.config.model.name, **sampling.model_dump()}
        meta = {"rmx": rmx_kernels.__version__, **meta}
        found = self._generate("rollouts", self.problems("train"), sampling, self.config.seed, meta)
        return {"rollouts": len(found), "truncated": sum(r.finish_reason == "length" for r in found)}

    def _generate(
        self, name: str, problems: list[Problem], sampling: Sampling, seed: int, meta: dict[str, Any]
    ) -> list[Rollout]:
        """Rollouts into ``name``.jsonl by way of a journal, which a killed stage takes up again."""
        renderer, lm = self.renderer, self.lm  # loads the model before the bar appears
        origin = {**meta, "seed": seed, "problems": _mark(problems), "weights": self.inputs["rollouts"]["weights"]}
        origin["model"] = self.config.model.model_dump()
        journal, known = Journal.open(self.path(f"{name}.journal.jsonl"), Rollout, origin)
        total = len(problems) * sampling.samples
        with journal, progress(name.removeprefix("evaluation."), total, "rollouts") as update:
            done = len(known)
            update(done, "")

            def on_unit(unit: list[Rollout]) -> None:
                nonlocal done
                journal.append(unit)
                done += len(unit)
                update(done, "")

            found = rollouts.generate_rollouts(lm, renderer, problems, sampling, seed, known=known, on_unit=on_unit)
        write_records(self.path(f"{name}.jsonl"), found, meta)
        return found

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
        found, settings, lm = self.to_score(), self.config.score, self.lm
        forward.check(lm, self.wanted().layer)
        keep, said = score.affordable(self.wanted(), found, lm, settings, self.path("scores"))
        console.print(f"score: {said}", highlight=False, markup=False, soft_wrap=True)
        store = score.ScoreStore(self.path("scores"), found, settings.shard_tokens, self.score_origin(keep))
        store.discard_others()
        with progress("score", len(found), "rollouts") as update:
            store.fill(lm, settings, keep, on_done=lambda n: update(n, ""))
        write_json(store.path / "index.json", {"shard_tokens": settings.shard_tokens, "origin": store.origin})
        return {"rollouts": len(found), "tokens": sum(len(r.completion_ids) for r in found)}

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

    def _train(self, group: Group = ALONE) -> dict[str, Any]:
        sequences, settings = self.training_set(), self.config.train
        if not group.leads:
            group.wait()  # for files that have to be made again
        base, keep = self.base_source()
        if group.leads:
            group.wait()
        adapter = lora.attach(self.lm.model, self.config.lora, self.config.seed)
        try:
            share = adapter.size / sum(p.numel() for p in self.lm.model.parameters())
            origin = {
                "training_set": fingerprint(self.path("training_set.jsonl").read_bytes()),
                "settings": {**self.settings("train"), "checkpoint_seconds": None},
                "model": self.config.model.model_dump(),
                "weights": self.inputs["rollouts"]["weights"],
                "base": None if base is None else dataclasses.asdict(keep),
            }
            mark = fingerprint(json.dumps(origin, sort_keys=True).encode())
            path = self.path("checkpoint.safetensors")
            checkpoint = Checkpoint(path, mark, settings.checkpoint_seconds, write=group.leads)
            steps = len(train.step_order(len(sequences), settings, self.config.seed))
            with ExitStack() as stack:
                on_step = self._training_log(stack, checkpoint, steps) if group.leads else lambda *_: None
                train.train_adapter(
                    self.lm,
                    adapter,
                    sequences,
                    settings,
                    self.config.seed,
                    base=base,
                    checkpoint=checkpoint,
                    group=group,
                    on_step=on_step,
                )
            if group.leads:
                lora.save_adapter(adapter, self.path("adapter"), self.config.model.name)
        finally:
            lora.detach(self.lm.model, adapter)
        made = self.history()[-1].step if group.leads else steps  # fewer where it stopped early
        return {"steps": made, "adapter": f"{adapter.size:,} parameters ({share:.2%})"}

    def _training_log(
        self, stack: ExitStack, checkpoint: Checkpoint, steps: int
    ) -> Callable[[train.StepMetrics, int], None]:
        made = checkpoint.peek()
        if made:
            console.print(f"train: goes on after step {made} of {steps}")
        log = train.MetricsLog(self.path("metrics.jsonl"), made)
        stack.callback(log.close)
        update = stack.enter_context(progress("train", steps, "steps"))
        update(made, "")

        def on_step(metrics: train.StepMetrics, total: int) -> None:
            log(metrics)
            update(metrics.step, f"loss {metrics.loss:+.3f} KL {metrics.anchor_kl:.4f}")

        return on_step

    def follow_training(self, group: Group) -> None:
        """What a process that does not lead does while the leading one runs the stage."""
        self._train(group)

    def merged(self, out: Path, adapter: Path | None = None) -> None:
        """Write the model with the adapter in its weights, and its tokenizer, as a plain Hugging Face directory."""
        out = out.expanduser().resolve()
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out}: is not empty")
        if adapter is None and not self.is_done("train"):  # an adapter that lies there may be of an earlier training
            raise RunError(f"{self.dir}: stage 'train' is not done: run `rmx train` first, or name an --adapter")
        found = lora.load_adapter(self.lm.model, adapter or self.path("adapter"))
        lora.merge(found)
        lora.detach(self.lm.model, found)
        model.save(self.lm, out)

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
        weights = self.inputs["rollouts"]["weights"]
        origin = {
            "model": self.config.model.model_dump(),
            "weights": weights,
            "problems": _mark(problems),
            "adapter": adapter,
        }
        meta = self.meta(**sampling.model_dump(exclude={"bootstrap"}), seed=self.config.seed, **origin)
        if path.exists():
            old, found = read_records(path, Rollout)
            if old == meta:
                return found, self._judge(name, problems, found)
        # The same seed for both sides: common random numbers make the paired difference sharper.
        found = self._generate(f"evaluation.{name}", problems, sampling, self.config.seed + 1, meta)
        return found, self._judge(name, problems, found)

    def _report(self) -> dict[str, Any]:
        path = self.path("report.png")
        gate = score.entropies(self.scores()), self.tau()
        report.plot(path, *gate, self.history(), self.evaluation())
        return {"written": str(path)}


def _mark(problems: list[Problem]) -> str:
    return fingerprint(json.dumps([dataclasses.asdict(p) for p in problems]).encode())
