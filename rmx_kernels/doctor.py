"""Describe this machine: devices, the implementation of every operator, measured rates, and warnings.

Needs only the operators: ``python -m rmx_kernels.doctor``, or ``rmx doctor``.
"""

import argparse
import json
import os
import platform
import re
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rmx_kernels import dispatch, native, precision
from rmx_kernels.dispatch import IMPLS, INTERPRETED, OPERATORS, BackendUnavailable
from rmx_kernels.machine import Cpu, Gpu, Rate, cpu, gpus, measure
from rmx_kernels.precision import Precision
from rmx_kernels.version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "safetensors", "flash-attn")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 1.0  # of each rate
ROOM = 3 << 30  # bytes that a GPU needs free for the above
WIDTH = 110


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
        traps.append(f"torch uses {found.threads} threads on {found.cores} cores, so the threads wait for each other")
    elif found.threads == 1 < found.cores and processes == 1:
        cause = f"OMP_NUM_THREADS is {setting}" if setting else "torch.set_num_threads sets it"
        traps.append(f"torch uses 1 thread of {found.cores} cores: {cause}")
    if busy > 0.5:
        traps.append(
            f"other work keeps this machine busy (load {busy:.1f} a core): the rates are too low. Set "
            "OMP_NUM_THREADS of each process to its share of the cores"
        )
    return traps


def traps_of_gpus(found: list[Gpu], device_files: list[str]) -> list[str]:
    """What keeps a GPU from use, or makes it slow."""
    traps = []
    if device_files and not found:
        build = torch.version.cuda
        cause = f"finds none: check the driver (for CUDA {build}), CUDA_VISIBLE_DEVICES and the access rights"
        if build is None:
            cause = "is a build without CUDA: install a build with CUDA"
        traps.append(f"this machine has an NVIDIA GPU ({device_files[0]}), but torch {torch.__version__} {cause}")
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
        return [said + "keep model.dtype=auto, which takes float32 here"]
    return [said + f"set model.dtype=float32, because model.dtype=auto takes bfloat16 ({auto_dtypes['cpu'].reason})"]


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
        traps.append("TRITON_INTERPRET is set: Triton kernels are interpreted, which is only for tests")
    if seconds and devices and devices[0].memory_free < ROOM:
        kinds = ("cpu",)
        traps.append(f"GPU 0 was not measured: expected {_gib(ROOM)} free, got {_gib(devices[0].memory_free)}")
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
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--no-rates", action="store_true", help="do not measure the rates")
    arguments = parser.parse_args()
    print(report(as_json=arguments.json, rates=not arguments.no_rates))


if __name__ == "__main__":
    main()
