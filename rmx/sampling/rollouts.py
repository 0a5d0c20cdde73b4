"""Sampling completions of a model: token ids in, token ids out."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from rmx.config import Sampling
from rmx.models.forward import changing_rotation
from rmx.models.model import CausalLM
from rmx.models.prompts import PromptError, Renderer
from rmx.progress import console
from rmx.records import Problem, Rollout
from rmx.sampling.batching import settled
from rmx.sampling.engines import Completion, EngineError, Finished, NoMemory, Unit, generate_batch, loop
from rmx.sampling.remote import openai, tuned_server
from rmx.sampling.vllm_engine import vllm

Engine = Callable[[CausalLM, Renderer, Sequence[Unit], Sampling, int], Finished]
ENGINES: dict[str, Engine] = {"loop": loop, "generate_batch": generate_batch, "openai": openai, "vllm": vllm}


@torch.no_grad()
def generate_rollouts(
    lm: CausalLM,
    renderer: Renderer,
    problems: Sequence[Problem],
    sampling: Sampling,
    seed: int,
    *,
    known: Iterable[Rollout] = (),
    on_unit: Callable[[list[Rollout]], None] = lambda _: None,
    adapter: Path | None = None,
) -> list[Rollout]:
    """Sample ``sampling.samples`` completions of every problem, in the order of the problems, samples ascending.

    The work is divided into units. The division depends only on the problems and the settings, and the result of a unit
    only on the unit. So a call with the ``known`` units of an interrupted call returns what that call would have
    returned. (Not with ``engine="openai"``: the answer of a server may depend on its other work. Where a batch does not
    fit the memory, the rest is sampled in batches of half its size: the loop's samples change by rounding only.)

    Args:
        known: rollouts that an earlier call with the same arguments handed to ``on_unit``, in any order; units that
            they cover are not sampled again.
        on_unit: called with the new rollouts of each unit when the unit is finished.
        adapter: path of the attached adapter, for engines that load a model of their own; a server has it under the
            name ``tuned_model``.

    Returns:
        len(problems) * samples rollouts; ``completion_ids`` keeps the EOS by which a model stopped.

    Raises:
        PromptError: a prompt and its completion would not fit the positions that the model knows.
        EngineError: the engine failed, or cannot do what ``sampling`` asks for.
    """
    engine = _engine(lm, sampling)
    prompts = [renderer(problem.question) for problem in problems]
    longest = max(map(len, prompts), default=0)
    check_length(lm, longest, sampling.max_new_tokens)
    if engine != "openai":
        check_rotation(lm, longest, sampling.max_new_tokens)
    sampling = settled(lm, sampling, prompts)
    done = {(rollout.problem_id, rollout.sample): rollout for rollout in known}
    sample = ENGINES[engine]
    if engine == "vllm":
        sample = partial(vllm, adapter=adapter)
    elif engine == "openai" and adapter is not None:
        sampling = tuned_server(sampling)
    while left := _missing(cut_units(problems, prompts, sampling, batched=engine != "openai"), done):
        try:
            for unit, completions in sample(lm, renderer, left, sampling, seed):
                rollouts = unit_rollouts(lm, unit, completions, lm.eos_ids)
                done |= zip(unit.keys, rollouts, strict=True)
                on_unit(rollouts)
        except NoMemory as fault:
            sampling = _halved(sampling, fault)
    return [done[problem.problem_id, sample] for problem in problems for sample in range(sampling.samples)]


def _missing(units: list[Unit], done: dict[tuple[str, int], Rollout]) -> list[Unit]:
    return [unit for unit in units if not done.keys() >= set(unit.keys)]


def _halved(sampling: Sampling, fault: NoMemory) -> Sampling:
    """The same with half of the sequences that did not fit, or the fault itself where it was one."""
    if fault.sequences == 1:
        raise fault
    half = fault.sequences // 2
    said = f"{fault.sequences} sequences at a time do not fit the memory; goes on with batch_size={half}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return sampling.model_copy(update={"batch_size": half})


def _engine(lm: CausalLM, sampling: Sampling) -> str:
    """auto is generate_batch on a GPU with flash attention (without it, it masks the whole batch), else loop."""
    if sampling.engine != "auto":
        return sampling.engine
    flash = "flash" in str(lm.model.config._attn_implementation)
    return "generate_batch" if lm.device.type == "cuda" and flash else "loop"


def cut_units(problems: Sequence[Problem], prompts: list[list[int]], sampling: Sampling, batched: bool) -> list[Unit]:
    """Divide the work: batches of ``batch_size`` sequences with prompts of similar length; else one problem a unit."""
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i])) if batched else range(len(problems))
    together = max(1, sampling.batch // sampling.samples) if batched else 1  # prompts in one unit
    repeats = min(sampling.samples, sampling.batch) if batched else sampling.samples  # of a prompt in one unit
    units = []
    for start in range(0, len(order), together):
        group = order[start : start + together]
        for first in range(0, sampling.samples, repeats):
            samples = range(first, min(first + repeats, sampling.samples))
            units.append(Unit([problems[i] for i in group], [prompts[i] for i in group], samples))
    return units


def unit_rollouts(lm: CausalLM, unit: Unit, completions: list[Completion], stops: frozenset[int]) -> list[Rollout]:
    """Make the records of one unit's completions; ``stops`` are the tokens that end a completion."""
    rollouts = []
    prompts = [prompt for prompt in unit.prompts for _ in unit.samples]
    for (problem_id, sample), prompt, (ids, logprobs) in zip(unit.keys, prompts, completions, strict=True):
        stopped = bool(ids) and ids[-1] in stops
        text = lm.tokenizer.decode(ids, skip_special_tokens=True)
        rounded = None if logprobs is None else [float(f"{value:.6g}") for value in logprobs]
        reason = "stop" if stopped else "length"
        rollouts.append(Rollout(problem_id, sample, prompt, ids, reason, text, rounded))  # type: ignore[arg-type]
    return rollouts


def check_rotation(lm: CausalLM, prompt: int, completion: int, section: str = "") -> None:
    """Raise EngineError if the rotary embedding would change within the tokens; arguments as for check_length."""
    if found := changing_rotation(lm, prompt + completion):
        raise EngineError(
            f"{type(lm.model).__name__}: its rotary embedding ({found[0]}) changes for the whole batch as "
            f"soon as one sequence has more than {found[1]} tokens: set {section}max_new_tokens to at most "
            f"{found[1] - prompt}, or {section}engine=openai for a server"
        )


def check_length(lm: CausalLM, prompt: int, completion: int, section: str = "") -> None:
    """Raise PromptError if the model has too few positions; ``section`` is part of the message, such as "evaluate."."""
    known = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if known and prompt + completion > known:
        raise PromptError(
            f"the longest prompt has {prompt} tokens and {section}max_new_tokens is {completion}, but the model "
            f"supports only {known} positions: lower {section}max_new_tokens"
        )
