"""Modules of torch around a model: what is inside, and a call in their forward."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

T = TypeVar("T")


def in_forward(model: nn.Module, function: Callable[[Any], T]) -> T:
    r"""function(module inside of the wrappers), called in the place of its forward.

    For DistributedDataParallel and FullyShardedDataParallel, which average gradients, and gather weights, around the
    forward of what they wrap: :func:`head_of`, :func:`token_logprobs` and the loss belong in there.

    .. math:: \mathrm{in\_forward}(\mathrm{wrap}(m), f) = f(m)

    Args:
        model: a module, in any number of wrappers, compiled or not.
        function: takes the module inside, and returns a tensor or a tuple, list or dict of them; called once.

    Returns:
        What function returned.

    Raises:
        TypeError: model is no module. RuntimeError: the wrapper did not call the module.

    >>> loss = in_forward(wrapped, lambda inner: -token_logprobs(inner, ids).logprob.mean())  # doctest: +SKIP
    >>> loss.backward()  # gradients are averaged over ranks  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = model
    while (found := inside(inner)) is not None:
        inner = found
    own = inner.__dict__.get("forward")
    results: list[T] = []

    def restore() -> None:
        inner.__dict__.pop("forward", None)
        if own is not None:
            inner.__dict__["forward"] = own

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(*_: Any, **__: Any) -> T:
        restore()  # function may call the module
        results.append(function(inner))
        return results[0]

    inner.__dict__["forward"] = forward
    try:
        returned = model()
    finally:
        restore()
    if not results:
        raise RuntimeError(f"model: expected {type(model).__name__} to call the module inside, it did not")
    return returned


def inside(model: nn.Module) -> Any:
    """What a wrapper of torch wraps: a compiled module, DistributedDataParallel, FullyShardedDataParallel."""
    names = ("_orig_mod", "module", "_fsdp_wrapped_module")
    return next((model._modules[name] for name in names if model._modules.get(name) is not None), None)
