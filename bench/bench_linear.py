"""The linear operators at the demo model's head (SmolLM2-135M: H = 576, V = 49152), after a correctness check."""

import pytest
import torch
from providers import DEVICE, LOSS, STATS
from torch import Tensor

N, H, V, K = 256, 576, 49152, 8
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


@pytest.mark.parametrize("provider", STATS)
def bench_linear_entropy_topk(benchmark, case: dict[str, Tensor], provider: str) -> None:  # type: ignore[no-untyped-def]
    args = case["hidden"], case["weight"], case["target"], K
    exact = STATS["eager"](case["hidden"].double(), case["weight"].double(), case["target"], K)
    entropy = STATS[provider](*args)[0]
    assert entropy is not None
    torch.testing.assert_close(entropy.double(), exact[0].double(), rtol=0, atol=2e-2)  # bf16 logits of eager
    benchmark.pedantic(lambda: STATS[provider](*args), rounds=7, warmup_rounds=2)


@pytest.mark.parametrize("provider", LOSS)
def bench_linear_gated_contrastive_loss(benchmark, case: dict[str, Tensor], provider: str) -> None:  # type: ignore[no-untyped-def]
    def step() -> Tensor:
        hidden = case["hidden"].detach().requires_grad_()
        LOSS[provider](hidden, *(case[name] for name in ("base", "weight", "target", "ce", "kl"))).backward()
        assert hidden.grad is not None
        return hidden.grad

    exact = torch.autograd.functional.vjp(
        lambda h: LOSS["eager"](h, case["base"].double(), case["weight"].double(), *_rest(case)),
        case["hidden"].double(),
    )[1]
    assert (step().double() - exact).norm() < 1e-2 * exact.norm()
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


def _rest(case: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return case["target"], case["ce"], case["kl"]
