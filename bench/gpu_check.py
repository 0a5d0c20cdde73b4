"""One GPU, one command, four minutes: the tests that need it, then the headline rows next to other libraries.

    python bench/gpu_check.py [--no-tests] [--rows NAME ...] [--out FILE]

It runs from a plain checkout with torch, triton, numpy and pytest; a library that is not installed is left out. Every
row gives the device's time (median of rounds that alternate with the floor's), the floor, and their ratio. The floor is
the reads and writes at the rate of a large copy, or the bare products at their best number of rows.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import providers
import roofline
import torch
import triton
from torch import Tensor

import rmx_kernels
from rmx_kernels.head import configs
from rmx_kernels.logits import Logits

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 12
N = 8192
QWEN, LLAMA = (151936, 1536), (131072, 4096)  # V, H
TESTS = ["tests/kernels/test_triton_gpu.py", "tests/kernels/test_entropy_topk.py"]
TESTS += ["tests/kernels/test_gated_contrastive_loss.py", "tests/kernels/test_linear_gated_contrastive_loss.py"]
TESTS += ["tests/kernels/test_linear_entropy_topk.py", "tests/kernels/test_loss_rows.py"]

Work = Callable[[], Any]
Measured = dict[str, Any]


def interleaved(work: Work, floor: Work, rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians in seconds of the device's time of both, which take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(rounds + 2):
        for run, found in zip((work, floor), times, strict=True):
            roofline.flush()
            taken = roofline.seconds(run)
            if step > 1:
                found.append(taken)
    return statistics.median(times[0]), statistics.median(times[1])


def memory(work: Work) -> float:
    """Extra peak in MiB, results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


class Table:
    """The rows measured so far, printed as they come."""

    def __init__(self) -> None:
        self.rows: list[Measured] = []
        self.copy = roofline.rates().copy

    def add(self, name: str, provider: str, work: Work, floor: Work | float, rounds: int = ROUNDS) -> float:
        """``floor`` is the bare work, or bytes."""
        try:
            first = work()
            del first
            if callable(floor):
                taken, least = interleaved(work, floor, rounds)
            else:
                taken, copied = interleaved(work, copy_once, rounds)
                least = copied * floor / (2 * roofline.COPY_BYTES)
        except Exception as fault:  # a peer that fails is a row that says so; ours is an error at the end
            self.rows.append({"name": name, "provider": provider, "fault": f"{type(fault).__name__}: {fault}"[:300]})
            print(f"{name:58} {provider:12} FAILED {type(fault).__name__}: {str(fault)[:200]}", flush=True)
            return float("nan")
        row = {"name": name, "provider": provider, "ms": taken * 1e3, "floor_ms": least * 1e3, "share": least / taken}
        row["extra_mib"] = memory(work)
        self.rows.append(row)
        print(
            f"{name:58} {provider:12} {row['ms']:9.3f} ms  floor {row['floor_ms']:8.3f}  {row['share']:6.1%}"
            f"  {row['extra_mib']:7.0f} MiB",
            flush=True,
        )
        return taken


def copy_once() -> None:
    source, destination = roofline._copy_buffers()
    destination.copy_(source)


def logits_rows(table: Table) -> None:
    V = QWEN[0]
    ops = torch.ops.rmx_kernels
    target = torch.randint(V, (N,), device="cuda")
    row, one = torch.ones(N, device="cuda"), torch.ones((), device="cuda")
    needs = [True, False, False, False, False]
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        logits = torch.empty(N, V, dtype=dtype, device="cuda").normal_(std=4.0)
        for k in (0, 8, 64) if dtype == torch.bfloat16 else (0, 8):
            run = partial(rmx_kernels.entropy_topk, logits, target, k=k, impl="triton")
            table.add(f"entropy_topk k={k} {N}x{V} {name}", "rmx", run, logits.nbytes)
        stats = ops.vocab_stats(*Logits(logits), target, 8, False, "triton")
        upstream = (stats[4], stats[5], stats[6], stats[1], None, row, row, None)
        run = partial(ops.vocab_stats_backward, *Logits(logits), target, *upstream, needs, "triton")
        table.add(f"entropy_topk backward {N}x{V} {name}", "rmx", run, 2 * logits.nbytes)
        del logits, run
    logits = torch.empty(N, V, dtype=torch.bfloat16, device="cuda").normal_(std=4.0)
    base = logits + 0.1 * torch.randn_like(logits)
    gate = torch.rand(N, device="cuda") < 0.03
    for label, ce, kl in (("3 % gated", gate.float(), (~gate).float()), ("all anchored", row, row)):
        inputs = (*Logits(logits), base, target, ce, kl)
        run = partial(ops.contrastive_loss, *inputs, None, False, "triton")
        table.add(f"gated_contrastive_loss forward, {label} {N}x{V}", "rmx", run, 2 * logits.nbytes)
        run = partial(ops.contrastive_loss_backward, *inputs, run()[3], one, needs, "triton")
        table.add(f"gated_contrastive_loss backward, {label} {N}x{V}", "rmx", run, 3 * logits.nbytes)


def products(hidden: Tensor, weight: Tensor, forward: int, backward: int) -> Work:
    """Bare products in bfloat16, 1 GiB of logits at a time."""
    rows = max(128, (1 << 30) // (2 * len(weight)) // 128 * 128)
    logits = torch.empty(rows, len(weight), dtype=weight.dtype, device="cuda").normal_(std=1e-3)
    out = torch.empty_like(hidden)

    def run() -> None:
        for part, to in zip(hidden.split(rows), out.split(rows), strict=True):
            for _ in range(forward):
                torch.mm(part, weight.T, out=logits[: len(part)])
            for _ in range(backward):
                torch.mm(logits[: len(part)], weight, out=to)

    return run


def linear_rows(table: Table) -> None:
    for V, H in (QWEN, LLAMA):
        shape = f"{N}x{H}x{V}"
        hidden = torch.randn(N, H, dtype=torch.bfloat16, device="cuda")
        weight = torch.randn(V, H, dtype=torch.bfloat16, device="cuda") / H**0.5 * 3
        base = hidden + torch.randn_like(hidden) / 50
        target = torch.randint(V, (N,), device="cuda")
        gate = torch.rand(N, device="cuda") < 0.03
        ce, kl = gate.float(), (~gate) * 0.2
        one, three, two = products(hidden, weight, 1, 0), products(hidden, weight, 2, 1), products(hidden, weight, 1, 1)
        loss = partial(linear_loss, hidden, base, weight, target, ce, kl)
        for dtype in (torch.bfloat16, torch.float32):
            configs.set_logits_dtype(dtype)
            name = str(dtype).removeprefix("torch.") + " logits"
            statistics = partial(rmx_kernels.linear_entropy_topk, hidden, weight, target, k=8, impl="triton")
            table.add(f"linear_entropy_topk k=8 {shape} {name}", "rmx", statistics, one)
            table.add(f"linear_gated_contrastive_loss {shape} {name}", "rmx", loss, three)
            run = partial(cross_entropy, providers.provider(providers.CE_ONLY, "triton"), hidden, weight, target)
            table.add(f"cross-entropy alone {shape} {name}", "rmx", run, two)
        configs.set_logits_dtype(None)
        for peer in ("liger", "cce"):
            if not providers.missing(providers.CE_ONLY, peer):
                run = partial(cross_entropy, providers.provider(providers.CE_ONLY, peer), hidden, weight, target)
                table.add(f"cross-entropy alone {shape}", peer, run, two, rounds=6)
        for mib in (224, 448, 896, 1792):
            configs.set_scratch_bytes(mib << 20)
            table.add(f"linear_gated_contrastive_loss {shape} {mib} MiB", "rmx", loss, three, rounds=6)
        configs.set_scratch_bytes(None)


def linear_loss(hidden: Tensor, base: Tensor, weight: Tensor, target: Tensor, ce: Tensor, kl: Tensor) -> Tensor:
    h = hidden.detach().requires_grad_()
    loss = rmx_kernels.linear_gated_contrastive_loss(h, base, weight, target, ce, kl, impl="triton").loss
    return torch.autograd.grad(loss, h)[0]


def cross_entropy(loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    h = hidden.detach().requires_grad_()
    return torch.autograd.grad(loss(h, weight, target), h)[0]


def few_rows(table: Table) -> None:
    """A call on 1, 16 and 64 rows: the device's time and the time until its results are there."""
    V, H = QWEN
    weight = torch.randn(V, H, dtype=torch.bfloat16, device="cuda") / H**0.5
    for n in (1, 16, 64):
        logits = torch.randn(n, V, dtype=torch.bfloat16, device="cuda")
        hidden = torch.randn(n, H, dtype=torch.bfloat16, device="cuda")
        target = torch.randint(V, (n,), device="cuda")
        calls: dict[str, Work] = {
            "entropy_topk k=8": partial(rmx_kernels.entropy_topk, logits, target, k=8, impl="triton"),
            "linear_entropy_topk k=8": partial(
                rmx_kernels.linear_entropy_topk, hidden, weight, target, k=8, impl="triton"
            ),
        }
        for name, run in calls.items():
            with torch.no_grad():
                for _ in range(5):
                    run()
                device = statistics.median(roofline.seconds(run) for _ in range(30))
                wall = []
                for _ in range(50):
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    run()
                    torch.cuda.synchronize()
                    wall.append(time.perf_counter() - start)
            row = {"name": f"{name} {n} rows", "device_us": device * 1e6, "wall_us": statistics.median(wall) * 1e6}
            table.rows.append(row)
            print(f"{row['name']:58} device {row['device_us']:7.1f} us, wall {row['wall_us']:7.1f} us", flush=True)


FIRST = """
import time, torch, rmx_kernels
def call(k, V, dtype=torch.bfloat16):
    x = torch.randn(64, V, dtype=dtype, device="cuda"); t = torch.zeros(64, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize(); start = time.perf_counter()
    rmx_kernels.entropy_topk(x, t, k=k, impl="triton"); torch.cuda.synchronize()
    return time.perf_counter() - start
def loss(V):
    x = torch.randn(64, V, dtype=torch.bfloat16, device="cuda").requires_grad_(); w = torch.ones(64, device="cuda")
    t = torch.zeros(64, dtype=torch.int64, device="cuda"); torch.cuda.synchronize(); start = time.perf_counter()
    rmx_kernels.gated_contrastive_loss(x, x.detach(), t, w, w, impl="triton").loss.backward(); torch.cuda.synchronize()
    return time.perf_counter() - start
torch.randn(8, device="cuda").sum().item()
for name, seconds in (("k=8", call(8, 151936)), ("k=64", call(64, 151936)), ("another V", call(8, 49152)),
                      ("odd V", call(8, 50257)), ("float32", call(8, 151936, torch.float32)),
                      ("loss, forward and backward", loss(151936)), ("loss, another V", loss(49152))):
    print(f"{name}\t{seconds:.3f}")
"""


def first_calls(table: Table) -> None:
    """Seconds of first calls in a fresh process with an empty compilation cache."""
    environment = os.environ | {"TRITON_CACHE_DIR": f"/tmp/rmx-triton-{os.getpid()}", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([sys.executable, "-c", FIRST], env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        print(found.stderr[-2000:])
    for line in found.stdout.splitlines():
        name, seconds = line.split("\t")
        table.rows.append({"name": f"first call, {name}", "seconds": float(seconds)})
        print(f"first call, {name:46} {float(seconds):8.3f} s", flush=True)


GROUPS = {"logits": logits_rows, "linear": linear_rows, "few": few_rows, "first": first_calls}


def tests() -> int:
    parallel = (
        ["-n", "6"] if subprocess.run([sys.executable, "-c", "import xdist"], check=False).returncode == 0 else []
    )
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-o", "addopts=", *parallel, *TESTS]
    return subprocess.run([*command, "--benchmark-disable"], cwd=ROOT, check=False).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--rows", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA or ROCm device")
    failed = 0 if options.no_tests else tests()
    table = Table()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, copy {table.copy / 1e9:.0f} GB/s")
    for name in options.rows:
        GROUPS[name](table)
        torch.cuda.empty_cache()
    today = datetime.date.today().isoformat()
    out = options.out or ROOT / "bench/results" / f"{device.lower().replace(' ', '-')}-{today}.json"
    head = {"device": device, "date": today, "torch": torch.__version__, "triton": triton.__version__}
    head |= {"rmx": rmx_kernels.__version__, "copy_bytes_per_s": table.copy, "gemm_flops": roofline.rates().gemm}
    out.write_text(json.dumps({**head, "rows": table.rows}, indent=1) + "\n")
    print(f"Written to {out}")
    ours = [row["name"] for row in table.rows if "fault" in row and row["provider"] == "rmx"]
    if failed or ours:
        raise SystemExit(f"tests: {'failed' if failed else 'passed'}; rows of ours that failed: {ours or 'none'}")


if __name__ == "__main__":
    main()
