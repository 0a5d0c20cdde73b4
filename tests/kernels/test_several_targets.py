"""log p of several given ids a row: values and gradients of full logits, in one operator with the other statistics."""

from typing import Any

import cases
import pytest
import torch
from cases import tiny_tiles
from torch import Tensor

OPERATORS = ("entropy_topk", "linear_entropy_topk")
N, V, K = 6, 23, 4


def given(op: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments with K targets a row, one of them twice, and their leaves."""
    arguments = cases.make(op, (2, N // 2), V, 7, dtype, device)
    if op.startswith("linear"):
        arguments = cases.with_lora(arguments)
    target = cases.randint(V, 2, N // 2, K, seed=3, device=device)
    target[..., 1] = target[..., 0]
    return cases.leaves(op, arguments | {"target": target} | changes)


def eager(arguments: dict[str, Any], temperature: float = 1.0, softcap: float | None = None) -> Tensor:
    if "logits" in arguments:
        z = arguments["logits"]
    else:
        A, B, scale = arguments["lora"]
        x = arguments["hidden"]
        z = x @ arguments["weight"].T + arguments["bias"] + scale * (x @ A.T) @ B.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(-1)


@pytest.mark.parametrize("scaling", [{}, cases.SCALED], ids=["plain", "scaled"])
@pytest.mark.parametrize("k", [0, 3])
def test_values_and_gradients(op: str, device: str, impl: str, fp64: torch.dtype, k: int, scaling: Any) -> None:
    arguments, inputs = given(op, fp64, device, k=k)
    log_p = eager(arguments, **scaling)
    for tile in ((5, 3), (8192, 256)):
        with tiny_tiles(*tile):
            stats = cases.call(op, arguments, impl=impl, **scaling)
            expected = [log_p.gather(-1, arguments["target"]), -(log_p.exp() * log_p).sum(-1)]
            got = [stats.logprob, stats.entropy]
            if k:
                expected.append(log_p.gather(-1, stats.topk_ids))
                got.append(stats.topk_logprobs)
            torch.testing.assert_close(got, expected)
            up = cases.cotangents(expected)
            results = [torch.autograd.grad(x, inputs, up, retain_graph=True) for x in (got, expected)]
            torch.testing.assert_close(*results)


def test_as_exact_as_one_target(op: str, device: str, impl: str, dtype: torch.dtype) -> None:
    arguments, _ = given(op, dtype, device)
    stats = cases.call(op, arguments, impl=impl, **cases.SCALED)
    assert stats.logprob.shape == arguments["target"].shape
    for j in range(K):
        one = cases.call(
            op, arguments | {"target": arguments["target"][..., j].contiguous()}, impl=impl, **cases.SCALED
        )
        torch.testing.assert_close(stats.logprob[..., j], one.logprob, rtol=2e-6, atol=2e-6)


def test_no_target_and_no_row(op: str, device: str, impl: str) -> None:
    arguments, inputs = given(op, torch.float32, device)
    for shape in ((2, N // 2, 0), (0, N // 2, K)):
        own = {n: v[: shape[0]] if n in ("logits", "hidden") else v for n, v in arguments.items()}
        target = own["target"].new_zeros(shape)
        stats = cases.call(op, own | {"target": target}, impl=impl)
        assert stats.logprob.shape == shape
        assert not torch.autograd.grad(stats.logprob.sum(), inputs[:1])[0].any()


def test_compiled(op: str, device: str, impl: str) -> None:
    arguments, inputs = given(op, torch.float32, device)
    function = torch.compile(lambda: cases.call(op, arguments, impl=impl).logprob, fullgraph=True, backend="aot_eager")
    got, expected = (
        [x, *torch.autograd.grad(x, inputs, cases.cotangents([x]))]
        for x in (function(), cases.call(op, arguments, impl=impl).logprob)
    )
    cases.assert_same_bits(got, expected)


def test_wrong_ids(op: str, device: str, impl: str) -> None:
    arguments, _ = given(op, torch.float32, device)
    target = arguments["target"].clone()
    target[0, 0, 2] = V
    if device == "cpu":
        with pytest.raises(ValueError, match=r"^target: expected ids in \[0, 23\), got 23"):
            cases.call(op, arguments | {"target": target}, impl=impl)
    with pytest.raises(ValueError, match=r"^target: expected one id per row"):
        cases.call(op, arguments | {"target": arguments["target"][None]}, impl=impl)
