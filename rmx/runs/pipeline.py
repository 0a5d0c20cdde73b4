"""All stages in one run directory.

A stage is done when ``stages.json`` lists it, which is written after its artefact. One that was killed goes on where it
was: at the batch of rollouts, the shard of scores or the checkpoint of training that it was in.
"""

import dataclasses
import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

import rmx_kernels
from rmx.artefacts import (
    ArtefactError,
    Journal,
    fingerprint,
    read_records,
    remove,
    replacing,
    write_json,
    write_records,
)
from rmx.config import Config, Sampling
from rmx.cost import Meter, metered, stage_costs
from rmx.grading.problems import build_problems
from rmx.grading.rewards import PythonReward
from rmx.grading.verify import Judgement, verify
from rmx.models import forward, lora
from rmx.models.prompts import CHAT
from rmx.models.targets import matching, spelled_for_peft
from rmx.progress import console, progress
from rmx.records import Evaluation, Problem, Rollout, Split, Verdict
from rmx.reports import html, report
from rmx.runs import evaluate
from rmx.runs.choose import Choice, candidate_path, choose
from rmx.runs.rundir import RunDirectory, RunError, meant
from rmx.runs.stages import STAGES
from rmx.runs.training_stage import train_stage
from rmx.sampling import rollouts, vllm_engine
from rmx.sampling.batching import settled
from rmx.sampling.remote import check_served
from rmx.training import score, select, trackers, train
from rmx.training.distributed import ALONE, Group


class Run(RunDirectory):
    """The stages of a run directory, one after the other or one alone."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.meter = Meter()  # of the stage under way
        self.batch = 0  # sequences that were decoded at a time last; 0: none were
        self.judged: dict[tuple[str, str, str, str], Judgement] = {}

    def execute(self, stage: str, again: bool = False, group: Group = ALONE) -> None:
        """Run one stage whose predecessors are done; with ``again`` even if it is done itself, from its beginning.

        ``group`` is for training alone: the other processes call :meth:`follow_training`.
        """
        order = list(STAGES)
        self.check_order(stage)
        imported = any("imported" in record for record in self.stages().values())
        if list(STAGES).index(stage) < list(STAGES).index("train") and not imported:  # the steps are known after select
            train.check_warmup(self.config.train, self.config.most_steps, "at most ")
        self.under_way, self.kept = stage, ""
        old = self.stages().get(stage)
        # From here on neither this stage nor a later one counts as done, should it be interrupted.
        write_json(
            self.path("stages.json"), {k: v for k, v in self.stages().items() if order.index(k) < order.index(stage)}
        )
        # with new settings, what still fits them is kept
        if again and (stage != "evaluate" or (old is not None and old["settings"] == self.settings(stage))):
            for name in STAGES[stage].partial:
                remove(self.path(name))
        summary = self.perform(stage, group)
        record = {"settings": self.settings(stage), "seconds": round(self.meter.seconds, 1), **summary}
        write_json(self.path("stages.json"), {**self.stages(), stage: record})
        for finished in order[: order.index(stage) + 1]:  # an earlier one may have been killed before it came here
            for name in STAGES[finished].spent:
                remove(self.path(name))
        self.under_way = ""
        words = ", ".join(f"{key} {value}" for key, value in summary.items())
        console.print(f"{stage}: {words} ({record['seconds']:.0f} s)", highlight=False, markup=False, soft_wrap=True)

    def perform(self, stage: str, group: Group = ALONE) -> dict[str, Any]:
        """Do a stage's work and log its cost; what to say of it. It does not count as done by that."""
        with metered(stage, self.path("costs.jsonl")) as self.meter:
            return self._train(group) if stage == "train" else getattr(self, f"_{stage}")()

    def run(self) -> Evaluation:
        """Every stage that is not done yet, in order."""
        with self.locked():
            done = [stage for stage in STAGES if self.is_done(stage)]  # changed settings are an error before any work
            if done:
                console.print(f"{self.dir}: continues after {', '.join(done)}", markup=False, soft_wrap=True)
            for stage in STAGES:
                if not self.is_done(stage):  # a stage that is redone undoes those behind it
                    self.execute(stage)
            return self.evaluation()

    # The stages. Each returns what to say of it.
    def _problems(self) -> dict[str, Any]:
        problems = build_problems(self.config.problems, self.config.seed, self.config.path)
        write_records(self.path("problems.jsonl"), problems, {"seed": self.config.seed})
        return {split: len(own) for split in get_args(Split) if (own := [p for p in problems if p.split == split])}

    def _check_ahead(self) -> None:
        """Mistakes that the model shows, found before the work of the stages that would stop at them."""
        if (most := self.lm.weight.shape[0]) < self.config.score.top_k:
            raise RunError(f"score.top_k: expected at most the vocabulary's {most}, got {self.config.score.top_k}")
        trackers.check(self.config.train.trackers)
        adapted = matching(self.lm.model, self.config.lora)
        spelled_for_peft(self.lm.model, self.config.lora, list(adapted))
        forward.check(self.lm, self.wanted().layer)
        for section, splits in (("rollouts", ["train"]), ("evaluate", ["choose", "evaluate"])):
            questions = [problem.question for split in splits for problem in self.problems(split)]
            longest = max((len(self.renderer(question)) for question in questions), default=0)
            sampling: Sampling = getattr(self.config, section)
            rollouts.check_length(self.lm, longest, sampling.max_new_tokens, f"{section}.")
            if sampling.engine == "vllm":
                vllm_engine.check(self.lm, adapted.values() if section == "evaluate" else ())
            if sampling.engine != "openai":
                rollouts.check_rotation(self.lm, longest, sampling.max_new_tokens, f"{section}.")

    def _rollouts(self) -> dict[str, Any]:
        self._check_ahead()
        sampling = self.config.rollouts
        meta = {"prompt": self.renderer.fingerprint, "model": self.config.model.name, **sampling.model_dump()}
        meta |= {"dtype": self.dtype[0]} if sampling.engine != "openai" else {}  # a server has its own
        meta = {"rmx": rmx_kernels.__version__, **meta}
        found = self.generate("rollouts", self.problems("train"), sampling, self.config.seed, meta)
        truncated = sum(r.truncated for r in found)
        return {"rollouts": len(found), "truncated": truncated, **self._chosen_batch("rollouts")}

    def _chosen_batch(self, section: str) -> dict[str, Any]:
        """What batch_size=auto was on this GPU, for the record; a CPU's is always the same."""
        sampling: Sampling = getattr(self.config, section)
        return {} if sampling.batch_size != "auto" or self.lm.device.type != "cuda" else {"batch_size": self.batch}

    def generate(
        self,
        name: str,
        problems: list[Problem],
        sampling: Sampling,
        seed: int,
        meta: dict[str, Any],
        adapter: Path | None = None,
    ) -> list[Rollout]:
        """Rollouts into ``name``.jsonl by way of a journal, which a killed stage takes up again.

        ``adapter``: that the model wears, for engines with a model of their own.
        """
        lm, renderer = self.lm, self.renderer  # loads the model before the bar appears
        section = "rollouts." if name == "rollouts" else "evaluate."
        sampling = settled(lm, sampling, [renderer(problem.question) for problem in problems], section)
        self.batch = sampling.batch
        origin = {**meta, "seed": seed, "problems": _mark(problems), "weights": self.weights}
        origin["model"] = self.model_settings.model_dump()
        journal, known = Journal.open(self.path(f"{name}.journal.jsonl"), Rollout, origin)
        total = len(problems) * sampling.samples
        title = name.rpartition("/")[2].removeprefix("evaluation.")
        with journal, progress(title, total, "rollouts") as update:
            done = 0

            def count(more: int) -> None:
                nonlocal done
                done += more
                self.kept = f"{done} of {total} rollouts are kept in {journal.path}"
                update(done, "")

            count(len(known))

            def on_unit(unit: list[Rollout]) -> None:
                journal.append(unit)
                self.meter.read += sum(len(r.prompt_ids) for r in {r.problem_id: r for r in unit}.values())
                self.meter.generated += sum(len(r.completion_ids) for r in unit)
                count(len(unit))

            found = rollouts.generate_rollouts(
                lm, renderer, problems, sampling, seed, known=known, on_unit=on_unit, adapter=adapter
            )
        write_records(self.path(f"{name}.jsonl"), found, meta)
        return found

    def _verify(self) -> dict[str, Any]:
        verdicts = self.judge("verify", self.problems("train"), self.rollouts())
        write_records(self.path("verdicts.jsonl"), verdicts, self.meta())
        outcomes = [v.outcome for v in verdicts]
        return {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}

    def judge(self, title: str, problems: list[Problem], found: list[Rollout]) -> list[Verdict]:
        """One verdict a rollout; the same answer to the same problem is judged once in a process."""
        asked = {p.problem_id: (p.problem_id, p.question, p.answer) for p in problems}
        keys = [(*asked[r.problem_id], r.text) for r in found]
        fresh = [r for r, key in zip(found, keys, strict=True) if key not in self.judged]
        if fresh:
            options: dict[str, Any] = {"workers": self.config.verify.workers, "timeout_s": self.config.verify.timeout_s}
            if self.config.verify.reward is not None:
                options["judge"] = PythonReward(self.reward_name, chat=self.renderer.style in CHAT)
            with progress(title, len({(r.problem_id, r.text) for r in fresh}), "answers") as update:
                verdicts = verify(problems, fresh, on_done=lambda n: update(n, ""), **options)
            for r, v in zip(fresh, verdicts, strict=True):
                self.judged[(*asked[r.problem_id], r.text)] = v.outcome, v.answer, v.reason, v.score
        return [Verdict(r.problem_id, r.sample, *self.judged[key]) for r, key in zip(found, keys, strict=True)]

    def _score(self) -> dict[str, Any]:
        found, settings, lm = self.to_score(), self.config.score, self.lm
        forward.check(lm, self.wanted().layer)
        keep, said = score.affordable(self.wanted(), found, lm, settings, self.path("scores"))
        console.print(f"score: {said}", highlight=False, markup=False, soft_wrap=True)
        store = score.ScoreStore(self.path("scores"), found, settings.shard_tokens, self.score_origin(keep))
        store.discard_others()
        with progress("score", len(found), "rollouts") as update:

            def on_done(done: int, read: int) -> None:
                self.meter.read = read
                self.kept = f"the scores of {done} of {len(found)} rollouts are kept in {store.path}"
                update(done, "")

            store.fill(lm, settings, keep, on_done=on_done)
        write_json(store.path / "index.json", {"shard_tokens": settings.shard_tokens, "origin": store.origin})
        return {"rollouts": len(found), "tokens": sum(len(r.completion_ids) for r in found)}

    def _select(self) -> dict[str, Any]:
        scores = self.scores()
        chosen, tau = select.select_sequences(
            self.rollouts(), self.verdicts(), scores, self.config.select, self.config.train_seed
        )
        write_records(self.path("training_set.jsonl"), chosen, self.meta(tau=tau))
        entropy = score.entropies(scores)
        gate = select.describe_gate(chosen, entropy, tau)
        write_json(self.path("gate.json"), self.meta(**dataclasses.asdict(gate)))
        report.plot_gate(self.path("gate.png"), entropy, tau)
        quantiles = ", ".join(f"{q:.0%} {nats:.2f}" for q, nats in gate.quantiles.items() if q in (0.5, 0.8, 0.9, 0.97))
        return {
            "problems": len({s.problem_id for s in chosen}),
            "sequences": len(chosen),
            "tau": round(tau, 3),
            "gated": f"{gate.gated} of {gate.tokens} tokens",
            "entropy quantiles": f"{quantiles} nats",
        }

    def steps(self) -> int:
        """Of the training, if it does not stop early."""
        return self.config.train.steps(len(self.training_set()))

    def _train(self, group: Group = ALONE) -> dict[str, Any]:
        return train_stage(self, group)

    def follow_training(self, group: Group) -> None:
        """What a process that does not lead does while the leading one runs the stage."""
        self._train(group)

    def check_adapter(self) -> None:
        """An adapter that lies there may be of an earlier training, or not the chosen one yet."""
        self.need("choose" if self.config.train.candidates > 1 else "train", ", or name an adapter")

    def _choose(self) -> dict[str, Any]:
        made = self.history()[-1].step
        if self.config.train.candidates == 1:
            choice = Choice(self.meta()["prompt"], 0, 0, [], made)
        else:
            self._check_prompt()
            choice = choose(self)
            with replacing(self.path("adapter")) as aside:
                shutil.copytree(candidate_path(self.dir, choice.step), aside)
        write_json(self.path("choice.json"), dataclasses.asdict(choice))
        found = {f"step {c.step}": f"{c.pass_at_1.mean:.3f}" for c in choice.candidates}
        return {"adapter": f"of step {choice.step} of {made}", **found}

    def _check_prompt(self) -> None:
        if self.meta()["prompt"] != self.renderer.fingerprint:
            raise ArtefactError(
                f"{self.path('rollouts.jsonl')}: was made with other prompts than this model and style render now "
                "(a chat template that writes today's date? fix it with prompt.template)"
            )

    def _evaluate(self) -> dict[str, Any]:
        problems = self.problems("evaluate")
        self._check_prompt()
        if self.config.evaluate.engine == "openai":
            check_served(self.lm, self.config.evaluate, self.path("adapter"))
        with lora.worn(self.lm.model, self.path("adapter")) as adapter:
            # The same seed for both sides: common random numbers make the paired difference sharper.
            with adapter.off():
                base = self.sampled("evaluation.base", problems, 1, None)
            tuned = self.sampled("evaluation.tuned", problems, 1, self.path("adapter"))
        result = evaluate.compare(problems, base, tuned, draws=self.config.evaluate.bootstrap, seed=self.config.seed)
        write_json(self.path("evaluation.json"), {**self.meta(), **dataclasses.asdict(result)})
        return {
            "base": str(result.base.pass_at_1),
            "tuned": str(result.tuned.pass_at_1),
            "gain": str(result.gain),
            **self._chosen_batch("evaluate"),
        }

    def sampled(
        self, name: str, problems: list[Problem], seed: int, adapter: Path | None
    ) -> tuple[list[Rollout], list[Verdict]]:
        """Rollouts and verdicts of the model as it is; taken from their file where an interrupted stage left one.

        Args:
            seed: added to the seed of the run. adapter: the adapter that is attached to the model, if any.
        """
        sampling = self.config.evaluate
        origin = {
            "model": self.model_settings.model_dump(),
            "weights": self.weights,
            "problems": _mark(problems),
            "adapter": adapter and lora.adapter_mark(adapter),
        }
        meta = self.meta(**sampling.model_dump(exclude={"bootstrap"}), seed=self.config.seed + seed, **origin)
        title = name.rpartition("/")[2].removeprefix("evaluation.")
        found = self.generated(name, problems, sampling, self.config.seed + seed, meta, adapter)
        return found, self.judge(title, problems, found)

    def generated(
        self,
        name: str,
        problems: list[Problem],
        sampling: Sampling,
        seed: int,
        meta: dict[str, Any],
        adapter: Path | None = None,
    ) -> list[Rollout]:
        """Those of ``name``.jsonl if it was made with this ``meta``, else :meth:`generate` makes them."""
        path = self.path(f"{name}.jsonl")
        if path.exists():
            old, found = read_records(path, Rollout)
            if meant(old) == meta:
                return found
        return self.generate(name, problems, sampling, seed, meta, adapter)

    def _notes(self) -> dict[str, str]:
        """What the configuration does not tell."""
        stages = self.stages()
        notes = {"Number format": self.dtype[0] + (" (auto)" if self.config.model.dtype == "auto" else "")}
        notes["Adapter size"] = stages["train"]["adapter"]
        if self.config.train.candidates > 1:
            notes["Adapter chosen"] = stages["choose"]["adapter"]
        if source := stages["rollouts"].get("imported"):
            notes["Rollouts"] = f"imported from {Path(source).name}"
        return notes

    def evaluated(self, side: str) -> tuple[list[Rollout], list[Verdict]]:
        """What the evaluation sampled of "base" or "tuned", judged again."""
        problems, found = self.problems("evaluate"), read_records(self.path(f"evaluation.{side}.jsonl"), Rollout)[1]
        return found, self.judge(side, problems, found)

    def _report(self) -> dict[str, Any]:
        scores, sequences, tau, history = self.scores(), self.training_set(), self.tau(), self.history()
        entropy, evaluation = score.entropies(scores), self.evaluation()
        report.plot(self.path("report.png"), entropy, tau, history, evaluation)
        tokenizer = self.vocabulary.tokenizer
        page = html.Page(
            config=self.config,
            evaluation=evaluation,
            entropies=entropy,
            tau=tau,
            training_set=sequences,
            history=history,
            examples=html.pick_examples(self.problems("train"), self.rollouts(), self.verdicts(), scores, sequences),
            style=self.renderer.style,
            prompt=self.meta()["prompt"],
            costs=stage_costs(self.path("costs.jsonl"), list(STAGES), self.config.cost),
            dates=(_written(self.path("problems.jsonl")), _written(self.path("evaluation.json"))),
            notes=self._notes(),
        )
        html.write_html(
            self.path("report.html"),
            page,
            lambda ids: tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        )
        if self.config.train.trackers:
            shown = trackers.Trackers(self.config.train.trackers, self.dir)
            shown.evaluation(evaluation, history[-1].step, self.path("report.png"))
            shown.close()
        return {"written": f"{self.path('report.html')} and report.png"}


def _written(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime)


def _mark(problems: list[Problem]) -> str:
    return fingerprint(json.dumps([dataclasses.asdict(p) for p in problems]).encode())
