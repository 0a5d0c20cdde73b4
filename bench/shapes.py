"""What is measured: the heads of four models, from 1 to 16384 rows, as far as memory and time allow.

The environment variable RMX_BENCH chooses how much:

* ``quick``: each operator with the smallest head and 16 rows, 3 rounds. Proves that everything works, in 2 minutes;
  writes no file, for its times say little.
* ``default``: the headline cases (HEADLINE) with every provider, and of the other cases those in which a round of eager
  PyTorch is estimated to take at most 0.1 s, with eager and our fastest implementation alone. Where a round of a
  headline case takes over 1 s, the other providers stand aside as well. At most about 12 minutes on 2 CPU cores.
* ``full``: every case whose eager round takes at most 3 s, with every provider.

A case that is left out, and why, is reported below the table.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import providers
import roofline
import torch

MODELS = {  # V, H of the output head
    "SmolLM2-135M": (49152, 576),
    "Llama-3.2-1B": (128256, 2048),
    "Qwen2.5-1.5B": (151936, 1536),
    "Gemma-3-1B": (262144, 1152),
}
ROWS = (1, 16, 64, 256, 2048, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# What every claim of speed or memory is about: (operator, dtype, N, H, V).
CPU_HEADLINE = (
    ("entropy_topk", "bf16", 256, 0, 49152),
    ("entropy_topk", "fp32", 256, 0, 49152),
    ("linear_entropy_topk", "bf16", 256, 576, 49152),
    ("linear_entropy_topk", "fp32", 256, 576, 49152),
    ("linear_entropy_topk", "bf16", 64, 1536, 151936),
    ("linear_entropy_topk", "fp32", 64, 1536, 151936),
    ("gated_contrastive_loss", "bf16", 256, 0, 49152),
    ("gated_contrastive_loss", "fp32", 256, 0, 49152),
    ("linear_gated_contrastive_loss", "bf16", 256, 576, 49152),
    ("linear_gated_contrastive_loss", "fp32", 256, 576, 49152),
    ("linear_gated_contrastive_loss", "bf16", 2048, 576, 151936),  # for its memory: 0.6 GB of logits, twice
    ("linear_cross_entropy", "bf16", 256, 576, 49152),
    ("linear_cross_entropy", "fp32", 256, 576, 49152),  # of which torch's own returns the loss in full precision
)
GPU_HEADLINE = (
    ("entropy_topk", "bf16", 8192, 0, 151936),
    ("entropy_topk", "fp32", 8192, 0, 151936),
    ("linear_entropy_topk", "bf16", 8192, 4096, 131072),
    ("linear_entropy_topk", "bf16", 8192, 1536, 151936),
    ("linear_entropy_topk", "bf16", 64, 1536, 151936),
    ("gated_contrastive_loss", "bf16", 8192, 0, 151936),
    ("linear_gated_contrastive_loss", "bf16", 8192, 1536, 151936),
    ("linear_cross_entropy", "bf16", 8192, 1536, 151936),
    ("linear_cross_entropy", "bf16", 8192, 4096, 131072),
)
HEADLINE = GPU_HEADLINE if providers.DEVICE == "cuda" else CPU_HEADLINE
# Per logit, in eager: bytes held at the peak besides the inputs; bytes moved by the passes that follow the product,
# such that the estimated time fits 256 x 49152. Estimates choose cases, they never enter a result.
EAGER_PEAK = {
    "entropy_topk": 16,
    "linear_entropy_topk": 16,
    "gated_contrastive_loss": 34,
    "linear_gated_contrastive_loss": 34,
    "linear_cross_entropy": 14,
}
EAGER_MOVED = {
    "entropy_topk": 80,
    "linear_entropy_topk": 80,
    "gated_contrastive_loss": 200,
    "linear_gated_contrastive_loss": 200,
    "linear_cross_entropy": 80,
}
GEMMS = {"linear_entropy_topk": 1, "linear_gated_contrastive_loss": 3, "linear_cross_entropy": 2}  # of eager
HEAVY = 1.0  # s, of an eager round from which only eager and our fastest run, unless RMX_BENCH=full


@dataclass(frozen=True)
class Mode:
    limit: float  # s, estimated for a round of eager, up to which a case runs
    budget: float  # s of timed rounds of one provider in one case; headline cases take HEADLINE_BUDGET times that
    fewest: int  # rounds; all there are where a round of eager takes over HEAVY


HEADLINE_BUDGET = 4
MODES = {"quick": Mode(0.0, 0.2, 3), "default": Mode(0.1, 1.0, 3), "full": Mode(3.0, 4.0, 5)}


def mode_name() -> str:
    name = os.environ.get("RMX_BENCH", "default")
    if name not in MODES:
        raise ValueError(f"RMX_BENCH: expected one of {', '.join(MODES)}, got {name!r}")
    return name


def mode() -> Mode:
    return MODES[mode_name()]


@dataclass(frozen=True)
class Case:
    operator: str
    dtype_name: str
    N: int  # rows
    H: int  # hidden size; 0 where the operator takes logits
    V: int  # vocabulary
    K: int = 8

    def __str__(self) -> str:
        return f"{self.shape}-{self.dtype_name}"

    @property
    def shape(self) -> str:
        return "x".join(str(n) for n in (self.N, self.H, self.V) if n)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def headline(self) -> bool:
        return (self.operator, self.dtype_name, self.N, self.H, self.V) in HEADLINE

    @property
    def budget(self) -> float:
        return mode().budget * (HEADLINE_BUDGET if self.headline else 1)

    @property
    def input_bytes(self) -> int:
        inputs = self.V * self.H if self.H else self.N * self.V * (1 if self.operator == "entropy_topk" else 3)
        return inputs * self.dtype.itemsize

    @property
    def eager_bytes(self) -> int:
        return EAGER_PEAK[self.operator] * self.N * self.V

    @property
    def eager_seconds(self) -> float:
        rates = roofline.rates()
        head = self.V * self.H * self.dtype.itemsize / rates.copy  # read at least once, however few the rows
        product = max(2 * self.N * self.H * self.V / rates.gemm[self.dtype_name], head)
        return GEMMS.get(self.operator, 0) * product + EAGER_MOVED[self.operator] * self.N * self.V / rates.copy

    @property
    def eager_misfit(self) -> str:
        """Why eager cannot run here, or an empty string."""
        need = self.input_bytes + self.eager_bytes
        return "" if need <= available_bytes() else f"does not fit: needs {need / 2**30:.1f} GiB"

    @property
    def reason_to_leave_out(self) -> str:
        if self.input_bytes > available_bytes():
            return f"does not fit: the inputs alone are {self.input_bytes / 2**30:.1f} GiB"
        if not self.headline and self.eager_seconds > mode().limit:
            return f"a round of eager is estimated at over {mode().limit:g} s"
        return ""

    def providers(self) -> tuple[str, ...]:
        names = providers.competitors(self.operator)
        if mode_name() == "default" and not (self.headline and self.eager_seconds <= HEAVY):
            names = tuple(name for name in names if name in ("eager", providers.fastest(self.operator)))
        return names


@functools.cache
def available_bytes() -> int:
    """Four fifths of the memory that is free when the benchmark starts."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] * 4 // 5
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 * 4 // 5
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cases(operator: str) -> list[Case]:
    """Every case of the operator that the mode knows, whether or not it will run; headline cases first."""
    linear = operator.startswith("linear")
    if mode_name() == "quick":
        V, H = MODELS["SmolLM2-135M"]
        return [Case(operator, "bf16", 16, H if linear else 0, V)]
    headline = [Case(*case) for case in HEADLINE if case[0] == operator]
    sweep = [Case(operator, "bf16", N, H if linear else 0, V) for V, H in MODELS.values() for N in ROWS]
    return headline + [case for case in sweep if case not in headline]


def selection(operator: str) -> list[tuple[Case, str]]:
    """The pairs (case, provider) to run; case after case."""
    kept = cases(operator) if mode_name() == "quick" else [c for c in cases(operator) if not c.reason_to_leave_out]
    return [(case, name) for case in kept for name in case.providers()]


def left_out(operator: str) -> list[tuple[Case, str]]:
    """The pairs (case, reason) of those that do not run."""
    if mode_name() == "quick":
        return []
    return [(case, reason) for case in cases(operator) if (reason := case.reason_to_leave_out)]
