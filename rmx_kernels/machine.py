"""What this machine is: its CPU, its GPUs, and the measured rates of copies and of matrix products."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

# Of the CPU's flags, those that decide what torch and the native kernels run on: x86's, then arm64's.
FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm"),
)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FEWEST_ROUNDS = 3
STEP = 8  # work of a size over that of the one before; the last ones are far beyond the caches
COPY_BYTES = {"cpu": (2 << 20, 16 << 20, 128 << 20), "cuda": (1 << 20, 8 << 20, 64 << 20, 512 << 20)}
GEMM_SIZES = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (128, 256, 512, 1024, 2048, 4096, 8192)}
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
Work = tuple[Callable[[], object], int]  # and its amount


@dataclass(frozen=True)
class Cpu:
    model: str
    instruction_sets: tuple[str, ...]
    torch_uses: str  # as torch names it: AVX2, AVX512, ...
    cores: int  # that this process may keep busy
    threads: int  # of torch
    memory: int  # bytes
    memory_free: int | None  # bytes; None where the system doesn't tell


@dataclass(frozen=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    memory: int  # bytes
    memory_free: int  # bytes


@dataclass(frozen=True)
class Rate:
    """Bytes/s of a copy, reads and writes together, or FLOP/s of a square product."""

    device: str
    what: str
    size: int  # bytes copied, or rows of the product: the largest of which some rounds fit the time
    median: float
    slowest: float
    fastest: float
    rounds: int


def _fields(path: str) -> dict[str, str]:
    """The first value of each name in a file of lines "name : value"; nothing where there is no such file."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    pairs = [line.split(":", 1) for line in reversed(lines) if ":" in line]
    return {name.strip(): value.strip() for name, value in pairs}


def _cores() -> int:
    """That this process may keep busy: of the machine, of its affinity, and of its container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = CPU_QUOTA.read_text().split() if CPU_QUOTA.exists() else ("max", "")
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


def cpu() -> Cpu:
    info, memory = _fields("/proc/cpuinfo"), _fields("/proc/meminfo")
    flags = set((info.get("flags") or info.get("Features") or "").split())
    free = memory.get("MemAvailable")
    return Cpu(
        model=info.get("model name") or platform.processor() or platform.machine(),
        instruction_sets=tuple(flag for flag in FLAGS if flag in flags),
        torch_uses=torch.backends.cpu.get_cpu_capability(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        memory_free=int(free.split()[0]) * 1024 if free else None,
    )


def gpus() -> list[Gpu]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Gpu(name, capability, total, free))
    return found


def _rate(
    device: str,
    what: str,
    make: Callable[[int], tuple[Callable[[], object], int]],
    sizes: Sequence[int],
    seconds: float,
) -> Rate:
    """Rounds for so many seconds, after some that warm up and find the largest of ``sizes`` that fits the time.

    Args:
        make: gives the work of a size; that of the next size is STEP times as much.
    """

    def timed(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for size in sizes:
        work, amount = make(size)
        timed(work)  # warms up
        if STEP * timed(work) > seconds / FEWEST_ROUNDS:
            break
    rates: list[float] = []
    end = time.perf_counter() + seconds
    while len(rates) < FEWEST_ROUNDS or time.perf_counter() < end:
        rates.append(amount / timed(work))
    return Rate(device, what, size, statistics.median(rates), min(rates), max(rates), len(rates))


def measure(device: str, seconds: float) -> list[Rate]:
    """Copy bandwidth, then products of random numbers: of constant ones a GPU draws less power, and is faster."""

    def copies(size: int) -> Work:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        copy = torch.ones_like(source)
        return lambda: copy.copy_(source), 2 * size

    def products(dtype: torch.dtype) -> Callable[[int], Work]:
        def make(size: int) -> Work:
            x = torch.randn(size, size, device=device).to(dtype)
            out = torch.empty_like(x)
            return lambda: torch.mm(x, x, out=out), 2 * size**3

        return make

    found = [_rate(device, "copy", copies, COPY_BYTES[device], seconds)]
    for name, dtype in DTYPES.items():
        found.append(_rate(device, f"GEMM {name}", products(dtype), GEMM_SIZES[device], seconds))
    return found
