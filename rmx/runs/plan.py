"""Estimate tokens, time, memory and disk of each stage of a run on this machine, before anything runs.

Tokens of prompts are counted, since problems and prompts need no model. The length of completions is assumed until
there are rollouts. Rates are measured in some seconds with the model itself.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rmx.config import ModelConfig, Sampling
from rmx.cost import GIB, process_bytes
from rmx.grading.problems import build_problems
from rmx.models.model import _Files
from rmx.records import Problem, Rollout
from rmx.runs import rates
from rmx.runs.pipeline import Run
from rmx.runs.plan_table import Figure, Kind, Plan, StagePlan, weaker
from rmx.runs.stages import STAGES
from rmx.sampling.batching import CPU, batch_size, cache_bytes, sequence_bytes
from rmx.sampling.rollouts import check_length, cut_units
from rmx.training import select
from rmx.training.score import Keep
from rmx.training.train import check_warmup
from rmx_kernels import machine

SECONDS = 2.0  # of each measurement
ANSWER_S = 0.002  # that a verifier process takes for an answer
RECORD_BYTES, TOKEN_BYTES = 200, 22  # of a rollout's line: beside its tokens, and for each token of a completion
PROMPT_TOKEN_BYTES = 7
SCORE_BYTES = 12  # entropy, log-prob and log-sum-exp of a completion token; each of the top k has 8 more
STATES = 4  # numbers of the adapter's size in float32: weights, gradient and AdamW's two moments
NF4_BYTES = 0.516  # of a weight, with the scales of its block
BUSY = 1.5  # processes that want a core, for each core
SAFE = 0.9  # of the free memory or disk


@dataclass(frozen=True)
class _Lengths:
    """Tokens of the completions of a section; a batch is decoded for ``steps`` steps."""

    mean: float
    steps: int


class _Planner:
    def __init__(self, run: Run, seconds: float) -> None:
        run.__dict__["dtype"] = run.dtype_now()  # keeps no record: this run has not begun
        self.run, self.config, self.budget = run, run.config, seconds
        self.done = {stage for stage in STAGES if run.is_done(stage)}
        if "train" not in self.done:
            check_warmup(self.config.train, self.config.most_steps, "at most ")
        self.advice: list[str] = []
        self.assumptions: list[str] = []
        self.problems = self._problems()
        self.prompts = {p.problem_id: run.renderer(p.question) for p in self.problems}
        files = _Files(self.config.located_model.model_copy(update={"dtype": run.dtype[0]}))
        self.device, self.dtype = torch.device(files.device), files.dtype
        self.shape = run.vocabulary.config
        self.weights = _weight_bytes(self.shape, self.dtype, self.config.model)
        self.lengths = {section: self._completions(section) for section in ("rollouts", "evaluate")}
        self.scored = self._scored()
        self.trained = self._trained()
        self.reads: float | None = None
        self.steps: dict[str, rates.Step] = {}
        self.training: rates.Training | None = None

    # What there is to do.
    def _problems(self) -> list[Problem]:
        if "problems" in self.done:
            return [p for split in ("train", "choose", "evaluate") for p in self.run.problems(split)]
        return build_problems(self.config.problems, self.config.seed, self.config.path)

    def of(self, split: str) -> list[Problem]:
        return [p for p in self.problems if p.split == split]

    def _completions(self, section: str) -> _Lengths:
        most = getattr(self.config, section).max_new_tokens
        if "rollouts" in self.done and most == self.config.rollouts.max_new_tokens:
            lengths = [len(r.completion_ids) for r in self.run.rollouts()]
            if section == "evaluate" and "evaluate" not in self.done:
                self.assumptions.append("completions of the evaluation are as long as the rollouts on average")
            return _Lengths(sum(lengths) / len(lengths), max(lengths))
        if section not in self.done:
            said = f"{section}: completions have {most / 2:g} tokens on average, half of {section}.max_new_tokens"
            self.assumptions.append(said)
        return _Lengths(most / 2, most)

    def _scored(self) -> tuple[list[Rollout], Kind]:
        """The rollouts that will be scored; until they are known, as many as can be, of the expected length."""
        if {"rollouts", "verify"} <= self.done:
            return self.run.to_score(), "counted"
        config, train = self.config, self.of("train")
        T = max(1, round(self.lengths["rollouts"].mean))
        count = len(train) * config.rollouts.samples
        if config.score.problems == "selected":
            problems = min(len(train), config.select.max_problems)
            count = min(config.select.max_sequences, problems * config.rollouts.samples)
            self.assumptions.append("score, train: as many problems are of mixed outcome as the selection takes")
        elif config.score.problems == "mixed":
            self.assumptions.append("score: every problem is of mixed outcome, the most that can be")
        prompts = [self.prompts[p.problem_id] for p in train]
        found = [Rollout("", i, prompts[i % len(prompts)], [0] * T, "length", "") for i in range(count)]
        return found, "assumed"

    def _trained(self) -> tuple[list[int], Kind]:
        """Tokens of each sequence of the training set."""
        if "select" in self.done:
            return [len(s.ids) for s in self.run.training_set()], "counted"
        config = self.config
        if {"rollouts", "verify"} <= self.done:
            rollouts = self.run.rollouts()
            chosen = select.choose_rollouts(rollouts, self.run.verdicts(), config.select)
            return [len(rollouts[i].ids) for own in chosen.values() for i in own], "counted"
        found = self.scored[0]
        most = min(len(self.of("train")), config.select.max_problems) * config.rollouts.samples
        return [len(r.ids) for r in found[: min(config.select.max_sequences, most)]], "assumed"

    # How fast, and what of it fits.
    def measure(self) -> None:
        """Rates of what is not done yet; the model is loaded for it."""
        lm, config = self.run.lm, self.config
        for section, splits in (("rollouts", ("train",)), ("evaluate", ("choose", "evaluate"))):
            longest = max((len(self.prompts[p.problem_id]) for split in splits for p in self.of(split)), default=0)
            check_length(lm, longest, getattr(config, section).max_new_tokens, f"{section}.")
        length = max(2, round(sum(self.trained[0]) / max(1, len(self.trained[0]))))
        self.reads = rates.reading(lm, config, length, self.budget)
        for stage, section in (("rollouts", "rollouts"), ("evaluate", "evaluate")):
            sampling: Sampling = getattr(config, section)
            if stage in self.done or sampling.engine not in ("auto", "loop", "generate_batch"):
                continue
            rows = max(len(unit.keys) for unit in cut_units(*self._units(section), batched=True))
            typical = sum(map(len, self.prompts.values())) / len(self.prompts) + self.lengths[section].mean / 2
            context = max(1, int(min(typical, self.reads * self.budget)))
            if section == "rollouts" or not self.steps:
                self.steps[section] = rates.decoding(lm, sampling, rows, context, self.budget)
            else:
                self.steps[section] = self.steps["rollouts"]
        if "train" not in self.done:
            keep, _ = self.kept()
            self.training = rates.training(lm, config, keep, length, 2 * self.budget, self.reads)

    def _units(self, section: str, split: str = "") -> tuple[list[Problem], list[list[int]], Sampling]:
        """The arguments of cut_units, with a number for the batch size."""
        sampling: Sampling = getattr(self.config, section)
        problems = self.of(split or {"rollouts": "train"}.get(section, "evaluate"))
        prompts = [self.prompts[p.problem_id] for p in problems]
        longest = max(map(len, prompts), default=0)
        count = len(problems) * sampling.samples
        size = sampling.batch_size
        if size == "auto":  # on a GPU by what is free beside the model, where that fits
            size = batch_size(self.run.lm, sampling, longest, count).size if "lm" in self.run.__dict__ else CPU
        return problems, prompts, sampling.model_copy(update={"batch_size": size})

    def kept(self) -> tuple[Keep | None, int]:
        """(the base states that the score stage will keep; None if they are too large, bytes of all)."""
        wanted = self.run.wanted()
        need = wanted.bytes(self.scored[0], self.shape.get_text_config().hidden_size, self.dtype)
        fits = need <= self.config.score.cache_gib * GIB and need <= SAFE * self.disk_free
        return wanted if fits else None, need

    @property
    def disk_free(self) -> int:
        path = self.run.dir.absolute()
        return shutil.disk_usage(next(p for p in (path, *path.parents) if p.is_dir())).free

    # The stages.
    def stage(self, name: str) -> StagePlan:
        if name in self.done:
            return StagePlan(name, True)
        found: dict[str, Figure] = {}
        if name in ("rollouts", "choose", "evaluate", "score", "train"):
            found = getattr(self, f"_{name}")()
        elif name == "verify":
            answers = len(self.of("train")) * self.config.rollouts.samples
            found = {"seconds": Figure(1 + ANSWER_S * answers / self.config.verify.workers, "assumed")}
        more = found.pop("memory", None)
        if more is not None:
            there = self._base() + more
            found["device_bytes" if self.device.type == "cuda" else "host_bytes"] = there
            if self.device.type == "cuda" and (resident := process_bytes("VmRSS")):
                found["host_bytes"] = Figure(resident, "measured")
        return StagePlan(name, False, **found)

    def _base(self) -> Figure:
        """What the loaded model takes: on a CPU this process."""
        if "lm" not in self.run.__dict__:
            return Figure(self.weights, "counted")
        if self.device.type == "cuda":
            return Figure(torch.cuda.memory_allocated(self.device), "measured")
        resident = process_bytes("VmRSS")
        return Figure(self.weights, "counted") if resident is None else Figure(resident, "measured")

    def _sampled(self, section: str, split: str, sides: int) -> dict[str, Figure]:
        problems, prompts, sampling = self._units(section, split)
        lengths, count = self.lengths[section], len(problems) * sampling.samples
        units = cut_units(problems, prompts, sampling, batched=sampling.engine != "openai")
        read = sum(len(prompt) for unit in units for prompt in unit.prompts)
        generated = Figure(sides * count * lengths.mean, "assumed")
        disk = count * (RECORD_BYTES + TOKEN_BYTES * lengths.mean)
        disk += PROMPT_TOKEN_BYTES * sampling.samples * sum(map(len, prompts))
        found = {
            "tokens_read": Figure(sides * read, "counted"),
            "tokens_generated": generated,
            "disk_bytes": Figure(2 * sides * disk, "assumed"),  # with the journal, which goes at the end
        }
        if step := self.steps.get(section):
            assert self.reads is not None
            decoded = sum(step.seconds(lengths.steps, len(unit.keys) * lengths.mean) for unit in units)
            found["seconds"] = Figure(sides * (read / self.reads + decoded), "assumed")
        if sampling.engine in ("auto", "loop", "generate_batch"):
            longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
            rows = max((len(unit.keys) for unit in units), default=0)
            graphs = self.device.type == "cuda" and self.config.model.cuda_graphs
            found["memory"] = Figure(rows * sequence_bytes(self.shape, self.dtype, longest, graphs), "counted")
        return found

    def _rollouts(self) -> dict[str, Figure]:
        return self._sampled("rollouts", "train", 1)

    def _evaluate(self) -> dict[str, Figure]:
        return self._sampled("evaluate", "evaluate", 2)

    def _choose(self) -> dict[str, Figure]:
        candidates = self.config.train.candidates
        return {} if candidates == 1 else self._sampled("evaluate", "choose", candidates)

    def _score(self) -> dict[str, Figure]:
        scored, kind = self.scored
        config, text = self.config.score, self.shape.get_text_config()
        tokens, completions = sum(len(r.ids) for r in scored), sum(len(r.completion_ids) for r in scored)
        keep, need = self.kept()
        states = need if keep is not None else 0
        if keep is None:
            self.advice.append(
                f"score: base states of {need / GIB:.1f} GiB are not kept (score.cache_gib={config.cache_gib:g}, "
                f"{self.disk_free / GIB:.1f} GiB of disk free), and training makes them in each step: raise "
                "score.cache_gib, set train.anchor=completion or lora.first_layer, or select.max_completion_tokens"
            )
        wide = 6 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
        found = {
            "tokens_read": Figure(tokens, kind),
            "disk_bytes": Figure(states + completions * (SCORE_BYTES + 8 * config.top_k), kind),
            "memory": Figure(min(tokens, config.token_budget) * wide * self.dtype.itemsize, "assumed"),
        }
        if self.reads:
            found["seconds"] = Figure(tokens / self.reads, weaker("measured", kind))
        return found

    def _train(self) -> dict[str, Figure]:
        lengths, kind = self.trained
        config, layers = self.config.train, self.shape.get_text_config().num_hidden_layers
        mean = sum(lengths) / max(1, len(lengths))
        tokens = max(1, round(config.epochs * len(lengths))) * mean
        kind = kind if config.epochs == 1 else weaker(kind, "assumed")
        found = {"tokens_read": Figure(tokens, kind)}
        if self.training is None:
            return found
        found["seconds"] = Figure(tokens / self.training.tokens_per_second, weaker("measured", kind))
        adapter = _adapter_numbers(self.run)
        in_pass = max(max(lengths), min(config.token_budget, config.sequences_per_step * mean))
        kept = self.training.bytes_per_token
        if config.activation_checkpointing:
            visited = layers - self.config.lora.first_layer
            inputs = visited * self.shape.get_text_config().hidden_size * self.dtype.itemsize
            offloaded = config.activation_checkpointing == "offload" and self.device.type == "cuda"
            kept = kept / visited + (0 if offloaded else inputs)
        found["memory"] = Figure(in_pass * kept + self.training.bytes_fixed + 4 * STATES * adapter, "assumed")
        found["disk_bytes"] = Figure(4 * adapter * (config.candidates + 1 + 3), "counted")
        return found

    def check_fit(self, stages: Sequence[StagePlan]) -> Iterator[str]:
        """What does not fit, with the settings that change it."""
        limits = {"host_bytes": (machine.cpu().memory_free, "memory"), "device_bytes": (self.device_free, "GPU memory")}
        loaded = self._base().value if "lm" in self.run.__dict__ else 0  # of what is in use already
        for key, (free, what) in limits.items():
            mine = loaded if (key == "device_bytes") == (self.device.type == "cuda") else process_bytes("VmRSS") or 0
            for stage in stages:
                figure: Figure | None = getattr(stage, key)
                if free is not None and figure is not None and figure.value > SAFE * (free + mine):
                    need, has = figure.value / GIB, (free + mine) / GIB
                    yield f"{stage.stage}: {need:.1f} GiB of {what} where {has:.1f} are free: {KEYS[stage.stage]}"
        disk = sum(stage.disk_bytes.value for stage in stages if stage.disk_bytes)
        if disk > SAFE * self.disk_free:
            yield (
                f"disk: {disk / GIB:.1f} GiB where {self.disk_free / GIB:.1f} are free: set another run_dir, lower "
                "score.cache_gib, or train.candidates"
            )

    @property
    def device_free(self) -> int | None:
        return int(torch.cuda.mem_get_info(self.device)[0]) if self.device.type == "cuda" else None

    def too_large(self) -> str | None:
        """Why the model itself cannot be loaded here."""
        free = self.device_free if self.device.type == "cuda" else machine.cpu().memory_free
        if free is None or self.weights <= SAFE * free:
            return None
        return (
            f"model: weights of {self.weights / GIB:.1f} GiB in {self.run.dtype[0]} where {free / GIB:.1f} GiB are "
            "free, so nothing was measured: set model.dtype, model.quantization=nf4, a smaller model, or model.device"
        )


SAMPLING_KEYS = "lower {0}.batch_size (auto fits a GPU's memory) or {0}.max_new_tokens"
KEYS = {  # of the configuration, by which a stage takes less memory
    "rollouts": SAMPLING_KEYS.format("rollouts"),
    "choose": SAMPLING_KEYS.format("evaluate"),
    "evaluate": SAMPLING_KEYS.format("evaluate"),
    "score": "lower score.token_budget",
    "train": "lower train.token_budget, set train.activation_checkpointing=true (or offload), raise lora.first_layer, "
    "or set select.max_completion_tokens",
}


def make(run: Run, seconds: float = SECONDS) -> Plan:
    """The plan of a run; nothing is written into its directory.

    Args:
        seconds: time limit of each of the four measurements; loading the model comes in addition.

    Raises:
        RunError: a stage was run with other settings. ProblemsError, PromptError, ModelError: as the stages.
    """
    planner = _Planner(run, seconds)
    too_large = planner.too_large()
    if too_large:
        planner.advice.append(too_large)
    elif not {"rollouts", "score", "train", "choose", "evaluate"} <= planner.done:
        planner.measure()
    load, cores = os.getloadavg()[0], machine.cpu().cores
    if load > BUSY * cores:
        planner.assumptions.append(
            f"the machine stays as busy with other work as it is (load {load:.0f} on {cores} cores): times are long"
        )
    stages = [planner.stage(name) for name in STAGES]
    planner.advice += planner.check_fit(stages)
    measured = {
        "read_tokens_per_second": planner.reads,
        "decoding": {section: asdict(step) for section, step in planner.steps.items()},
        "training": None if planner.training is None else asdict(planner.training),
        "cache_bytes_per_token": cache_bytes(planner.shape, planner.dtype, 1),
    }
    return Plan(
        stages=stages,
        device=planner.device.type,
        dtype=run.dtype[0],
        host_free=machine.cpu().memory_free,
        device_free=planner.device_free,
        disk_free=planner.disk_free,
        assumptions=planner.assumptions,
        advice=planner.advice,
        measured=measured,
    )


def _weight_bytes(config: Any, dtype: torch.dtype, settings: ModelConfig) -> int:
    """Of all parameters, counted without making them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code)
    whole = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    if settings.quantization is None:
        return whole
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings())
    return whole - int(sum(m.weight.numel() for m in linear) * (dtype.itemsize - NF4_BYTES))


def _adapter_numbers(run: Run) -> int:
    from rmx.models.targets import matching, size

    layers = matching(run.lm.model, run.config.lora).items()
    return sum(run.config.lora.of(name)[0] * size(layer) for name, layer in layers)
