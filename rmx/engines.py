"""What samples the completions of a unit in this process: rmx's own loop, or transformers' continuous batching.

An engine is called with (lm, renderer, units, sampling, seed) and yields each unit with its completions, in the order
of ``unit.keys``; units may come in any order.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from rmx.config import Sampling
from rmx.decode_attention import decoding
from rmx.errors import RmxError
from rmx.model import CausalLM, ModelError, pad
from rmx.prompts import Renderer
from rmx.records import Problem
from rmx.sampling import SamplingParams, sample_tokens
from rmx_kernels.native import scratch

SHRINK = 0.75  # finished sequences leave the batch when so few are left that copying the cache pays
ROOM = 1 / 8  # of its length by which the cache grows at a time; more, and the empty part costs locality
PAGE = 256  # tokens of a block of transformers' paged cache, its default


class EngineError(RmxError):
    """The engine failed, or cannot do what the sampling settings ask for."""


@dataclass(frozen=True, slots=True)
class Unit:
    """The same samples of some problems: sampled together, and lost together."""

    problems: list[Problem]
    prompts: list[list[int]]  # token ids, one list a problem
    samples: range

    @property
    def keys(self) -> list[tuple[str, int]]:
        """(problem_id, sample) of every completion, samples of a problem one after the other."""
        return [(problem.problem_id, sample) for problem in self.problems for sample in self.samples]


class Completion(NamedTuple):
    ids: list[int]  # T ids, with the EOS
    logprobs: list[float] | None  # T, nats; see Rollout


Finished = Iterator[tuple[Unit, list[Completion]]]
Picked = tuple[Tensor, Tensor]  # tokens [B] int64, their log p [B] float64


def stream_key(seed: int, problem_id: str, sample: int) -> int:
    """128 random bits, a function of the arguments alone."""
    digest = hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:16], "little")


@torch.no_grad()
def loop(lm: CausalLM, renderer: Renderer, units: Sequence[Unit], sampling: Sampling, seed: int) -> Finished:
    """One batch a unit, decoded with :func:`rmx.sampling.sample_tokens`.

    A problem's prompt is read once for all its samples. Every sample draws from a random stream of its own, keyed by
    (seed, problem_id, sample), so it does not depend on what else is in the batch, beyond rounding of the logits.
    """
    params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
    for unit in units:
        uniforms = unit_uniforms(unit, sampling, seed).to(lm.device)
        decoder = Decoder(lm, unit.prompts, len(unit.samples))

        def pick(step: int, rows: list[int], decoder: Decoder = decoder, uniforms: Tensor = uniforms) -> Picked:
            return sample_tokens(lm, decoder.hidden, uniforms[rows, step], params)

        yield unit, decode([decoder], pick, len(unit.keys), sampling.max_new_tokens, lm.eos_ids)


def unit_uniforms(unit: Unit, sampling: Sampling, seed: int) -> Tensor:
    """[completions, max_new_tokens] float64 in [0, 1): a function of (seed, problem_id, sample) alone."""
    generators = [np.random.Generator(np.random.Philox(stream_key(seed, *key))) for key in unit.keys]
    return torch.tensor(np.stack([generator.random(sampling.max_new_tokens) for generator in generators]))


class _RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, heads, L, D] in buffers with room for more, where DynamicLayer copies all at every token."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        if length == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[-2]
        new = {"keys": key_states, "values": value_states}
        for name, states in new.items():
            held, buffer = getattr(self, name), getattr(self, f"{name}_buffer", None)
            if buffer is None or buffer.shape[0] != held.shape[0] or buffer.shape[-2] < end:
                buffer = _room(held, (*held.shape[:2], end + int(ROOM * end), held.shape[-1]))
                buffer[:, :, :length] = held
                setattr(self, f"{name}_buffer", buffer)
            buffer[:, :, length:end] = states
            setattr(self, name, buffer[:, :, :end])
        return self.keys, self.values


def _room(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor; on a CPU in huge pages, since the first touch of small ones costs more than the copy."""
    return scratch(math.prod(shape), like.dtype).view(shape) if like.device.type == "cpu" else like.new_empty(shape)


def _cache(lm: CausalLM) -> DynamicCache:
    cache = DynamicCache(config=lm.model.config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class Decoder:
    """One model over completions under way, row by row; :attr:`hidden` [B, H] predicts the next token of each.

    Args:
        prompts: token ids; each is read once for its ``repeats`` rows.
        within: entered for each forward pass, as to switch an adapter off.
    """

    def __init__(
        self,
        lm: CausalLM,
        prompts: list[list[int]],
        repeats: int,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.lm, self.within, self.cache = lm, within, _cache(lm)
        ids, mask = pad(prompts, lm.device, left=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._forward(ids, mask, positions)
        self.cache.batch_repeat_interleave(repeats)
        self.hidden = hidden.repeat_interleave(repeats, 0)
        self.mask = mask.repeat_interleave(repeats, 0)
        self.position = positions[:, -1].repeat_interleave(repeats)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        with self.within(), decoding(self.lm.model):
            return self.lm.hidden(ids, mask, position_ids=positions, past_key_values=self.cache, use_cache=True)[:, -1]

    def read(self, tokens: Tensor) -> None:
        """Go on by one token a row, [B] int64."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=-1)
        self.position = self.position + 1
        self.hidden = self._forward(tokens[:, None], self.mask, self.position[:, None])

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.cache.batch_select_indices(rows)
        self.hidden, self.mask, self.position = (x[rows] for x in (self.hidden, self.mask, self.position))


def decode(
    decoders: Sequence[Decoder],
    pick: Callable[[int, list[int]], Picked],
    count: int,
    length: int,
    stops: frozenset[int],
) -> list[Completion]:
    """``count`` completions of up to ``length`` tokens, which all ``decoders`` read in step; ``stops`` end one.

    Args:
        pick: (step, which completion each row of the batch is) -> (token ids [B], log p [B]).
    """
    device = decoders[0].lm.device
    done = [Completion([], []) for _ in range(count)]
    rows = list(range(count))
    alive = set(rows)
    for step in range(length):
        tokens, logprobs = pick(step, rows)
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if row in alive:
                done[row].ids.append(token)
                done[row].logprobs.append(logprob)  # type: ignore[union-attr]
                if token in stops:
                    alive.remove(row)
        if not alive or step + 1 == length:
            break
        if len(alive) < SHRINK * len(rows):
            keep = torch.tensor([place for place, row in enumerate(rows) if row in alive], device=device)
            rows = [row for row in rows if row in alive]
            tokens = tokens[keep]
            for decoder in decoders:
                decoder.keep(keep)
        for decoder in decoders:
            decoder.read(tokens)
    return done


@torch.no_grad()
def generate_batch(lm: CausalLM, renderer: Renderer, units: Sequence[Unit], sampling: Sampling, seed: int) -> Finished:
    """transformers' continuous batching (paged attention), one manager a unit.

    A unit draws from one random stream, keyed by (seed, first problem_id, first sample). All its requests wait before
    the first step, so that who is in which step does not depend on the threads' timing. Log-probs are told where
    nothing is cut off, as transformers computes them after the cut.

    Raises:
        EngineError: a request failed. ModelError: the model gave logits that are not finite.
    """
    greedy = sampling.temperature == 0
    whole = greedy or (sampling.top_p == 1 and sampling.top_k is None)
    cut = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
    for unit in units:
        repeats = 1 if greedy else len(unit.samples)  # greedy samples are the same, and transformers makes one
        generation = GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=repeats,
            eos_token_id=sorted(lm.eos_ids) or -1,
            **({} if greedy else cut),
        )
        sequences = len(unit.prompts) * repeats
        longest = max(map(len, unit.prompts)) + sampling.max_new_tokens
        # on a CPU transformers would take 60 % of the memory for the cache, and a mask of thousands of tokens by it
        small = {"num_blocks": sequences * (longest // PAGE + 1) + 1, "max_batch_tokens": max(PAGE, sequences)}
        batching = ContinuousBatchingConfig(
            seed=stream_key(seed, *unit.keys[0]) >> 65,  # of 63 bits
            return_logprobs=whole,
            max_requests_per_batch=sequences,
            **(small if lm.device.type == "cpu" else {}),
        )
        with torch.random.fork_rng([lm.device] if lm.device.type == "cuda" else []):
            found = _run(lm, unit.prompts, sequences, generation, batching)
        completions = []
        for i in range(len(unit.prompts)):
            names = [f"req_{i}", *(f"req_{i}__child#{child}" for child in range(repeats - 1))]
            for name in names if not greedy else names * len(unit.samples):
                output = found[name]
                completions.append(Completion(list(output.generated_tokens), output.logprobs if whole else None))
        if whole and not np.isfinite([value for c in completions for value in c.logprobs or []]).all():
            raise ModelError("sampling: the model gave logits that are not finite")
        yield unit, completions


def _run(
    lm: CausalLM,
    prompts: list[list[int]],
    sequences: int,
    generation: GenerationConfig,
    batching: ContinuousBatchingConfig,
) -> dict[str, Any]:
    """The GenerationOutput of each of the ``sequences``, by its request's name."""
    manager = lm.model.init_continuous_batching(generation_config=generation, continuous_batching_config=batching)
    found: dict[str, Any] = {}
    try:
        manager.add_requests(prompts, max_new_tokens=generation.max_new_tokens)
        manager.start()
        while len(found) < sequences:
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise EngineError("generate_batch: transformers' generation thread ended before its requests")
            if result is not None and result.error is not None:
                raise EngineError(f"generate_batch: {result.error}")
            if result is not None and result.is_finished():
                found[result.request_id] = result
    finally:
        manager.stop(block=True, hard_stop=True)
        manager.destroy()
    return found
