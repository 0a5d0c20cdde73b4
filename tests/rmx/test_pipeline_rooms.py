"""The rooms of the pipeline: a module imports from its own and from those below, and nothing imports in a circle."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rmx

ROOT = Path(rmx.__file__).parent
ROOMS = ["", "attention", "fused", "models", "grading", "sampling", "training", "reports", "runs", "analyses"]
ROOMS += ["interchange", "commands", "cli"]  # from the lowest up; "" are the modules that stand in no room
DOORS = {"cli", "demo"}  # which stand in none, and import from all


def modules() -> dict[str, Path]:
    """By dotted name below rmx."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__").removesuffix("__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    return "cli" if module in DOORS else module.rpartition(".")[0]


def imported(path: Path) -> Iterator[str]:
    """Modules of rmx that run when this one runs, or when its functions do; not what annotations alone need."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "rmx":
            base = (node.module or "").removeprefix("rmx").removeprefix(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".removeprefix(".")
                yield inner if inner in MODULES else base
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("rmx.") for a in node.names if a.name.startswith("rmx."))


GRAPH = {name: set(imported(path)) & MODULES.keys() for name, path in MODULES.items()}


def test_every_module_stands_in_a_room() -> None:
    assert {room(name) for name in MODULES if name and MODULES[name].name != "__init__.py"} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_no_module_imports_from_a_room_above(module: str) -> None:
    own = ROOMS.index(room(module)) if module and MODULES[module].name != "__init__.py" else 0
    above = {other for other in GRAPH[module] if ROOMS.index(room(other)) > own}
    assert not above, f"rmx.{module} imports {sorted(above)}"


def test_nothing_imports_in_a_circle() -> None:
    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        left = [start]
        while left:
            new = GRAPH[left.pop()] - seen
            seen |= new
            left.extend(new)
        return seen

    assert not [module for module in GRAPH if module in reached(module)]


def test_files_are_short() -> None:
    folders = ("rmx", "rmx_kernels", "csrc", "bench", "recipes", "tests")
    files = [
        path
        for folder in folders
        for kind in ("py", "cpp", "h", "j2")
        for path in (ROOT.parent / folder).rglob(f"*.{kind}")
    ]
    assert len(files) > 250
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {path: count for path, count in lines.items() if count > 400}


def test_a_run_can_be_followed_through_a_few_files() -> None:
    """docs/design.md names them: all are there, and each is imported by one that is named before it or with it."""
    text = (
        (ROOT.parent / "docs" / "design.md").read_text().partition("## From a configuration")[2].partition("\n## ")[0]
    )
    named = re.findall(r"`([\w/]+)\.py`", text)
    assert len(named) == len(set(named)) <= 15
    modules = [name.replace("/", ".") for name in named]
    assert set(modules) <= set(GRAPH)
    reached = {module for name in modules for module in GRAPH[name]} | {"commands.stages"}
    assert set(modules) <= reached


def test_the_command_starts_without_torch() -> None:
    """Help and mistakes of the configuration need no second of waiting."""
    import subprocess

    code = "import sys, rmx.cli, rmx.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
