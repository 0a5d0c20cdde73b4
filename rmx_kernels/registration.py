"""Registration of operators with torch.library; their kernels are loaded when they first run."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

# Triton's interpreter runs its kernels on CPU tensors; it is on or off for a whole process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
# device type -> the module of an operator's folder that serves it
KERNELS = {"cpu": "triton" if INTERPRETED else "cpu", "cuda": "triton"}
Formula = tuple[Callable[..., Any], Callable[..., Any]]  # (backward, setup_context)


def register(op: str, schema: str, fake: Callable[..., Any], autograd: Formula | None = None, suffix: str = "") -> None:
    """Define rmx_kernels::{op}{suffix}.

    Its kernels are the functions ``forward``, or that named by the suffix, of the modules rmx_kernels.{op}.cpu and
    .triton, where this version ships them. Without a formula a differentiation is an error, not a silent zero.
    """
    name, function = f"rmx_kernels::{op}{suffix}", suffix.removeprefix("_") or "forward"
    torch.library.define(name, schema)
    torch.library.register_fake(name, fake)
    for device, implementation in KERNELS.items():
        module = f"rmx_kernels.{op}.{implementation}"
        if importlib.util.find_spec(module) is not None:
            torch.library.impl(name, device, _late(module, function))
    if autograd is None:
        torch.library.register_autograd(name, refuse(name))
    else:
        torch.library.register_autograd(name, autograd[0], setup_context=autograd[1])


def _late(module: str, function: str) -> Callable[..., Any]:
    @functools.cache
    def loaded() -> Any:
        return importlib.import_module(module)

    def kernel(*arguments: Any) -> Any:
        return getattr(loaded(), function)(*arguments)

    return kernel


def refuse(name: str) -> Callable[..., Any]:
    def refusal(*_: Any) -> None:
        raise RuntimeError(f"{name}: trying to differentiate twice a function that is once_differentiable")

    return refusal
