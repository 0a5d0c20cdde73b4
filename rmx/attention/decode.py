"""Attention of one new token a sequence on a CPU, by a native kernel: 1.5 to 2 times as fast as torch's.

Torch multiplies each head of keys by itself, thousands of products of three rows by 64 columns. The kernel reads every
key and value once for all the heads that share it. All that it does not do is left to transformers' own function.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rmx.attention.packing import HARMLESS, attention_function
from rmx_kernels import native

NAME = "rmx_decode"  # among transformers' attention functions, with the masks of its "sdpa"
LANES, GROUP = 16, 64  # of csrc/decode_attention.cpp: width of heads in steps of, most heads a key


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Any]:
    """Query [B, Hq, n, D], key and value [B, Hk, L, D] -> ([B, n, Hq, D], None), as transformers' "sdpa" does."""
    asked = {name for name, value in more.items() if value is not None} - {*HARMLESS, "sliding_window"}
    if asked or dropout or not fits(query, key, value, attention_mask):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    return decode(query, key, value, attention_mask, scaling), None


def fits(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the native kernel is there and takes these: float32 on a CPU, one query a row, keys end to end."""
    B, Hq, n, D = query.shape
    if n != 1 or query.device.type != "cpu" or query.requires_grad or native.missing():
        return False
    group, rest = divmod(Hq, key.shape[1])
    rows = all(x.dtype == torch.float32 and x.shape[-1] == D and x.stride()[2:] == (D, 1) for x in (key, value))
    same = query.dtype == torch.float32 and key.shape == value.shape and key.shape[0] == B
    masked = mask is None or (mask.shape[1:] == (1, 1, key.shape[2]) and mask.shape[0] in (1, B))
    return rows and same and masked and rest == 0 and group <= GROUP and D % LANES == 0


def decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """[B, 1, Hq, D] of what :func:`fits`; a mask is boolean (True: seen) or added to the scores."""
    B, Hq, _, D = query.shape
    Hk, L = key.shape[1:3]
    query = query.contiguous()
    bias = None
    if mask is not None:
        added = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else mask.float()
        bias = added.view(-1, L).expand(B, L).contiguous()
    scores, out = query.new_empty(B * Hq * L), torch.empty_like(query)
    strides = *key.stride()[:2], *value.stride()[:2]
    pointers: list[int | None] = [x.data_ptr() for x in (query, key, value)]
    pointers += [native.address(bias), scores.data_ptr(), out.data_ptr()]
    scale = D**-0.5 if scaling is None else scaling
    native.call("rmx_decode_attention", native.Attention(*pointers, *strides, B, Hk, Hq // Hk, L, D, scale))
    return out.transpose(1, 2)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


@contextmanager
def decoding(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model on a CPU whose attention is transformers' "sdpa" attends with the function above."""
    if next(model.parameters()).device.type != "cpu":
        yield
        return
    with attention_function(model, NAME, instead_of="sdpa"):
        yield
