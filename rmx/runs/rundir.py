"""A run directory: its settings, which of its stages are done, and readers of what they wrote."""

import dataclasses
import fcntl
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from rmx.artefacts import ArtefactError, fingerprint, lock_file, parser, read_lines, read_meta, read_records, write_json
from rmx.config import Config, ModelConfig
from rmx.errors import Interrupted, RmxError
from rmx.grading.problems import fingerprints
from rmx.grading.rewards import RewardError, split_name
from rmx.models import source
from rmx.models.prompts import Renderer, renderer_for
from rmx.progress import console
from rmx.records import Evaluation, Problem, Rollout, Scores, StepMetrics, TrainingSequence, Verdict
from rmx.runs.stages import STAGES
from rmx.training import select

if TYPE_CHECKING:  # torch is imported by what uses it: what a run has done is known without it
    from rmx.models import model
    from rmx.training import loss, score

CHOICE = ("max_problems", "max_sequences", "max_completion_tokens", "min_pass_rate", "max_pass_rate")  # of rollouts

FIRST_AUTO = "bfloat16"  # what model.dtype=auto was on every device, before it was kept
FIRST_LENGTH = 8192  # of evaluate.max_new_tokens where it was not given, before it followed the rollouts


class RunError(RmxError):
    """The request is not possible in this run directory."""


class RunDirectory:
    """One run directory and the configuration that made it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.dir = config.path(config.run_dir, "stages.json")
        self.under_way = ""  # the stage that is running
        self.kept = ""  # of it, should it be interrupted
        self.writes = True  # False: no record is kept of what is looked up, here and in the cache of digests

    def path(self, name: str) -> Path:
        return self.dir / name

    # The model is loaded once, and only by a stage that needs it.
    @cached_property
    def lm(self) -> "model.CausalLM":
        from rmx.models import model

        dtype, reason = self.dtype
        said = f"loading {self.config.model.name} in {dtype}"
        said += f" (model.dtype=auto: {reason})" if self.config.model.dtype == "auto" else ""
        console.print(said, markup=False, highlight=False, soft_wrap=True)
        return model.load(
            self.config.located_model.model_copy(update={"dtype": dtype}), self.__dict__.get("vocabulary")
        )

    @cached_property
    def dtype(self) -> tuple[str, str]:
        """(what the configuration says or ``auto`` was when this run began, why); precision.json keeps the latter."""
        found = self.dtype_now()
        if self.begun_dtype is None and self.writes:
            from rmx_kernels import __version__

            write_json(self.path("precision.json"), {"rmx": __version__, "dtype": found[0], "reason": found[1]})
        return found

    def dtype_now(self) -> tuple[str, str]:
        """The same, and nothing is written where the run has not begun."""
        if self.begun_dtype is not None:
            return self.begun_dtype, "this run began with it" if self.config.model.dtype == "auto" else "model.dtype"
        from rmx_kernels import precision  # asks torch, which the other cases need not import

        found = precision.choose(self.config.model.device)
        return found.dtype, found.reason

    @cached_property
    def begun_dtype(self) -> str | None:
        """That of the configuration or, for ``auto``, of the run; None: it has not begun."""
        if self.config.model.dtype != "auto":
            return self.config.model.dtype
        path = self.path("precision.json")
        if record := self.stages().get("rollouts"):
            return str(meant(record["settings"])["model"]["dtype"])
        if path.exists():
            return self._kept_precision(path)
        return FIRST_AUTO if self.path("rollouts.journal.jsonl").exists() else None

    def _kept_precision(self, path: Path) -> str:
        try:
            dtype = json.loads(path.read_text(encoding="utf-8"))["dtype"]
            if dtype not in ("bfloat16", "float16", "float32"):
                raise ValueError(f"expected bfloat16, float16 or float32, got {dtype!r}")
        except (ValueError, TypeError, KeyError) as fault:
            raise RunError(f"{path}: cannot be understood: {fault}; delete it, or set model.dtype") from fault
        return dtype

    @cached_property
    def model_settings(self) -> ModelConfig:
        """``model`` of the configuration with the dtype in use: what the model's artefacts depend on."""
        return self.config.model.model_copy(update={"dtype": self.dtype[0]})

    @cached_property
    def vocabulary(self) -> "model.Vocabulary":
        """Of the model; its weights are not loaded for it."""
        from rmx.models import model

        if "lm" in self.__dict__:
            return model.Vocabulary(self.lm.tokenizer, self.lm.model.config)
        return model.load_vocabulary(self.config.located_model.model_copy(update={"dtype": self.dtype[0]}))

    @cached_property
    def renderer(self) -> Renderer:
        return renderer_for(self.vocabulary.tokenizer, self.vocabulary.model_type, self.config)

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
        if stage == "choose" and self.config.train.candidates == 1:
            return {}  # nothing is sampled
        tree = self.config.model_dump(mode="json")
        found = {name: tree[name] for name in STAGES[stage].settings}
        if "model" in found:
            found["model"] = self.model_settings.model_dump(mode="json")
            if self.commit is not None:
                found["commit"] = self.commit
        if stage == "score" and self.config.score.problems == "selected":
            found["select"] = {key: tree["select"][key] for key in CHOICE}
        return {**found, **self.inputs.get(stage, {})}

    @cached_property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """The content of files that settings name, so that a change of theirs is noticed too."""
        return {"rollouts": {"weights": self.weights}, **self.named_files}

    @property
    def named_files(self) -> dict[str, dict[str, Any]]:
        """The same without the model's."""
        problems = fingerprints(self.config.problems, self.config.path)
        found: dict[str, dict[str, Any]] = {"problems": {"files": problems}}
        file = self.reward_name.rpartition(":")[0]
        if file.endswith(".py"):
            try:
                found["verify"] = {"reward file": fingerprint(Path(file).read_bytes())}
            except OSError as fault:
                raise RewardError(f"verify.reward: {file}: cannot be read: {fault.strerror}") from fault
        if (start := self.config.lora.start) is not None:
            from rmx.models.lora import adapter_mark

            try:
                found["train"] = {"start": adapter_mark(self.config.path(start))}
            except OSError as fault:
                raise RunError(f"lora.start={start}: cannot be read as an adapter: {fault}") from fault
        return found

    @property
    def reward_name(self) -> str:
        """``verify.reward``, with the path of its file resolved; empty where there is none."""
        if self.config.verify.reward is None:
            return ""
        where, function = split_name(self.config.verify.reward)
        return f"{self.config.path(where).resolve()}:{function}" if where.endswith(".py") else f"{where}:{function}"

    @cached_property
    def weights(self) -> str | None:
        return source.fingerprint(self.config.located_model, keep=self.writes)

    @cached_property
    def commit(self) -> str | None:
        """Of a model of the hub: what its name and revision stand for now."""
        return source.commit(self.config.located_model)

    @property
    def model_mark(self) -> str:
        """Tells the model from another one: by its local weights, else by its name and revision."""
        mark = self.weights or f"{self.config.model.name}@{self.config.model.revision}"
        return mark if self.config.model.quantization is None else f"{mark} in {self.config.model.quantization}"

    def is_done(self, stage: str) -> bool:
        """Whether the stage is finished, with these settings, and its artefact is there.

        Raises:
            RunError: it was finished with other settings; the message names them.
        """
        record = self.stages().get(stage)
        if record is None or not self.path(STAGES[stage].output).exists():
            return False
        old, now = meant(record["settings"]), self.settings(stage)
        if self.config.evaluates_as_long and old.get("evaluate", {}).get("max_new_tokens") == FIRST_LENGTH:
            now["evaluate"] = {**now["evaluate"], "max_new_tokens": FIRST_LENGTH}
        for section, values in now.items():
            if isinstance(values, dict) and values.get("batch_size") == "auto" and section in old:
                now[section] = {**values, "batch_size": old[section].get("batch_size")}  # whatever it was made with
        if not (old.get("commit") and now.get("commit")):  # one is not known
            old, now = ({k: v for k, v in tree.items() if k != "commit"} for tree in (old, now))
        elif old["commit"] == now["commit"]:  # then it does not matter by which revision
            now["model"] = {**now["model"], "revision": old["model"].get("revision")}
        changed = [f"{key} was {before!r}, is now {after!r}" for key, before, after in differences(old, now)]
        if changed:
            raise RunError(
                f"{self.dir}: stage {stage!r} was run with other settings: {'; '.join(changed)}. Set another run_dir "
                f"(rmx demo: --run-dir), or redo it and the later stages with `rmx {stage} CONFIG --again`"
            )
        return True

    def need(self, stage: str, instead: str = "") -> None:
        """Raise RunError unless the stage and those before it are finished, with these settings.

        ``instead``: what else would do.
        """
        for needed in list(STAGES)[: list(STAGES).index(stage) + 1]:
            if not self.is_done(needed):
                raise RunError(f"{self.dir}: stage {needed!r} is not done: run `rmx {needed}` first{instead}")

    def check_order(self, stage: str) -> None:
        """Raise RunError unless the stages before this one are finished, with these settings."""
        for earlier in list(STAGES)[: list(STAGES).index(stage)]:
            if not self.is_done(earlier):
                raise RunError(f"{self.dir}: stage {stage!r} needs stage {earlier!r}: run `rmx {earlier}` first")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time in a run directory."""
        if self.dir.exists() and not self.dir.is_dir():
            raise RunError(f"run_dir: {self.dir} is a file; expected a directory or an unused name")
        self.dir.mkdir(parents=True, exist_ok=True)
        with lock_file(self.path(".lock")) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as fault:
                raise RunError(f"{self.dir}: another process is running in it") from fault
            with self.stoppable():
                yield

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Inside, Ctrl-C ends the work with a word about what is kept.

        Raises:
            Interrupted: SIGINT arrived.
        """
        try:
            yield
        except KeyboardInterrupt as stop:
            kept = self.kept or (
                "nothing of this stage is kept" if self.under_way else f"what was finished is kept in {self.dir}"
            )
            said = f"{self.under_way or self.dir}: SIGINT; {kept}; start again to continue"
            raise Interrupted(said, signal.SIGINT) from stop

    # What the stages wrote.
    def meta(self, **more: Any) -> dict[str, Any]:
        """Written into every artefact after the rollouts: the same prompts all along, or an error."""
        from rmx_kernels import __version__

        prompt = read_meta(self.path("rollouts.jsonl"))["prompt"]
        return {"rmx": __version__, "prompt": prompt, **more}

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
        if self.config.score.problems == "selected":
            found = self.rollouts()
            chosen = select.choose_rollouts(found, self.verdicts(), self.config.select)
            return [found[i] for i in sorted(i for own in chosen.values() for i in own)]
        mixed = select.mixed_problems(self.verdicts())
        return [rollout for rollout in self.rollouts() if rollout.problem_id in mixed]

    def scores(self) -> list[Scores]:
        return self.kept_scores()[0].scores()

    def kept_scores(self) -> "tuple[score.ScoreStore, score.Keep]":
        """The score stage's files, and which base states they hold."""
        from rmx.training import score

        path = self.path("scores/index.json")
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            store = score.ScoreStore(path.parent, self.to_score(), index["shard_tokens"], index["origin"])
            return store, score.Keep(**index["origin"]["keep"])
        except (OSError, ValueError, KeyError, TypeError) as fault:
            raise ArtefactError(f"{path}: cannot be read: {fault}; run `rmx score` with --again") from fault

    def score_origin(self, keep: "score.Keep") -> dict[str, Any]:
        """All that scores and base states depend on, beside the rollouts."""
        return {
            "weights": self.model_mark,
            "tokenizer": self.lm.vocabulary,
            "dtype": str(self.lm.weight.dtype).removeprefix("torch."),
            "packing": self.config.model.packing,
            "score": {key: getattr(self.config.score, key) for key in ("top_k", "token_budget")},
            "keep": dataclasses.asdict(keep),
            "prompt": self.meta()["prompt"],
        }

    def wanted(self) -> "score.Keep":
        """The base states that training will ask for."""
        from rmx.training import score

        settings = self.config.train
        return score.Keep(settings.anchor if settings.anchor_weight else "none", self.config.lora.first_layer)

    def base_source(self) -> "tuple[loss.BaseSource | None, score.Keep]":
        """(base states from the score stage's files, torn ones made again; which they are); None if not kept."""
        store, keep = self.kept_scores()
        for key, value in self.score_origin(keep).items():
            if store.origin.get(key) == value:
                continue
            raise ArtefactError(
                f"{store.path}: was made with another {key}: {store.origin.get(key)!r}, now {value!r}; "
                "run `rmx score` with --again"
            )
        if not keep.covers(self.wanted()):
            said = "train: the score stage did not store the base states that training needs; every step computes them"
            console.print(said, markup=False, soft_wrap=True)
            return None, keep
        if made := store.fill(self.lm, self.config.score, keep):
            said = f"train: {made} files of {store.path} were missing or incomplete and were made again"
            console.print(said, markup=False, soft_wrap=True)
        return (lambda sequence: store.states(sequence.problem_id, sequence.sample, keep)), keep

    def base_scores(self) -> list[Scores]:
        """The base model's scores of every rollout, for the analyses; the score stage may look at fewer."""
        from rmx.training.text_scores import score_text

        return score_text(
            self.lm, "base", self.model_mark, self.rollouts(), self.path("base_scores"), self.config.score
        )

    def training_set(self) -> list[TrainingSequence]:
        return self._records("training_set.jsonl", TrainingSequence)

    def tau(self) -> float:
        return float(read_meta(self.path("training_set.jsonl"))["tau"])

    def history(self) -> list[StepMetrics]:
        parse = parser(StepMetrics)
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


def meant(settings: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings, those of earlier versions in the words of this one."""
    if settings.get("model", {}).get("dtype") == "auto":
        return {**settings, "model": {**settings["model"], "dtype": FIRST_AUTO}}
    return settings


def differences(old: Any, new: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key.path, value, other value) of each setting that differs; None where one side has no such setting."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield where, old, new
