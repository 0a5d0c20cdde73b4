"""The attention that keeps packed sequences apart, which transformers calls for any model of its common interface.

Backends, best first: flash_attn, torch's flash kernel (both CUDA, half precision), a native kernel (CPU, float32),
exact attention per group of sequences of similar length. In a compiled layer the whole of it is one operator,
rmx::attend, of which the compiler knows shapes alone: no length of a sequence is in the compiled code.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel

from rmx.attention import native
from rmx.attention.grouped import grouped, grouped_gradients
from rmx.attention.packing import HARMLESS, Frame, Packing, PackingError, attention_function, packing_of

NAME = "rmx_packed"  # among transformers' attention functions; it has no mask function, so no mask is made
UNSAID = -1  # no window was handed over, not even None


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
        PackingError: the model passes no packing, or asks for what this attention does not support.
    """
    name = type(module).__name__
    if packing is None or query.shape[0] != 1:
        raise PackingError(f"{name} does not pass the packing to its attention; set model.packing=false")
    asked = sorted(key for key, value in more.items() if key not in HARMLESS and value is not None)
    if asked or attention_mask is not None or dropout or not getattr(module, "is_causal", True):
        what = ", ".join(asked) or "a mask, dropout or attention in both directions"
        raise PackingError(f"{name} asks its attention for {what}, which is not supported; set model.packing=false")
    unsaid = None
    if sliding_window == UNSAID:  # a window that is only in the masks of the model would be lost
        sliding_window, unsaid = None, min(_declared_windows(module), default=None)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    if torch.compiler.is_compiling():
        assert isinstance(packing, Tensor)
        return _attend(q, k, v, packing, scale, sliding_window, softcap, unsaid, name)[0][None], None
    known, window = _checked(q, packing, sliding_window, unsaid, name)
    return backend(q, k, v, softcap)(q, k, v, known, scale, window, softcap)[None], None


def _checked(
    q: Tensor, ends: Tensor | Frame, window: int | None, unsaid: int | None, name: str
) -> tuple[Packing | Frame, int | None]:
    """(the packing, the window or None where no sequence is longer)."""
    packing = _packing(ends, q.device)
    if len(q) != packing.tokens:
        raise PackingError(f"{name} does not pass the packing to its attention; set model.packing=false")
    if unsaid is not None and unsaid < packing.longest:
        raise PackingError(
            f"{name} does not pass the window of {unsaid} tokens in its configuration to its attention; "
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
    """([T, Hq, E], what torch's flash kernel or the native one wants back of its rows, or nothing)."""
    packing, window = _checked(q, ends, window, unsaid, name)
    if native.fits(q, k, v, cap):
        return native.forward(q, k, v, packing, scale, window)
    if not _fits(q, v, cap):
        return grouped(q, k, v, packing, scale, window, cap).contiguous(), q.new_empty(0, dtype=torch.float32)
    return _flash_forward(q, k, v, packing, scale, window)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, scale: float, window: int | None, cap: float | None, *_: Any
) -> Any:
    T, Hq = q.shape[:2]
    kept = (T, Hq, 2) if native.fits(q, k, v, cap) else (Hq, T) if _fits(q, v, cap) else (0,)
    return q.new_empty(T, Hq, v.shape[2]), q.new_empty(kept, dtype=torch.float32)


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
    if native.fits(q, k, v, cap):
        return native.backward(gradient, (q, k, v, out, lse), packing, scale, window)
    if not _fits(q, v, cap):
        return grouped_gradients(gradient, q, k, v, packing, scale, window, cap)
    return _flash_backward(gradient, (q, k, v, out, lse), packing, scale, window)


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


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """(the result, its log-sum-exps) of torch's flash kernel, for which heads of q may share one of k and v."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *_flash_arguments(packing, window), False, **_flash_window(scale, window)
    )
    return out.contiguous(), lse


def _flash_backward(
    gradient: Tensor, kept: tuple[Tensor, ...], packing: Packing | Frame, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``kept``: q, k, v and the two results."""
    unused = kept[0].new_empty(2, dtype=torch.uint64), kept[0].new_empty(0)  # random state: there is no dropout
    found = torch.ops.aten._flash_attention_backward(
        gradient.contiguous(), *kept, *_flash_arguments(packing, window), *unused, **_flash_window(scale, window)
    )
    dq, dk, dv = (x.contiguous() for x in found)
    return dq, dk, dv


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


def backend(query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Backend:
    """The fastest attention for this device, dtype and width of heads."""
    if native.fits(query, key, value, softcap):
        return native_packed
    if _fits(query, value, None):
        if _flash_attn() is not None:
            return flash
        if softcap is None:
            return torch_flash
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


def torch_flash(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """torch's own flash kernel of sequences of several lengths, which has no softcap."""
    assert cap is None
    out: Tensor = _WithRows.apply(q, k, v, _flash_forward, _flash_backward, packing, scale, window)
    return out


def native_packed(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing | Frame, scale: float, window: int | None, cap: float | None
) -> Tensor:
    """The native kernel of :mod:`rmx.attention.native`, of what it fits."""
    assert cap is None
    out: Tensor = _WithRows.apply(q, k, v, native.forward, native.backward, packing, scale, window)
    return out


class _WithRows(torch.autograd.Function):
    """Attention whose ``backward`` wants q, k, v and both results of ``forward``: out, and statistics of its rows."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, forward: Any, backward: Any, *settings: Any) -> Tensor:
        out, of_rows = forward(q, k, v, *settings)
        ctx.save_for_backward(q, k, v, out, of_rows)
        ctx.gradients, ctx.settings = backward, settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return *ctx.gradients(gradient, ctx.saved_tensors, *ctx.settings), *[None] * 5


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model's attention is that of packed sequences."""
    with attention_function(model, NAME):
        yield
