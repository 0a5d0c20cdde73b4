"""Launches ask Triton once for each kind of arguments, and every difference that Triton compiles for is a kind."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rmx_kernels.head import launch as launching

CUDA = torch.device("cuda", 0)


class Kernel:
    """Stands in for a kernel: compiles on every launch of its own, and counts."""

    arg_names = ("x", "y", "n", "c", "R", "L")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, num_warps: int, **constants: Any) -> Any:
            everything = (*arguments, *(constants[name] for name in self.arg_names[len(arguments) :]))
            self.compiled.append((grid, num_warps, everything))
            return self.Binary(self, num_warps)

        return run

    class Binary:
        def __init__(self, kernel: "Kernel", warps: int) -> None:
            self.kernel, self.warps = kernel, warps

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments: self.kernel.launched.append((grid, self.warps, arguments))


@pytest.fixture(autouse=True)
def _a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launching, "_compiled", {})
    return


def launch(kernel: Kernel, *arguments: Any, programs: int = 3, warps: int = 4, **constants: Any) -> None:
    launching.launch(kernel, programs, CUDA, *arguments, warps=warps, **constants)


def test_the_second_launch_of_a_kind_goes_to_what_was_compiled_with_the_arguments_in_their_order() -> None:
    kernel, x = Kernel(), torch.zeros(32)
    launch(kernel, x, None, 48, 0.5, L=8, R=2)
    y = torch.ones(64)
    launch(kernel, y, None, 64, 0.25, L=8, R=2, programs=7)
    assert [grid for grid, _, _ in kernel.compiled] == [(3,)]
    ((grid, warps, arguments),) = kernel.launched
    assert (grid, warps) == ((7, 1, 1), 4)
    assert arguments[0] is y and arguments[1:] == (None, 64, 0.25, 2, 8)


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.zeros(32, dtype=torch.float16)},
        {"x": torch.zeros(33)[1:]},  # not at a multiple of 16 bytes
        {"y": torch.zeros(32)},
        {"n": 49},
        {"n": 1},
        {"n": 2**31},
        {"c": None},
        {"R": 1},
        {"warps": 8},
    ],
    ids=str,
)
def test_what_triton_compiles_for_is_compiled_for(other: dict[str, Any]) -> None:
    kernel = Kernel()
    usual: dict[str, Any] = {"x": torch.zeros(32), "y": None, "n": 48, "c": 0.5, "R": 2, "L": 8, "warps": 4}
    for values in (usual, usual | other, usual | other, usual):
        constants = {name: values[name] for name in ("R", "L")}
        launch(kernel, *(values[name] for name in ("x", "y", "n", "c")), warps=values["warps"], **constants)
    assert len(kernel.compiled) == 2 and len(kernel.launched) == 2


def test_arguments_of_one_kind_are_of_one_kind_for_triton() -> None:
    jit = pytest.importorskip("triton.runtime.jit")
    backend = pytest.importorskip("triton.backends.nvidia.compiler").CUDABackend
    tensors = [
        torch.zeros(40, dtype=dtype)[at:] for dtype in (torch.bfloat16, torch.int32, torch.int64) for at in (0, 1, 8)
    ]
    numbers = [0, 1, 2, 15, 16, 17, 2**31 - 1, 2**31, 2**31 + 1, 2**32, -1, -16, -(2**31), -(2**31) - 1, 0.5, 1.0, None]
    found: dict[Any, Any] = {}
    for argument in tensors + numbers:
        for specialised in (True, False):
            theirs = jit.native_specialize_impl(backend, argument, False, specialised, specialised)
            assert found.setdefault((*launching._kinds((argument,)), specialised), theirs) == theirs, argument


def test_nothing_is_launched_for_no_programs() -> None:
    kernel = Kernel()
    launch(kernel, torch.zeros(1), None, 1, 0.5, R=2, L=8, programs=0)
    assert not kernel.compiled and not kernel.launched
