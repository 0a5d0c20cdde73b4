"""What `make wheel` makes: built without torch, installed where nothing of this repository is, and run there.

The environments are new. Only a path file lends them this one's torch; path files of lent folders are not read, so an
editable installation of rmx does not come along.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from rmx_kernels import version

ROOT = Path(__file__).parents[1]
SOURCES = ["CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md"]
SOURCES += ["pyproject.toml", "setup.py"]
FOLDERS = ["bench", "csrc", "docs", "rmx", "rmx_kernels", "tests"]
NO_COMPILER = {"CC": "false", "CXX": "false"}
OPERATOR = """
import sys, warnings, torch, rmx_kernels
warnings.simplefilter("always")
for impl in sys.argv[1:]:
    result = rmx_kernels.linear_entropy_topk(torch.randn(3, 16), torch.zeros(8, 16), impl=impl or None)
    torch.testing.assert_close(result.entropy, torch.full((3,), 8.0).log())
print(rmx_kernels.__file__, rmx_kernels.__version__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that finds nothing of this repository by itself."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def build(tmp_path: Path, **environment: str) -> tuple[Path, Path, str]:
    """(sdist, the wheel built from it, what was said) of a copy of the sources, where torch cannot be imported.

    Without isolation, so that no package is downloaded: setuptools is here, and torch stands in its own way.
    """
    tree, blocked = tmp_path / "tree", tmp_path / "blocked"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    blocked.mkdir()
    (blocked / "torch.py").write_text("raise ImportError('the build needs no torch')")
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", tree)
    done = run(*command, cwd=tmp_path, PYTHONPATH=str(blocked), **environment)
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    return sdist, wheel, done.stdout + done.stderr


def new_environment(folder: Path) -> Path:
    """The Python of an environment that has this one's packages, and not its rmx."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "bin" / "python"


def install(python: Path, file: Path, **environment: str) -> str:
    """What pip said of an installation that downloads nothing, and keeps no wheel for others to find."""
    options = ("--no-deps", "--no-index", "--no-cache-dir", "--no-build-isolation", "--ignore-installed", "--verbose")
    done = run(python, "-m", "pip", "install", *options, file, cwd=file.parent, **environment)
    return done.stdout + done.stderr


def run_operator(python: Path, *impls: str) -> str:
    """What was said on standard error, after the operator of the new environment gave the right numbers on each.

    An empty name stands for impl=None.
    """
    done = run(python, "-c", OPERATOR, *impls, cwd=python.parent)
    file, number = done.stdout.split()
    assert Path(file).is_relative_to(python.parents[1]), f"expected the installed rmx_kernels, got {file}"
    assert number == version.__version__
    return done.stderr


def files_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def modules(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".py") and name.split("/")[0] in ("rmx", "rmx_kernels")}


def shipped() -> set[str]:
    return {str(path.relative_to(ROOT)) for name in ("rmx", "rmx_kernels") for path in (ROOT / name).rglob("*.py")}


@pytest.mark.thorough
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="needs a C++17 compiler")
def test_the_wheel_has_the_library_and_runs_it(tmp_path: Path) -> None:
    sdist, wheel, _ = build(tmp_path)
    name = f"rmx-{version.__version__}"
    assert re.fullmatch(rf"{re.escape(name)}-py3-none-(linux|manylinux|macosx)\w+\.whl", wheel.name), wheel.name
    names = files_in(wheel)
    assert modules(names) == shipped()
    others = {file for file in names if file not in shipped() and not file.startswith(f"{name}.dist-info/")}
    data = {
        "rmx/demo.yaml",
        "rmx/py.typed",
        *(
            f"rmx/reports/{name}.j2"
            for name in ("card.md", "chart.html", "difference.html", "layout.html", "report.html")
        ),
        "rmx_kernels/py.typed",
    }
    assert others == data | {"rmx_kernels/librmx_cpu.so"}
    assert f"{name}.dist-info/licenses/LICENSE" in names
    with tarfile.open(sdist) as archive:
        inside = {file.removeprefix(f"{name}/") for file in archive.getnames()}
    assert sdist.name == f"{name}.tar.gz"
    assert inside >= shipped() | {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} | set(SOURCES)
    assert not [file for file in inside if file.startswith(("tests", "bench")) or file.endswith((".so", ".o", ".pyc"))]
    python = new_environment(tmp_path / "environment")
    install(python, wheel)
    assert run_operator(python, "", "cpu") == ""


@pytest.mark.thorough
def test_without_a_compiler_it_installs_says_so_and_runs_on_the_reference(tmp_path: Path) -> None:
    sdist, wheel, said = build(tmp_path, **NO_COMPILER)
    assert wheel.name == f"rmx-{version.__version__}-py3-none-any.whl"
    assert "rmx_kernels/librmx_cpu.so" not in files_in(wheel)
    assert "the native CPU kernels were NOT built" in said
    python = new_environment(tmp_path / "environment")
    assert "the native CPU kernels were NOT built" in install(python, sdist, **NO_COMPILER)
    warned = run_operator(python, "")
    assert "RuntimeWarning: rmx_kernels: the native kernels were not built: install a C++17 compiler" in warned
    assert "Running on impl='reference'" in warned
    assert run_operator(python, "reference") == ""
