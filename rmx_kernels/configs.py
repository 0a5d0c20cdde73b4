"""How the Triton kernels are launched, per architecture: explicit data, changed by measurement (bench/tune.py) alone.

A row's bits depend on ``columns``, so these numbers are part of what reproduces a result on an architecture.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sweep:
    """A kernel that goes over logits: one program takes ``columns`` of one row."""

    columns: int  # a power of 2; 16 bytes a thread and load
    warps: int


@dataclass(frozen=True)
class Config:
    statistics: Sweep  # entropy_topk: one read
    statistics_gradient: Sweep  # one read, one write
    loss: Sweep  # two reads: student and base
    loss_gradient: Sweep  # two reads, one write
    finish_warps: int  # one program a row merges its parts; twice as many where it sorts over 2048 keys
    logit_bytes: int  # of the whole rows of logits, of student and base, that a linear operator holds at a time


MIB = 1 << 20
# A thread holds 16 or 32 logits in registers, and at least 4 programs share a multiprocessor, so that the loads of some
# hide the reductions of others. Not tuned on hardware yet: starting points from the count of registers.
CONFIGS = {
    "sm_80": Config(Sweep(8192, 8), Sweep(4096, 8), Sweep(4096, 8), Sweep(4096, 8), 4, 224 * MIB),
    "sm_90": Config(Sweep(4096, 8), Sweep(4096, 8), Sweep(4096, 8), Sweep(4096, 8), 4, 224 * MIB),
    "sm_100": Config(Sweep(4096, 8), Sweep(4096, 8), Sweep(4096, 8), Sweep(4096, 8), 4, 224 * MIB),
    "gfx942": Config(Sweep(4096, 4), Sweep(4096, 4), Sweep(4096, 4), Sweep(4096, 4), 4, 224 * MIB),  # 64 threads a warp
}
ROW_MULTIPLE = 128  # rows of one product: few enough that reading the head bounds it, and what products are padded to
HEAD_TILE_BYTES = 48 * MIB  # of a slice of a trained head's gradient in float32, and of the logits that it is made of


def architecture(device: torch.device) -> str:
    """The entry of CONFIGS for a device; under the interpreter, which has none, that of Hopper."""
    if device.type != "cuda":
        return "sm_90"
    if torch.version.hip is not None:
        return "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return "sm_80" if major < 9 else "sm_90" if major == 9 else "sm_100"


def config(device: torch.device) -> Config:
    return CONFIGS[architecture(device)]


def chunk_columns(V: int, K: int) -> int:
    """Columns of which the statistics keep the maximum. The top-k sorts K segments' maxima and K chunks' columns."""
    width = 16
    while width < 64 and width * width * K < V:
        width *= 2
    return width
