"""Which implementation of an operator runs where. No silent fallback."""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from rmx_kernels import native

OPERATORS = (
    "entropy_topk",
    "linear_entropy_topk",
    "gated_contrastive_loss",
    "linear_gated_contrastive_loss",
    "linear_logprob_kl",
    "linear_divergence",
)
IMPLS = ("triton", "cpu", "reference")  # the order in which impl=None tries them
# Triton's interpreter runs its kernels on CPU tensors; it is on or off for a whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


class BackendUnavailable(RuntimeError):
    """The requested implementation cannot run this operator on this machine or device."""


@dataclass(frozen=True)
class Backend:
    """One implementation: whether it runs here, on which device types, for which operators; if not, the reason."""

    name: str
    available: bool
    devices: tuple[str, ...]
    operators: tuple[str, ...]
    reason: str  # "" where available


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _describe(impl: str) -> Backend:
    devices = {
        "triton": ("cuda", "cpu") if INTERPRETED else ("cuda",),
        "cpu": ("cpu",),
        "reference": ("cpu", "cuda", "mps", "xpu"),
    }[impl]
    reason = ""
    if impl == "cpu" and INTERPRETED:
        reason = "TRITON_INTERPRET is set: interpreted Triton kernels replace the CPU kernels"
    elif impl == "cpu" and native.missing():
        reason = native.missing()
    elif impl == "triton" and not _installed("triton"):
        reason = "the triton package is not installed"
    elif impl == "triton" and not torch.cuda.is_available() and not INTERPRETED:
        reason = "torch sees no CUDA or ROCm device"
    return Backend(impl, reason == "", devices, OPERATORS, reason)


def backends() -> dict[str, Backend]:
    """Return every implementation by name: whether it runs here, on which devices, for which operators; if not, why.

    >>> for backend in backends().values():
    ...     print(backend.name, backend.available, backend.reason)  # doctest: +SKIP
    """
    return {impl: _describe(impl) for impl in IMPLS}


def choose(op: str, impl: str | None, device: str, dtype: torch.dtype) -> str:
    """Return the name of the implementation that computes ``op`` for tensors of ``dtype`` on a type of device.

    Raises:
        ValueError: ``impl`` is not None or one of :data:`IMPLS`.
        BackendUnavailable: the requested implementation cannot run here; the message says why.
    """
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: expected None or one of {', '.join(sorted(IMPLS))}, got {impl!r}")
    for name in IMPLS if impl is None else (impl,):
        backend = _describe(name)
        reason = backend.reason
        if not reason and name != "reference" and device not in backend.devices:
            reason = f"the tensors are on {device!r}, but it runs on {', '.join(backend.devices)}"
        if not reason and name == "triton" and dtype == torch.float64:
            reason = "the tensors are float64, but it computes in float32"
        if not reason:
            return name
        if impl is not None:
            raise BackendUnavailable(f"impl={impl!r} cannot run {op} here: {reason}")
        if device in backend.devices:
            _warn_of_fallback(name, reason)
    raise AssertionError("unreachable: the reference runs on every device")


@functools.cache
def remembered(op: str, impl: str | None, device: str, dtype: torch.dtype) -> str:
    return choose(op, impl, device, dtype)


@functools.cache
def _warn_of_fallback(name: str, reason: str) -> None:
    warnings.warn(
        f"rmx_kernels: {reason}. Running on impl='reference', which is exact and several times slower",
        RuntimeWarning,
        stacklevel=6,
    )


@functools.cache
def kernels(family: str, impl: str) -> ModuleType:
    """The module of a family, "statistics", "losses" or "divergences", that holds an implementation's functions."""
    return importlib.import_module(f"rmx_kernels.{family}.{impl}")


def sharded(op: str) -> Callable[..., Any]:
    """The form of a linear operator for a head that is spread over processes; loaded where one is asked for."""
    found: Callable[..., Any] = getattr(kernels("vocab_parallel", "api"), f"vocab_parallel_{op}")
    return found
