"""Sampled completions of a model, token ids in and token ids out."""

import hashlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from rmx.config import Sampling
from rmx.model import CausalLM, pad
from rmx.prompts import PromptError, Renderer
from rmx.records import Problem, Rollout
from rmx.sampling import SamplingParams, sample_tokens

SHRINK = 0.75  # finished sequences leave the batch when so few are left that copying the cache pays


@torch.no_grad()
def generate_rollouts(
    lm: CausalLM,
    renderer: Renderer,
    problems: Sequence[Problem],
    sampling: Sampling,
    seed: int,
    *,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Rollout]:
    """``sampling.samples`` completions of every problem, in the order of the problems.

    A problem's prompt is read once for all its samples. Every sample draws from a random stream of its own, keyed by
    (seed, problem_id, sample), so it does not depend on what else is in the batch, beyond rounding of the logits.

    Args:
        on_done: called with the number of finished rollouts after each batch.

    Returns:
        len(problems) * samples rollouts; ``completion_ids`` keeps the EOS by which a model stopped.

    Raises:
        PromptError: a prompt and its completion would not fit the positions that the model knows.
    """
    params = SamplingParams(sampling.temperature, sampling.top_p, sampling.top_k)
    prompts = [renderer(problem.question) for problem in problems]
    _check_length(lm, max(map(len, prompts), default=0), sampling.max_new_tokens)
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    completions: dict[int, list[list[int]]] = {i: [] for i in order}
    repeats = min(sampling.samples, sampling.batch_size)  # of a prompt in one batch
    together = max(1, sampling.batch_size // sampling.samples)  # prompts in one batch
    done = 0
    for start, first in itertools.product(range(0, len(order), together), range(0, sampling.samples, repeats)):
        group = order[start : start + together]
        samples = range(first, min(first + repeats, sampling.samples))
        streams = [_uniforms(seed, problems[i].problem_id, n, sampling.max_new_tokens) for i in group for n in samples]
        rows = _decode(lm, [prompts[i] for i in group], len(samples), params, torch.tensor(np.stack(streams)))
        for place, i in enumerate(group):
            completions[i] += rows[place * len(samples) : (place + 1) * len(samples)]
        done += len(rows)
        on_done(done)
    rollouts = []
    for i, problem in enumerate(problems):
        for sample, ids in enumerate(completions[i]):
            stopped = bool(ids) and ids[-1] in lm.eos_ids
            text = lm.tokenizer.decode(ids, skip_special_tokens=True)
            reason = "stop" if stopped else "length"
            rollouts.append(Rollout(problem.problem_id, sample, prompts[i], ids, reason, text))  # type: ignore[arg-type]
    return rollouts


def _check_length(lm: CausalLM, prompt: int, completion: int) -> None:
    known = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if known and prompt + completion > known:
        raise PromptError(
            f"the longest prompt has {prompt} tokens and max_new_tokens is {completion}, but the model knows only "
            f"{known} positions: lower max_new_tokens"
        )


def _uniforms(seed: int, problem_id: str, sample: int, count: int) -> np.ndarray:
    key = hashlib.sha256(f"{seed}/{problem_id}/{sample}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "little"))).random(count)


def _decode(
    lm: CausalLM, prompts: list[list[int]], repeats: int, params: SamplingParams, uniforms: torch.Tensor
) -> list[list[int]]:
    """``repeats`` completions of every prompt; uniforms [prompts * repeats, max_new_tokens] float64."""
    device, length = lm.device, uniforms.shape[1]
    ids, mask = pad(prompts, device, left=True)
    cache = DynamicCache(config=lm.model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    hidden = lm.hidden(ids, mask, position_ids=positions, past_key_values=cache, use_cache=True)[:, -1]
    cache.batch_repeat_interleave(repeats)
    hidden = hidden.repeat_interleave(repeats, 0)
    mask = mask.repeat_interleave(repeats, 0)
    position = positions[:, -1].repeat_interleave(repeats)
    uniforms = uniforms.to(device)
    eos = torch.tensor(sorted(lm.eos_ids), device=device)
    done: list[list[int]] = [[] for _ in range(len(prompts) * repeats)]
    rows = torch.arange(len(done), device=device)  # which sequence each row of the batch is
    alive = torch.ones_like(rows, dtype=torch.bool)
    for step in range(length):
        tokens = sample_tokens(lm, hidden, uniforms[rows, step], params)
        for row, token, live in zip(rows.tolist(), tokens.tolist(), alive.tolist(), strict=True):
            if live:
                done[row].append(token)
        alive &= ~torch.isin(tokens, eos)
        left = int(alive.sum())
        if left == 0 or step + 1 == length:
            break
        if left < SHRINK * alive.numel():
            keep = alive.nonzero().squeeze(1)
            cache.batch_select_indices(keep)
            rows, tokens, mask, position, alive = (x[keep] for x in (rows, tokens, mask, position, alive))
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=-1)
        position = position + 1
        step_out = lm.hidden(
            tokens[:, None], mask, position_ids=position[:, None], past_key_values=cache, use_cache=True
        )
        hidden = step_out[:, -1]
    return done
