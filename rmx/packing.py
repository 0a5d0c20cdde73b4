"""Sequences end to end in one row, without padding, and the attention that keeps them apart.

The model runs on ``input_ids`` [1, T] with positions that start anew in each sequence, ``use_cache=False`` and no mask;
what keeps sequences apart is the attention function registered here, which transformers calls for any model of its
common attention interface. Backends, best first: flash_attn, torch.nn.attention.varlen (both CUDA, half precision),
exact attention per group of sequences of similar length. In a compiled layer the whole of it is one operator,
rmx::attend, of which the compiler knows shapes alone: no length of a sequence is in the compiled code.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from rmx.errors import RmxError

NAME = "rmx_packed"  # among transformers' attention functions; it has no mask function, so no mask is made
SHORT = 256  # tokens; up to here the explicit product beats the CPU's flash attention, whose backward is slow
UNSAID = -1  # no window was handed over, not even None
# What models hand to any attention function, and what changes nothing here.
HARMLESS = ["position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "is_causal"]
HARMLESS += ["output_attentions", "output_hidden_states", "output_router_logits", "return_dict"]
PADDING = 1.25  # at most this many padded tokens per token inside one group of sequences


class PackingError(RmxError):
    """The model cannot run on packed sequences."""


def sent(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x


@dataclass(frozen=True)
class Packing:
    """Sequences of ``lengths`` tokens end to end: T = sum(lengths) on ``device``."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def ends(self) -> Tensor:
        """[N + 1] int64 on the CPU: where each sequence starts, and T. This is what models hand to the attention."""
        return torch.tensor((0, *self.lengths)).cumsum(0)

    @cached_property
    def offsets(self) -> Tensor:
        """The ends as int32, on the device."""
        return sent(self.ends.to(torch.int32), self.device)

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, T]: 0 .. length - 1 of each sequence."""
        return sent(torch.cat([torch.arange(n) for n in self.lengths])[None], self.device)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(B, L): B sequences of at most L tokens, similar in length; longest first."""
        return [(len(group), self.lengths[group[0]]) for group in self._members]

    @cached_property
    def gather(self) -> Tensor | None:
        """[S], S = sum of B * L: packed tokens to padded rows, group after group; None where they are that already.

        Padding repeats a sequence's last token: causal attention of real tokens never looks there.
        """
        if len(set(self.lengths)) == 1:
            return None
        starts = self.ends.tolist()
        rows = [
            starts[i] + torch.arange(L).clamp(max=self.lengths[i] - 1)
            for group, (_, L) in zip(self._members, self.groups, strict=True)
            for i in group
        ]
        return sent(torch.cat(rows), self.device)

    @cached_property
    def places(self) -> Tensor:
        """[T]: where each packed token is among the padded rows."""
        first: dict[int, int] = {}
        start = 0
        for group, (_, L) in zip(self._members, self.groups, strict=True):
            for i in group:
                first[i] = start
                start += L
        return sent(torch.cat([first[i] + torch.arange(n) for i, n in enumerate(self.lengths)]), self.device)

    @cached_property
    def _members(self) -> list[list[int]]:
        members: list[list[int]] = []
        for i in sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)):
            group = [*(members[-1] if members else []), i]
            tokens = sum(self.lengths[j] for j in group)
            if members and self.lengths[group[0]] * len(group) <= PADDING * tokens:
                members[-1].append(i)
            else:
                members.append([i])
        return members


class Frame:
    """Room for sequences end to end in tensors that stay where they are, for work that is captured and repeated.

    All of ``tokens`` are always computed: those after the last sequence are one sequence more. What is left of
    ``count`` sequences is empty. No sequence is longer than ``longest``. The attributes are those of a Packing.
    """

    def __init__(self, tokens: int, count: int, longest: int, device: torch.device) -> None:
        self.tokens, self.count, self.longest, self.device = tokens, count, longest, device
        self._rows = torch.zeros(2, 1, tokens, dtype=torch.int64, device=device)
        self.ids, self.position_ids = self._rows
        self.offsets = torch.zeros(count + 1, dtype=torch.int32, device=device)
        self.read_on_host = False  # by an attention that cannot be captured

    def fill(self, sequences: Sequence[Sequence[int]]) -> None:
        """Put in other sequences, without waiting for the device."""
        lengths = [len(sequence) for sequence in sequences]
        if rest := self.tokens - sum(lengths):
            lengths.append(rest)
        if rest < 0 or len(lengths) > self.count or max(lengths) > self.longest:
            raise ValueError(f"{lengths} do not fit into {self.tokens} tokens of {self.count} x {self.longest}")
        rows = torch.zeros(2, 1, self.tokens, dtype=torch.int64)
        rows[0, 0, : self.tokens - rest] = torch.tensor([token for sequence in sequences for token in sequence])
        rows[1, 0] = torch.cat([torch.arange(n) for n in lengths])
        offsets = torch.full((self.count + 1,), self.tokens, dtype=torch.int32)
        offsets[: len(lengths)] = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        for own, new in ((self._rows, rows), (self.offsets, offsets)):
            own.copy_(new.pin_memory() if self.device.type == "cuda" else new, non_blocking=True)

    @property
    def groups(self) -> list[tuple[int, int]]:
        return self._now.groups

    @property
    def gather(self) -> Tensor | None:
        return self._now.gather

    @property
    def places(self) -> Tensor:
        return self._now.places

    @property
    def _now(self) -> Packing:
        self.read_on_host = True
        return packing_of(tuple(n for n in self.offsets.diff().tolist() if n), self.device)


@functools.lru_cache(maxsize=8)
def packing_of(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """The last few are kept, with what was sent to the device."""
    return Packing(lengths, device)


def _packing(ends: Tensor | Frame, device: torch.device) -> Packing | Frame:
    return ends if isinstance(ends, Frame) else packing_of(tuple(ends.diff().tolist()), device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = UNSAID,
    softcap: float | None = None,
    packing: Tensor | Frame | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence; query [1, Hq, T, D], key and value [1, Hk, T, D].

    Args:
        packing: its ends, or a frame.

    Returns:
        ([1, T, Hq, D], None).

    Raises:
        PackingError: the model hands over no packing, or asks for what this attention does not do.
    """
    name = type(module).__name__
    if packing is None or query.shape[0] != 1:
        raise PackingError(f"{name} hands no packing to its attention; set model.packing=false")
    asked = sorted(key for key, value in more.items() if key not in HARMLESS and value is not None)
    if asked or attention_mask is not None or dropout or not getattr(module, "is_causal", True):
        what = ", ".join(asked) or "a mask, dropout or attention in both directions"
        raise PackingError(f"{name} asks its attention for {what}; set model.packing=false")
    unsaid = None
    if sliding_window == UNSAID:  # a window that is only in the masks of the model would be lost
        sliding_window, unsaid = None, min(_declared_windows(module), default=None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if torch.compiler.is_compiling():
        assert isinstance(packing, Tensor)
        return _attend(q, k, v, packing, scale, sliding_window, softcap, unsaid, name)[0][None], None
    known, window = _checked(q, packing, sliding_window, unsaid, name)
    return backend(q, v, softcap)(q, k, v, known, scale, window, softcap)[None], None


def _checked(
    q: Tensor, ends: Tensor | Frame, window: int | None, unsaid: int | None, name: str
) -> tuple[Packing | Frame, int | None]:
    """(the packing, the window or None where no sequence is longer)."""
    packing = _packing(ends, q.device)
    if len(q) != packing.tokens:
        raise PackingError(f"{name} hands no packing to its attention; set model.packing=false")
    if unsaid is not None and unsaid < packing.longest:
        raise PackingError(
            f"{name} does not tell its attention of the window of {unsaid} tokens in its configuration; "
            "set model.packing=false"
        )
    return packing, None if window is None or window >= packing.longest else window


@torch.library.custom_op("rmx::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
    unsaid: int | None,
    name: str,
) -> tuple[Tensor, Tensor]:
    """([T, Hq, E], the log-sum-exps that torch's flash kernel wants back, or none)."""
    packing, window = _checked(q, ends, window, unsaid, name)
    if not _fits(q, v, cap):
        return grouped(q, k, v, packing, scale, window, cap).contiguous(), q.new_empty(0, dtype=torch.float32)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_flash_arguments(packing, window), False, **_flash_window(scale, window)
    )
    return out.contiguous(), lse


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, window: int | None, cap: float | None, *_: Any
) -> Any:
    lse = q.new_empty((q.shape[1], q.shape[0]) if _fits(q, v, cap) else 0, dtype=torch.float32)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), lse


@torch.library.custom_op("rmx::attend_backward", mutates_args=())
def _attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ends: Tensor,
    scale: float,
    window: int | None,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    packing = _packing(ends, q.device)
    window = None if window is None or window >= packing.longest else window
    if not _fits(q, v, cap):
        return _grouped_gradients(gradient, q, k, v, packing, scale, window, cap)
    unused = q.new_empty(2, dtype=torch.uint64), q.new_empty(0)  # random state and the like: there is no dropout
    arguments = _flash_arguments(packing, window)
    found = torch.ops.aten._flash_attention_backward(
        gradient.contiguous(), q, k, v, out, lse, *arguments, *unused, **_flash_window(scale, window)
    )
    dq, dk, dv = (x.contiguous() for x in found)
    return dq, dk, dv


@_attend_backward.register_fake
def _(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output, ends)


def _gradients(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    scale, window, cap, *_ = ctx.settings
    return *_attend_backward(gradient, *ctx.saved_tensors, scale, window, cap), *[None] * 6


_attend.register_autograd(_gradients, setup_context=_keep)


def _flash_arguments(packing: Packing | Frame, window: int | None) -> tuple[Any, ...]:
    """Of torch's flash kernel: offsets, longest sequences, dropout, whether it is causal without a window."""
    return packing.offsets, packing.offsets, packing.longest, packing.longest, 0.0, window is None


def _flash_window(scale: float, window: int | None) -> dict[str, Any]:
    return {"scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _declared_windows(module: nn.Module) -> list[int]:
    config = getattr(module, "config", None)
    names = ["attention_chunk_size"] + ["sliding_window"] * bool(getattr(config, "use_sliding_window", True))
    return [value for name in names if isinstance(value := getattr(config, name, None), int)]


AttentionInterface.register(NAME, attend)

Backend = Callable[[Tensor, Tensor, Tensor, Packing | Frame, float, int | None, float | None], Tensor]


def backend(query: Tensor, value: Tensor, softcap: float | None) -> Backend:
    """The fastest attention for this device, dtype and width of heads."""
    if _fits(query, value, None):
        if _flash_attn() is not None:
            return flash
        if _varlen() is not None and softcap is None:
            return varlen
    return grouped


def _fits(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether torch's flash kernel can do it."""
    widths = query.shape[-1], value.shape[-1]
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16) or softcap is not None:
        return False
    return widths[0] == widths[1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


@functools.cache
def _flash_attn() -> Any:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


@functools.cache
def _varlen() -> tuple[Any, frozenset[str]] | None:
    """(varlen_attn, its parameters): torch 2.10 has is_causal, later versions a window; enable_gqa came later still."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return (varlen_attn, names) if {"scale", "window_size"} <= names else None


def flash(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """flash_attn's variable-length kernel."""
    at, longest = packing.offsets, packing.longest
    left = -1 if window is None else window - 1
    more = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (left, 0 if left >= 0 else -1),
        "softcap": cap or 0.0,
    }
    return _flash_attn()(q, k, v, at, at, longest, longest, **more)


def varlen(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """torch's variable-length kernel."""
    found = _varlen()
    assert found is not None and cap is None
    function, names = found
    more: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in names:
        more["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    at, longest = packing.offsets, packing.longest
    return function(q, k, v, at, at, longest, longest, **more)


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


def _grouped_gradients(
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


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is that of packed sequences."""
    with attention_function(model, NAME):
        yield


@contextmanager
def attention_function(model: PreTrainedModel, name: str, instead_of: str | None = None) -> Iterator[None]:
    """Inside, the model's attention is transformers' function ``name``, where it is ``instead_of`` or that is None."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    text = model.config.get_text_config()
    configs[id(text)] = text
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for key, config in configs.items():
            if instead_of is None or before[key] == instead_of:
                config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def pack(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in groups of at most ``token_budget`` tokens (a longer sequence goes alone), best fit, longest first."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [g for g, left in enumerate(room) if left >= lengths[i]]
        if fitting:
            g = min(fitting, key=lambda g: room[g])
            groups[g].append(i)
            room[g] -= lengths[i]
        else:
            groups.append([i])
            room.append(token_budget - lengths[i])
    return groups
