"""The linear operators hold no tensor of rows x vocabulary: scratch is bounded, whatever N and V."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any
from unittest.mock import patch

import cases
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rmx_kernels import dispatch
from rmx_kernels.head.cpu import LOGIT_BYTES
from rmx_kernels.head.reference import TILE_BYTES

OPERATORS = ("linear_entropy_topk", "linear_gated_contrastive_loss", "linear_logprob_kl", "linear_divergence")
IMPLS = ("reference", "cpu")  # that of the Triton kernels is larger than these shapes: test_triton_gpu.py
SCRATCH = 64 << 20  # bytes, the bound that is documented for the CPU

LARGEST = {"reference": 2 * TILE_BYTES, "cpu": LOGIT_BYTES}  # bytes of one tensor

H = 64
SHAPES = [  # N, V: 32 MiB of logits in float32, then 128 MiB, by more rows or by a larger vocabulary
    (512, 16384),
    (2048, 16384),
    (512, 65536),
]


class Ledger(TorchDispatchMode):
    """Bytes of the storages that torch operators make while it is entered: the largest, and the most alive at once."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {StorageWeakRef(x.untyped_storage()) for x in known}
        self.alive: dict[StorageWeakRef, int] = {}
        self.largest = self.peak = self.most_elements = 0
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = StorageWeakRef(x.untyped_storage())
                if storage not in self.known:
                    self.alive[storage] = x.untyped_storage().nbytes()
                    self.largest = max(self.largest, self.alive[storage])
                    self.most_elements = max(self.most_elements, x.numel())
                    self.shapes.add(tuple(x.shape))
        self.alive = {storage: size for storage, size in self.alive.items() if not storage.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@contextmanager
def inside(ledger: Ledger, op: str, impl: str) -> Iterator[Ledger]:
    """Enter the ledger here, and anew in the kernels of a registered operator, where a dispatch mode sees nothing."""

    def seen(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(kernel)
        def run(*arguments: Any) -> Any:
            with ledger:
                return kernel(*arguments)

        return run

    compared = "divergences" if op == "linear_divergence" else "losses"
    module = dispatch.kernels("statistics" if op.endswith("topk") else compared, impl)
    functions = (
        "divergence",
        "divergence_backward",
        "contrastive_loss",
        "contrastive_loss_backward",
        "logprob_kl",
        "logprob_kl_backward",
    )
    names = [name for name in (*functions, "forward", "backward") if hasattr(module, name)]
    assert names
    with patch.dict(vars(module), {name: seen(getattr(module, name)) for name in names}), ledger:
        yield ledger


@cache
def measure(
    op: str,
    impl: str,
    device: str,
    N: int,
    V: int,
    trained: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
) -> tuple[Ledger, int]:
    """The ledger of a forward and backward, and the bytes of the gradients that it returns."""
    arguments = cases.make(op, (N,), V, H, dtype, device)
    if "lora" in trained:
        arguments = cases.with_lora(arguments, 8)
    inputs = [x.requires_grad_() for name in trained for x in cases.tensors({name: arguments[name]})]
    with inside(Ledger(cases.tensors(arguments)), op, impl) as ledger:
        outputs = cases.differentiable(cases.call(op, arguments, impl=impl))
        if outputs:
            torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    return ledger, sum(x.nbytes for x in inputs)


@pytest.mark.thorough
@pytest.mark.parametrize(("N", "V"), SHAPES)
@pytest.mark.parametrize("trained", [(), ("hidden",), ("hidden", "weight", "bias"), ("hidden", "lora")])
def test_scratch_is_bounded(op: str, device: str, impl: str, N: int, V: int, trained: tuple[str, ...]) -> None:
    """No large tensor but the gradients, which may be held once more until they are scaled and returned."""
    ledger, gradients = measure(op, impl, device, N, V, trained)
    weight = V * H * 4 if "weight" in trained else 0
    assert ledger.peak <= SCRATCH + 2 * gradients
    assert 1 << 20 <= ledger.largest <= max(LARGEST.get(impl, SCRATCH), weight)  # at least a tile, which is seen


@pytest.mark.thorough
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight", "bias"), ("hidden", "lora")])
@pytest.mark.parametrize("op", OPERATORS)
def test_native_scratch_is_bounded_in_low_precision(op: str, trained: tuple[str, ...]) -> None:
    """Room for twice as many logits is no room for all of them. The reference works in float32 anyway."""
    ledger, gradients = measure(op, "cpu", "cpu", 512, 65536, trained, torch.bfloat16)
    assert ledger.peak <= SCRATCH + 2 * gradients
    assert ledger.most_elements < 512 * 65536


@pytest.mark.thorough
@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "lora")])
def test_scratch_does_not_grow(op: str, device: str, impl: str, trained: tuple[str, ...]) -> None:
    """Four times the rows or four times the vocabulary: some more row statistics, no more tiles."""
    d_lora_weight = 8 * 4 if "lora" in trained else 0  # bytes a token, of a gradient that is returned
    peaks = [measure(op, impl, device, N, V, trained)[0].peak - V * d_lora_weight for N, V in SHAPES]
    assert max(peaks) - peaks[0] <= 4 << 20


def test_lora_on_a_frozen_head_makes_nothing_of_its_size(op: str, device: str, impl: str) -> None:
    """Neither W + scale B A nor a gradient of W."""
    ledger, _ = measure(op, impl, device, *SHAPES[0], ("hidden", "lora"))
    V = SHAPES[0][1]
    assert not ledger.shapes & {(V, H), (H, V)}
    assert (V, 8) in ledger.shapes  # the gradient of B, which is seen


def test_nothing_is_kept_for_a_backward_that_cannot_come(op: str, device: str, impl: str) -> None:
    """Without grad mode, a trainable head costs no gradient."""
    arguments = cases.make(op, (64,), 16384, 64, device=device)
    for name in cases.DIFFERENTIABLE[op]:
        arguments[name].requires_grad_()
    known = [v for v in arguments.values() if isinstance(v, Tensor)]
    with torch.no_grad(), inside(Ledger(known), op, impl) as ledger:
        result = cases.call(op, arguments, impl=impl)
    with torch.no_grad(), inside(Ledger(known), op, impl) as frozen:
        for name in cases.DIFFERENTIABLE[op]:
            arguments[name].requires_grad_(False)
        cases.call(op, arguments, impl=impl)
    assert cases.differentiable(result) == []
    assert ledger.peak == frozen.peak


def test_ledger_sees_full_logits(device: str, impl: str, op: str) -> None:
    """The measure itself: it counts what eager code would hold."""
    arguments = cases.make(op, (256,), 16384, 64, device=device)
    with Ledger([v for v in arguments.values() if isinstance(v, Tensor)]) as ledger:
        (arguments["hidden"] @ arguments["weight"].T).log_softmax(-1)
    assert ledger.largest == 256 * 16384 * 4 and ledger.peak == 2 * ledger.largest
