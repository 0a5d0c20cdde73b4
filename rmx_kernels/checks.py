"""Input checks, made once at the public door. Each error names the argument, what was expected and what came."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def is_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    whole(name, value)
    no_tangent(name, value)


def is_sharded(value: object) -> bool:
    """Whether it is a DTensor, as the parameters of fully_shard (FSDP2) are outside of its forward."""
    return hasattr(value, "full_tensor")


def whole(name: str, value: Tensor) -> None:
    """No DTensor, which does not tell whether its rows are to be gathered or are a part of the vocabulary."""
    if is_sharded(value):
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got a DTensor; pass rmx_kernels.gathered(parameter), or for a "
            "head that is sharded over ranks parameter.to_local() with process_group="
        )


def no_tangent(name: str, value: Tensor) -> None:
    """The operators have no forward-mode derivative; torch would take it for zero."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name}: expected a tensor without a tangent, since forward-mode differentiation (torch.func.jvp, jacfwd, "
            "forward_ad) is not implemented, got one; use backward or torch.autograd.grad"
        )


def floating(name: str, value: object, min_dims: int) -> None:
    """A floating-point tensor with at least ``min_dims`` dimensions and a last one that is not empty."""
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {value.dtype}")
    if value.dim() < min_dims:
        raise ValueError(f"{name}: expected at least {min_dims} dimension(s), got shape {tuple(value.shape)}")
    if value.shape[-1] == 0:
        raise ValueError(f"{name}: expected a last dimension of at least 1, got shape {tuple(value.shape)}")


def like(name: str, value: object, other_name: str, other: Tensor, mixed: bool = False) -> None:
    """A tensor with the shape, dtype and device of another; ``mixed``: with a dtype that is multiplied with its."""
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.shape != other.shape:
        raise ValueError(f"{name}: expected the shape of {other_name}, {tuple(other.shape)}, got {tuple(value.shape)}")
    if mixed:
        mixable(name, value, other_name, other)
    elif value.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {value.dtype}")
    same_device(name, value, other_name, other)


def mixable(name: str, value: Tensor, other_name: str, other: Tensor, part: str = "") -> None:
    """Of two operands of one product: float64 stands alone, the others may differ (:func:`logits.operand_dtype`)."""
    if value.dtype not in FLOATS or (value.dtype == torch.float64) != (other.dtype == torch.float64):
        expected = "float64" if other.dtype == torch.float64 else "bfloat16, float16 or float32"
        raise TypeError(f"{name}: expected {part}{expected}, since {other_name} has {other.dtype}, got {value.dtype}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def frozen(name: str, value: Tensor, why: str) -> None:
    if torch.is_grad_enabled() and value.requires_grad:
        raise ValueError(f"{name}: expected a tensor that requires no gradient, {why}; pass {name}.detach()")


def _one_a_row(name: str, what: str, value: Tensor, rows: Sequence[int], device: torch.device) -> None:
    if tuple(value.shape) != tuple(rows):
        raise ValueError(f"{name}: expected one {what} per row, shape {tuple(rows)}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected device {device}, got {value.device}")


def candidates(target: object, rows: Sequence[int], device: torch.device) -> None:
    """Token ids, one a row, or of shape [*rows, K]."""
    several = isinstance(target, Tensor) and target.dim() == len(rows) + 1
    shape = (*rows, *target.shape[-1:]) if several and isinstance(target, Tensor) else rows
    targets(target, shape, None, device)


def targets(
    target: object, rows: Sequence[int], vocab: int | None, device: torch.device, used: Tensor | None = None
) -> None:
    """Token ids of shape ``rows`` in [0, vocab); where ``used`` is given, only its True rows are looked at.

    With None for the vocabulary the registered operator looks at the range, which it has to in compiled code anyway.
    """
    is_tensor("target", target)
    assert isinstance(target, Tensor)
    if target.dtype not in INTEGERS:
        raise TypeError(f"target: expected int64 or int32 token ids, got {target.dtype}")
    _one_a_row("target", "id", target, rows, device)
    if vocab is not None and not torch.compiler.is_compiling():
        target_range(target, vocab, used)


def target_range(target: Tensor, vocab: int, used: Tensor | None = None) -> None:
    """Token ids in [0, vocab), in the rows that are used.

    Looked at on a CPU alone: a GPU would be waited for, and its kernels return NaN in such rows.
    """
    if target.device.type != "cpu":
        return
    bad = (target < 0) | (target >= vocab)
    if used is not None:
        bad = bad & used
    if bad.any():
        raise ValueError(f"target: expected ids in [0, {vocab}), got {int(target[bad].flatten()[0])}")


def row_weights(name: str, value: object, rows: Sequence[int], device: torch.device) -> None:
    is_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    _one_a_row(name, "weight", value, rows, device)
    frozen(name, value, "weights are constants (use linear_logprob_kl for differentiable ones)")


def full_precision(name: str, value: Tensor) -> None:
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {value.dtype}")


def head(hidden: Tensor, weight: object, bias: object, of: str = "") -> None:
    """weight [V, H] and bias [V] on the device of hidden [..., H]; ``of`` begins the names of all three."""
    floating(f"{of}weight", weight, 2)
    assert isinstance(weight, Tensor)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(f"{of}weight: expected shape [V, {hidden.shape[-1]}], got {tuple(weight.shape)}")
    mixable(f"{of}weight", weight, f"{of}hidden", hidden)
    same_device(f"{of}weight", weight, f"{of}hidden", hidden)
    if bias is None:
        return
    floating(f"{of}bias", bias, 1)
    assert isinstance(bias, Tensor)
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{of}bias: expected shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    mixable(f"{of}bias", bias, f"{of}hidden", hidden)
    same_device(f"{of}bias", bias, f"{of}hidden", hidden)


def lora(hidden: Tensor, weight: Tensor, value: object) -> None:
    """None, or (A [r, H], B [V, r], scale), both tensors on the device of hidden [..., H]."""
    if value is None:
        return
    if not isinstance(value, tuple):
        raise TypeError(f"lora: expected a tuple (A, B, scale) or None, got {type(value).__name__}")
    if len(value) != 3:
        raise ValueError(f"lora: expected a tuple (A, B, scale), got {len(value)} value(s)")
    A, B, scale = value
    for part, x in (("A", A), ("B", B)):
        if not isinstance(x, Tensor):
            raise TypeError(f"lora: expected {part} to be a torch.Tensor, got {type(x).__name__}")
        whole(f"lora: {part}", x)
        no_tangent(f"lora: {part}", x)
        mixable("lora", x, "hidden", hidden, f"{part} of ")
        if x.device != hidden.device:
            raise ValueError(f"lora: expected {part} on the device of hidden, {hidden.device}, got {x.device}")
    H, V = hidden.shape[-1], weight.shape[0]
    if A.dim() != 2 or A.shape[1] != H or A.shape[0] == 0:
        raise ValueError(f"lora: expected A of shape [r, {H}] with r >= 1, got {tuple(A.shape)}")
    if tuple(B.shape) != (V, A.shape[0]):
        raise ValueError(f"lora: expected B of shape [{V}, {A.shape[0]}], r as in A, got {tuple(B.shape)}")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"lora: expected scale to be a number, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:  # as in scaling
        raise ValueError(f"lora: expected scale to be a finite number, got {scale}")


def operand(
    hidden: object, weight: object, bias: object, lora_pair: object, temperature: object, softcap: object
) -> None:
    """What every linear operator makes its logits of."""
    floating("hidden", hidden, 1)
    assert isinstance(hidden, Tensor)
    head(hidden, weight, bias)
    assert isinstance(weight, Tensor)
    lora(hidden, weight, lora_pair)
    scaling(temperature, softcap, hidden)


def process_group(value: object) -> None:
    if not isinstance(value, getattr(torch.distributed, "ProcessGroup", ())):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup that this process is in, or None, got "
            f"{type(value).__name__}"
        )


def base(name: str, value: object, other_name: str, other: Tensor, mixed: bool = False) -> None:
    """The frozen base's rows, :func:`like` the student's."""
    like(name, value, other_name, other, mixed)
    assert isinstance(value, Tensor)
    frozen(name, value, "the base distribution is a constant")


def loss_rows(target: object, ce_weight: object, kl_weight: object, rows: Sequence[int], device: torch.device) -> None:
    """One target and two weights a row; the registered operator looks at the range of the targets."""
    row_weights("ce_weight", ce_weight, rows, device)
    row_weights("kl_weight", kl_weight, rows, device)
    targets(target, rows, None, device)


def scaling(temperature: object, softcap: object, x: Tensor | None, of: str = "") -> None:
    """Of rows x [..., columns], where they are known: a temperature for all of them, or a tensor with one for each.

    ``of``: what the names begin with.
    """
    if isinstance(temperature, Tensor):
        row_temperature(temperature, x, of)
        temperature = 1.0
    _above_0(f"{of}temperature", temperature, "a number or a tensor")
    if softcap is not None:
        _above_0(f"{of}softcap", softcap, "a number")


def _above_0(name: str, value: object, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not 0 < value < math.inf:  # refuses NaN too; math.isfinite would break torch.compile's graph
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def row_temperature(value: Tensor, x: Tensor | None, of: str = "") -> None:
    """A floating-point constant, one a row of x where they are known; the registered operator looks at its range."""
    name = f"{of}temperature"
    no_tangent(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a number or a floating-point tensor, got {value.dtype}")
    if x is not None:
        _one_a_row(name, "temperature", value, x.shape[:-1], x.device)
    frozen(name, value, "temperatures are constants")


def temperature_of(temperature: Any, x: Tensor, live: Tensor) -> Any:
    """That of the live ones [n] among the rows of x [..., columns]; a number as it is."""
    if not isinstance(temperature, Tensor):
        return temperature
    row_temperature(temperature, x)
    return temperature[live]


def temperature_range(value: Tensor | None, used: Tensor | None = None, of: str = "") -> None:
    """Finite numbers above 0, in the rows that are used; looked at as the targets are in :func:`target_range`."""
    if value is None or value.device.type != "cpu":
        return
    bad = ~((value > 0) & (value < math.inf))
    if used is not None:
        bad = bad & used
    if bad.any():
        raise ValueError(f"{of}temperature: expected finite numbers above 0, got {float(value[bad].flatten()[0])}")


def top_k(k: object, vocab: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 0 <= k <= vocab:
        raise ValueError(f"k: expected 0 <= k <= V = {vocab}, got {k}")
