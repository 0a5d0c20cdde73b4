"""Element-wise work of a decoder layer in one kernel each, on a GPU: RMSNorm, the gated activation, the rotation.

Eager PyTorch reads and writes a tensor some twenty times for one RMSNorm with its backward. Here it is read once
forward and twice backward. A module is replaced only where it then gives what it gave before, which is tried on random
input: the error against float32 may be at most twice the module's own. Weights of norms are frozen in this training,
so they get no gradient. Sizes are specialised, since a mask whose end is no multiple of 16 forbids loads of 16 bytes.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rmx_kernels.head.kernels import tanh
from rmx_kernels.head.launch import launch, power_of_2

Form = Callable[[Tensor], Tensor]
WIDTH = 16  # of trials
SLACK = 8 * torch.finfo(torch.float32).eps  # of the largest entry: modules compute in float32 too
BLOCK = 1024  # of the gated activation
GELU_SCALE = tl.constexpr((2 / torch.pi) ** 0.5)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def norm_forward(x, weight, y, rstd, H, eps, offset, ROUND: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < H
    value = tl.load(x + row * H + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide) / H + eps)
    unit = wide * scale
    if ROUND:
        unit = unit.to(value.dtype).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + row * H + column, (unit * w).to(value.dtype), mask=inside)
    tl.store(rstd + row, scale)


@triton.jit
def norm_backward(g, x, weight, rstd, dx, H, offset, WIDTH: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    inside = column < H
    value = tl.load(x + row * H + column, mask=inside, other=0.0)
    scale = tl.load(rstd + row)
    unit = value.to(tl.float32) * scale
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
    along = tl.load(g + row * H + column, mask=inside, other=0.0).to(tl.float32) * w
    d = scale * (along - unit * (tl.sum(along * unit) / H))
    tl.store(dx + row * H + column, d.to(value.dtype), mask=inside)


@triton.jit
def activated(z, GELU: tl.constexpr):
    """(act(z), act'(z)) in float32: silu(z) = z sigmoid(z), or GELU with tanh."""
    if GELU:
        inner = GELU_SCALE * (z + GELU_CUBE * z * z * z)
        t = tanh(inner)
        a = 0.5 * z * (1 + t)
        d = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * GELU_SCALE * (1 + 3 * GELU_CUBE * z * z)
    else:
        s = 1.0 / (1.0 + tl.exp(-z))
        a = z * s
        d = s * (1 + z * (1 - s))
    return a, d


@triton.jit
def gated_forward(gate, up, y, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(gate + at, mask=inside, other=0.0)
    a, _ = activated(z.to(tl.float32), GELU)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (a.to(z.dtype).to(tl.float32) * u).to(z.dtype), mask=inside)


@triton.jit
def gated_backward(g, gate, up, d_gate, d_up, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.load(gate + at, mask=inside, other=0.0)
    a, slope = activated(z.to(tl.float32), GELU)
    upstream = tl.load(g + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(d_gate + at, (upstream * u * slope).to(z.dtype), mask=inside)
    tl.store(d_up + at, (upstream * a).to(z.dtype), mask=inside)


@triton.jit(do_not_specialize=["T", "heads"])
def rotate(
    x, x_batch, x_head, x_token,  # [B, heads, T, 2 D], the last dimension without a stride
    cos, sin, table_batch,  # [B or 1, T, 2 D]
    y, y_batch, y_head, y_token,
    T, heads,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """(x1 cos1 - x2 sin1, x2 cos2 + x1 sin2) of the two halves of a head, or that map transposed."""
    token, batch = tl.program_id(0).to(tl.int64) % T, tl.program_id(0).to(tl.int64) // T
    half, head = tl.arange(0, HALF)[None, :], tl.arange(0, HEADS)[:, None]
    known = half < D
    inside = (head < heads) & known
    table = batch * table_batch + token * (2 * D) + half
    cos1 = tl.load(cos + table, mask=known, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + table + D, mask=known, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + table, mask=known, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + table + D, mask=known, other=0.0).to(tl.float32)
    at = batch * x_batch + head * x_head + token * x_token + half
    x1 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + at + D, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    to = y + batch * y_batch + head * y_head + token * y_token + half
    tl.store(to, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(to + D, y2.to(y.dtype.element_ty), mask=inside)


def _warps(width: int) -> int:
    return min(16, max(1, width // 512))


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), x [..., H]; d x alone. ``rounded``: before the weight too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> Tensor:
        x = x.contiguous()
        H = x.shape[-1]
        rows, y = x.numel() // H, torch.empty_like(x)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        width = power_of_2(H)
        constants = {"ROUND": rounded, "WIDTH": width}
        launch(norm_forward, rows, x.device, x, weight, y, rstd, H, eps, offset, warps=_warps(width), **constants)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        H, dx = x.shape[-1], torch.empty_like(x)
        width = power_of_2(H)
        arguments = (g.contiguous(), x, weight, rstd, dx, H, ctx.offset)
        launch(norm_backward, rstd.numel(), x.device, *arguments, warps=_warps(width), WIDTH=width)
        return dx, None, None, None, None


class GatedActivation(torch.autograd.Function):
    """act(gate) * up, of tensors of one shape; act is SiLU, or GELU in its form with tanh."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y, size = torch.empty_like(gate), gate.numel()
        launch(gated_forward, -(-size // BLOCK), y.device, gate, up, y, size, warps=4, GELU=gelu, BLOCK=BLOCK)
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        d_gate, d_up, size = torch.empty_like(gate), torch.empty_like(up), gate.numel()
        arguments = (g.contiguous(), gate, up, d_gate, d_up, size)
        launch(gated_backward, -(-size // BLOCK), g.device, *arguments, warps=4, GELU=ctx.gelu, BLOCK=BLOCK)
        return d_gate, d_up, None


class Rotation(torch.autograd.Function):
    """x [B, heads, T, 2 D] rotated by cos and sin [B or 1, T, 2 D], whose halves go with the halves of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, inverse=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return _rotated(g, *ctx.saved_tensors, inverse=True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    B, heads, T, width = x.shape
    # as the projection wrote it, [B, T, heads, width], which is also how attention of packed sequences reads it
    y = torch.empty(B, T, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    table_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    constants: dict[str, Any] = {"INVERSE": inverse, "HEADS": power_of_2(heads), "D": width // 2}
    constants["HALF"] = power_of_2(width // 2)
    launch(
        *(rotate, B * T, x.device, x, *x.stride()[:3], cos, sin, table_batch, y, *y.stride()[:3], T, heads),
        warps=4,
        **constants,
    )
    return y


def _norm_forms(module: nn.Module) -> list[Form]:
    """The ways to compute an RMSNorm, one of which may be that of the module; none for other modules."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not (type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and isinstance(eps, float)):
        return []
    if weight.requires_grad:
        return []

    def form(offset: float, rounded: bool) -> Form:
        return lambda x: RMSNorm.apply(x, weight, eps, offset, rounded)

    return [form(0.0, True), form(1.0, False), form(0.0, False)]


def _gated_forms(module: nn.Module) -> list[Form]:
    """The same of a gated feed-forward module."""
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
        return []
    gate, up, down = (cast(nn.Module, getattr(module, name)) for name in ("gate_proj", "up_proj", "down_proj"))

    def form(gelu: bool) -> Form:
        return lambda x: down(GatedActivation.apply(gate(x), up(x), gelu))

    return [form(False), form(True)]


KINDS: dict[str, Callable[[nn.Module], list[Form]]] = {"norms": _norm_forms, "feed-forward": _gated_forms}


def _close(plain: list[Tensor], other: list[Tensor], exact: list[Tensor]) -> bool:
    for p, o, e in zip(plain, other, exact, strict=True):
        rounding = 0.0 if o.dtype == torch.float32 else torch.finfo(o.dtype).eps / 2
        allowed = 2 * (p.double() - e).abs().max() + (SLACK + rounding) * e.abs().max()
        close = (o.double() - e).abs().max() <= allowed  # NaN is not close
        if o.dtype != p.dtype or not close:
            return False
    return True


def _tried(call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """[y, d x] of one call, for a fixed upstream gradient."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = call(x)
        g = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
        return [y.detach(), torch.autograd.grad(y, x, g)[0]]


def _probe(module: nn.Module) -> nn.Module:
    """The module; of a feed-forward one, its own code and activation around narrow linear layers."""
    if not hasattr(module, "gate_proj"):
        return module
    parameter = next(module.parameters())
    probe = copy.copy(module)
    widths = {"gate_proj": (WIDTH, 2 * WIDTH), "up_proj": (WIDTH, 2 * WIDTH), "down_proj": (2 * WIDTH, WIDTH)}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        narrow = {name: nn.Linear(*sizes, bias=False).to(parameter) for name, sizes in widths.items()}
    probe._modules = module._modules | narrow
    return probe


def _form(module: nn.Module, forms: Callable[[nn.Module], list[Form]]) -> int | None:
    """Which of its forms gives what the module gives."""
    probe = _probe(module)
    options, parameter = forms(probe), next(probe.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, parameter.shape[-1], generator=generator).to(parameter)
    plain = _tried(probe, x)
    exact = [t.double() for t in _tried(copy.deepcopy(probe).double(), x.double())]
    return next((i for i, form in enumerate(options) if _close(plain, _tried(form, x), exact)), None)


def _rotation(plain: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or q.dim() != 4 or cos.dim() != 3 or not cos.shape[-1] == q.shape[-1] == k.shape[-1]:
            return plain(q, k, cos, sin, *args, **kwargs)
        return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)

    return apply_rotary_pos_emb


def _rotates_alike(plain: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 16, generator=generator).to(device, dtype)
    angle = torch.randn(2, 3, 8, generator=generator).to(device).repeat(1, 1, 2)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    try:
        tried = _tried(lambda x: plain(x, x, *tables)[0], x)
        exact = _tried(lambda x: plain(x, x, *(t.double() for t in tables))[0], x.double())
    except (RuntimeError, TypeError, ValueError):  # another signature, other tables
        return False
    return _close(tried, _tried(lambda x: Rotation.apply(x, *tables), x), exact)


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Inside, the model's modules run fused where that gives the same; yields how many of each kind do."""
    counts = dict.fromkeys([*KINDS, "rotations"], 0)
    replaced: list[nn.Module] = []
    rotations: dict[str, Any] = {}
    first = next(model.parameters())
    chosen: dict[Any, int | None] = {}
    try:
        for module in list(model.modules()):
            for kind, forms in KINDS.items():
                options = forms(module)
                if not options or "forward" in vars(module):
                    continue
                alike = kind, type(module), first.dtype, str(getattr(module, "act_fn", None))
                if alike not in chosen:
                    chosen[alike] = _form(module, forms)
                if (form := chosen[alike]) is not None:
                    module.forward = options[form]
                    replaced.append(module)
                    counts[kind] += 1
            namespace = sys.modules[type(module).__module__]
            plain = vars(namespace).get("apply_rotary_pos_emb")
            if plain is not None and namespace.__name__ not in rotations:
                rotations[namespace.__name__] = plain
                if _rotates_alike(plain, first.dtype, first.device):
                    vars(namespace)["apply_rotary_pos_emb"] = _rotation(plain)
                    counts["rotations"] += 1
        yield counts
    finally:
        for module in replaced:
            del module.forward
        for name, plain in rotations.items():
            vars(sys.modules[name])["apply_rotary_pos_emb"] = plain
