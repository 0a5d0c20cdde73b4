"""The demo in a size that this machine does in some minutes, by a short measurement before anything else.

What a run takes is counted in products (FLOPs, from the lengths that the demo's model writes) and timed by the rate of
products of the model's shape here.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rmx.config import Config
from rmx.config_file import load_config
from rmx.progress import console, duration

if TYPE_CHECKING:
    import torch

Size = Literal["auto", "full", "small"]
SMALL = {  # half of the work
    "problems.train_count": 48,
    "problems.evaluate_count": 120,
    "select.max_problems": 24,
    "select.max_sequences": 192,
}
PATIENCE = 600.0  # seconds: above it the small size is taken
SECONDS = 0.5  # of the measurement
ROWS, WIDTHS = 128, (576, 1536)  # of its product: a decoding step in an MLP of the model

# SmolLM2-135M: FLOPs a token in the decoder and in its head; tokens of a prompt, a rollout, a rollout that is trained
# on, and an evaluated completion; rows that a decoding batch computes for each token, as finished ones leave it late.
DECODER, HEAD = 2 * 106.2e6, 2 * 28.3e6
PROMPT, ROLLOUT, TRAINED, EVALUATED, LATE = 52, 31, 28, 24, 1.12
SLOWER = 1.5  # than the measured product are those of other shapes and what is done between them
REST = 0.9e12  # FLOP/s of a run whose products took no time: Python, sampling
START = 20.0  # seconds of loading, verifying and reporting


def demo_config(path: Path, seed: int, run_dir: str, overrides: list[str], size: Size) -> Config:
    """The configuration of the demo in ``size``; auto: that of the run directory's run, else by a measurement."""

    def made(name: str) -> Config:
        smaller = [f"{key}={value}" for key, value in SMALL.items()] if name == "small" else []
        config = load_config(path, [f"seed={seed}", *smaller, *overrides])
        given = any(override.startswith("run_dir=") for override in overrides)
        return config if given else config.model_copy(update={"run_dir": run_dir}).at(Path())

    if size != "auto":
        return made(size)
    full, small = made("full"), made("small")
    begun = full.path(full.run_dir) / "stages.json"
    if begun.exists():
        counts = json.loads(begun.read_text(encoding="utf-8")).get("problems", {}).get("settings", {}).get("problems")
        return small if counts == small.model_dump(mode="json")["problems"] else full
    import torch  # a run that goes on decides without it

    from rmx_kernels import precision

    device = full.model.device
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return full
    dtype = precision.choose(device).dtype if full.model.dtype == "auto" else full.model.dtype
    rate = product_rate(getattr(torch, dtype))
    long, short = seconds(full, rate), seconds(small, rate)
    if long <= PATIENCE or small == full:
        return full
    said = (
        f"demo: the full size would take about {duration(long)} here (products in {dtype} at {rate / 1e9:.0f} GFLOP/s)"
    )
    said += f"; the small size runs instead, about {duration(short)}; --size full runs the full one"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    return small


def product_rate(dtype: "torch.dtype", budget: float = SECONDS) -> float:
    """FLOP/s on this CPU over so many seconds."""
    import torch
    from torch.nn.functional import linear

    x, weight = torch.randn(ROWS, WIDTHS[0]).to(dtype), torch.randn(WIDTHS[1], WIDTHS[0]).to(dtype)
    linear(x, weight)  # the first call prepares
    made, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < budget or not made:
        linear(x, weight)
        made += 1
    return made * 2 * ROWS * WIDTHS[0] * WIDTHS[1] / taken


def seconds(config: Config, rate: float) -> float:
    """About how long a run takes where products run at ``rate`` FLOP/s."""
    return START + sum(flops(config).values()) * (SLOWER / rate + 1 / REST)


def flops(config: Config) -> dict[str, float]:
    """Of each stage that runs the model."""
    problems, train = config.problems, config.train
    chosen = min(config.select.max_problems, problems.train_count)
    sequences = min(config.select.max_sequences, chosen * config.rollouts.samples)
    upper = 1 - config.lora.first_layer / 30  # of the layers, which are visited forward and, for the inputs, backward

    def sampled(count: int, samples: int, length: int) -> float:
        return count * (PROMPT * DECODER + samples * length * LATE * (DECODER + HEAD))

    return {
        "rollouts": sampled(problems.train_count, config.rollouts.samples, ROLLOUT),
        "score": sequences * ((PROMPT + TRAINED) * DECODER + TRAINED * HEAD),
        "train": train.epochs * sequences * ((PROMPT + TRAINED) * 2 * upper * DECODER + TRAINED * 2 * HEAD),
        "evaluate": 2 * sampled(problems.evaluate_count, config.evaluate.samples, EVALUATED),
    }
