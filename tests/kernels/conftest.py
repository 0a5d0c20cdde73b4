"""Each test that takes ``device`` and ``impl`` runs once for every implementation that runs here.

The implementations come from ``rmx_kernels.backends()``, so a new one goes through the whole grid unchanged. A test
names its operator by the module constant OPERATOR, or takes ``op`` and runs for all, or those in OPERATORS.
``dtype`` adds every dtype that the implementation takes; ``fp64`` is torch.float64, where it is taken.
"""

import dataclasses
from typing import Any

import pytest
import torch

from rmx_kernels import backends, dispatch
from rmx_kernels.checks import FLOATS
from rmx_kernels.dispatch import OPERATORS

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
# Of the implementations that take fewer than all of FLOATS.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {"triton": (torch.bfloat16, torch.float16, torch.float32)}
FAST = (torch.bfloat16,) if dispatch.INTERPRETED else (torch.bfloat16, torch.float32)  # of the fast suite


def _speed_up_interpreter() -> None:
    """Leave out what Triton's interpreter does again at every operation, which is two thirds of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(fn: Any) -> Any:
        """A launch has patched triton.language already when a function is called within its kernel."""
        languages = [module for module in fn.__globals__.values() if module is tl or module is tl.core]
        return patch_language(fn) if any(tl.core.is_builtin(module.load) for module in languages) else None

    numpy_type, types = interpreter._get_np_dtype, dict[str, Any]()

    def known_type(of: Any) -> Any:
        if of.name not in types:
            types[of.name] = numpy_type(of)
        return types[of.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, known_type
    # Its overflows are computed and then asserted in debug mode alone.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


if dispatch.INTERPRETED:
    _speed_up_interpreter()


def runnable(op: str, device: str) -> list[str]:
    return [b.name for b in backends().values() if b.available and device in b.devices and op in b.operators]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = [name for name in ("op", "device", "impl", "dtype", "fp64") if name in metafunc.fixturenames]
    if "impl" not in names:
        return
    cases = []
    for op in getattr(metafunc.module, "OPERATORS", OPERATORS) if "op" in names else (metafunc.module.OPERATOR,):
        for device in DEVICES:
            for impl in runnable(op, device):
                if impl not in getattr(metafunc.module, "IMPLS", (impl,)):
                    continue
                taken = DTYPES.get(impl, FLOATS)
                for dtype in taken if "dtype" in names else (torch.float64,) if "fp64" in names else (None,):
                    if dtype is not None and dtype not in taken:
                        continue
                    values = {"op": op, "device": device, "impl": impl, "dtype": dtype, "fp64": dtype}
                    label = "-".join(str(values[name]).removeprefix("torch.") for name in names if name != "fp64")
                    marks = [pytest.mark.gpu] if device == "cuda" else []
                    widest = torch.float32  # the reference computes in it, whatever the dtype
                    if "dtype" in names and (dtype not in FAST or (impl == "reference" and dtype != widest)):
                        marks.append(pytest.mark.thorough)
                    cases.append(pytest.param(*(values[name] for name in names), id=label, marks=marks))
    metafunc.parametrize(names, cases)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Cases of the implementation "triton" are worth a run under the interpreter."""
    given = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    names = [part for value in given for part in (value if isinstance(value, tuple) else (value,))]
    if any(isinstance(name, str) and name == "triton" for name in names):
        item.add_marker(pytest.mark.interpreted)
