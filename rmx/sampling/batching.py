"""The number of sequences that are decoded at a time with ``batch_size: auto``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rmx.config import Sampling
from rmx.models.model import CausalLM
from rmx.progress import console
from rmx.sampling.decode_graphs import rounded
from rmx.sampling.engines import ROOM

CPU = 128  # there a larger batch is not faster: the products run at their full rate
MOST = 2048
USABLE = 0.8  # of the free memory: the rest is for what is not counted here
LOGITS = 8  # bytes of a vocabulary's entry and row while a token is drawn


@dataclass(frozen=True)
class BatchSize:
    """Sequences decoded at a time, and why."""

    size: int
    reason: str


def free_memory(device: torch.device) -> int:
    """Bytes of a CUDA device that tensors can still use: free ones, and those that torch has reserved."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def cache_bytes(config: Any, dtype: torch.dtype, length: int) -> int:
    """Keys and values of one sequence of ``length`` tokens, counted from a model's configuration.

    Layers with a window keep at most that many tokens; a layer without attention counts as one with attention.
    """
    text = config.get_text_config()
    heads, own = _heads(text)
    shared = getattr(text, "num_key_value_heads", None) or heads
    shared = max(shared) if isinstance(shared, list) else shared
    if getattr(text, "kv_lora_rank", None):  # latent attention, in some versions cached written out by heads
        width = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    else:
        width = 2 * shared * own
    window = getattr(text, "sliding_window", None)
    kinds: Sequence[str] = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    tokens = sum(min(length, window) if window and kind == "sliding_attention" else length for kind in kinds)
    return tokens * width * dtype.itemsize


def _heads(text: Any) -> tuple[int, int]:
    """(heads of queries, width of each); a model without attention counts as one with a single head."""
    heads = getattr(text, "num_attention_heads", None) or 1
    heads = max(heads) if isinstance(heads, list) else heads
    return heads, getattr(text, "head_dim", None) or text.hidden_size // heads


def sequence_bytes(config: Any, dtype: torch.dtype, length: int, graphs: bool = False) -> int:
    """What one more sequence of the batch takes: its cache with room to grow, one layer's keys and values for all
    query heads, as a masked attention makes them, and a row of logits.

    Args:
        graphs: whether CUDA graphs may replay its steps, whose buffers are multiples of 64 tokens.
    """
    text = config.get_text_config()
    heads, own = _heads(text)
    held = int((1 + ROOM) * cache_bytes(config, dtype, length))
    if graphs:
        length = rounded(length)
        held = max(held, cache_bytes(config, dtype, length))
    widened = 2 * length * heads * own * dtype.itemsize
    return held + widened + LOGITS * text.vocab_size


def batch_size(lm: CausalLM, sampling: Sampling, longest: int, count: int, models: int = 1) -> BatchSize:
    """The size that ``sampling`` gives, or for ``auto`` one that fits the device.

    128 on a CPU and for a server; 2048 for vLLM, which manages its memory itself. On a GPU the largest power of two, at
    most 2048, whose sequences of ``longest`` + ``max_new_tokens`` tokens fit into 80 % of the free memory. Never more
    than the ``count`` completions need.

    Args:
        longest: tokens of the longest prompt. count: completions to sample.
        models: number of models that read every completion, each with a cache of its own.
    """
    if isinstance(sampling.batch_size, int):
        return BatchSize(sampling.batch_size, "batch_size")
    enough = 1 << (max(1, count) - 1).bit_length()
    if sampling.engine == "vllm":
        return BatchSize(min(MOST, enough), "vLLM decodes as many at a time as fit")
    if sampling.engine == "openai" or lm.device.type != "cuda":
        return BatchSize(CPU, "a server's queue" if sampling.engine == "openai" else "a CPU")
    own = models * sequence_bytes(lm.model.config, lm.weight.dtype, longest + sampling.max_new_tokens, lm.graphs)
    free = free_memory(lm.device)
    fits = max(1, int(USABLE * free) // own)
    size = min(MOST, 1 << (fits.bit_length() - 1), enough)
    said = (
        f"{free / 2**30:.1f} GiB free, {own / 2**20:.1f} MiB a sequence of {longest + sampling.max_new_tokens} tokens"
    )
    return BatchSize(size, said)


def settled(
    lm: CausalLM, sampling: Sampling, prompts: Sequence[Sequence[int]], section: str = "", models: int = 1
) -> Sampling:
    """``sampling`` with a number for ``batch_size``; it prints the choice for a GPU.

    Args:
        section: of the configuration, as "rollouts.". models: see :func:`batch_size`.
    """
    if isinstance(sampling.batch_size, int):
        return sampling
    found = batch_size(lm, sampling, max(map(len, prompts), default=0), len(prompts) * sampling.samples, models)
    if lm.device.type == "cuda" and sampling.engine not in ("openai", "vllm"):
        said = f"{section}batch_size=auto: {found.size} ({found.reason})"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    return sampling.model_copy(update={"batch_size": found.size})
