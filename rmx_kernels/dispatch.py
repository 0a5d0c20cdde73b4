"""Which implementation of an operator runs where, and the loading of it. No silent fallback."""

import functools
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch

from rmx_kernels import native
from rmx_kernels.registration import INTERPRETED

OPERATORS = (
    "entropy_topk",
    "linear_entropy_topk",
    "gated_contrastive_loss",
    "linear_gated_contrastive_loss",
    "linear_logprob_kl",
)
IMPLS = ("triton", "cpu", "reference")  # the order in which impl=None tries them
_PACKAGES = {op: importlib.import_module(f"rmx_kernels.{op}") for op in OPERATORS}  # without what is in them


class BackendUnavailable(RuntimeError):
    """The implementation that was named cannot run this operator on this machine or device."""


@dataclass(frozen=True)
class Backend:
    """One implementation: does it run here, on which device types, for which operators, and if not, why."""

    name: str
    available: bool
    devices: tuple[str, ...]
    operators: tuple[str, ...]
    reason: str  # "" where available


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def _shipped(impl: str) -> tuple[str, ...]:
    return tuple(op for op in OPERATORS if importlib.util.find_spec(f"rmx_kernels.{op}.{impl}") is not None)


def _describe(impl: str) -> Backend:
    operators = _shipped(impl)
    devices = {
        "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
        "cpu": ("cpu",),
        "reference": ("cpu", "cuda", "mps", "xpu"),
    }[impl]
    reason = ""
    if not operators:
        reason = f"this version of rmx_kernels ships no {impl} implementation"
    elif impl == "cpu" and INTERPRETED:
        reason = "TRITON_INTERPRET is set: the interpreted Triton kernels have its place"
    elif impl == "cpu" and native.missing():
        reason = native.missing()
    elif impl == "triton" and not _installed("triton"):
        reason = "the triton package is not installed"
    elif impl == "triton" and not torch.cuda.is_available() and not INTERPRETED:
        reason = "torch sees no CUDA or ROCm device"
    return Backend(impl, reason == "", devices, operators, reason)


def backends() -> dict[str, Backend]:
    """Return every implementation by name: whether it runs here, for what, and why not otherwise.

    >>> for backend in backends().values():
    ...     print(backend.name, backend.available, backend.reason)  # doctest: +SKIP
    """
    return {impl: _describe(impl) for impl in IMPLS}


def load(op: str, impl: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """Return the module whose ``run`` computes ``op`` for tensors of ``dtype`` on ``device``.

    The choice is made once in a process for each operator, implementation, device type and dtype.

    Raises:
        ValueError: ``impl`` is not None or one of :data:`IMPLS`.
        BackendUnavailable: the implementation that was named cannot run here; the message says why.
    """
    if torch.compiler.is_compiling():
        from rmx_kernels.traced import imported  # takes seconds, unless torch.compile is at work already

        name = imported(op, impl, device.type, dtype)
    else:
        name = _imported(op, impl, device.type, dtype)
    module: ModuleType = getattr(_PACKAGES[op], name)
    return module


@functools.cache
def _imported(op: str, impl: str | None, device: str, dtype: torch.dtype) -> str:
    """The name of the implementation, whose module is then an attribute of the operator's package."""
    name = choose(op, impl, device, dtype)
    importlib.import_module(f"rmx_kernels.{op}.{name}")
    return name


def choose(op: str, impl: str | None, device: str, dtype: torch.dtype) -> str:
    """The name of the implementation; raises as :func:`load` does."""
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: expected None or one of {', '.join(sorted(IMPLS))}, got {impl!r}")
    for name in IMPLS if impl is None else (impl,):
        backend = _describe(name)
        reason = backend.reason
        if not reason and op not in backend.operators:
            reason = f"this version of rmx_kernels ships no {name} implementation of {op}"
        if not reason and name != "reference" and device not in backend.devices:
            reason = f"the tensors are on {device!r}, it runs on {', '.join(backend.devices)}"
        if not reason and name == "triton" and dtype == torch.float64:
            reason = "the tensors are float64, it computes in float32"
        if not reason:
            return name
        if impl is not None:
            raise BackendUnavailable(f"impl={impl!r} cannot run {op} here: {reason}")
        if device in backend.devices:
            _warn_of_fallback(name, reason)
    raise AssertionError("unreachable: the reference runs on every device")


@functools.cache
def _warn_of_fallback(name: str, reason: str) -> None:
    warnings.warn(
        f"rmx_kernels: {reason}. Running on impl='reference', exact and several times slower",
        RuntimeWarning,
        stacklevel=6,
    )
