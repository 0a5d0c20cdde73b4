"""A LoRA pair on the output head: its first product, a small one under autograd; the operators make the second."""

import torch
import torch.nn.functional as F
from torch import Tensor

LoRA = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], scale


def split(hidden: Tensor, lora: LoRA | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(lora_hidden [..., r] = scale * hidden @ A.T, lora_weight [V, r] = B), or None twice.

    The gradient of A, and that of hidden through A, come from autograd. On a CPU rows come in fours, as in head_cpu,
    so that neither a value nor a gradient depends on the number of rows. (MKL's float64 product at ranks of 16 to 32
    also depends on whether there are more than 2 r rows.)
    """
    if lora is None:
        return None, None
    A, B, scale = lora
    x = hidden.reshape(-1, hidden.shape[-1])
    N = x.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cpu" and (torch.compiler.is_compiling() or N % 4):
            x = F.pad(x, (0, 0, 0, -N % 4))
        lora_hidden = torch.addmm(x.new_zeros(()), x, A.T, beta=0, alpha=scale)  # scaled before it is rounded
    return lora_hidden[:N].view(*hidden.shape[:-1], A.shape[0]), B
