"""The table at the end of a run, and bench/results/<device>-<date>.json, where the partial runs of a day add up."""

import datetime
import json
import platform
import re
import statistics
import textwrap
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import roofline
import shapes
import torch
from oracle import UNIT_ROUNDOFF
from providers import DEVICE

import rmx_kernels

RESULTS = Path(__file__).with_name("results")
WIDTH = 132
PACKAGES = {"torch": "torch", "triton": "triton", "liger": "liger-kernel", "cce": "cut-cross-entropy"}


@dataclass(frozen=True)
class Spread:
    """Of the rounds, in milliseconds."""

    min: float
    p20: float
    p50: float
    p80: float
    max: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        ms = [1e3 * s for s in seconds]
        fifths = statistics.quantiles(ms, n=5, method="inclusive")
        return cls(min(ms), fifths[0], statistics.median(ms), fifths[3], max(ms))


@dataclass(frozen=True)
class Row:
    operator: str
    shape: str
    dtype: str
    provider: str
    rows: int
    hidden: int | None
    vocabulary: int
    rounds: int
    time: Spread
    eager: Spread | None  # of the rounds between the provider's
    no_eager: str  # why there are none
    ratio: float | None  # median eager / median provider
    floor: Spread
    floor_of: str
    floor_flops: int
    floor_bytes: int
    share: float  # median floor / median provider
    extra_memory_mib: float | None
    errors: dict[str, float]
    eager_errors: dict[str, float]

    @property
    def error_ratio(self) -> float:
        """The worst of the errors, each relative to eager's."""
        return max(e / max(self.eager_errors[name], UNIT_ROUNDOFF) for name, e in self.errors.items())

    def cells(self) -> list[str]:
        return [
            *(self.shape, self.dtype, self.provider),
            *(f"{ms:.2f}" for ms in (self.time.p50, self.time.p20, self.time.p80)),
            "-" if self.ratio is None else f"{self.ratio:.2f}x",
            f"{self.share:.0%} of {self.floor_of}",
            "-" if self.extra_memory_mib is None else f"{self.extra_memory_mib:.0f}",
            f"{self.error_ratio:.2f}",
            self.no_eager and f"eager {self.no_eager}",
        ]


HEADINGS = [
    "shape",
    "dtype",
    "provider",
    "p50 ms",
    "p20",
    "p80",
    "eager/this",
    "floor/this",
    "MiB",
    "error/eager",
    "",
]


def device_name() -> str:
    """Of the GPU; of the CPU with the number of threads."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {threads} core{'s'[: threads > 1]}"


def results_file(device: str, what: str) -> Path:
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{what}.json"


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[shapes.Case, str, str]] = field(default_factory=list)  # case, provider, reason

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def skip(self, case: shapes.Case, provider: str, reason: str) -> None:
        self.skipped.append((case, provider, reason))

    def operators(self) -> list[str]:
        return list(dict.fromkeys([row.operator for row in self.rows] + [case.operator for case, _, _ in self.skipped]))

    def skips(self, operator: str) -> dict[tuple[str, str], list[str]]:
        """(provider, reason) -> cases; "every" provider where the case itself was left out."""
        found: dict[tuple[str, str], list[str]] = {}
        for case, provider, reason in self.skipped:
            if case.operator == operator:
                found.setdefault((provider, reason), []).append(str(case))
        for case, reason in shapes.left_out(operator):
            found.setdefault(("every", reason), []).append(f"{case} ({case.eager_seconds:.1f} s)")
        return found

    def table(self) -> str:
        blocks = []
        for operator in self.operators():
            cells = [row.cells() for row in self.rows if row.operator == operator]
            lines = [HEADINGS, *cells] if cells else []
            widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
            text = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
            for (provider, reason), where in self.skips(operator).items():
                note = f"not run: {provider}, {reason}: {', '.join(where)}"
                text += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="    ")
            blocks.append("\n".join([f"{operator} on {device_name()}", *text]))
        return "\n\n".join(blocks)

    def header(self) -> dict[str, Any]:
        rates = roofline.rates()
        return {
            "device": device_name(),
            "date": datetime.date.today().isoformat(),
            "mode": shapes.mode_name(),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "rmx": rmx_kernels.__version__}
            | {n: version(d) for n, d in PACKAGES.items()},
            "cuda": torch.version.cuda,
            "roofline": {
                "gemm_tflops": {name: rate / 1e12 for name, rate in rates.gemm.items()},
                "copy_gb_per_s": rates.copy / 1e9,
            },
            "units": "times in ms; ratio = eager p50 / time p50; share = floor p50 / time p50; errors relative, 2-norm",
        }

    def write(self) -> Path:
        """Rows measured now replace those of the same operator, shape, dtype and provider."""
        header = self.header()
        path = results_file(header["device"], header["date"])
        known = json.loads(path.read_text()) if path.exists() else {"results": [], "skipped": []}
        results = {key(row): row for row in known["results"]}
        results |= {key(row): row for row in (asdict(r) | {"error_ratio": r.error_ratio} for r in self.rows)}
        measured = {row.operator for row in self.rows}
        skipped = [skip for skip in known["skipped"] if skip["operator"] not in measured]
        for operator in self.operators():
            for (provider, reason), where in self.skips(operator).items():
                skipped.append({"operator": operator, "provider": provider, "reason": reason, "cases": where})
        content = header | {"results": list(results.values()), "skipped": skipped}
        path.write_text(json.dumps(content, indent=1) + "\n")
        return path


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("operator", "shape", "dtype", "provider"))
