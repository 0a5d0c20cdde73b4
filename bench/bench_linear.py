"""The linear operators at the demo model's head (SmolLM2-135M: H = 576, V = 49152).

A provider is timed only if its error against float64 is at most twice that of eager PyTorch in the same precision.
"""

from collections.abc import Callable

import pytest
import torch
from providers import DEVICE, LOSS, STATS
from torch import Tensor

N, H, V, K = 256, 576, 49152, 8
Compute = Callable[..., Tensor]
GATED = 0.03  # share of rows that are decision tokens; the rest are anchored


@pytest.fixture(scope="module")
def case() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=g)
    gate = torch.rand(N, generator=g) < GATED
    tensors = {
        "hidden": hidden,
        "base": hidden + 0.05 * torch.randn(N, H, generator=g),
        "weight": torch.randn(V, H, generator=g) / H**0.5 * 3,
    }
    low = {name: tensor.to(DEVICE, torch.bfloat16) for name, tensor in tensors.items()}
    target = torch.randint(0, V, (N,), generator=g).to(DEVICE)
    return {**low, "target": target, "ce": gate.float().to(DEVICE), "kl": (~gate).float().to(DEVICE)}


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def entropy(provider: str, case: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    result = STATS[provider](case["hidden"].to(dtype), case["weight"].to(dtype), case["target"], K)[0]
    assert result is not None
    return result


def gradient(provider: str, case: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    hidden = case["hidden"].to(dtype).detach().requires_grad_()
    low = (case[name].to(dtype) for name in ("base", "weight"))
    LOSS[provider](hidden, *low, *(case[name] for name in ("target", "ce", "kl"))).backward()
    assert hidden.grad is not None
    return hidden.grad


def check_and_time(benchmark, compute: Compute, provider: str, case: dict[str, Tensor], rounds: int) -> None:  # type: ignore[no-untyped-def]
    exact = compute("eager", case, torch.float64)
    error, eager = (relative_error(compute(name, case), exact) for name in (provider, "eager"))
    assert error <= 2 * eager
    benchmark.extra_info["relative_error"] = error
    benchmark.pedantic(lambda: compute(provider, case), rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("provider", STATS)
def bench_linear_entropy_topk(benchmark, case: dict[str, Tensor], provider: str) -> None:  # type: ignore[no-untyped-def]
    check_and_time(benchmark, entropy, provider, case, rounds=9)


@pytest.mark.parametrize("provider", LOSS)
def bench_linear_gated_contrastive_loss(benchmark, case: dict[str, Tensor], provider: str) -> None:  # type: ignore[no-untyped-def]
    check_and_time(benchmark, gradient, provider, case, rounds=7)
