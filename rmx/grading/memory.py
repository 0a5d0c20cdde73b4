"""The memory of a verifier's worker: how much it may take, and that the lack of it is never a verdict."""

import ast
import importlib
import resource
import sys
from pathlib import Path

MEMORY_BYTES = 1 << 30  # of address space, for one answer
# Of math-verify, in the order of their imports. They catch every Exception and go on as if the sides were not equal.
CATCHING = (
    "latex2sympy2_extended.math_normalization",
    "latex2sympy2_extended.latex2sympy2",
    "math_verify.grader",
    "math_verify.parser",
    "math_verify",  # which hands on what they define
)


def limit_memory() -> None:
    """From here on this process may take :data:`MEMORY_BYTES` more. On Linux."""
    if sys.platform == "linux":  # others do not hold to the limit, or do not tell what is taken
        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = taken + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def let_memory_errors_pass() -> None:
    """Have math-verify's own handlers let a MemoryError pass, which would be a wrong answer to them.

    Their modules are run a second time, with ``except MemoryError: raise`` before each ``except Exception``.
    """
    for name in CATCHING:
        module = importlib.import_module(name)
        tree = _Passing().visit(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")))
        exec(compile(ast.fix_missing_locations(tree), str(module.__file__), "exec"), module.__dict__)


class _Passing(ast.NodeTransformer):
    def visit_Try(self, node: ast.Try) -> ast.Try:
        self.generic_visit(node)
        if node.handlers:
            caught = ast.Name("MemoryError", ast.Load())
            node.handlers.insert(0, ast.ExceptHandler(type=caught, name=None, body=[ast.Raise()]))
        return node
