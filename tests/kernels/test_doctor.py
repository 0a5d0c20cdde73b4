"""What `rmx doctor` says: the dispatch's own choices, rates that were measured, and each trap where it is one."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from typer.testing import CliRunner

from rmx.cli import app
from rmx_kernels import doctor, machine, native, precision
from rmx_kernels.choice import chosen
from rmx_kernels.dispatch import IMPLS, OPERATORS
from rmx_kernels.precision import Precision

CPU = machine.Cpu("A CPU", ("avx2",), "AVX2", cores=8, threads=8, memory=32 << 30, memory_free=None)
GPU = machine.Gpu("A GPU", (9, 0), memory=80 << 30, memory_free=79 << 30)


def test_choices_are_those_of_the_dispatch() -> None:
    found = doctor.choices("cpu")
    assert [choice.operator for choice in found] == list(OPERATORS)
    for choice in found:
        assert chosen(choice.operator, None, torch.zeros(1)) == choice.runs[0]
        assert {*choice.runs, *choice.reasons} == set(IMPLS)
        assert all(choice.reasons.values()), choice


def test_without_the_library_it_says_why_and_what_runs() -> None:
    with patch.object(native, "_open", lambda: (None, "no compiler came by")), patch("shutil.which", lambda _: None):
        found = doctor.examine(seconds=None)
    assert {choice.runs for choice in found.operators if choice.device == "cpu"} == {("reference",)}
    assert found.native == doctor.Native(str(native.LIBRARY), "no compiler came by", "", "", ())
    assert "cpu tensors run on the reference, several times slower: no compiler came by" in found.traps
    printed = doctor.text(found)
    assert "native     no compiler came by\n           compilers on the PATH: none\n" in printed
    assert "rates      not measured\n" in printed


def test_the_library_tells_its_compiler() -> None:
    library = doctor.native_library()
    assert library.reason == "" and library.isa == native.isa()
    assert library.compiler.startswith(("GCC: ", "clang version "))


@pytest.mark.parametrize(
    ("threads", "environment", "busy", "expected"),
    [
        (8, {}, 0.1, None),
        (1, {"OMP_NUM_THREADS": "1"}, 0.1, "1 thread of 8 cores: OMP_NUM_THREADS is 1"),
        (1, {}, 0.1, "1 thread of 8 cores: torch.set_num_threads"),
        (64, {}, 0.1, "64 threads on 8 cores"),  # of a container that may use eight of them
        (8, {"LOCAL_WORLD_SIZE": "4"}, 0.1, "4 processes of 8 threads share 8 cores: OMP_NUM_THREADS is not set, expe"),
        (4, {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "4"}, 0.1, "OMP_NUM_THREADS is 4, expected 2"),
        (2, {"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}, 0.1, None),
        (1, {"PYTEST_XDIST_WORKER_COUNT": "8", "OMP_NUM_THREADS": "1"}, 0.1, None),
        (8, {}, 0.9, "load 0.9 a core"),
    ],
)
def test_threads(threads: int, environment: dict[str, str], busy: float, expected: str | None) -> None:
    traps = doctor.traps_of_threads(dataclasses.replace(CPU, threads=threads), environment, busy)
    assert len(traps) == (expected is not None)
    assert expected is None or expected in traps[0]


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 3), ("200000 100000", 2), ("50000 100000", 1)])
def test_a_container_has_the_cores_of_its_quota(quota: str, cores: int, tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota)
    with patch.object(machine, "CPU_QUOTA", file), patch("os.sched_getaffinity", lambda _: {0, 1, 5}, create=True):
        assert machine.cpu().cores == cores


def test_gpus_that_torch_cannot_use() -> None:
    assert doctor.traps_of_gpus([], []) == doctor.traps_of_gpus([GPU], ["/dev/nvidia0"]) == []
    with patch("torch.version.cuda", None):
        (trap,) = doctor.traps_of_gpus([], ["/dev/nvidia0"])
        assert "NVIDIA GPU (/dev/nvidia0)" in trap and trap.endswith("without CUDA: install a build with CUDA")
    with patch("torch.version.cuda", "13.0"):
        (trap,) = doctor.traps_of_gpus([], ["/dev/nvidia0"])
        assert "finds none: check the driver (for CUDA 13.0)" in trap
    (trap,) = doctor.traps_of_gpus([dataclasses.replace(GPU, capability=(7, 5))], ["/dev/nvidia0"])
    assert "expected compute capability 8.0 or above" in trap


def test_a_gpu_is_described() -> None:
    found = dataclasses.replace(doctor.examine(seconds=None), gpus=[GPU])
    assert "cuda:0: A GPU, compute capability 9.0, memory 80.0 GiB, 79.0 GiB free" in doctor.text(found)


def test_rates_are_measured() -> None:
    with patch.object(machine, "COPY_BYTES", {"cpu": [1 << 16]}), patch.object(machine, "GEMM_SIZES", {"cpu": [64]}):
        rates = machine.measure("cpu", seconds=0.01)
    assert [(rate.what, rate.size) for rate in rates] == [("copy", 1 << 16), ("GEMM bf16", 64), ("GEMM fp32", 64)]
    for rate in rates:
        assert rate.rounds >= machine.FEWEST_ROUNDS and 0 < rate.slowest <= rate.median <= rate.fastest


class Clock:
    """Time that passes by work alone: ``cost`` seconds for the smallest size, STEP times as much for each next one."""

    def __init__(self, costs: list[float]) -> None:
        self.now, self.costs, self.worked = 0.0, iter(costs), 0

    def make(self, size: int) -> tuple[Callable[[], object], int]:
        def work() -> None:
            self.worked += 1
            self.now += next(self.costs) * machine.STEP**size

        return work, 16 * machine.STEP**size


def test_rates_are_medians_in_bytes_and_operations_a_second() -> None:
    clock = Clock([1, 1, 2, 4, 8, 9])  # warms up, is looked at, three rounds within the time, and one that is not made
    with patch("time.perf_counter", lambda: clock.now):
        rate = machine._rate("cpu", "copy", clock.make, [0, 1], seconds=14)
    assert rate == machine.Rate("cpu", "copy", size=0, median=4, slowest=2, fastest=8, rounds=3)


@pytest.mark.parametrize(("cost", "size"), [(1e-6, 4), (1e-3, 2), (0.01, 1), (0.5, 0)])
def test_the_time_bounds_the_size(cost: float, size: int) -> None:
    """One second of rounds, and a size that three of them fit; without that a machine could take minutes."""
    clock = Clock([cost] * 10**6)
    with patch("time.perf_counter", lambda: clock.now):
        rate = machine._rate("cpu", "GEMM bf16", clock.make, range(5), seconds=1)
    assert rate.size == size and rate.median == pytest.approx(16 / cost)
    assert rate.rounds >= machine.FEWEST_ROUNDS
    assert clock.now <= 2.5 or size == 0


def test_bfloat16_that_is_slower_than_float32() -> None:
    copy, bf16, fp32 = (machine.Rate("cpu", w, 64, 1e12, 1e12, 1e12, 3) for w in ("copy", "GEMM bf16", "GEMM fp32"))
    half, single = {"cpu": Precision("bfloat16", "its flags")}, {"cpu": Precision("float32", "none")}
    assert doctor.traps_of_rates([], half) == doctor.traps_of_rates([copy, bf16, fp32], half) == []
    slow = [copy, dataclasses.replace(bf16, median=1e11), fp32]
    assert doctor.traps_of_rates(slow, single) == [
        "this CPU multiplies bfloat16 slower than float32: keep model.dtype=auto, which takes float32 here"
    ]
    (trap,) = doctor.traps_of_rates(slow, half)
    assert "set model.dtype=float32, because model.dtype=auto takes bfloat16 (its flags)" in trap


def test_it_says_what_auto_is() -> None:
    with patch.object(precision, "choose", lambda kind: Precision("float16", f"asked for {kind}")):
        found = doctor.examine(seconds=None)
    assert found.auto_dtypes["cpu"] == Precision("float16", "asked for cpu")
    assert "\ndtype      model.dtype=auto is float16 on cpu: asked for cpu\n" in doctor.text(found)


@pytest.mark.thorough
def test_the_operators_alone_suffice_and_json_says_the_same() -> None:
    program = (
        "import runpy, sys; sys.modules |= dict.fromkeys(('typer', 'rich', 'pydantic', 'transformers')); "
        "sys.argv = ['doctor', '--json', '--no-rates']; runpy.run_module('rmx_kernels.doctor', run_name='__main__')"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    found = json.loads(printed.stdout)
    assert set(found) == {field.name for field in dataclasses.fields(doctor.Examination)}
    here = json.loads(doctor.report(as_json=True, rates=False))
    for name in ("rmx", "path", "python", "packages", "native", "operators", "rates"):
        assert found[name] == here[name], name


def test_the_command() -> None:
    result = CliRunner().invoke(app, ["doctor", "--no-rates"])
    assert result.exit_code == 0, result.output
    for heading in ("rmx", "versions", "devices", "native", "operators", "dtype", "rates", "warnings"):
        assert f"\n{heading} " in f"\n{result.output}"
