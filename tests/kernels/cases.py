"""Inputs for the operators, and the calls by which tests reach values and gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import oracles
import torch
from torch import Tensor

import rmx_kernels
from rmx_kernels import dispatch, native
from rmx_kernels.head import configs
from rmx_kernels.head import cpu as head_cpu
from rmx_kernels.head import reference as tiles

Arguments = dict[str, Any]

DIFFERENTIABLE = {
    "entropy_topk": ("logits",),
    "linear_entropy_topk": ("hidden", "weight", "bias"),
    "gated_contrastive_loss": ("logits",),
    "linear_gated_contrastive_loss": ("hidden", "weight", "bias"),
    "linear_logprob_kl": ("hidden", "weight", "bias"),
    "linear_divergence": ("hidden", "weight", "bias"),
}
TARGETED = tuple(op for op in dispatch.OPERATORS if op != "linear_divergence")  # those that take target ids
PER_ROW = ("logits", "base_logits", "hidden", "base_hidden", "teacher_hidden", "target", "ce_weight", "kl_weight")
SCALED = {"temperature": 0.7, "softcap": 5.0}


def available(device: str) -> list[str]:
    """The implementations that run here for tensors on a device."""
    return [b.name for b in rmx_kernels.backends().values() if b.available and device in b.devices]


def unless_interpreted(count: int, interpreted: int) -> int:
    """How many draws or rows: fewer under Triton's interpreter, which takes a hundred times as long for each."""
    return interpreted if dispatch.INTERPRETED else count


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Drawn in float32 on the CPU, so that every dtype and device gets the same numbers, up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def randint(high: int, *shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def temperatures(*lead: int, device: str = "cpu") -> Tensor:
    """One a row, from 0.3 to 3."""
    return (randn(*lead, seed=21) / 2).exp().clamp(0.3, 3).to(device)


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
    if op == "linear_divergence":  # the teacher is wider
        arguments["teacher_hidden"] = randn(*lead, H + 2, seed=seed + 3, **place) * (3 / (H + 2) ** 0.5)
        arguments["teacher_weight"] = randn(V, H + 2, seed=seed + 5, **place)
        return arguments | {"teacher_bias": randn(V, seed=seed + 6, **place), "kind": "jsd", "beta": 0.3}
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


def with_lora(arguments: Arguments, r: int = 3, scale: float = 0.5, seed: int = 0) -> Arguments:
    """The arguments with a LoRA pair that moves the logits as far as hidden does."""
    weight = arguments["weight"]
    V, H = weight.shape
    place: Any = {"dtype": weight.dtype, "device": weight.device.type}
    A = randn(r, H, seed=seed + 7, **place) * (1 / H**0.5)
    B = randn(V, r, seed=seed + 8, **place)
    return arguments | {"lora": (A, B, scale)}


def tensors(arguments: Arguments) -> list[Tensor]:
    """All of them, those of the LoRA pair among them."""
    values = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
    return [v for v in values if isinstance(v, Tensor)]


def call(op: str, arguments: Arguments, **options: Any) -> Any:
    return getattr(rmx_kernels, op)(**arguments, **options)


def differentiable(result: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [value for value in result if value is not None and value.requires_grad]


def cotangents(outputs: Sequence[Tensor], seed: int = 11) -> list[Tensor]:
    """Upstream gradients that are neither ones nor alike."""
    return [randn(*o.shape, seed=seed + i, dtype=o.dtype, device=o.device.type) for i, o in enumerate(outputs)]


def leaves(op: str, arguments: Arguments) -> tuple[Arguments, list[Tensor]]:
    """Copies of the arguments whose differentiable tensors are fresh leaves, and those leaves, A and B last."""
    fresh = {
        name: value.detach().clone().requires_grad_(name in DIFFERENTIABLE[op]) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    inputs = [fresh[name] for name in DIFFERENTIABLE[op] if name in fresh]
    if arguments.get("lora") is not None:
        *pair, scale = arguments["lora"]
        pair = [x.detach().clone().requires_grad_() for x in pair]
        fresh["lora"] = (*pair, scale)
        inputs += pair
    return fresh, inputs


def forward_backward(op: str, arguments: Arguments, **options: Any) -> list[Tensor]:
    """Everything that a call and its backward return: all results, then all gradients."""
    fresh, inputs = leaves(op, arguments)
    result = call(op, fresh, **options)
    outputs = differentiable(result)
    grads = torch.autograd.grad(outputs, inputs, cotangents(outputs))
    return [value.detach() for value in result if value is not None] + list(grads)


def full_logits(
    op: str,
    arguments: Arguments,
    ids: Tensor | None,
    dtype: torch.dtype,
    off: tuple[float, int] | None = None,
    **scaling: Any,
) -> list[Tensor]:
    """The differentiable results of an operator by way of full logits in dtype, then their gradients.

    With off = (share, seed) every product with the head is off by that share of itself, upwards or downwards by chance.
    """
    cast = {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
    if "lora" in arguments:
        A, B, scale = arguments["lora"]
        cast["lora"] = A.to(dtype), B.to(dtype), scale
    given, inputs = leaves(op, cast)
    head = [given[name] for name in ("weight", "bias") if name in given]
    logits = oracles.linear(given["hidden"], *head, lora=given.get("lora")) if head else given["logits"]
    base_head = [given[f"teacher_{name}"] for name in ("weight", "bias") if f"teacher_{name}" in given] or head
    base_hidden = given.get("base_hidden", given.get("teacher_hidden"))
    base = given.get("base_logits") if base_hidden is None else oracles.linear(base_hidden, *base_head)
    if off is not None:
        share, seed = off
        exactly = arguments["weight"].dtype != torch.float32  # summed, and then rounded once
        teacher = given["hidden"] if base_hidden is None else base_hidden
        sizes = []
        for x, parts in ((given["hidden"], head), (teacher, base_head)):
            sizes.append(oracles.linear(*(y.detach() if exactly else y.detach().abs() for y in (x, *parts))).abs())
        size = sizes[0]
        if "lora" in arguments:  # a sum, rounded as each of its terms, of which the pair's has two products and a scale
            size = size + logits.detach().abs() + 3 * (logits - oracles.linear(given["hidden"], *head)).detach().abs()
        exact = logits, base
        logits = logits + signs(size, seed) * share * size
        base = None if base is None else base + signs(base, seed + 1) * share * sizes[1]
    outputs: Sequence[Tensor]
    if ids is not None:
        outputs = oracles.vocab_stats(logits, given["target"], ids, **scaling)
        outputs = outputs[: 4 if ids.shape[-1] else 3]
    else:
        if op == "linear_divergence":
            outputs = oracles.divergence(logits, base, given["kind"], given["beta"], **scaling)
        elif op == "linear_logprob_kl":
            outputs = oracles.logprob_kl(logits, base, given["target"], **scaling)
        else:
            weights = arguments["ce_weight"], arguments["kl_weight"]
            outputs = oracles.contrastive_loss(logits, base, given["target"], *weights, **scaling)
            if off is not None:  # what the rows are off by, which a sum of both signs would hide
                loss, *parts = oracles.contrastive_loss(*exact, given["target"], *weights, **scaling)
                by = zip(weights, outputs[1:], parts, strict=True)
                wide = loss + sum((w.abs() * (a - b).abs()).nan_to_num(0, 0, 0).sum() for w, a, b in by)
                return [wide, *torch.autograd.grad(outputs[:1], inputs, cotangents(outputs[:1]))]
            outputs = outputs[:1]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents(outputs))]


def signs(like: Tensor, seed: int) -> Tensor:
    return (randint(2, *like.shape, seed=seed, device=like.device.type) * 2 - 1).to(like.dtype)


HEADS = ("weight", "bias", "teacher_weight", "teacher_bias")


def turned(op: str, arguments: Arguments) -> Arguments:
    """The arguments with the vocabulary in the reverse order: the same results, summed in another order."""

    def of(name: str, value: Any) -> Any:
        if name == "target":
            return V - 1 - value
        if name == "lora" and value is not None:
            return value[0], value[1].flip(0), value[2]
        return value.flip(-1) if "logits" in name else value.flip(0) if name in HEADS else value

    V = arguments["weight"].shape[0] if "weight" in arguments else arguments["logits"].shape[-1]
    return {name: of(name, value) for name, value in arguments.items()}


OFF = 2  # draws of logits that are off


def eager_ways(op: str, arguments: Arguments, ids: Tensor | None, **scaling: Any) -> list[tuple[Tensor, ...]]:
    """Eager's results and gradients in the dtype of the arguments, several times, since any of them may be lucky.

    Summed from the first token on and from the last: how far a plain float32 sum over the vocabulary is off depends on
    its order, and on the processor that chose it. Then with logits of a head that are all off by as much as rounding
    them to the dtype is on average, a quarter of a step: of few rows the largest entries are made of few logits.
    """
    dtype = arguments[DIFFERENTIABLE[op][0]].dtype
    V = arguments["weight"].shape[0] if "weight" in arguments else arguments["logits"].shape[-1]
    ways = [full_logits(op, arguments, ids, dtype, **scaling)]
    backwards = full_logits(op, turned(op, arguments), None if ids is None else V - 1 - ids, dtype, **scaling)
    names = [name for name in DIFFERENTIABLE[op] if name in arguments]
    names += ["A", "B"] if "lora" in arguments else []
    for place, name in enumerate(names, len(backwards) - len(names)):
        dim = -1 if name == "logits" else 0 if name in ("weight", "bias", "B") else None
        backwards[place] = backwards[place] if dim is None else backwards[place].flip(dim)
    ways.append(backwards)
    if "weight" in arguments and dtype != torch.float64:
        share = torch.finfo(dtype).eps / 4
        ways += [full_logits(op, arguments, ids, torch.float64, (share, 40 + 2 * i), **scaling) for i in range(OFF)]
    return list(zip(*ways, strict=True))


class Compared(NamedTuple):
    """A differentiable result or a gradient; the magnitude of it or of the terms it sums."""

    name: str
    got: Tensor
    eager: tuple[Tensor, ...]  # in several ways
    oracle: Tensor
    size: Tensor
    roundings: int


def compare(op: str, arguments: Arguments, impl: str, **scaling: Any) -> tuple[Any, list[Compared]]:
    """The result of a call, and every differentiable part and gradient of it beside eager's and the fp64 oracle's."""
    fresh, inputs = leaves(op, arguments)
    dtype = inputs[0].dtype
    result = call(op, fresh, impl=impl, **scaling)
    outputs = differentiable(result)
    got = [*outputs, *torch.autograd.grad(outputs, inputs, cotangents(outputs))]
    ids = None
    if op.endswith("entropy_topk"):
        # the log-probs of the tokens that were chosen; that these are the right ones is a test of its own
        ids = arguments["target"].long()[..., None][..., :0] if result.topk_ids is None else result.topk_ids
    eager = eager_ways(op, arguments, ids, **scaling)
    oracle = full_logits(op, arguments, ids, torch.float64, **scaling)
    names = [n for n, v in zip(result._fields, result, strict=True) if any(v is o for o in outputs)]
    names += ["d " + name for name in DIFFERENTIABLE[op] if name in arguments]
    names += ["d A", "d B"] if "lora" in arguments else []
    compared = []
    for name, *values in zip(names, got, eager, oracle, strict=True):
        size = values[-1].detach().abs()
        if name == "loss":  # a sum of terms of both signs, so its rounding goes with their size
            live = [arguments["ce_weight"] * result.logprob, arguments["kl_weight"] * result.kl]
            size = sum(term.nan_to_num(0).abs().sum() for term in live)
        if dtype == torch.float64:  # eager is no yardstick here, and results are differences of such terms
            operands = [v for v in tensors(arguments) if v.is_floating_point()]
            size = size + max([1.0, *(float(v.abs().max()) for v in operands if v.numel())]) ** 2
        roundings = (
            2 if name[:2] == "d " and "weight" in arguments else 1
        )  # of the logits' gradient, and of its product
        compared.append(Compared(name, *values, size, roundings))
    for name, value in zip(names[len(outputs) :], got[len(outputs) :], strict=True):
        assert value.dtype == dtype, f"{name}: {value.dtype}"
    return result, compared


def check(op: str, arguments: Arguments, impl: str, **scaling: Any) -> Any:
    """Compare every differentiable result and every gradient with the fp64 oracle, by the error of eager."""
    result, compared = compare(op, arguments, impl, **scaling)
    dtype = arguments[DIFFERENTIABLE[op][0]].dtype
    for name, *values, size, roundings in compared:
        oracles.assert_as_good_as_eager(*values, what=name, input_dtype=dtype, size=size, roundings=roundings)
    return result


def integers(x: Tensor) -> Tensor:
    """The bits of x, which tell 0 from -0; every NaN alike."""
    if not x.is_floating_point():
        return x
    canonical = torch.where(x.isnan(), x.new_tensor(torch.nan), x)
    return canonical.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize])


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"value {i}: {m}")


@contextmanager
def tiny_tiles(columns: int = 5, rows: int = 3) -> Iterator[None]:
    """Tiles of a few columns and rows, so that small shapes cross many. The native kernels take rows in fours, and
    columns in whole blocks of theirs; the Triton kernels take rows in fours, and 16 columns a program, in two steps."""
    native = {"LOGIT_BYTES": 1, "TILE_ROWS": 4, "TILE_COLUMNS": 1024, "UPCAST_BYTES": 1}
    sweep = configs.Sweep(loads=2, lanes=2, warps=1, span=16, width=8)
    small = configs.Config(sweep, sweep, sweep, sweep, chunk=8)
    launches = {
        "CONFIGS": dict.fromkeys(configs.CONFIGS, small),
        "ROW_MULTIPLE": 4,
        "HEAD_TILE_BYTES": 1,
        "_scratch_bytes": 1,
    }
    with (
        patch.multiple(tiles, TILE_COLUMNS=columns, TILE_BYTES=4 * columns * rows),
        patch.multiple(head_cpu, **native),
        patch.multiple(configs, **launches),
    ):
        yield


@contextmanager
def another_library(path: Path, abi: int = native.ABI) -> Iterator[None]:
    """native opens the file at ``path`` in the place of the shipped one."""
    try:
        with patch.multiple(native, LIBRARY=path, ABI=abi):
            _forget()
            yield
    finally:
        _forget()


def _forget() -> None:
    """What was found out about the library, and chosen by it."""
    native._open.cache_clear()
    dispatch.remembered.cache_clear()
