"""The engine that samples by vLLM in this process, on the GPU that the run's model is on.

vLLM loads the weights a second time, beside the run's own, and takes 90 % of what is free then. It is started for each
stage that samples, and ended with it. Not run on hardware yet: tested against a stand-in of its interface.
"""

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmx.config import Sampling
from rmx.models.lora_layers import LoraLayer
from rmx.models.model import CausalLM
from rmx.models.prompts import Renderer
from rmx.progress import console
from rmx.sampling.engines import Completion, EngineError, Finished, Unit, stream_key

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank may be
USED = 0.9  # of the memory that is free


def check(lm: CausalLM, adapted: Iterable[nn.Module] = ()) -> None:
    """Raise EngineError where vLLM cannot sample from this model here, with an adapter on these layers if any."""
    try:
        import vllm  # noqa: F401
    except ImportError as fault:
        raise EngineError(f"engine=vllm: vLLM cannot be imported ({fault}): pip install 'rmx[vllm]'") from fault
    if not _on_gpu(lm):
        raise EngineError("engine=vllm: needs a CUDA GPU, and the model is on the CPU: use engine loop or auto")
    if lm.settings is None:
        raise EngineError("engine=vllm: vLLM needs a model from files, this one was not loaded from files: use loop")
    if lm.gguf:
        raise EngineError(
            "engine=vllm: vLLM would read the weights of this GGUF file in another way than rmx: use engine loop, "
            "or save the model as safetensors and use that"
        )
    ends, to_be = (lm.model.get_input_embeddings(), lm.model.get_output_embeddings()), set(map(id, adapted))
    if any(isinstance(end, LoraLayer) or id(end) in to_be for end in ends):
        raise EngineError(
            "engine=vllm: the adapter is on the input embedding or the output head, which vLLM supports only for some "
            "models: use engine loop, or leave them out of lora.targets"
        )


def vllm(
    lm: CausalLM,
    renderer: Renderer,
    units: Sequence[Unit],
    sampling: Sampling,
    seed: int,
    adapter: Path | None = None,
) -> Finished:
    """Units of ``batch_size`` sequences, of which vLLM decodes as many at a time as it sees fit.

    Every sample has a seed of its own, a function of (seed, problem_id, sample). Log-probs are not told: vLLM gives
    them before the temperature.

    Args:
        adapter: the directory of the one that the samples wear; None: the base.

    Raises:
        EngineError: see :func:`check`; vLLM does not start, or gives what does not fit.
    """
    check(lm)
    if not units:
        return
    from vllm import SamplingParams, TokensPrompt

    plain = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": sorted(lm.eos_ids),
        "detokenize": False,
    }
    longest = max(len(prompt) for unit in units for prompt in unit.prompts)
    with _engine(lm, longest + sampling.max_new_tokens, adapter) as (engine, request):
        for unit in units:
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in unit.prompts for _ in unit.samples]
            params = [SamplingParams(**plain, seed=stream_key(seed, *key) >> 97) for key in unit.keys]
            try:
                outputs = engine.generate(prompts, params, use_tqdm=False, lora_request=request)
            except (RuntimeError, ValueError) as fault:
                raise EngineError(f"engine=vllm: {fault}") from fault
            if len(outputs) != len(prompts):
                raise EngineError(f"engine=vllm: {len(outputs)} answers to {len(prompts)} prompts")
            yield unit, [_completion(lm, output, sampling) for output in outputs]


@contextmanager
def _engine(lm: CausalLM, length: int, adapter: Path | None) -> Iterator[tuple[Any, Any]]:
    """(vllm.LLM, the request for the adapter or None)."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    assert lm.settings is not None
    more: dict[str, Any] = {}
    request = None
    if adapter is not None:
        more = {"enable_lora": True, "max_loras": 1, "max_lora_rank": _rank(adapter)}
        request = LoRARequest("tuned", 1, str(adapter.absolute()))
    free, total = _memory(lm.device)
    share = USED * free / total
    console.print(f"vllm: starts, with {share:.0%} of the GPU's memory", markup=False, highlight=False, soft_wrap=True)
    name = str(lm.model.name_or_path)
    try:
        engine = LLM(
            model=name,
            tokenizer=name,
            revision=lm.settings.revision,
            tokenizer_revision=lm.settings.revision,
            trust_remote_code=lm.settings.trust_remote_code,
            dtype=str(lm.weight.dtype).removeprefix("torch."),
            max_model_len=length,
            gpu_memory_utilization=round(share, 3),
            generation_config="vllm",  # no sampling defaults of the model's own
            **more,
        )
    except (RuntimeError, ValueError, OSError) as fault:
        raise EngineError(f"engine=vllm: does not start: {fault}") from fault
    try:
        yield engine, request
    finally:
        del engine  # its process ends with the last reference
        gc.collect()
        _empty_cache()


def _rank(adapter: Path) -> int:
    """The smallest ``max_lora_rank`` that takes the adapter."""
    description = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    r = max(description["r"], *(description.get("rank_pattern") or {}).values(), 0)
    found = next((rank for rank in RANKS if rank >= r), None)
    if found is None:
        raise EngineError(f"engine=vllm: {adapter} has rank {r}, vLLM supports at most {RANKS[-1]}: use another engine")
    return found


def _completion(lm: CausalLM, output: Any, sampling: Sampling) -> Completion:
    (choice,) = output.outputs
    ids, V = list(choice.token_ids), lm.weight.shape[0]
    if choice.finish_reason not in ("stop", "length") or len(ids) > sampling.max_new_tokens:
        raise EngineError(
            f"engine=vllm: expected up to {sampling.max_new_tokens} tokens that end by stop or length, got {len(ids)} "
            f"that end by {choice.finish_reason!r}"
        )
    if wrong := [token for token in ids if not 0 <= token < V]:
        raise EngineError(f"engine=vllm: token id {wrong[0]}, but the vocabulary has {V} tokens: another model")
    if choice.finish_reason == "stop" and not (ids and ids[-1] in lm.eos_ids):
        eos = lm.tokenizer.eos_token_id
        ids.append(choice.stop_reason if choice.stop_reason in lm.eos_ids else eos)
    return Completion(ids, None)


def _on_gpu(lm: CausalLM) -> bool:
    return lm.device.type == "cuda"


def _memory(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes of the GPU, after what torch keeps for later is given back."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
