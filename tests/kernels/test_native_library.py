"""The library of the native kernels: built, found, refused or absent, and an ABI in step with its mirror in Python."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import pytest
import torch
from cases import another_library, assert_same_bits, forward_backward

from rmx_kernels import BackendUnavailable, backends, dispatch, entropy_topk, native
from rmx_kernels.dispatch import OPERATORS
from rmx_kernels.divergences.op import KINDS

ROOT = Path(native.__file__).parents[1]


# ---- without the library -----------------------------------------------------------------------------------------


def clear() -> None:
    dispatch.remembered.cache_clear()
    dispatch._warn_of_fallback.cache_clear()


@pytest.fixture
def not_warned_yet() -> Iterator[None]:
    """As in a process that has not chosen an implementation yet."""
    clear()
    yield
    clear()


@pytest.mark.usefixtures("not_warned_yet")
def test_without_the_library_the_reference_runs_and_says_so_once() -> None:
    with patch.object(native, "_open", lambda: (None, "no compiler came by")):
        backend = backends()["cpu"]
        assert not backend.available and backend.reason == "no compiler came by"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for op in OPERATORS:
                arguments = cases.make(op)
                with pytest.raises(BackendUnavailable, match=f"^impl='cpu' cannot run {op} here: no compiler came by$"):
                    cases.call(op, arguments, impl="cpu")
                got, expected = (forward_backward(op, arguments, impl=impl) for impl in (None, "reference"))
                assert_same_bits(got, expected)
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "no compiler came by" in str(caught[0].message) and "reference" in str(caught[0].message)
    assert caught[0].filename == cases.__file__  # where the operator was called


@pytest.mark.usefixtures("not_warned_yet")
def test_with_the_library_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.call("entropy_topk", cases.make("entropy_topk"))


def test_a_library_that_is_not_there(tmp_path: Path) -> None:
    with another_library(tmp_path / "librmx_cpu.so"):
        assert re.search("not built: install a C.. *.*compiler", backends()["cpu"].reason)
        with pytest.raises(BackendUnavailable, match="not built"):
            entropy_topk(torch.zeros(2, 3), impl="cpu")
    assert backends()["cpu"].available


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    path = tmp_path / "librmx_cpu.so"
    path.write_bytes(b"a text, or a library for another machine")
    with another_library(path):
        reason = backends()["cpu"].reason
        assert reason.startswith("the native kernels cannot be loaded: ") and str(path) in reason


def test_a_library_of_another_abi_is_refused() -> None:
    with another_library(native.LIBRARY, abi=native.ABI + 1):
        assert backends()["cpu"].reason == (
            f"{native.LIBRARY} was built for another version of rmx_kernels: install rmx again"
        )


def test_a_build_without_a_compiler_goes_on_and_says_so(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "rmx", "rmx_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"],
        cwd=tmp_path,
        env=os.environ | {"CC": "false", "CXX": "false"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "the native CPU kernels were NOT built" in built.stderr
    assert list(tmp_path.rglob("*.so")) == []


# ---- the C ABI and its mirror in Python --------------------------------------------------------------------------

HEADER = re.sub(r"//[^\n]*", "", (ROOT / "csrc" / "rmx_cpu.h").read_text())
FUNCTIONS = dict(re.findall(r"RMX_API[\w\s*]+?(\w+)\(([^)]*)\);", HEADER))
STRUCTS = {name: body for body, name in re.findall(r"typedef struct \{([^}]*)\} (\w+);", HEADER)}
MIRRORS = {
    "rmx_scale": native.Scale,
    "rmx_rows": native.Rows,
    "rmx_sums": native.Sums,
    "rmx_stats": native.Stats,
    "rmx_stats_gradient": native.StatsGradient,
    "rmx_loss": native.Loss,
    "rmx_divergence_rows": native.DivergenceRows,
    "rmx_attention": native.Attention,
    "rmx_packed": native.Packed,
    "rmx_norm": native.Norm,
    "rmx_gated": native.Gated,
    "rmx_rotation": native.Rotation,
}
C_TYPES = {"double": ctypes.c_double, "int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32}


def c_fields(body: str) -> list[tuple[str, Any]]:
    """(name, ctypes type) of each member, in order."""
    fields = []
    for declaration in body.split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*(?:const\s+)?(\w+)\s*(.*)", declaration, re.DOTALL).groups()
        for name in names.split(","):
            pointer = name.strip().startswith("*")
            fields.append((name.strip(" *\n"), ctypes.c_void_p if pointer else C_TYPES[kind]))
    return fields


def test_structures_mirror_the_header() -> None:
    assert set(STRUCTS) == set(MIRRORS) | {"rmx_entry"}
    for name, mirror in MIRRORS.items():
        assert c_fields(STRUCTS[name]) == list(mirror._fields_), name
    entry = [("value", ctypes.c_double), ("id", ctypes.c_int64)]  # for which Python makes room of two int64
    assert c_fields(STRUCTS["rmx_entry"]) == entry


def test_functions_mirror_the_header() -> None:
    assert set(native.SIGNATURES) | {"rmx_abi", "rmx_isa", "rmx_use_huge_pages"} == set(FUNCTIONS)
    mirrors = {ctypes.POINTER(mirror): name for name, mirror in MIRRORS.items()}
    for name, arguments in native.SIGNATURES.items():
        declared = [re.sub(r"const |\*", "", a).split()[0] for a in FUNCTIONS[name].split(",")]
        plain = {ctypes.c_int32: "int32_t", ctypes.c_int64: "int64_t", ctypes.c_void_p: "rmx_parallel_for"}
        assert [mirrors.get(a) or plain[a] for a in arguments] == declared, name


def test_numbers_mirror_the_header() -> None:
    assert re.search(r"#define RMX_ABI (\d+)", HEADER).group(1) == str(native.ABI)
    numbers = dict(re.findall(r"(RMX_\w+) = (\d+)", HEADER))
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    assert {names[n]: int(numbers.pop(f"RMX_{n}")) for n in names} == native.DTYPES
    kinds = [int(numbers.pop(f"RMX_{kind.upper()}")) for kind in KINDS]
    assert kinds == list(range(len(KINDS)))
    assert numbers.pop("RMX_OK") == "0"
    assert set(native.ERRORS) == {int(value) for value in numbers.values()}


def test_the_library_exports_its_abi_and_nothing_else() -> None:
    if shutil.which("nm") is None or sys.platform != "linux":
        pytest.skip("nm -D --defined-only lists the exports of an ELF library")
    listed = subprocess.run(["nm", "-D", "--defined-only", native.LIBRARY], capture_output=True, text=True, check=True)
    exported = {line.split()[-1] for line in listed.stdout.splitlines()}
    assert exported == set(FUNCTIONS)


def test_an_unknown_dtype_is_an_error() -> None:
    x = native.rows(torch.zeros(2, 3))
    x.dtype = 9
    sums = native.Sums(*[torch.empty(2).data_ptr()] * 3, None, None, 0, None)
    with pytest.raises(RuntimeError, match=r"^rmx_entropy_topk: unknown dtype$"):
        native.call("rmx_entropy_topk", x, native.scale(1.0, None), 2, 0, 3, sums)
