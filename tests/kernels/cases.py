"""Inputs for the five operators, and the calls by which tests reach values and gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import oracles
import torch
from torch import Tensor

import rmx_kernels
from rmx_kernels import head_cpu, tiles

Arguments = dict[str, Any]

DIFFERENTIABLE = {
    "entropy_topk": ("logits",),
    "linear_entropy_topk": ("hidden", "weight", "bias"),
    "gated_contrastive_loss": ("logits",),
    "linear_gated_contrastive_loss": ("hidden", "weight", "bias"),
    "linear_logprob_kl": ("hidden", "weight", "bias"),
}
SCALED = {"temperature": 0.7, "softcap": 5.0}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Drawn in float32 on the CPU, so that every dtype and device gets the same numbers, up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def randint(high: int, *shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def make(
    op: str,
    lead: Sequence[int] = (6,),
    V: int = 23,
    H: int = 7,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Arguments:
    """Arguments of an operator for ``lead`` rows; the first rows of the losses have every pattern of zero weights."""
    place: Any = {"dtype": dtype, "device": device}
    N = torch.Size(lead).numel()
    arguments: Arguments = {}
    if op.startswith("linear"):
        arguments["hidden"] = randn(*lead, H, seed=seed, **place) * (3 / H**0.5)
        arguments["weight"] = randn(V, H, seed=seed + 1, **place)
        arguments["bias"] = randn(V, seed=seed + 2, **place)
        base = {"base_hidden": arguments["hidden"] + randn(*lead, H, seed=seed + 3, **place) * (1 / H**0.5)}
    else:
        arguments["logits"] = randn(*lead, V, seed=seed, **place) * 3
        base = {"base_logits": arguments["logits"] + randn(*lead, V, seed=seed + 3, **place)}
    arguments["target"] = randint(V, *lead, seed=seed + 4, device=device)
    if op.endswith("entropy_topk"):
        return arguments | {"k": min(3, V)}
    if "loss" in op:
        stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        ce = randn(N, seed=seed + 5, dtype=stats_dtype, device=device)  # of both signs, as advantages are
        kl = randn(N, seed=seed + 6, dtype=stats_dtype, device=device).abs()
        ce[1:2], kl[2:3] = 0, 0
        ce[3:4], kl[3:4] = 0, 0
        kl[4:5] *= -1  # pushes away from the base: nothing forbids it
        arguments |= {"ce_weight": ce.reshape(tuple(lead)), "kl_weight": kl.reshape(tuple(lead))}
    return arguments | base


def call(op: str, arguments: Arguments, **options: Any) -> Any:
    return getattr(rmx_kernels, op)(**arguments, **options)


def differentiable(result: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [value for value in result if value is not None and value.requires_grad]


def cotangents(outputs: Sequence[Tensor], seed: int = 11) -> list[Tensor]:
    """Upstream gradients that are neither ones nor alike."""
    return [randn(*o.shape, seed=seed + i, dtype=o.dtype, device=o.device.type) for i, o in enumerate(outputs)]


def leaves(op: str, arguments: Arguments) -> tuple[Arguments, list[Tensor]]:
    """Copies of the arguments whose differentiable tensors are fresh leaves, and those leaves."""
    fresh = {
        name: value.detach().clone().requires_grad_(name in DIFFERENTIABLE[op]) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    return fresh, [fresh[name] for name in DIFFERENTIABLE[op] if name in fresh]


def forward_backward(op: str, arguments: Arguments, **options: Any) -> list[Tensor]:
    """Everything that a call and its backward return: all results, then all gradients."""
    fresh, inputs = leaves(op, arguments)
    result = call(op, fresh, **options)
    outputs = differentiable(result)
    grads = torch.autograd.grad(outputs, inputs, cotangents(outputs))
    return [value.detach() for value in result if value is not None] + list(grads)


def full_logits(op: str, arguments: Arguments, ids: Tensor | None, dtype: torch.dtype, **scaling: Any) -> list[Tensor]:
    """The differentiable results of an operator by way of full logits in dtype, then their gradients."""
    cast = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    given, inputs = leaves(op, cast)
    head = [given[name] for name in ("weight", "bias") if name in given]
    logits = oracles.linear(given["hidden"], *head) if head else given["logits"]
    outputs: Sequence[Tensor]
    if ids is not None:
        outputs = oracles.vocab_stats(logits, given["target"], ids, **scaling)
        outputs = outputs[: 4 if ids.shape[-1] else 3]
    else:
        base = oracles.linear(given["base_hidden"], *head) if head else given["base_logits"]
        if op == "linear_logprob_kl":
            outputs = oracles.logprob_kl(logits, base, given["target"], **scaling)
        else:
            weights = arguments["ce_weight"], arguments["kl_weight"]
            outputs = oracles.contrastive_loss(logits, base, given["target"], *weights, **scaling)[:1]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents(outputs))]


def check(op: str, arguments: Arguments, impl: str, **scaling: Any) -> Any:
    """Compare every differentiable result and every gradient with the fp64 oracle, by the error of eager."""
    fresh, inputs = leaves(op, arguments)
    dtype = inputs[0].dtype
    result = call(op, fresh, impl=impl, **scaling)
    outputs = differentiable(result)
    got = [*outputs, *torch.autograd.grad(outputs, inputs, cotangents(outputs))]
    ids = None
    if op.endswith("entropy_topk"):
        # the log-probs of the tokens that were chosen; that these are the right ones is a test of its own
        ids = arguments["target"].long()[..., None][..., :0] if result.topk_ids is None else result.topk_ids
    eager = full_logits(op, arguments, ids, dtype, **scaling)
    oracle = full_logits(op, arguments, ids, torch.float64, **scaling)
    names = [n for n, v in zip(result._fields, result, strict=True) if any(v is o for o in outputs)]
    names += ["d " + name for name in DIFFERENTIABLE[op] if name in arguments]
    for name, *values in zip(names, got, eager, oracle, strict=True):
        size = values[-1].detach().abs()
        if name == "loss":  # a sum of terms of both signs, so its rounding goes with their size
            live = [arguments["ce_weight"] * result.logprob, arguments["kl_weight"] * result.kl]
            size = sum(term.nan_to_num(0).abs().sum() for term in live)
        if dtype == torch.float64:  # eager is no yardstick here, and results are differences of such terms
            operands = [v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
            size = size + max([1.0, *(float(v.abs().max()) for v in operands if v.numel())]) ** 2
        oracles.assert_as_good_as_eager(*values, what=name, input_dtype=dtype, size=size)
    for name, value in zip(names[len(outputs) :], got[len(outputs) :], strict=True):
        assert value.dtype == dtype, f"{name}: {value.dtype}"
    return result


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"value {i}: {m}")


@contextmanager
def tiny_tiles(columns: int = 5, rows: int = 3) -> Iterator[None]:
    """Tiles of a few columns and rows, so that small shapes cross many. The native kernels take rows in fours, and
    columns in whole blocks of theirs."""
    native = {"LOGIT_BYTES": 1, "TILE_ROWS": 4, "TILE_COLUMNS": 1024, "UPCAST_BYTES": 1}
    with (
        patch.multiple(tiles, TILE_COLUMNS=columns, TILE_BYTES=4 * columns * rows),
        patch.multiple(head_cpu, **native),
    ):
        yield
