"""The rooms of rmx_kernels: what may import what, how many parameters a function takes, and one of each thing."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rmx_kernels

ROOT = Path(rmx_kernels.__file__).parent
# A module imports those before it alone.
ORDER = (
    *("version", "precision", "registration", "native", "dispatch", "traced", "choice", "checks", "ignored"),
    *(
        "results",
        "logits",
        "once",
        "head",
        "head.configs",
        "head.kernels",
        "head.launch",
        "head.gradient",
        "head.reference",
    ),
    *("head.cpu", "head.triton", "statistics", "statistics.op", "statistics.reference", "statistics.cpu"),
    *("statistics.kernels", "statistics.triton", "statistics.api", "statistics.kept", "losses", "losses.op"),
    *("losses.reference", "losses.cpu", "losses.kernels", "losses.triton", "losses.api", "losses.cross_entropy"),
    *("losses.policy", "divergences", "divergences.op", "divergences.reference", "divergences.cpu"),
    *("divergences.kernels", "divergences.triton", "divergences.api"),
    *("vocab_parallel.merge", "vocab_parallel.agreement", "vocab_parallel.shard"),
    *("vocab_parallel.functions", "vocab_parallel.api", "vocab_parallel", "wrappers", "head_check", "causal_lm"),
    *("machine", "doctor", ""),
)
MOST_PARAMETERS = 8
DOORS = (
    "statistics/api.py",
    "statistics/kept.py",
    "losses/api.py",
    "losses/cross_entropy.py",
    "losses/policy.py",
    "divergences/api.py",
    "vocab_parallel/api.py",
    "causal_lm.py",
)  # keyword arguments of the public


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {name_of(path): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of rmx_kernels that one imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rmx_kernels":
            room = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{room}.{alias.name}".strip(".")
                yield inner if inner in MODULES else room


def test_every_module_has_a_place() -> None:
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_downwards(module: str) -> None:
    assert not {other for other in imported(MODULES[module]) if ORDER.index(other) >= ORDER.index(module)}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    """All but Triton's kernels, whose arguments are pointers, strides and sizes."""
    for module, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(d) for d in node.decorator_list):
                yield module, node


def test_few_parameters_below_the_doors() -> None:
    doors = {name_of(ROOT / door) for door in DOORS}
    for module, function in functions():
        given = function.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg != "self"]
        public = module in doors and not function.name.startswith("_")
        assert public or len(names) <= MOST_PARAMETERS, f"{module}.{function.name}: {len(names)}"


def test_one_of_each_class() -> None:
    """Names that two implementations need are shared, or say which of them they are in."""
    classes = [node.name for tree in MODULES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    twice = {name for name in classes if classes.count(name) > 1}
    assert twice <= {
        "Head",  # the head's products on a CPU, and on a GPU
        "HeadRows",  # the rows of hidden states of losses and divergences: CPU, GPU
        "Rows",  # as the native library takes them, and as Triton's kernels do
        "Statistics",  # of a GPU's rows, and over ranks
        "StatisticsGradient",  # CPU, GPU
    }
