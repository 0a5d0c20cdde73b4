"""Chooses the launch configurations of the Triton kernels by measurement: `python bench/tune.py [--write]` on a GPU.

Each candidate of a kernel is timed on its operator at the shape of Qwen2.5-1.5B, after its results passed the bench's
check against float64, and its time is set against the bytes that it must move. What wins is a line for
rmx_kernels/head/configs.py, printed; with --write it also goes to bench/results/<device>-<date>-tuning.json. Nothing is
tuned when the library starts.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import providers
import roofline
import torch
import triton
from report import device_name

import rmx_kernels
from rmx_kernels.head import configs
from rmx_kernels.logits import Logits

N, V, H = 8192, 151936, 1536
SPANS, WARPS, STAGES = (0, 8192, 40960, 81920, 163840), (2, 4, 8), (1, 3)
MIB = 1 << 20


def milliseconds(work: Callable[[], Any]) -> float:
    return float(triton.testing.do_bench(work, warmup=50, rep=200, return_mode="median"))


def works(dtype: torch.dtype) -> dict[str, tuple[int, Callable[[], Any]]]:
    """By field of a Config: (bytes that must move, the call that is timed)."""
    logits = torch.empty(N, V, dtype=dtype, device="cuda").normal_()
    base = logits + torch.empty_like(logits).normal_(std=0.1)
    target = torch.randint(V, (N,), device="cuda")
    gate = torch.rand(N, device="cuda") < 0.03
    ce, kl = gate.float(), (~gate).float()
    ops = torch.ops.rmx_kernels
    z, needs = Logits(logits), [True, False, False, False, False]
    stats = ops.vocab_stats(*z, target, 8, False, "triton")
    saved = (stats[4], stats[5], stats[6], stats[1])
    norms = ops.contrastive_loss(*z, base, target, ce, kl, None, False, "triton")[3]
    one, row = logits.nbytes, torch.ones(N, device="cuda")
    return {
        "statistics": (one, lambda: ops.vocab_stats(*z, target, 8, False, "triton")),
        "statistics_gradient": (
            2 * one,
            lambda: ops.vocab_stats_backward(*z, target, *saved, None, row, row, None, needs, "triton"),
        ),
        "loss": (2 * one, lambda: ops.contrastive_loss(*z, base, target, ce, kl, None, False, "triton")),
        "loss_gradient": (
            3 * one,
            lambda: ops.contrastive_loss_backward(*z, base, target, ce, kl, norms, row[0], needs, "triton"),
        ),
    }


def linear_work() -> Callable[[], Any]:
    hidden = torch.randn(N, H, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = torch.randn(V, H, dtype=torch.bfloat16, device="cuda") / H**0.5
    target = torch.randint(V, (N,), device="cuda")
    gate = torch.rand(N, device="cuda") < 0.03
    arguments = (hidden.detach() * 1.01, weight, target, gate.float(), (~gate) * 0.2)

    def work() -> None:
        rmx_kernels.linear_gated_contrastive_loss(hidden, *arguments, impl="triton").loss.backward()
        hidden.grad = None

    return work


def checked(field: str) -> bool:
    """Small hard inputs give what the reference gives, under the configuration in force."""
    x = torch.randn(33, 50257, device="cuda") * 5
    target, w = torch.randint(50257, (33,), device="cuda"), torch.ones(33, device="cuda")
    calls = {
        "statistics": lambda z, impl: rmx_kernels.entropy_topk(z, target, k=8, impl=impl)[:4],
        "loss": lambda z, impl: rmx_kernels.gated_contrastive_loss(z, x.flip(0), target, w, w, impl=impl)[:1],
    }
    results = []
    for impl in ("triton", "reference"):
        z = x.clone().requires_grad_()
        outputs = calls[field.removesuffix("_gradient")](z, impl)
        total = torch.stack([o.sum() for o in outputs if o is not None]).sum()
        results.append([*outputs, *torch.autograd.grad(total, z)])
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*results, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if providers.DEVICE != "cuda":
        raise SystemExit("needs a CUDA or ROCm device")
    architecture = configs.architecture(torch.device("cuda"))
    best, table = configs.CONFIGS[architecture], []
    copy = roofline.rates().copy
    for field, (moved, work) in works(torch.bfloat16).items():
        timed = {}
        current = getattr(best, field)
        threads = current.lanes // current.warps
        for span, warps, stages in itertools.product(SPANS, WARPS, STAGES if field in ("statistics", "loss") else (1,)):
            sweep = dataclasses.replace(current, span=span, warps=warps, lanes=threads * warps, stages=stages)
            configs.CONFIGS[architecture] = dataclasses.replace(best, **{field: sweep})
            if not checked(field):
                continue
            timed[sweep] = milliseconds(work)
            share = moved / copy / (timed[sweep] / 1e3)
            table.append({"field": field, **dataclasses.asdict(sweep), "ms": timed[sweep], "share": share})
            print(
                f"{field:20} {span:6} columns {warps} warps {stages} stages {timed[sweep]:8.3f} ms {share:6.1%}",
                flush=True,
            )
        best = dataclasses.replace(best, **{field: min(timed, key=lambda s: timed[s])})
    torch.cuda.empty_cache()
    work = linear_work()
    for size in (224, 448, 896, 1792):
        configs.set_scratch_bytes(size * MIB)
        table.append({"field": "scratch_bytes", "mib": size, "ms": milliseconds(work)})
        print(f"{'scratch_bytes':20} {size:6} MiB {table[-1]['ms']:24.3f} ms", flush=True)
    print(f'\n    "{architecture}": {best},')
    if options.write:
        name = f"{device_name()}-{datetime.date.today()}-tuning.json"
        path = Path(__file__).with_name("results") / name
        path.write_text(
            json.dumps({"copy_bytes_per_s": copy, "best": dataclasses.asdict(best), "table": table}, indent=1)
        )
        print(f"Written to {path}")


if __name__ == "__main__":
    main()
