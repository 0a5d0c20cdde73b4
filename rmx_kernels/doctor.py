"""What this machine is, what every operator runs on and how fast, and known traps.

Needs the operators alone: ``python -m rmx_kernels.doctor``, or ``rmx doctor``.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rmx_kernels import dispatch, native, precision
from rmx_kernels.dispatch import IMPLS, INTERPRETED, OPERATORS, BackendUnavailable
from rmx_kernels.precision import Precision
from rmx_kernels.version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "safetensors", "flash-attn")
# Of the CPU's flags, those that decide what torch and the native kernels run on: x86's, then arm64's.
FLAGS = (
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"),
    *("asimd", "asimdhp", "sve", "sve2", "bf16", "i8mm"),
)
COMPILERS = ("c++", "g++", "clang++")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SECONDS = 1.0  # of each rate
FEWEST_ROUNDS = 3
STEP = 8  # work of a size over that of the one before; the last ones are far beyond the caches
COPY_BYTES = {"cpu": (2 << 20, 16 << 20, 128 << 20), "cuda": (1 << 20, 8 << 20, 64 << 20, 512 << 20)}
GEMM_SIZES = {"cpu": (128, 256, 512, 1024, 2048), "cuda": (128, 256, 512, 1024, 2048, 4096, 8192)}
ROOM = 3 << 30  # bytes that a GPU needs free for the above
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
WIDTH = 110
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
class Native:
    """The library of the native CPU kernels; reason says why there is none, and is "" where there is one."""

    path: str
    reason: str
    compiler: str  # "" where the library doesn't tell
    isa: str
    compilers: tuple[str, ...]  # on the PATH, to build it with


@dataclass(frozen=True)
class Choice:
    """What an operator runs on for float32 tensors of a device: impl=None takes the first of ``runs``."""

    operator: str
    device: str
    runs: tuple[str, ...]
    reasons: dict[str, str]  # why each of the others does not run


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


@dataclass(frozen=True)
class Examination:
    rmx: str
    path: str
    python: str
    packages: dict[str, str | None]  # None: not installed
    torch_cuda: str | None  # of CUDA or ROCm that torch was built for
    cpu: Cpu
    gpus: list[Gpu]
    native: Native
    operators: list[Choice]
    auto_dtypes: dict[str, Precision]  # what model.dtype: auto is on each device
    rates: list[Rate]
    traps: list[str]


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


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


def native_library() -> Native:
    reason, path = native.missing(), native.LIBRARY
    compilers = tuple(found for found in map(shutil.which, COMPILERS) if found)
    if reason:
        return Native(str(path), reason, "", "", compilers)
    named = re.search(rb"GCC: \([^)]*\) [\w.]+|clang version [\w.]+", path.read_bytes())
    return Native(str(path), "", named[0].decode() if named else "", native.isa(), compilers)


def choices(device: str) -> list[Choice]:
    """Asked of the dispatch itself, implementation by implementation in the order of impl=None."""
    found = []
    for operator in OPERATORS:
        reasons = {}
        for impl in IMPLS:
            try:
                dispatch.choose(operator, impl, device, torch.float32)
            except BackendUnavailable as fault:
                reasons[impl] = str(fault).partition(" here: ")[2]
        found.append(Choice(operator, device, tuple(impl for impl in IMPLS if impl not in reasons), reasons))
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


def _processes(environment: Mapping[str, str]) -> int:
    """On this machine, of a run of torchrun or pytest-xdist that this process is part of."""
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("PYTEST_XDIST_WORKER_COUNT") or 1)


def traps_of_operators(found: list[Choice]) -> list[str]:
    """Devices on which operators fall back to the reference."""
    expected = {"cpu": "cpu", "cuda": "triton"}
    traps = [
        f"{choice.device} tensors run on the reference, several times slower: {choice.reasons[expected[choice.device]]}"
        for choice in found
        if choice.runs[0] == "reference"
    ]
    return list(dict.fromkeys(traps))  # the operators of a device share their reason


def traps_of_threads(found: Cpu, environment: Mapping[str, str], busy: float) -> list[str]:
    """Threads that are too many or too few. ``busy``: the machine's load of the last minute, per core."""
    traps = []
    processes, setting = _processes(environment), environment.get("OMP_NUM_THREADS")
    if processes > 1 and processes * found.threads > found.cores:
        said = f"is {setting}" if setting else "is not set"
        traps.append(
            f"{processes} processes of {found.threads} threads share {found.cores} cores: OMP_NUM_THREADS {said}, "
            f"expected {max(1, found.cores // processes)}"
        )
    elif found.threads > found.cores:
        traps.append(f"torch uses {found.threads} threads on {found.cores} cores, where they wait for each other")
    elif found.threads == 1 < found.cores and processes == 1:
        cause = f"OMP_NUM_THREADS is {setting}" if setting else "torch.set_num_threads sets it"
        traps.append(f"torch uses 1 thread of {found.cores} cores: {cause}")
    if busy > 0.5:
        traps.append(
            f"other work keeps this machine busy (load {busy:.1f} a core): the rates are too low. Of processes that "
            "run side by side, each needs an OMP_NUM_THREADS of its share of the cores"
        )
    return traps


def traps_of_gpus(found: list[Gpu], device_files: list[str]) -> list[str]:
    """What keeps a GPU from use, or makes it slow."""
    traps = []
    if device_files and not found:
        build = torch.version.cuda
        cause = f"finds none: is the driver new enough for CUDA {build}, CUDA_VISIBLE_DEVICES empty, its use allowed?"
        if build is None:
            cause = "is a build without CUDA: install one with it"
        traps.append(f"this machine has an NVIDIA GPU ({device_files[0]}), and torch {torch.__version__} {cause}")
    for index, gpu in enumerate(found):
        if gpu.capability < (8, 0) and torch.version.hip is None:
            traps.append(f"GPU {index} ({gpu.name}) has no bfloat16 products: expected compute capability 8.0 or above")
    return traps


def traps_of_rates(rates: list[Rate], auto_dtypes: Mapping[str, Precision]) -> list[str]:
    """Where a number format is slow, and what model.dtype: auto takes there."""
    medians = {(rate.device, rate.what): rate.median for rate in rates}
    half, single = (medians.get(("cpu", f"GEMM {name}")) for name in ("bf16", "fp32"))
    if half is None or single is None or half >= single:
        return []
    said = "this CPU multiplies bfloat16 slower than float32: "
    if auto_dtypes["cpu"].dtype == "float32":
        return [said + "model.dtype=auto takes float32 here, leave it so"]
    return [said + f"set model.dtype=float32, as model.dtype=auto takes bfloat16 ({auto_dtypes['cpu'].reason})"]


def examine(*, seconds: float | None = SECONDS) -> Examination:
    """Examine this machine, about ``seconds`` for each of three rates a device; None measures no rates."""
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)  # before this process adds its own
    described, devices, library = cpu(), gpus(), native_library()
    files = [str(path) for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    kinds = ("cpu", "cuda") if devices else ("cpu",)
    operators = [choice for kind in kinds for choice in choices(kind)]
    auto_dtypes = {kind: precision.choose(kind) for kind in kinds}
    traps = [*traps_of_operators(operators), *traps_of_threads(described, os.environ, busy)]
    traps += traps_of_gpus(devices, files)
    if INTERPRETED:
        traps.append("TRITON_INTERPRET is set: Triton kernels are interpreted, which is for tests alone")
    if seconds and devices and devices[0].memory_free < ROOM:
        kinds = ("cpu",)
        traps.append(f"GPU 0 was not measured: {_gib(ROOM)} have to be free, {_gib(devices[0].memory_free)} are")
    rates = [rate for device in kinds for rate in measure(device, seconds)] if seconds else []
    return Examination(
        rmx=__version__,
        path=str(Path(__file__).parent),
        python=platform.python_version(),
        packages={name: version(name) for name in PACKAGES},
        torch_cuda=torch.version.cuda or torch.version.hip,
        cpu=described,
        gpus=devices,
        native=library,
        operators=operators,
        auto_dtypes=auto_dtypes,
        rates=rates,
        traps=traps + traps_of_rates(rates, auto_dtypes),
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _speed(what: str, value: float) -> str:
    if what == "copy":
        return f"{value / 1e9:.1f} GB/s"
    return f"{value / 1e12:.3g} TFLOP/s" if value >= 1e12 else f"{value / 1e9:.3g} GFLOP/s"


def _operator_lines(found: list[Choice]) -> list[str]:
    """Operators of the same fate share their lines."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for choice in found:
        groups.setdefault((choice.device, choice.runs, tuple(choice.reasons.items())), []).append(choice.operator)
    lines = []
    for (device, runs, reasons), operators in groups.items():
        others = f" (with impl= also on {', '.join(runs[1:])})" if runs[1:] else ""
        lines.append(f"{device} tensors run on {runs[0]}{others}: {', '.join(operators)}")
        lines += [f"    not {impl}: {reason}" for impl, reason in reasons]
    return lines


def _version_lines(found: Examination) -> list[str]:
    there = [f"{name} {number}" for name, number in found.packages.items() if number]
    absent = [name for name, number in found.packages.items() if not number]
    return [", ".join([f"python {found.python}", *there]), *([f"not installed: {', '.join(absent)}"] if absent else [])]


def _device_lines(found: Examination) -> list[str]:
    cpu, build = found.cpu, found.torch_cuda
    free = "" if cpu.memory_free is None else f", {_gib(cpu.memory_free)} free"
    lines = [
        f"cpu: {cpu.model}, cores {cpu.cores}, memory {_gib(cpu.memory)}{free}",
        f"    {' '.join(cpu.instruction_sets) or 'unknown instruction sets'}; torch uses {cpu.torch_uses}, "
        f"threads {cpu.threads}",
    ]
    for index, gpu in enumerate(found.gpus):
        capability = ".".join(map(str, gpu.capability))
        memory = f"memory {_gib(gpu.memory)}, {_gib(gpu.memory_free)} free"
        lines.append(f"cuda:{index}: {gpu.name}, compute capability {capability}, {memory}")
    if not found.gpus:
        lines.append(f"no GPU; torch is built for {f'CUDA or ROCm {build}' if build else 'CPUs'}")
    return lines


def _rate_line(rate: Rate) -> str:
    median, slowest, fastest = (_speed(rate.what, value) for value in (rate.median, rate.slowest, rate.fastest))
    size = f"{rate.size >> 20} MiB" if rate.what == "copy" else f"{rate.size}^2"
    what = f"{rate.device:<5} {rate.what:<10} {size:>8} {median:>13}"
    return f"{what}   median of {rate.rounds}, {slowest} to {fastest}"


def text(found: Examination) -> str:
    """The examination as lines for people."""
    library = found.native
    built = f"{library.path}, built with {library.compiler or 'an unknown compiler'}, runs on {library.isa}"
    compilers = f"compilers on the PATH: {', '.join(library.compilers) or 'none'}"
    sections = {
        "rmx": [f"{found.rmx} in {found.path}"],
        "versions": _version_lines(found),
        "devices": _device_lines(found),
        "native": [library.reason or built, compilers],
        "operators": _operator_lines(found.operators),
        "dtype": [f"model.dtype=auto is {p.dtype} on {kind}: {p.reason}" for kind, p in found.auto_dtypes.items()],
        "rates": list(map(_rate_line, found.rates)) or ["not measured"],
        "warnings": found.traps or ["none"],
    }
    lines = []
    for name, paragraphs in sections.items():
        for i, paragraph in enumerate(paragraphs):
            heading = f"{name if i == 0 else '':<10} "
            indent = " " * (len(heading) + len(paragraph) - len(paragraph.lstrip()) + 2)
            lines.append(textwrap.fill(heading + paragraph, WIDTH, subsequent_indent=indent, break_on_hyphens=False))
    return "\n".join(lines)


def report(*, as_json: bool = False, rates: bool = True) -> str:
    """:func:`examine` as text, or the same as JSON in bytes, bytes/s and FLOP/s."""
    found = examine(seconds=SECONDS if rates else None)
    return json.dumps(asdict(found), indent=2) if as_json else text(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rmx_kernels.doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--no-rates", action="store_true", help="skip the rates")
    arguments = parser.parse_args()
    print(report(as_json=arguments.json, rates=not arguments.no_rates))


if __name__ == "__main__":
    main()
