"""Naive full-logits counterparts, written from the definitions."""

import torch
from torch import Tensor

from rmx.models.model import CausalLM


def full_logits(lm: CausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B, L, V] logits by the head that the library would use."""
    logits = lm.hidden(ids, mask, use_cache=False) @ lm.weight.T
    if lm.bias is not None:
        logits = logits + lm.bias
    logits = logits * lm.scale
    return logits if lm.softcap is None else lm.softcap * torch.tanh(logits / lm.softcap)
