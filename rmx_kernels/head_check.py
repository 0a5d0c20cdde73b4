"""Whether a causal LM's logits are those of the formula of head_of, found out once on 8 tokens.

Three things are looked at apart, since the rounding of bfloat16 logits would hide a wrong scale or softcap: what the
model does to the output of its head, by numbers of all sizes in float32 put in its place; that the head reads the final
hidden states; and that its own output is a product with the weight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROUNDING = 1e-4  # of a scale and a softcap in float32, relative
LARGEST = 80.0  # of the numbers that stand for the head's output: beyond the softcaps that models have (15 to 50)


@torch.no_grad()
def check_logits(head: Any) -> None:
    """Raise ValueError unless the formula gives the logits of ``head``, a CausalLMHead."""
    given, name = head.kwargs(), type(head.causal_lm).__name__
    weight, module = given["weight"], head.causal_lm.get_output_embeddings()
    ids = torch.arange(1, 9, device=weight.device).unsqueeze(0) % weight.shape[0]
    calls: list[tuple[Tensor, Tensor, Tensor]] = []  # the head's input, its output, what was put in its place

    def exchange(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        calls.append((args[0], output, probe(output)))
        return calls[-1][2]

    with evaluating(head.outer):  # dropout would make two runs differ
        handle = module.register_forward_hook(exchange, prepend=True)
        try:
            theirs = head.outer(input_ids=ids, use_cache=False)[0]  # first, since fully_shard takes it for the root
        finally:
            handle.remove()
        hidden = head.hidden(ids)
    product = F.linear(hidden.float(), weight.float(), None if given["bias"] is None else given["bias"].float())
    if given["lora"] is not None:
        A, B, scale = given["lora"]
        product += scale * F.linear(F.linear(hidden.float(), A.float()), B.float())
    if product.shape != theirs.shape:
        raise ValueError(
            f"model: expected logits of shape {tuple(product.shape)} from {name}, as its hidden states and output head "
            f"give, got {tuple(theirs.shape)}"
        )
    if len(calls) != 1:  # the weight is used without its module: all in one, as far as rounded logits tell
        limit = max(1e-3, torch.finfo(theirs.dtype).eps / 2)
        _compare(name, _transformed(product, head.scale, head.softcap), theirs, limit)
        return
    ((states, output, put),) = calls
    eps = torch.finfo(output.dtype).eps  # that of autocast, where it is on
    if states.numel() != hidden.numel():
        raise ValueError(
            f"model: expected the head of {name} to read states of shape {tuple(hidden.shape)}, as its decoder gives, "
            f"got {tuple(states.shape)}"
        )
    states, scale = states.reshape(hidden.shape).to(hidden.dtype), head.scale
    if scale != 1.0 and _error(scale * hidden, states) < _error(hidden, states):  # MiniCPM: before the head, not after
        _compare(name, scale * hidden, states, max(1e-3, eps / 2), "the states that its head reads")
        product, scale = F.linear(states.float(), weight.float()), 1.0
    else:
        _compare(name, hidden, states, 1e-3, "the states that its head reads")
    _compare(name, product, output, max(1e-3, 4 * eps), "the output of its head")
    expected = _transformed(put, scale, head.softcap).to(theirs.dtype)
    _compare(name, expected, theirs, max(ROUNDING, torch.finfo(theirs.dtype).eps))


def probe(like: Tensor) -> Tensor:
    """Numbers from -LARGEST to LARGEST, in another order at each position; float32 in the shape of ``like``."""
    V = like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(V, generator=generator) for _ in range(like[..., 0].numel())]
    return torch.linspace(-LARGEST, LARGEST, V)[torch.stack(rows)].view(like.shape).to(like.device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _error(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def _compare(name: str, ours: Tensor, theirs: Tensor, limit: float, what: str = "its logits") -> None:
    error = _error(ours, theirs)
    if not error <= limit:
        raise ValueError(
            f"model: expected the logits of {name} to be its hidden states times its output head, with the scale and "
            f"softcap of its configuration, got {what} with a difference of {error:.2%}; the model "
            "transforms them in another way"
        )
