"""What samples the completions of a unit in this process: rmx's own loop, or transformers' continuous batching.

An engine is called with (lm, renderer, units, sampling, seed) and yields each unit with its completions, in the order
of ``unit.keys``; units may come in any order.
"""

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from rmx.attention.decode import decoding
from rmx.config import Sampling
from rmx.errors import RmxError
from rmx.models.model import CausalLM, ModelError, embedded_leaves, pad, text_decoder
from rmx.models.prompts import Renderer
from rmx.records import Problem
from rmx.sampling.decode_graphs import Steps, replayed
from rmx.sampling.nucleus import SamplingParams, sample_tokens
from rmx_kernels.native import scratch

SHRINK = 0.75  # finished sequences leave the batch when so few are left that copying the cache pays
RARELY = 0.5  # the same where a batch of another size needs another graph
ROOM = 1 / 8  # of its length by which the cache grows at a time; more, and the empty part costs locality
OTHERS = "use another engine (generate_batch, or openai for a server)"
PAGE = 256  # tokens of a block of transformers' paged cache, its default


class EngineError(RmxError):
    """The engine failed, or cannot do what the sampling settings ask for."""


class NoMemory(EngineError):
    """A batch of so many sequences does not fit the memory."""

    def __init__(self, sequences: int, fault: RuntimeError) -> None:
        first = str(fault).splitlines()[0]
        super().__init__(f"loop: no memory for {sequences} sequences at a time: set batch_size to fewer ({first})")
        self.sequences = sequences


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
    """One batch a unit, decoded with :func:`rmx.sampling.nucleus.sample_tokens`.

    A problem's prompt is read once for all its samples. Every sample draws from a random stream of its own, keyed by
    (seed, problem_id, sample), so it does not depend on what else is in the batch, beyond rounding of the logits.

    Raises:
        NoMemory: a batch does not fit.
    """
    params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
    for unit in units:
        check_decoding(lm, padded=len(set(map(len, unit.prompts))) > 1)
        try:
            found = _decoded(lm, unit, unit_uniforms(unit, sampling, seed).to(lm.device), params)
        except torch.OutOfMemoryError as fault:
            raise NoMemory(len(unit.keys), fault) from fault
        yield unit, found


def _decoded(lm: CausalLM, unit: Unit, uniforms: Tensor, params: SamplingParams) -> list[Completion]:
    """Of one batch; a function of its own, so that nothing of it outlives a fault."""
    decoder = Decoder(lm, unit.prompts, len(unit.samples), new=uniforms.shape[1])
    left = (list(range(len(unit.keys))), uniforms)  # on the device; its rows change when some leave

    def pick(step: int, rows: list[int]) -> Picked:
        nonlocal left
        if rows != left[0]:
            left = (rows, uniforms[rows])
        return sample_tokens(lm, decoder.hidden, left[1][:, step], params)

    return decode([decoder], pick, len(unit.keys), uniforms.shape[1], lm.eos_ids)


@torch.no_grad()
def check_decoding(lm: CausalLM, padded: bool) -> None:
    """Whether a few tokens, read step by step, have the states of whole sequences; of prompts padded on the left.

    A model that passed is not asked again.

    Raises:
        EngineError: they have not: the model keeps states in another way, or padding reaches them.
    """
    passed: set[bool] = lm.model.__dict__.setdefault("_rmx_decodes", set())
    if padded in passed:
        return
    name, V = type(lm.model).__name__, lm.weight.shape[0]
    hint = OTHERS
    if padded:
        check_decoding(lm, padded=False)
        hint = "set batch_size to samples, so that a batch has one prompt, or " + hint
    prompts = [[(5 * i + 3 * j + 1) % V for j in range(n)] for i, n in enumerate((3 if padded else 6, 6))]
    steps = [[(7 * i + 2 * j + 3) % V for j in range(2)] for i in range(2)]
    try:
        with torch.enable_grad(), embedded_leaves(lm.model) as embedded:
            decoder = Decoder(lm, prompts, 2)
            (reached,) = torch.autograd.grad(decoder.hidden[0].float().sum(), embedded[:1], retain_graph=True)
        if padded and bool(reached[0, :3].nan_to_num().any()):  # NaN: 0 times infinity, by roots of 0
            raise EngineError(f"{name}: padding on the left changes the states of the tokens; {hint}")
        decoder = Decoder(lm, prompts, 2)
        decoder.read(torch.tensor([steps[0][0], 0, 0, steps[1][0]], device=lm.device))
        decoder.keep(torch.tensor([0, 3], device=lm.device))
        decoder.read(torch.tensor([steps[0][1], steps[1][1]], device=lm.device))
        whole = [torch.tensor([a + b], device=lm.device) for a, b in zip(prompts, steps, strict=True)]
        alone = torch.cat([lm.hidden(ids, use_cache=False)[:, -1] for ids in whole]).float()
    except (EngineError, torch.OutOfMemoryError):
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as fault:
        said = f"{name}: engine loop cannot carry its states from token to token ({fault!r})"
        raise EngineError(f"{said}; {hint}") from fault
    limit = 1e-3 if lm.weight.dtype in (torch.float32, torch.float64) else 5e-2
    error = float((decoder.hidden.float() - alone).norm() / alone.norm())
    if not error < limit:
        what = "prompts padded on the left" if padded else "tokens read one by one"
        raise EngineError(f"{name}: {what} give states that differ from whole sequences by {error:.1%}; {hint}")
    passed.add(padded)


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


class _Cache(DynamicCache):  # type: ignore[misc]
    """Of attention and, which transformers' own leaves out, of linear attention, convolutions and state spaces."""

    def __init__(self, lm: CausalLM) -> None:
        super().__init__(config=lm.model.config)
        own: list[Any] = self.layers
        self.layers: list[Any] = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in own]
        self.roomy = all(type(layer) is _RoomyLayer for layer in self.layers)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                held = *layer.conv_states.values(), *layer.recurrent_states.values()
                states = [x for x in held if x is not None]
                rows = torch.arange(states[0].shape[0], device=states[0].device)
                layer.reorder_cache(rows.repeat_interleave(repeats))
            else:
                layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(indices)
            else:
                layer.batch_select_indices(indices)


class Decoder:
    """One model over completions under way, row by row; :attr:`hidden` [B, H] predicts the next token of each.

    Args:
        prompts: token ids; each is read once for its ``repeats`` rows.
        within: entered for each forward pass, as to switch an adapter off.
        new: tokens that will be read after the prompts, at most; None: not known.
        graphs: whether CUDA graphs replay the steps; None: where :func:`rmx.sampling.decode_graphs.replayed` says so.

    Attributes:
        steady: whether the last step took as long as the next ones will.
    """

    def __init__(
        self,
        lm: CausalLM,
        prompts: list[list[int]],
        repeats: int,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
        new: int | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.lm, self.within, self.cache = lm, within, _Cache(lm)
        parameters = inspect.signature(text_decoder(lm.model).forward).parameters
        if not {"past_key_values", "cache_params"} & set(parameters):
            raise EngineError(f"{type(lm.model).__name__}: engine loop does not support its cache; {OTHERS}")
        self.inputs = [name for name in ("past_key_values", "cache_params", "position_ids") if name in parameters]
        if graphs is None:
            graphs = self.inputs == ["past_key_values", "position_ids"] and self.cache.roomy
            graphs = graphs and replayed(lm, lambda prompts, graphs: Decoder(lm, prompts, 1, graphs=graphs))
        self.replays = graphs
        self.most = None if new is None else max(map(len, prompts)) + new
        self.steps: Steps | None = None
        self.reads = 0
        ids, mask = pad(prompts, lm.device, left=True)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        hidden = self._forward(ids, mask, positions)
        self.cache.batch_repeat_interleave(repeats)
        self.hidden = hidden.repeat_interleave(repeats, 0)
        self.mask = mask.repeat_interleave(repeats, 0)
        self.position = positions[:, -1].repeat_interleave(repeats)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        if "cache_params" in self.inputs and mask is not None and ids.shape != mask.shape:
            mask = None  # a state space reads it along with the tokens alone
        given = {"past_key_values": self.cache, "cache_params": self.cache, "position_ids": positions}
        with self.within(), decoding(self.lm.model):
            return self.lm.hidden(ids, mask, **{name: given[name] for name in self.inputs}, use_cache=True)[:, -1]

    def read(self, tokens: Tensor) -> None:
        """Go on by one token a row, [B] int64."""
        self.reads += 1
        if self.replays:
            if self.steps is None:
                self.steps = Steps(self.lm, self.cache, self.mask, self.position, self.hidden, self.most, self.within)
            self.hidden = self.steps.read(tokens)
            return
        self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], dim=-1)
        self.position = self.position + 1
        self.hidden = self._forward(tokens[:, None], self.mask, self.position[:, None])

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        if self.steps is not None:
            self.steps.keep(rows)
            self.hidden = self.steps.hidden
            return
        self.cache.batch_select_indices(rows)
        self.hidden, self.mask, self.position = (x[rows] for x in (self.hidden, self.mask, self.position))

    @property
    def steady(self) -> bool:
        return self.reads > 1 if self.steps is None else self.steps.steady


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
    shrink = RARELY if any(decoder.replays for decoder in decoders) else SHRINK
    done = [Completion([], []) for _ in range(count)]
    rows = list(range(count))
    alive = set(rows)
    for step in range(length):
        tokens, logprobs = pick(step, rows)
        both = torch.stack([tokens.double(), logprobs]).tolist()  # one wait for the device
        for row, token, logprob in zip(rows, map(int, both[0]), both[1], strict=True):
            if row in alive:
                done[row].ids.append(token)
                done[row].logprobs.append(logprob)  # type: ignore[union-attr]
                if token in stops:
                    alive.remove(row)
        if not alive or step + 1 == length:
            break
        if len(alive) < shrink * len(rows):
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
