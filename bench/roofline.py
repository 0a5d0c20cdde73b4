"""The least that an operator must do: bare torch.mm of its shapes, or its reads and writes at a large copy's rate.

Floors are timed in the same rounds as the providers, because a shared machine's speed drifts. A share above 100 % means
that the work was less than the floor counts (a row without an anchor needs fewer products) or came from a cache.
"""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from providers import DEVICE
from torch import Tensor

COPY_BYTES = (2 << 30) if DEVICE == "cuda" else (128 << 20)  # far beyond every cache
FLUSH_BYTES = 256 << 20  # several times the L2 cache of a GPU
HEAD_START = 2_000_000  # cycles, about 1 ms, in which a call's launches are queued
GEMM_SIZES = (256, 512, 1024, 2048, 4096, 8192)[: 6 if DEVICE == "cuda" else 4]  # of square products
GEMM_SECONDS = 2.0  # for those of a dtype: a CPU without bfloat16 takes minutes for the largest
LOGIT_BYTES = 1 << 30  # of the products' output, so that a floor fits wherever the inputs do


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@functools.cache
def _flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)


def flush() -> None:
    """Empty a GPU's L2 cache. On a CPU the interleaved rounds do that, as a trainer's other work does."""
    if DEVICE == "cuda":
        _flush_buffer().zero_()
        synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Of one call. On a GPU the device's own time: it is kept busy first, so that it never waits for a launch."""
    synchronize()
    if DEVICE == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Floor:
    label: str
    flops: int
    bytes: int  # that have to be moved: inputs read, results written
    measure: Callable[[], float]  # one timed round, in seconds


def gemm_floor(x: Tensor, weight: Tensor, forward: int, backward: int = 0) -> Floor:
    """So many bare products x [N, H] @ weight.T and dz [N, V] @ weight."""
    (N, H), V = x.shape, len(weight)
    rows = min(N, max(1, LOGIT_BYTES // (V * x.element_size())))
    logits = torch.empty(rows, V, dtype=x.dtype, device=x.device).fill_(1e-3)  # never NaN or denormal
    out = torch.empty(rows, H, dtype=x.dtype, device=x.device)

    def there() -> None:
        for part in x.split(rows):
            torch.mm(part, weight.T, out=logits[: len(part)])

    def back() -> None:
        for part in x.split(rows):
            torch.mm(logits[: len(part)], weight, out=out[: len(part)])

    def measure() -> float:
        return forward * seconds(there) + (backward * seconds(back) if backward else 0.0)

    count = forward + backward
    label = f"{count} GEMM{'s' if count > 1 else ''}"
    return Floor(label, count * 2 * N * H * V, count * (N + V) * H * x.element_size(), measure)


@functools.cache
def _copy_buffers() -> tuple[Tensor, Tensor]:
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=DEVICE)
    return source, torch.ones_like(source)


def copy_seconds() -> float:
    source, destination = _copy_buffers()
    return seconds(lambda: destination.copy_(source))


def copy_floor(moved: int, label: str) -> Floor:
    """``moved`` bytes at the rate of a large copy, which moves two bytes for each it reads."""
    return Floor(label, 0, moved, lambda: copy_seconds() * moved / (2 * COPY_BYTES))


@dataclass(frozen=True)
class Rates:
    gemm: dict[str, float]  # FLOP/s by dtype
    copy: float  # bytes/s, reads and writes together


@functools.cache
def rates() -> Rates:
    """Medians at the start of the run: the largest square products that GEMM_SECONDS allow, and the large copy."""
    gemm = {}
    for name, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        for size in GEMM_SIZES:
            x = torch.randn(size, size, device=DEVICE).to(dtype)  # products of constants run faster
            out = torch.empty_like(x)
            times = [seconds(lambda x=x, out=out: torch.mm(x, x, out=out)) for _ in range(6)]  # type: ignore[misc]
            gemm[name] = 2 * size**3 / statistics.median(times[1:])
            if 8 * sum(times) > GEMM_SECONDS:  # the next ones
                break
    return Rates(gemm, 2 * COPY_BYTES / statistics.median([copy_seconds() for _ in range(6)][1:]))
