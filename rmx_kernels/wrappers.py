"""Modules of torch around a model: what is inside, a call in their forward, and parameters spread over ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmx_kernels import checks

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


def gathered(parameter: Tensor) -> Tensor:
    r"""The whole of a parameter that is spread over ranks as a DTensor; any other tensor as it is.

    .. math:: \frac{\partial}{\partial \mathrm{parameter}} = \frac{1}{R} \sum_{r=1}^{R} g_r

    with the gradient g of the whole on each of the R ranks of its mesh: their mean, as fully_shard (FSDP2) makes of the
    gradients of its own forward, in the parameter's placements. Where all ranks compute the same (tensor parallelism
    with replicated rows) the mean is what each of them has.

    A DTensor with Shard(0) may be a shard of FSDP2, or a part of the vocabulary: it does not tell. So it is gathered,
    which is right for both. A head that is to stay spread is given as ``parameter.to_local()`` with ``process_group=``.

    Args:
        parameter: a tensor; a DTensor on all ranks of its mesh at once, each of which makes this call.

    Returns:
        A plain tensor of the whole shape. Differentiable once.

    Source: ``torch.distributed.tensor.DTensor.full_tensor``, whose gradient is each rank's own.

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
