"""What only a GPU shows: real sizes, addresses beyond 32 bits, captured graphs, other devices, memory."""

import importlib
from typing import Any

import cases
import pytest
import torch
from cases import assert_same_bits
from torch import Tensor

import rmx_kernels
from rmx_kernels.head import configs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

V, H = 151936, 1536  # Qwen2.5-1.5B


def make(N: int, V: int = V, H: int = H, gated: float = 0.03, dtype: torch.dtype = torch.bfloat16) -> cases.Arguments:
    """Arguments of the linear loss, ``gated`` of whose rows decide while the others are anchored."""
    place: Any = {"dtype": dtype, "device": "cuda"}
    hidden = torch.randn(N, H, **place)
    gate = torch.rand(N, device="cuda") < gated
    return {
        "hidden": hidden,
        "base_hidden": hidden + torch.randn(N, H, **place) / 50,
        "weight": torch.randn(V, H, **place) / H**0.5,
        "target": torch.randint(V, (N,), device="cuda"),
        "ce_weight": torch.where(gate, torch.randn(N, device="cuda"), 0.0),
        "kl_weight": torch.where(gate, 0.0, 0.2),
    }


def statistics(given: cases.Arguments, rows: slice) -> list[Tensor]:
    stats = rmx_kernels.linear_entropy_topk(
        given["hidden"][rows], given["weight"], given["target"][rows], k=8, impl="triton"
    )
    return [x for x in stats if x is not None]


def loss_and_gradient(given: cases.Arguments) -> list[Tensor]:
    hidden = given["hidden"].detach().requires_grad_()
    result = rmx_kernels.linear_gated_contrastive_loss(**given | {"hidden": hidden}, impl="triton")
    return [result.loss.detach(), result.logprob, result.kl, torch.autograd.grad(result.loss, hidden)[0]]


def test_statistics_of_more_than_2_to_the_31_logits() -> None:
    N = 2**31 // V + 512
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    last = logits[-256:].detach().clone().requires_grad_()
    target = torch.randint(V, (N,), device="cuda")
    got, expected = (
        rmx_kernels.entropy_topk(x, t, k=8, impl="triton") for x, t in ((logits, target), (last, target[-256:]))
    )
    assert_same_bits([x[-256:] for x in got if x is not None], [x for x in expected if x is not None])
    (got.entropy.sum() + got.logprob.sum()).backward()
    (expected.entropy.sum() + expected.logprob.sum()).backward()
    assert_same_bits([logits.grad[-256:]], [last.grad])


def test_losses_of_more_than_2_to_the_31_logits() -> None:
    N = 2**31 // V + 512
    student = torch.empty(N, V, dtype=torch.bfloat16, device="cuda").normal_()
    base = (student + 0.1).requires_grad_(False)
    base[:, ::7] -= 0.5
    given = make(N, V=2, H=2)
    rows = [given[name] for name in ("ce_weight", "kl_weight")]
    target = torch.randint(V, (N,), device="cuda")
    results = []
    for part in (slice(0, N), slice(N - 256, N)):
        x = student[part].detach().requires_grad_()
        result = rmx_kernels.gated_contrastive_loss(
            x, base[part], target[part], *(w[part] for w in rows), impl="triton"
        )
        (gradient,) = torch.autograd.grad(result.loss, x)
        results.append([result.logprob[-256:], result.kl[-256:], gradient[-256:]])
    assert_same_bits(*results)


def test_many_rows() -> None:
    """A grid's second dimension ends at 65535."""
    arguments = cases.make("entropy_topk", (70001,), 64, device="cuda")
    cases.check("entropy_topk", arguments, "triton")


@pytest.mark.parametrize("N", [1, 16, 128, 129, 500, 1000])
def test_rows_do_not_depend_on_their_number(N: int) -> None:
    """Values have the same bits. A gradient sums over V in an order that the library chooses by the number of rows."""
    given = make(2048, gated=0.5)
    assert_same_bits(statistics(given, slice(0, N)), [x[:N] for x in statistics(given, slice(0, 2048))])
    part = {n: x if n == "weight" else x[:N] for n, x in given.items()}
    _, *values, gradient = loss_and_gradient(part)
    _, *all_values, all_gradients = loss_and_gradient(given)
    assert_same_bits(values, [x[:N] for x in all_values])
    scale = all_gradients[:N].float().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(gradient / scale, all_gradients[:N] / scale, rtol=2**-7, atol=2**-12)


def test_two_runs_give_the_same_bits_at_real_size() -> None:
    given = make(1500)
    assert_same_bits(loss_and_gradient(given), loss_and_gradient(given))
    assert_same_bits(*(statistics(given, slice(0, 1500)) for _ in range(2)))


@pytest.mark.parametrize("op", ["linear_entropy_topk", "linear_gated_contrastive_loss"])
def test_as_good_as_eager_at_real_size(op: str) -> None:
    given = make(256, gated=0.3)
    if op == "linear_entropy_topk":
        given = {n: given[n] for n in ("hidden", "weight", "target")} | {"k": 8}
    given["bias"] = torch.zeros(V, dtype=torch.bfloat16, device="cuda")
    cases.check(op, given, "triton")


def test_captured_in_a_graph() -> None:
    """Forward and backward, replayed on other inputs; there every row is multiplied, weight or not."""
    given = make(300, V=5003, H=256, gated=0.3)
    given["kl_weight"][:40] = 0
    given["ce_weight"][20:40] = 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_and_gradient(given)
        statistics(given, slice(0, 300))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_gradient(given) + statistics(given, slice(0, 300))
    given["hidden"].mul_(0.5)
    given["ce_weight"].mul_(-2)
    graph.replay()
    torch.cuda.synchronize()
    expected = loss_and_gradient(given) + statistics(given, slice(0, 300))
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("N", [2048, 16384])
def test_extra_memory(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 32 MiB beside the scratch and what is returned, whatever N and V."""
    monkeypatch.setattr(configs, "_scratch_bytes", 224 << 20)
    given = make(N)
    for call in (lambda: loss_and_gradient(given), lambda: statistics(given, slice(0, N))):
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        returned = 2 * sum(x.nbytes for x in kept)  # d_hidden, and its product with the upstream gradient
        assert torch.cuda.max_memory_allocated() - before <= (256 << 20) + returned


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    given = {n: x.to("cuda:1") for n, x in make(64, V=1000, H=64).items()}
    here = {n: x.to("cuda:0") for n, x in given.items()}
    assert torch.cuda.current_device() == 0
    got = [x.to("cuda:0") for x in loss_and_gradient(given) + statistics(given, slice(0, 64))]
    assert_same_bits(got, loss_and_gradient(here) + statistics(here, slice(0, 64)))


def test_head_gradients_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "HEAD_TILE_BYTES", 1 << 20)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        cases.check(
            "linear_gated_contrastive_loss",
            cases.make("linear_gated_contrastive_loss", (700,), 5003, 64, dtype, "cuda"),
            "triton",
        )


def test_no_scalar_is_read_from_the_device() -> None:
    """Statistics and logit losses never wait; the linear loss waits for the number of live rows alone."""
    importlib.import_module("rmx_kernels.statistics.triton")
    logits = torch.randn(8, 1000, device="cuda", requires_grad=True)
    target, w = torch.zeros(8, dtype=torch.int64, device="cuda"), torch.ones(8, device="cuda")
    rmx_kernels.entropy_topk(logits, target, k=4).lse.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rmx_kernels.entropy_topk(logits, target, k=4).lse.sum().backward()
        rmx_kernels.gated_contrastive_loss(logits, logits.detach(), target, w, w).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
