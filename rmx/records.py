"""The records that stages pass on. Each shape is defined once, here. T = number of completion tokens of a rollout.

Index rule: the distribution at position p predicts token p + 1. Completion token t is predicted from position
``len(prompt_ids) - 1 + t``; every per-token value below belongs to completion token t and its predicting position.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # verifier processes read problems and need no torch
    from torch import Tensor

Split = Literal["train", "choose", "evaluate"]
Outcome = Literal["right", "wrong", "no_answer", "timeout", "crash"]


@dataclass(frozen=True, slots=True)
class Problem:
    problem_id: str
    question: str
    answer: str  # ground truth
    category: str = ""
    split: Split = "train"  # choose: for the choice of the best checkpoint
    entry: dict[str, Any] = field(default_factory=dict)  # reasoning-gym's own record, which its scorer needs


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled completion, as token ids, which are never recomputed from text."""

    problem_id: str
    sample: int  # 0 .. samples - 1
    prompt_ids: list[int]
    completion_ids: list[int]  # T ids; ends with EOS where the model stopped by itself
    finish_reason: Literal["stop", "length"]
    text: str  # decoded completion, for the verifier and the reader
    logprobs: list[float] | None = None  # T, nats, at the sampling temperature (0: at 1) before any cut; if known

    @property
    def ids(self) -> list[int]:
        """Prompt and completion, end to end: P + T ids."""
        return self.prompt_ids + self.completion_ids

    @property
    def truncated(self) -> bool:
        """Whether it hit the length limit."""
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True)
class Verdict:
    problem_id: str
    sample: int
    outcome: Outcome
    answer: str | None  # what was extracted
    reason: str = ""  # why, where the outcome is not "right"
    score: float | None = field(default=None, metadata={"unwritten": None})  # of a reward function, in [0, 1]

    @property
    def reward(self) -> float | None:
        """In [0, 1], without a reward function 1 or 0; None if the verifier itself failed and there is no verdict."""
        if self.score is not None:
            return self.score
        return {"right": 1.0, "wrong": 0.0, "no_answer": 0.0}.get(self.outcome)


@dataclass(frozen=True, slots=True)
class Scores:
    """The frozen base model's view of one rollout, from one teacher-forced pass; float32, nats."""

    problem_id: str
    sample: int
    entropy: "Tensor"  # [T]
    logprob: "Tensor"  # [T]     of the sampled token
    lse: "Tensor"  # [T]
    topk_ids: "Tensor"  # [T, K] int32
    topk_logprobs: "Tensor"  # [T, K]


@dataclass(frozen=True, slots=True)
class BaseStates:
    """States of the frozen base for one rollout of L = P + T tokens, stored so that training needs no base pass."""

    hidden: "Tensor"  # [R, H] final states at the last R predicting positions: all L - 1, or the completion's T
    entry: "Tensor | None"  # [L, H] states that enter the first adapted layer; None where that is layer 0


@dataclass(frozen=True, slots=True)
class TrainingSequence:
    problem_id: str
    sample: int
    prompt_ids: list[int]
    completion_ids: list[int]  # T ids
    reward: float
    advantage: float
    decision_tokens: list[int]  # ascending t with base entropy > tau: the gate
    base_logprob: list[float]  # T, nats
    scale: float = field(default=1.0, metadata={"unwritten": 1.0})  # of the decision tokens' weights; 1 but in controls

    @property
    def ids(self) -> list[int]:
        """Prompt and completion, end to end: P + T ids."""
        return self.prompt_ids + self.completion_ids


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One step of the training: a line of metrics.jsonl."""

    step: int  # 1 ..
    loss: float  # nats
    decision: float  # its contrastive part
    anchor_kl: float  # mean KL(base || student) over anchor positions, nats
    positive_shift: float | None  # mean change of log p since the base, decisions of right rollouts, nats
    negative_shift: float | None  # the same of wrong rollouts
    gradient_norm: float  # before clipping
    learning_rate: float
    tokens: int  # read, without padding
    seconds: float


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self, ".3f")

    def __format__(self, spec: str) -> str:
        """Each of the three numbers in the form ``spec``; three decimals without one."""
        spec = spec or ".3f"
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Statistics of one model's samples of some problems. Samples without a verdict count only in lengths and boxes."""

    problems: int  # with a judged sample
    samples: int  # n of each problem
    pass_at_1: Interval  # mean over problems of the share of right samples: avg@n
    standard_error: float | None  # of pass_at_1, over problems; None for a single one
    pass_at_k: dict[int, Interval]  # k = 1, 2, 4, ... up to n, and n; without those that no problem has k samples for
    maj_at_k: dict[int, Interval]  # majority vote of k samples, same k
    tokens: float  # mean completion length
    truncated: float  # share of samples that hit the length limit
    boxed: float  # share of samples with a closed box that is not empty
    unverified: int  # samples whose verifier timed out or crashed


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Base against tuned on the same held-out problems, sampled with the same settings and random numbers."""

    problems: int  # with a judged sample on both sides: what base, tuned and gain are over
    samples: int
    base: Accuracy
    tuned: Accuracy
    gain: Interval  # of pass@1, tuned - base, paired over problems
    categories: dict[str, tuple[float, float]]  # category -> (base, tuned) pass@1
