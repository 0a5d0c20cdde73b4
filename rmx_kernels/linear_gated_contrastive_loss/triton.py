"""The rows of linear_logprob_kl that carry a weight, those with an anchor first; no others are multiplied.

How many they are is asked of the device once a call. Inside a captured CUDA graph that cannot be: there all rows are
multiplied, and those without a weight count for nothing.
"""

import torch
from torch import Tensor

from rmx_kernels.gated_contrastive_loss.reference import live_rows
from rmx_kernels.gated_contrastive_loss.triton import flat, weighted_sum
from rmx_kernels.head_triton import HeadGradient
from rmx_kernels.linear_gated_contrastive_loss.ops import run as run
from rmx_kernels.linear_logprob_kl.triton import LossRows, all_rows


def _live(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    weights: tuple[Tensor, Tensor],
    temperature: float,
    softcap: float | None,
) -> LossRows:
    capturing = hidden.is_cuda and torch.cuda.is_current_stream_capturing()
    index, anchored = (None, None) if capturing else live_rows(*weights)
    if index is not None and index.shape[0] == weights[0].shape[0] and anchored in (0, index.shape[0]):
        index = None  # every row, in its own order
    return all_rows(
        *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, temperature, softcap),
        index=index,
        anchored=anchored,
    )


def forward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    base_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_gated_contrastive_loss."""
    ce, kl_w = flat(ce_weight, kl_weight)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = _live(
            *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, (ce, kl_w), temperature, softcap)
        )
        known = None if base_lse is None else base_lse.reshape(-1)
        logprob, kl, norms, dx, du = rows.terms((ce, kl_w), known, gradient)
        loss = weighted_sum(ce, kl_w, logprob, kl)
    dx = dx.view(hidden.shape) if gradient else dx
    du = du.view(lora_hidden.shape) if gradient and lora_hidden is not None else du
    return loss, logprob.view(target.shape), kl.view(target.shape), norms, dx, du


def backward(
    hidden: Tensor,
    base_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    target: Tensor,
    ce_weight: Tensor,
    kl_weight: Tensor,
    norms: Tensor,
    g_loss: Tensor,
    temperature: float,
    softcap: float | None,
    need_weight: bool,
    need_bias: bool,
    need_lora_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of rmx_kernels::linear_gated_contrastive_loss_backward."""
    ce, kl_w = flat(ce_weight, kl_weight)
    with torch.autocast(hidden.device.type, enabled=False):
        rows = _live(
            *(hidden, base_hidden, weight, bias, lora_hidden, lora_weight, target, (ce, kl_w), temperature, softcap)
        )
        sink = HeadGradient(rows.head, need_weight, need_bias, need_lora_weight)
        rows.head_gradients((ce, kl_w), norms, sink, g_loss.to(torch.float32))
    return sink.weight, sink.bias, sink.lora_weight


def d_hidden(d_hidden: Tensor, g_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient that came with the value, times the upstream gradient: an operator, so as to refuse a second one."""
    return (d_hidden * g_loss).to(dtype)
