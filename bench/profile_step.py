"""Where the time of a training step goes: first step, median step, tokens/s, MFU, peak memory, kernels by kind.

    python bench/profile_step.py [--compile] [--shape tiny] [--steps 13] [--out result.json]
    python bench/profile_step.py --released    # the published way, for comparison
    python bench/profile_step.py --table a.json b.json ...

One process measures one way of training, so that each can have a time limit of its own: a compilation that takes too
long costs the others nothing. Models have random weights; the sequences are those of bench_train_step.py. On a CPU the
small shape shows that the script works; its kernels are not counted there.
"""

import argparse
import itertools
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import train_steps
from bench_train_step import QWEN_1_5B, random_qwen
from report import device_name
from torch.profiler import ProfilerActivity, profile
from train_steps import DEVICE, Pair, make_pair, peak_flops, released, step_flops, synthetic

from rmx.config import LoraConfig, TrainConfig
from rmx.models.model import CausalLM
from rmx.records import StepMetrics, TrainingSequence
from rmx.training import train

TINY = {"vocab_size": 997, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
SHAPES: dict[str, tuple[dict[str, int], tuple[int, int, int, float]]] = {  # model; sequences, prompt, completion, gated
    "qwen2.5-1.5b": (QWEN_1_5B, (8, 128, 672, 0.03)),
    "tiny": ({**TINY, "num_attention_heads": 4, "num_key_value_heads": 2}, (4, 8, 16, 0.1)),
}
KINDS = {  # of a kernel, by its name; the first that fits
    "copies": r"^Mem(cpy|set)",
    "attention": r"flash|fmha|attention",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|splitK|wgmma",
    "fused by the compiler": r"^triton_",
    "vocabulary": r"^[a-z_0-9]+$",  # the Triton kernels of rmx_kernels have plain names
    "optimiser": r"adam|multi_tensor",
    "element-wise and others": "",
}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def kernels(trace: Path) -> dict[str, Any]:
    """Number and time of the kernels in a trace of torch's profiler, by kind; how long the device was busy."""
    events = [
        e for e in json.loads(trace.read_text())["traceEvents"] if e.get("cat", "").startswith(("kernel", "gpu_"))
    ]
    events = [e for e in events if e["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")]
    kinds: dict[str, list[float]] = {}
    names: dict[str, list[float]] = {}
    for e in events:
        kind = next(kind for kind, pattern in KINDS.items() if re.search(pattern, e["name"], re.IGNORECASE))
        kinds.setdefault(kind, []).append(e["dur"])
        names.setdefault(e["name"][:100], []).append(e["dur"])
    busy, end = 0.0, 0.0
    for start, duration in sorted((e["ts"], e["dur"]) for e in events):
        busy += max(0.0, start + duration - max(start, end))
        end = max(end, start + duration)
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:25]
    return {
        "kernels": len(events),
        "busy_ms": busy / 1e3,
        "kinds": {kind: {"count": len(own), "ms": sum(own) / 1e3} for kind, own in kinds.items()},
        "longest": {name: {"count": len(own), "ms": sum(own) / 1e3} for name, own in longest},
    }


def run_ours(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig, steps: int) -> dict[str, Any]:
    """Steps of one training, timed from callback to callback; the profiler sees the last but one."""
    marks, history = [time.perf_counter()], []
    profiler = profile(activities=[ProfilerActivity.CUDA]) if DEVICE == "cuda" else None
    found: dict[str, Any] = {}

    def on_step(metrics: StepMetrics, total: int) -> None:
        synchronize()
        marks.append(time.perf_counter())
        history.append(metrics)
        print(f"step {metrics.step}: {marks[-1] - marks[-2]:.4f} s, loss {metrics.loss:.5f}", flush=True)
        if profiler is None:
            return
        if metrics.step == total - 2:
            profiler.start()
            synchronize()
            found["from"] = time.perf_counter()
        elif metrics.step == total - 1:
            found["profiled_ms"] = 1e3 * (time.perf_counter() - found.pop("from"))
            profiler.stop()

    settings = {"epochs": float(steps), "sequences_per_step": len(sequences), "warmup_steps": 0}
    config = config.model_copy(update=settings)
    train.train_adapter(
        pair.lm, pair.adapter, sequences, config, 0, base=lambda s: pair.kept[s.sample], on_step=on_step
    )
    if profiler is not None:
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            found |= kernels(trace)
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    found |= {"first_step_seconds": seconds[0], "seconds": seconds[2:-2] or seconds, "all_seconds": seconds}
    found |= {"losses": [m.loss for m in history], "norms": [m.gradient_norm for m in history]}
    # another number of tokens: a compiled step that is compiled anew would take as long as the first one
    few = sequences[: len(sequences) // 2 + 1]
    config = config.model_copy(update={"epochs": 2.0, "sequences_per_step": len(few)})
    others: list[float] = []
    started = time.perf_counter()

    def other(metrics: StepMetrics, total: int) -> None:
        synchronize()
        others.append(time.perf_counter() - started - sum(others))

    train.train_adapter(pair.lm, pair.adapter, few, config, 0, base=lambda s: pair.kept[s.sample], on_step=other)
    return found | {"other_length_seconds": others}


def run_released(pair: Pair, sequences: list[TrainingSequence], config: TrainConfig, steps: int) -> dict[str, Any]:
    seconds, losses = [], []
    for _ in range(steps):
        started = time.perf_counter()
        losses.append(released(pair, sequences, config))
        synchronize()
        seconds.append(time.perf_counter() - started)
        print(f"released: {seconds[-1]:.4f} s, loss {losses[-1]:.5f}", flush=True)
    return {"first_step_seconds": seconds[0], "seconds": seconds[1:] or seconds, "losses": losses}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    sizes, (count, prompt, completion, gated) = SHAPES[arguments.shape]
    lm: CausalLM = random_qwen(sizes)
    sequences = synthetic(count, prompt, completion, gated, sizes["vocab_size"])
    config = TrainConfig(compile=arguments.compile)
    pair = make_pair(lm, LoraConfig())
    if not arguments.released:  # only the published way has a second copy
        pair = Pair(pair.lm, pair.adapter, pair.lm.model)
        pair.keep(sequences, config)
    synchronize()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {
        "way": "released" if arguments.released else "compiled" if arguments.compile else "eager",
        "label": arguments.label,
        "shape": arguments.shape,
        "device": device_name(),
        "torch": torch.__version__,
        "impl": train_steps.IMPL,
        "tokens": sum(len(s.ids) for s in sequences),
    }
    result |= (run_released if arguments.released else run_ours)(pair, sequences, config, arguments.steps)
    result["median_seconds"] = statistics.median(result["seconds"])
    result["tokens_per_second"] = result["tokens"] / result["median_seconds"]
    if DEVICE == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated()
    if not arguments.released:
        flops = step_flops(pair, sequences, config)
        result |= {"flops": flops, "mfu": flops / result["median_seconds"] / peak_flops(lm)}
    return result


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        f"{'':16}{'first step':>11}{'a step':>9}{'tokens/s':>10}{'MFU':>6}{'kernels':>9}{'busy':>9}{'peak':>10}  loss"
    ]
    for r in results:
        cells = [f"{r['first_step_seconds']:.1f} s", f"{r['median_seconds']:.4f}", f"{r['tokens_per_second']:.0f}"]
        cells += [f"{r['mfu']:.0%}" if "mfu" in r else "", str(r.get("kernels", ""))]
        cells += [f"{r['busy_ms']:.1f} ms" if "busy_ms" in r else ""]
        cells += [f"{r['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in r else ""]
        widths = (11, 9, 10, 6, 9, 9, 10)
        row = "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        third = r["losses"][min(2, len(r["losses"]) - 1)]
        lines.append(f"{(r['label'] or r['way'])[:15]:16}{row}  {r['losses'][0]:.5f} {third:.5f}")
    for r in results:
        name = r["label"] or r["way"]
        if "kinds" in r:
            kinds = sorted(r["kinds"].items(), key=lambda item: -item[1]["ms"])
            lines.append(f"{name}: " + ", ".join(f"{k} {v['ms']:.1f} ms ({v['count']})" for k, v in kinds))
        if "other_length_seconds" in r:
            lines.append(
                f"{name}: steps of another length {', '.join(f'{s:.3f} s' for s in r['other_length_seconds'])}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compile", action="store_true", help="train with train.compile=true")
    parser.add_argument("--released", action="store_true", help="measure the published way")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b", help="model and sequences")
    parser.add_argument("--steps", type=int, default=14, help="number of optimiser steps")
    parser.add_argument("--label", default="", help="name of this run in the table")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--table", nargs="+", type=Path, help="print the table of these files, measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([json.loads(path.read_text()) for path in arguments.table if path.exists()]))
        return
    result = measure(arguments)
    print(table([result]))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
