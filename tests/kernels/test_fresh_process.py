"""What a process has that only just imported rmx_kernels: little, and operators that torch.compile takes at once."""

import subprocess
import sys
from pathlib import Path

import pytest

# Each case is traced in a fork of a process in which no operator has run yet, so that it is the first there.
FORKS = """
import os
import sys
import traceback
from itertools import combinations_with_replacement

import cases
import torch
import torch._dynamo
import rmx_kernels
from rmx_kernels.dispatch import OPERATORS

ROWS = {op: cases.make(op) for op in OPERATORS}


def trace(first, second):
    def both():
        return [cases.call(op, ROWS[op], impl=impl) for op, impl in (first, second)]

    for got, expected in zip(torch.compile(both, fullgraph=True, backend="eager")(), both(), strict=True):
        for x, y in zip(got, expected, strict=True):
            assert (x is None and y is None) or torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def forked(first, second):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        trace(first, second)
        status = 0
    except BaseException:
        traceback.print_exc(limit=2)
    finally:
        sys.stderr.flush()
        os._exit(status)


pairs = [((first, None), (second, "cpu")) for first, second in combinations_with_replacement(OPERATORS, 2)]
failed = [pair for pair in pairs if forked(*pair)]
assert not failed, failed
"""


# torch itself may import some of them one day: what matters is what comes on top.
LIGHT = """
import sys
import torch

before = set(sys.modules)
import rmx_kernels
from rmx_kernels import entropy_topk, head_of, token_logprobs

assert set(rmx_kernels.__all__) <= set(dir(rmx_kernels))
heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton", "transformers", "peft", "numpy", "torch.distributed")
added = [name for name in set(sys.modules) - before]
found = sorted(n for n in added if any(n == h or n.startswith(h + ".") for h in heavy))
assert not found, found
print(len([name for name in added if not name.startswith("rmx_kernels")]))
"""


def test_importing_brings_no_package_beyond_torch() -> None:
    """Seconds of imports are those of who uses them: torch.compile, Triton, transformers."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10  # of the standard library, and small parts of torch


@pytest.mark.thorough
def test_any_pair_of_operators_is_traced_before_anything_ran() -> None:
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {folder!r})" + FORKS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
