"""Attention of packed sequences by groups of similar length, exactly, on any device and in any dtype."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmx.attention.packing import Frame, Packing

SHORT = 256  # tokens; up to here the explicit product beats the CPU's flash attention, whose backward is slow


def grouped(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """Attention of each group of similar lengths, on any device and dtype."""
    sizes = [B * L for B, L in packing.groups]
    padded = [x if packing.gather is None else _Gather.apply(x, packing.gather, packing.places) for x in (q, k, v)]
    outs = []
    for (B, L), *parts in zip(packing.groups, *(x.split(sizes) for x in padded), strict=True):
        qs, ks, vs = (part.view(B, L, *part.shape[1:]).transpose(1, 2) for part in parts)  # [B, heads, L, D]
        if cap is not None or (L <= SHORT and not q.is_cuda):
            out = explicit(qs, ks, vs, scale, window, cap)
        else:
            mask = None if window is None else causal_bias(L, window, q.device) == 0
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(
                qs, ks, vs, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
            )
        outs.append(out.transpose(1, 2).reshape(B * L, q.shape[1], -1))
    joined = outs[0] if len(outs) == 1 else torch.cat(outs)
    return joined if packing.gather is None else _Scatter.apply(joined, packing.places)


class _Kept:
    """Stands for autograd's context, which an operator has none of."""

    saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def grouped_gradients(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | Frame,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of :func:`grouped`, from probabilities that are made anew, group by group."""
    padded = [x if packing.gather is None else x.index_select(0, packing.gather) for x in (q, k, v)]
    if packing.gather is not None:
        spread = gradient.new_zeros(len(packing.gather), *gradient.shape[1:])
        gradient = spread.index_copy_(0, packing.places, gradient)
    sizes = [B * L for B, L in packing.groups]
    found: list[list[Tensor]] = [[], [], []]
    for (B, L), *parts in zip(packing.groups, *(x.split(sizes) for x in (gradient, *padded)), strict=True):
        rows = [part.view(B, L, *part.shape[1:]).transpose(1, 2) for part in parts]  # [B, heads, L, D]
        Hk = rows[2].shape[1]
        g, qs, ks, vs = (x.reshape(B * Hk, -1, x.shape[-1]) for x in rows)  # heads that share a key in one product
        kept = _Kept()
        _Explicit.forward(kept, qs, ks, vs, causal_bias(L, window, q.device), scale, cap)
        for own, x, like in zip(found, _Explicit.backward(kept, g), rows[1:], strict=False):
            assert x is not None
            own.append(x.view(like.shape).transpose(1, 2).reshape(B * L, *like.shape[1:2], -1))
    joined = [torch.cat(own) for own in found]
    dq, dk, dv = (x if packing.gather is None else x.index_select(0, packing.places) for x in joined)
    return dq, dk, dv


class _Gather(torch.autograd.Function):
    """x[gather] where rows that ``places`` does not name get no gradient: no sum over repeated rows is needed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _Scatter(torch.autograd.Function):
    """x[places], the places being distinct."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = x.shape[0]
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        spread = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return spread.index_copy_(0, ctx.saved_tensors[0], gradient), None


def causal_bias(length: int, window: int | None, device: torch.device) -> Tensor:
    """[L, L] float32: 0 where a token may look (itself and the ``window - 1`` before it), -inf elsewhere."""
    return (_short_bias if length <= 256 else _causal_bias)(length, window, device)


def _causal_bias(length: int, window: int | None, device: torch.device) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return torch.zeros(length, length).masked_fill_(~allowed, float("-inf")).to(device)


_short_bias = functools.lru_cache(maxsize=64)(_causal_bias)  # of at most 256 KiB each


def explicit(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, cap: float | None) -> Tensor:
    """softmax(cap(scale q k^T) + bias) v with float32 scores; q [B, Hq, L, D], k [B, Hk, L, D], v [B, Hk, L, E]."""
    B, Hq, L, D = q.shape
    Hk = k.shape[1]
    bias = causal_bias(L, window, q.device)
    # heads that share a key are rows of one product
    flat = q.reshape(B * Hk, Hq // Hk * L, D), k.reshape(B * Hk, L, D), v.reshape(B * Hk, L, -1)
    out: Tensor = _Explicit.apply(*flat, bias, scale, cap)
    return out.view(B, Hq, L, -1)


class _Explicit(torch.autograd.Function):
    """[N, G L, D], [N, L, D], [N, L, E] -> [N, G L, E]. Keeps the probabilities, in the inputs' dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, cap: float | None) -> Tensor:
        L = bias.shape[0]
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.bmm(q.to(wide), k.to(wide).transpose(1, 2)).mul_(scale)
        slope = None
        if cap is not None:
            scores.div_(cap).tanh_()
            slope = (1 - scores.square()).to(q.dtype)
            scores.mul_(cap)
        scores = scores.view(-1, L, L).add_(bias)
        p = torch.softmax(scores, -1).to(q.dtype).view(q.shape[0], -1, L)
        out = torch.bmm(p, v)
        ctx.save_for_backward(q, k, v, p, out, slope)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, out, slope = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        gradient = gradient.contiguous()
        dv = torch.bmm(p.transpose(1, 2), gradient)
        mean = (gradient.to(wide) * out).sum(-1, keepdim=True)
        ds = torch.bmm(gradient, v.transpose(1, 2)).to(wide).sub_(mean).mul_(p).mul_(ctx.scale)
        if slope is not None:
            ds.mul_(slope)
        ds = ds.to(q.dtype)
        return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv, None, None, None
