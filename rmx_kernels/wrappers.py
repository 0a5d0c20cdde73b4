"""Wrappers of torch around a model: the inner module, a call in its forward, and parameters sharded over ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmx_kernels import checks

T = TypeVar("T")


def in_forward(model: nn.Module, function: Callable[[Any], T]) -> T:
    r"""Run the wrappers' forward with function(inner module) instead of the inner module's forward.

    DistributedDataParallel and FullyShardedDataParallel average gradients and gather weights only around the forward of
    the module that they wrap. So call :func:`head_of`, :func:`token_logprobs` and the loss inside ``function``.

    .. math:: \mathrm{in\_forward}(\mathrm{wrap}(m), f) = f(m)

    Args:
        model: a module, in any number of wrappers, compiled or not.
        function: takes the inner module, and returns a tensor or a tuple, list or dict of tensors; called once.

    Returns:
        The result of function.

    Raises:
        TypeError: model is not a module. RuntimeError: the wrapper did not call the inner module.

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
        raise RuntimeError(f"model: expected {type(model).__name__} to call its inner module, but it did not")
    return returned


def inside(model: nn.Module) -> Any:
    """The inner module of a compiled module, DistributedDataParallel or FullyShardedDataParallel; None for others."""
    names = ("_orig_mod", "module", "_fsdp_wrapped_module")
    return next((model._modules[name] for name in names if model._modules.get(name) is not None), None)


def gathered(parameter: Tensor) -> Tensor:
    r"""The full tensor of a parameter that is sharded over ranks as a DTensor; any other tensor unchanged.

    .. math:: \frac{\partial}{\partial \mathrm{parameter}} = \frac{1}{R} \sum_{r=1}^{R} g_r

    where g_r is the gradient of the full tensor on rank r of the R ranks of its mesh. This is the mean that fully_shard
    (FSDP2) computes for its own forward, and it has the parameter's placements. If all ranks compute the same values
    (tensor parallelism with replicated rows), the mean equals the gradient of each rank.

    A DTensor with Shard(0) does not say whether it is a shard of FSDP2 or a part of the vocabulary. Gathering it is
    right for both. To keep a head sharded, pass ``parameter.to_local()`` with ``process_group=`` to the operator.

    Args:
        parameter: a tensor; if it is a DTensor, every rank of its mesh has to make this call.

    Returns:
        A plain tensor of the full shape. Differentiable once.

    Source: ``torch.distributed.tensor.DTensor.full_tensor``, which leaves each rank its own gradient.

    >>> linear_entropy_topk(hidden, gathered(model.lm_head.weight))  # doctest: +SKIP
    """
    return _Gathered.apply(parameter) if checks.is_sharded(parameter) else parameter


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        whole: Tensor = x.full_tensor()
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mean = (gradient / ctx.mesh.size()).contiguous()
        parts = DTensor.from_local(mean, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements)
