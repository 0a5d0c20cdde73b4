"""How fast a loaded model reads, decodes and trains on this machine, by measurements of a few seconds."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from rmx.config import Config, Sampling
from rmx.models import forward, lora
from rmx.models.model import CausalLM
from rmx.records import BaseStates, Rollout, TrainingSequence
from rmx.sampling.engines import Decoder
from rmx.sampling.nucleus import SamplingParams, sample_tokens
from rmx.training.score import Keep, score_rollouts
from rmx.training.train import train_adapter

FEWEST = 16  # tokens of a measured pass
MOST_READS = 8  # tokens until a decode step takes its usual time
SHARE = 0.25  # of a completion's tokens that are decisions in a measured training step


@dataclass(frozen=True)
class Step:
    """A decoding step of n sequences takes ``fixed`` + n * ``each`` seconds."""

    fixed: float
    each: float
    rows: int  # the most sequences that were measured
    context: int  # tokens that each of them had read

    def seconds(self, steps: float, tokens: float) -> float:
        """Of a batch that is decoded in ``steps`` steps and has ``tokens`` tokens then."""
        return self.fixed * steps + self.each * tokens


@dataclass(frozen=True)
class Training:
    """A forward and backward pass over ``tokens`` tokens."""

    tokens_per_second: float
    bytes_per_token: float  # of activations kept for the backward pass, without activation checkpointing
    bytes_fixed: float  # kept for it whatever the tokens
    tokens: int


def _random(lm: CausalLM, length: int, seed: int) -> list[int]:
    ids: list[int] = np.random.default_rng(seed).integers(lm.weight.shape[0], size=length).tolist()
    return ids


def _timed(lm: CausalLM, work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter() - started


def reading(lm: CausalLM, config: Config, length: int, seconds: float) -> float:
    """Tokens a second of a scoring pass over sequences of ``length`` tokens, in passes that grow for ``seconds``."""
    budget, tokens, spent = config.score.token_budget, FEWEST, 0.0
    score_rollouts(lm, _rollouts(lm, 1, FEWEST), top_k=config.score.top_k)  # the first pass prepares
    while True:
        own = min(length, tokens)
        found = _rollouts(lm, max(1, tokens // own), own)
        read = sum(len(r.ids) for r in found)
        taken = _timed(lm, lambda: score_rollouts(lm, found, top_k=config.score.top_k, token_budget=budget))  # noqa: B023
        spent += taken
        if tokens >= budget or spent + 4 * taken > seconds:
            return read / taken
        tokens = min(budget, 4 * tokens)


def _rollouts(lm: CausalLM, count: int, length: int) -> list[Rollout]:
    half = max(1, length // 2)
    return [Rollout("", i, (ids := _random(lm, length, i))[:half], ids[half:], "length", "") for i in range(count)]


@torch.no_grad()
def decoding(lm: CausalLM, sampling: Sampling, rows: int, context: int, seconds: float) -> Step:
    """Of 1 sequence, of 32, and so on up to ``rows``; more than 32 while all take less than ``seconds``.

    What a sequence adds is taken to be the same beyond the last one measured.
    """
    params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
    prompt, times, spent = [_random(lm, context, 0)], dict[int, float](), 0.0
    count, nearest = 1, min(rows, 32)
    while True:
        uniforms = torch.full((count,), 0.5, dtype=torch.float64, device=lm.device)
        decoder = Decoder(lm, prompt, count, new=MOST_READS)

        def step(decoder: Decoder = decoder, uniforms: Tensor = uniforms) -> None:
            decoder.read(sample_tokens(lm, decoder.hidden, uniforms, params)[0])

        times[count] = _timed(lm, step)  # makes room in the cache, or is recorded
        spent += times[count]
        while not decoder.steady:
            times[count] = _timed(lm, step)
            spent += times[count]
        if count >= rows or (count >= nearest and spent + 8 * times[count] > seconds):
            break
        count = nearest if count == 1 else min(rows, 4 * count)
    each = max(0.0, (times[count] - times[1]) / (count - 1)) if count > 1 else times[1]
    return Step(max(0.0, times[1] - each), each, count, context)


def training(lm: CausalLM, config: Config, keep: Keep | None, length: int, seconds: float, reads: float) -> Training:
    """One step of random sequences of ``length`` tokens with the configuration's adapter, which is taken off again.

    Args:
        keep: the base states that training finds kept; None: it makes them in each step.
        reads: tokens a second of a pass forward.
    """
    most = min(config.train.token_budget, config.train.sequences_per_step * length)
    tokens = int(min(most, max(FEWEST, seconds / 8 * reads)))
    own = min(length, tokens)
    sequences = [_sequence(lm, i, own) for i in range(max(1, tokens // own))]
    more = {"epochs": 1.0, "sequences_per_step": len(sequences), "warmup_steps": 0, "early_stop_steps": None}
    plain = {"activation_checkpointing": False, "compile": False}
    settings = config.train.model_copy(update=more)
    width, dtype = lm.weight.shape[1], lm.weight.dtype

    def base(sequence: TrainingSequence) -> BaseStates:
        assert keep is not None
        L = len(sequence.ids)
        rows = L - 1 if keep.rows == "all" else len(sequence.completion_ids)
        entry = torch.randn(L, width).to(dtype) if keep.layer else None  # norms need rows that are not zero
        return BaseStates(torch.randn(rows, width).to(dtype), entry)

    source = None if keep is None else base
    weights = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}
    forward.check(lm, config.lora.first_layer)  # which training would do, and its passes are not to be counted
    adapter = lora.attach(lm.model, config.lora, 0)
    sizes: list[tuple[int, int]] = []  # tokens, bytes kept; the rest is what does not grow with the tokens
    try:
        for some in (sequences[: len(sequences) // 2] or [_sequence(lm, 0, max(2, own // 2))], sequences):
            kept = _Kept(weights)
            with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
                train_adapter(lm, adapter, some, settings.model_copy(update=plain), 0, base=source)
            sizes.append((sum(len(s.ids) for s in some), kept.most))
        history = train_adapter(lm, adapter, sequences, settings, 0, base=source)
    finally:
        lora.detach(lm.model, adapter)
    (few, small), (read, large) = sizes
    each = max(0.0, (large - small) / max(1, read - few))
    return Training(read / history[0].seconds, each, max(0.0, large - each * read), read)


def _sequence(lm: CausalLM, number: int, length: int) -> TrainingSequence:
    ids, half = _random(lm, length, number), max(1, length // 2)
    T = length - half
    decisions = list(range(max(1, int(SHARE * T))))
    return TrainingSequence("", number, ids[:half], ids[half:], 1.0, (-1.0) ** number, decisions, [-1.0] * T)


class _Kept:
    """Counts the bytes that graphs keep at a time, but for the model's weights.

    By storages that are alive: the address of one that was freed is soon another's.
    """

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.alive, self.most = weights, dict[StorageWeakRef, int](), 0

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.alive = {kept: size for kept, size in self.alive.items() if not kept.expired()}
            self.alive[StorageWeakRef(storage)] = storage.nbytes()
            self.most = max(self.most, sum(self.alive.values()))
        return tensor
