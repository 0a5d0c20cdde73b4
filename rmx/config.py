"""The settings of a run, validated; :mod:`rmx.config_file` reads them.

An unknown key or a wrong type is an error that names it. The defaults are the published settings (arXiv 2605.06241).
"""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from rmx.errors import RmxError
from rmx.layer_patterns import LayerPattern, value_of

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # torch takes 64 bits, and evaluations add to it
Probability = Annotated[float, Field(gt=0, le=1)]


class ConfigError(RmxError):
    """The configuration is invalid: a setting is missing, unknown, or has a wrong value."""


class Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    name: str  # Hugging Face name, directory, .gguf file, or package:NAME for a GGUF inside an installed package
    gguf_file: str | None = None  # the GGUF to take from a directory or hub repository
    revision: str | None = None  # branch, tag or commit of a model on the hub
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: by device, see rmx_kernels.precision
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if torch finds a GPU
    trust_remote_code: bool = False  # run Python code that comes with the model
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"  # for generation; models without sdpa use eager
    quantization: Literal["nf4"] | None = None  # nf4: linear layers in 4 bits by bitsandbytes, except the head
    packing: bool = True  # score and train on packed sequences; false: padded ones, with model.attention
    # On a GPU, decode steps and training passes of one shape are captured once and replayed. Results are equal up to
    # rounding. The setting is not recorded: a run can continue with the other value.
    cuda_graphs: bool = Field(default=True, exclude=True)


class PromptConfig(Section):
    # auto: depends on the model; docs/prompts.md shows the text of each style
    style: Literal[
        "auto",
        "chat",
        "chat_boxed",
        "chat_plain",
        "boxed",
        "qa",
        "qwen_boxed",
        "qwen_plain",
        "qwen_math",
        "llama_abel",
        "olmo3_math",
        "olmo3_rlzero_math",
    ] = "auto"
    system: str | None = None  # system message; chat styles only
    suffix: str = ""  # text appended to every question
    template: dict[str, Any] = {}  # variables of the chat template, such as enable_thinking or date_string


class ProblemSource(Section):
    jsonl: str | None = None  # lines of {"question", "answer", optional "problem_id", "category"}
    task: str | None = None  # name of a reasoning-gym task
    params: dict[str, Any] = {}  # settings of the task
    split: Literal["train", "choose", "evaluate", "both"] = "both"  # use of the problems; both: divided among all
    dataset: str | None = None  # name on the hub, a directory, or a file (Parquet, JSON, CSV); see rmx.grading.data
    dataset_config: str | None = None  # configuration of the data set
    dataset_split: str | None = None  # split of the data set; default: train
    revision: str | None = None  # branch, tag or commit of a data set on the hub
    question: str | None = None  # column, or an expression such as "{passage} {question}"; default: question
    answer: str | None = None  # column, or an expression such as "answer: after ####"; default: answer
    category: str | None = None  # column of categories, reported separately; default: the data set's name
    limit: PositiveInt | None = None  # number of rows to take after a shuffle with the run's seed; default: all
    streaming: bool | None = None  # read rows over the network, do not download the whole data set

    @pydantic.model_validator(mode="after")
    def _one(self) -> "ProblemSource":
        if sum(kind is not None for kind in (self.jsonl, self.task, self.dataset)) != 1:
            raise ValueError("expected exactly one of jsonl, task and dataset")
        of_dataset = ("dataset_config", "dataset_split", "revision", "question", "answer", "category", "limit")
        given = [name for name in (*of_dataset, "streaming") if getattr(self, name) is not None]
        if given and self.dataset is None:
            raise ValueError(f"{given[0]} is a setting of a dataset")
        if self.streaming and self.limit is None:
            raise ValueError("streaming needs a limit: the number of rows to take")
        return self


class ProblemsConfig(Section):
    sources: Annotated[list[ProblemSource], Field(min_length=1)]  # sources, used in turn until the counts are reached
    train_count: PositiveInt = 200  # number of problems to sample completions for
    choose_count: Annotated[int, Field(ge=0)] = 0  # held-out problems to choose among train.candidates; not reported
    evaluate_count: PositiveInt = 200  # number of held-out problems, which measure the gain


class Sampling(Section):
    samples: PositiveInt  # completions of each problem
    temperature: Annotated[float, Field(ge=0)] = 0.6  # 0: greedy
    top_p: Probability = 0.95  # sample from the smallest set of tokens with this total probability
    top_k: PositiveInt | None = None  # sample from at most this many of the most probable tokens
    max_new_tokens: PositiveInt = 8192  # maximum number of tokens of a completion
    batch_size: Literal["auto"] | int = "auto"  # sequences decoded at once; auto: by memory, see rmx.sampling.batching
    engine: Literal["auto", "loop", "generate_batch", "openai", "vllm"] = "auto"  # sampling engine; auto: by the device
    base_url: str | None = None  # address of an OpenAI-compatible server, for engine openai
    server_model: str | None = None  # name of the model on the server; default: model.name

    @pydantic.field_validator("batch_size", mode="plain")
    @classmethod
    def _some_or_auto(cls, batch_size: Any) -> Literal["auto"] | int:
        if batch_size != "auto" and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
            raise ValueError("expected auto or a whole number of at least 1")
        return batch_size

    @property
    def batch(self) -> int:
        """``batch_size`` as a number; a ValueError while it is ``auto``."""
        if isinstance(self.batch_size, str):
            raise ValueError("batch_size is still auto: rmx.sampling.batching.settled chooses the number")
        return self.batch_size

    @pydantic.field_validator("temperature")
    @classmethod
    def _greedy_or_not(cls, temperature: float) -> float:
        if 0 < temperature < 1e-3:
            raise ValueError("expected 0 (greedy) or at least 0.001")
        return temperature

    @pydantic.model_validator(mode="after")
    def _server(self) -> "Sampling":
        if (self.engine == "openai") != (self.base_url is not None):
            raise ValueError("expected base_url with engine openai, and no base_url with another engine")
        return self


class RolloutsConfig(Sampling):
    samples: PositiveInt = 20  # completions of each problem


class VerifyConfig(Section):
    workers: PositiveInt = 2  # number of processes that judge answers
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 10.0  # time limit for one answer, in seconds
    reward: str | None = None  # module:function or FILE.py:function; see rmx.grading.rewards


class ScoreConfig(Section):
    problems: Literal["selected", "mixed", "all"] = (
        "mixed"  # problems to score: those selected for training, those with right and wrong completions, or all
    )
    top_k: Annotated[int, Field(ge=0)] = 8  # number of most probable tokens stored for each position
    token_budget: PositiveInt = 16384  # tokens in one forward pass
    shard_tokens: PositiveInt = 65536  # tokens in one file; a killed stage repeats at most one file
    cache_gib: Annotated[float, Field(ge=0)] = (
        32.0  # limit, in GiB, of the base states kept for training; above it they are recomputed
    )


class SelectConfig(Section):
    max_problems: PositiveInt = 50  # maximum number of problems to train on; pass rates near one half come first
    max_sequences: PositiveInt = 1000  # maximum number of completions to train on
    max_completion_tokens: PositiveInt | None = None  # longer completions are left out
    min_pass_rate: Annotated[float, Field(ge=0, le=1)] = 0.0  # use only problems with a higher pass rate
    max_pass_rate: Annotated[float, Field(ge=0, le=1)] = 1.0  # use only problems with a lower pass rate
    advantage_clip: PositiveFloat = 2.5  # largest absolute advantage
    # Gate: base entropy > tau. Set exactly one of tau, quantile and budget; see rmx.training.select.gate_threshold.
    tau: PositiveFloat | None = None  # tau is in nats
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = None  # tau: this quantile of all scored tokens' entropies
    budget: Probability | None = None  # tau: such that the gate takes this share of the completion tokens trained on
    # Controls: random and lowest take as many tokens per sequence, at random or of lowest entropy; all takes all.
    gate: Literal["entropy", "random", "lowest", "all"] = "entropy"
    shuffle_advantages: bool = False  # control: shuffle the advantages among the rollouts of each problem
    matched_gradient: bool | None = None  # for controls: scale each rollout to the gradient mass of its entropy gate
    right_only: bool | None = None  # use only right rollouts, with advantage 1; with gate all: supervised training

    @pydantic.model_validator(mode="before")
    @classmethod
    def _published_gate(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "tau" in given:
            return given
        return {**given, "tau": 1.4} if given.get("budget") is None and given.get("quantile") is None else given

    @pydantic.model_validator(mode="after")
    def _some_rates(self) -> "SelectConfig":
        if self.min_pass_rate >= self.max_pass_rate:
            raise ValueError("expected min_pass_rate < max_pass_rate: no pass rate is between them")
        return self

    @pydantic.model_validator(mode="after")
    def _one_gate(self) -> "SelectConfig":
        if sum(value is not None for value in (self.tau, self.quantile, self.budget)) != 1:
            raise ValueError("expected exactly one of tau, quantile and budget")
        return self


class LoraConfig(Section):
    r: PositiveInt = 32  # rank of the adapter
    alpha: PositiveFloat = 64.0  # the product B A is scaled by alpha / r
    targets: Annotated[list[str], Field(min_length=1)] = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]  # layers to adapt, also lm_head and embed_tokens; all-linear: every linear layer except the output head
    first_layer: Annotated[int, Field(ge=0)] = 0  # first decoder layer to adapt; training skips the layers below it
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # dropout of the adapter's input, in training only
    rslora: bool | None = None  # scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)
    # r of single layers: regular expressions that match the end of a layer's path, as in PEFT; the first match counts
    rank_pattern: dict[LayerPattern, PositiveInt] | None = None
    alpha_pattern: dict[LayerPattern, PositiveFloat] | None = None  # alpha of single layers, in the same way
    start: str | None = None  # directory of an adapter to continue training, with the same layers, r and alpha

    def of(self, path: str) -> tuple[int, float]:
        """(rank, scale of the product B A) of the layer at this path."""
        r = value_of(self.rank_pattern, path, self.r)
        return r, value_of(self.alpha_pattern, path, self.alpha) / (r**0.5 if self.rslora else r)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        if isinstance(given, dict) and "use_dora" in given:
            raise ValueError("use_dora: DoRA (it also scales the weights' columns) is not supported; leave it out")
        return given


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 1.2  # number of passes over the training sequences
    sequences_per_step: PositiveInt = 8  # number of sequences in each optimiser step
    learning_rate: PositiveFloat = 1e-4  # peak of the learning rate; it then falls linearly to 0
    warmup_steps: Annotated[int, Field(ge=0)] = 50  # steps in which the learning rate rises linearly
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # weight decay of AdamW
    clip: PositiveFloat = 1.0  # maximum of the gradient norm
    anchor_weight: Annotated[float, Field(ge=0)] = 0.2  # lambda: weight of the KL to the base
    anchor: Literal["all", "completion"] = "all"  # positions of that KL; all: prompt positions too
    negative_weight: Annotated[float, Field(ge=0)] = 1.0  # beta: weight of negative advantages; 0: positives only
    negatives: Literal["ce", "ratio", "hinge"] = (
        "ce"  # loss that lowers wrong rollouts; see rmx.training.loss.contrastive
    )
    ratio_clip: Annotated[float, Field(gt=0, lt=1)] = 0.2  # for ratio: lower p until it is (1 - ratio_clip) * base p
    hinge_margin: PositiveFloat = 1.0  # for hinge: lower log p until it is this many nats below the base's
    negative_floor: Annotated[float, Field(lt=0)] | None = (
        None  # for ce: tokens below this log p (nats) are not lowered further
    )
    early_stop_steps: PositiveInt | None = (
        None  # stop if log p of right rollouts' decision tokens, averaged over this many steps, is below the base's
    )
    anchor_fraction: Probability = 1.0  # share of the anchor positions used in a step, drawn again for each step
    token_budget: PositiveInt = 16384  # tokens in one forward pass
    # true: recompute layers in the backward pass (less memory, a third more time). offload: also keep the inputs of
    # the layers in host memory until then.
    activation_checkpointing: bool | Literal["offload"] = False
    compile: bool = False  # compile the decoder layers by torch.compile; worth it in long trainings
    candidates: PositiveInt = 1  # number of adapters to keep, from equally spaced steps; the last is the final one
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 10.0  # seconds between two checkpoints; 0: after every step
    # services that get the metrics as well as metrics.jsonl; not recorded: a run can continue with others
    trackers: list[Literal["tensorboard", "trackio", "wandb", "mlflow"]] = Field(default=[], exclude=True)

    def steps(self, sequences: int) -> int:
        """Number of steps of a training on this many sequences, if it does not stop early."""
        return math.ceil(max(1, round(self.epochs * sequences)) / self.sequences_per_step)

    @pydantic.field_validator("activation_checkpointing", mode="plain")
    @classmethod
    def _whether_or_offload(cls, how: Any) -> bool | Literal["offload"]:
        if not isinstance(how, bool) and how != "offload":
            raise ValueError("expected true, false or offload")
        return how

    @pydantic.model_validator(mode="after")
    def _one_option(self) -> "TrainConfig":
        if self.compile and self.activation_checkpointing:
            raise ValueError("compile and activation_checkpointing cannot be combined: layers would not be compiled")
        return self


class EvaluateConfig(Sampling):  # max_new_tokens: default is that of the rollouts
    samples: PositiveInt = 4  # completions of each problem
    bootstrap: Annotated[int, Field(ge=40, le=10_000_000)] = 10_000  # draws; fewer than 40 have no 2.5 % quantile

    tuned_model: str | None = None  # name of the adapter on the server, as in vLLM's --lora-modules NAME=PATH

    @pydantic.model_validator(mode="after")
    def _two_models(self) -> "EvaluateConfig":
        if (self.engine == "openai") != (self.tuned_model is not None):
            raise ValueError(
                "expected tuned_model (the adapter's name on the server) with engine openai, and no tuned_model with "
                "another engine"
            )
        if self.tuned_model is not None and self.tuned_model == self.server_model:
            raise ValueError("expected two names, got the same one for server_model and tuned_model")
        return self


class CostConfig(Section):
    per_hour: Annotated[float, Field(ge=0)] | None = None  # price of this machine for one hour
    currency: str = "USD"  # currency of that price


class Config(Section):
    run_dir: str  # directory for all files of the run
    seed: Seed = 0  # random seed of problems, sampling, adapter and order
    training_seed: Seed | None = None  # seed of gate controls, adapter and order; default: seed
    model: ModelConfig
    prompt: PromptConfig = PromptConfig()
    problems: ProblemsConfig
    rollouts: RolloutsConfig = RolloutsConfig()
    verify: VerifyConfig = VerifyConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    cost: CostConfig = CostConfig()
    _folder: Path = Path()  # of the file
    _evaluates_as_long: bool = False  # as the rollouts, because nothing else is given

    def at(self, folder: Path) -> "Config":
        """A copy whose relative paths start at ``folder``."""
        moved = self.model_copy()
        moved._folder = folder
        return moved

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def evaluates_as_long(self) -> bool:
        """Whether evaluate.max_new_tokens is not set and so equals rollouts.max_new_tokens."""
        return self._evaluates_as_long

    def path(self, written: str, mark: str = "") -> Path:
        """Resolve a path of the configuration.

        In earlier versions all paths started at the current directory, so a path that exists there, and not beside the
        configuration file, is still found. ``mark``: a file that a directory must contain to count as existing.
        """
        given = Path(written).expanduser()
        here = self._folder / given
        return given if not (here / mark).exists() and (given / mark).exists() else here

    @property
    def located_model(self) -> ModelConfig:
        """``model``, with the resolved path if its name is a path."""
        name = self.model.name
        path = self.path(name)
        if name.startswith("package:") or not (path.exists() or name.startswith((".", "~", "/"))):
            return self.model
        return self.model.model_copy(update={"name": str(path)})

    @property
    def most_steps(self) -> int:
        """The largest number of training steps; there are fewer if fewer problems have right and wrong rollouts."""
        problems = min(self.problems.train_count, self.select.max_problems)
        sequences = min(self.select.max_sequences, problems * self.rollouts.samples)
        return self.train.steps(sequences)

    @pydantic.model_validator(mode="after")
    def _as_long_as_the_rollouts(self) -> "Config":
        if "max_new_tokens" not in self.evaluate.model_fields_set:
            length = {"max_new_tokens": self.rollouts.max_new_tokens}
            object.__setattr__(self, "evaluate", self.evaluate.model_copy(update=length))
            self._evaluates_as_long = True
        return self

    @property
    def train_seed(self) -> int:
        return self.seed if self.training_seed is None else self.training_seed

    @pydantic.model_validator(mode="after")
    def _quantized_where_it_can_be(self) -> "Config":
        if self.model.quantization is None:
            return self
        if self.train.compile:
            raise ValueError("model.quantization and train.compile cannot be combined: 4-bit layers are not compiled")
        for section, sampling in (("rollouts", self.rollouts), ("evaluate", self.evaluate)):
            if sampling.engine == "vllm":
                raise ValueError(
                    f"model.quantization and {section}.engine=vllm cannot be combined: vLLM would sample from the "
                    "unquantised weights, which are not the model that is trained"
                )
        return self

    @pydantic.model_validator(mode="after")
    def _chosen_on_something(self) -> "Config":
        if self.train.candidates > 1 and self.problems.choose_count == 0:
            raise ValueError("train.candidates > 1 needs problems.choose_count > 0: problems to find the best adapter")
        if self.train.candidates > 1 and self.evaluate.engine == "openai":
            raise ValueError(
                "train.candidates > 1 samples from every candidate, but a server has one tuned model: use another "
                "evaluate.engine, or train.candidates=1"
            )
        return self
