"""Linear layers whose weights are in 4 bits, as bitsandbytes keeps them: what differs from others."""

from typing import Any

import torch
from torch import Tensor, nn


def nf4(dtype: torch.dtype) -> Any:
    """transformers' settings, as QLoRA's (arXiv 2305.14314): NF4 in blocks, whose scales are quantised too; products
    in ``dtype``. The output head, embeddings and norms stay as they are."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def is_quantized(layer: nn.Module) -> bool:
    return getattr(layer.weight, "quant_state", None) is not None


def quantized(model: nn.Module) -> list[nn.Linear]:
    """The layers of ``model`` whose weights are in 4 bits."""
    return [module for module in model.modules() if isinstance(module, nn.Linear) and is_quantized(module)]


def parameter_count(model: nn.Module) -> int:
    """Numbers in all parameters; two of 4 bits share a byte of their tensor."""
    whole = sum(p.numel() for p in model.parameters())
    return whole + sum(layer.in_features * layer.out_features - layer.weight.numel() for layer in quantized(model))


def dense(layer: nn.Linear) -> Tensor:
    """The weight [out, in]; of 4 bits what they stand for, in the dtype of the weight before."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight
    from bitsandbytes.functional import dequantize_4bit

    whole: Tensor = dequantize_4bit(layer.weight.data, state)
    return whole
