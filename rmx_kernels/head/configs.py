"""How the Triton kernels are launched, per architecture: explicit data, changed by measurement (bench/tune.py) alone.

A row's bits depend on these numbers, so they are part of what reproduces a result on an architecture.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Sweep:
    """A kernel that goes over logits, a step of [loads, lanes, width / itemsize] of them at a time."""

    loads: int  # a lane and step: 1 or 2
    lanes: int  # one a thread
    warps: int
    span: int = 0  # columns a program, at most; 0 for one step
    stages: int = 1  # steps whose loads are under way
    width: int = 16  # bytes of one load

    def shape(self, itemsize: int) -> dict[str, Any]:
        """The constants R, L and J of a kernel."""
        return {"R": self.loads, "L": self.lanes, "J": max(1, self.width // itemsize)}

    def columns(self, itemsize: int) -> int:
        """Of one step."""
        return self.loads * self.lanes * max(1, self.width // itemsize)

    def division(self, V: int, itemsize: int, multiple: int = 1) -> tuple[int, int]:
        """(programs a row, steps of each); the steps a multiple. They depend on V alone, not on the number of rows."""
        steps = -(-V // self.columns(itemsize))
        most = self.span // self.columns(itemsize)
        programs = -(-steps // max(multiple, most // multiple * multiple))
        return programs, -(-steps // (programs * multiple)) * multiple


@dataclass(frozen=True)
class Config:
    statistics: Sweep  # entropy_topk: one read
    statistics_gradient: Sweep  # one read, one write
    loss: Sweep  # two reads: student and base
    loss_gradient: Sweep  # two reads, one write
    chunk: int  # columns of a lane whose maximum is kept for the top-k


MIB = 1 << 20


def _config(threads: int) -> Config:
    """For warps of so many threads."""
    return Config(
        statistics=Sweep(loads=2, lanes=4 * threads, warps=4, span=40960),
        statistics_gradient=Sweep(loads=2, lanes=4 * threads, warps=4, span=8192),
        loss=Sweep(loads=2, lanes=4 * threads, warps=4, span=81920),
        loss_gradient=Sweep(loads=2, lanes=4 * threads, warps=4, span=8192),
        chunk=64,
    )


CONFIGS = {"sm_80": _config(32), "sm_90": _config(32), "sm_100": _config(32), "gfx942": _config(64)}
LEAST_SCRATCH, MOST_SCRATCH = 224 * MIB, 896 * MIB
DEFAULT_LOGITS = torch.bfloat16  # of a bfloat16 head
ROW_MULTIPLE = 128  # rows of one product: few enough that reading the head bounds it, and what products are padded to
FULL_WAVES = 512  # multiples of so many rows leave few processors idle in a product's last wave (docs/kernels.md)
HEAD_TILE_BYTES = 48 * MIB  # of a slice of a trained head's gradient in float32, and of the logits that it is made of


def architecture(device: torch.device) -> str:
    """The entry of CONFIGS for a device; under the interpreter, which has none, that of Hopper."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = _major(device)
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def config(device: torch.device) -> Config:
    return CONFIGS[architecture(device)]


_scratch_bytes: int | None = None
_logits_dtype: torch.dtype | None = None


def set_scratch_bytes(count: int | None) -> None:
    """Set how many bytes of logits the linear operators store at a time on a GPU; None for the default.

    More rows in one product use the GPU better but need more memory. The default is 1/128 of the device's memory,
    but at least 224 MiB and at most 896 MiB. docs/kernels.md has the times measured at several sizes.

    Raises:
        ValueError: ``count`` is neither None nor a positive number.
    """
    global _scratch_bytes
    if count is not None and count <= 0:
        raise ValueError(f"set_scratch_bytes: expected None or a positive number of bytes, got {count!r}")
    _scratch_bytes = count


def scratch_bytes(device: torch.device) -> int:
    """The number of bytes in force on a device."""
    if _scratch_bytes is not None:
        return _scratch_bytes
    if device.type != "cuda":
        return LEAST_SCRATCH
    return min(MOST_SCRATCH, max(LEAST_SCRATCH, torch.cuda.get_device_properties(device).total_memory // 128))


def set_logits_dtype(dtype: torch.dtype | None) -> None:
    """Set the dtype in which linear operators store the logits of bfloat16 inputs on a GPU; None for the default.

    float32 keeps the sum of the product. bfloat16 rounds it, as eager PyTorch does: at logits up to 14 a log-prob
    is then off by up to 1.8e-2 nats, against 1e-5. docs/kernels.md has the times of both.

    Raises:
        ValueError: ``dtype`` is not one of None, torch.float32 and torch.bfloat16.
    """
    global _logits_dtype
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"set_logits_dtype: expected None, torch.float32 or torch.bfloat16, got {dtype!r}")
    _logits_dtype = dtype


def logits_dtype(weight: torch.dtype) -> torch.dtype:
    """Of the logits that a head of this dtype gives."""
    if weight == torch.bfloat16:
        return DEFAULT_LOGITS if _logits_dtype is None else _logits_dtype
    return torch.float32  # float16 has few digits for logits above 1024
