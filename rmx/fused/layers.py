"""Element-wise work of a decoder layer in one kernel each: RMSNorm, the gated activation, the rotation.

Eager PyTorch reads and writes a tensor some twenty times for one RMSNorm with its backward. Here it is read once
forward and twice backward. A module is replaced only where it then gives what it gave before, which is tried on random
input: the error against float32 may be at most twice the module's own. Weights of norms are frozen in this training,
so they get no gradient. The kernels are Triton's on a GPU and native ones on a CPU.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rmx.fused import cpu
from rmx_kernels.dispatch import INTERPRETED

Form = Callable[[Tensor], Tensor]
WIDTH = 16  # of trials
SLACK = 8 * torch.finfo(torch.float32).eps  # of the largest entry: modules compute in float32 too


def _kernels(x: Tensor) -> Any:
    """The module of the kernels for a tensor."""
    if x.device.type == "cpu" and not INTERPRETED:
        return cpu
    from rmx.fused import triton  # which not every system has

    return triton


class RMSNorm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), x [..., H]; d x alone. ``rounded``: before the weight too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounded: bool) -> Tensor:
        x = x.contiguous()
        y, rstd = _kernels(x).norm(x, weight, eps, offset, rounded)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return cast(Tensor, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, rstd = ctx.saved_tensors
        return _kernels(x).norm_gradient(g.contiguous(), x, weight, rstd, ctx.offset), None, None, None, None


class GatedActivation(torch.autograd.Function):
    """act(gate) * up, of tensors of one shape; act is SiLU, or GELU in its form with tanh."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return cast(Tensor, _kernels(gate).gated(gate, up, gelu))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *_kernels(gate).gated_gradients(g.contiguous(), gate, up, ctx.gelu), None


class TwoProducts(torch.autograd.Function):
    """x V^T and x W^T of frozen weights; d x = g V + h W is one sum, made inside the second product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, V: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(V, W)
        return F.linear(x, V), F.linear(x, W)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        V, W = ctx.saved_tensors
        dx = g.flatten(0, -2) @ V
        return dx.addmm_(h.flatten(0, -2), W).view(*g.shape[:-1], -1), None, None


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
    B, heads, T, width = x.shape
    # as the projection wrote it, [B, T, heads, width], which is also how attention of packed sequences reads it
    y = torch.empty(B, T, heads, width, dtype=x.dtype, device=x.device).transpose(1, 2)
    _kernels(x).rotated(x, cos.contiguous(), sin.contiguous(), y, inverse=inverse)
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
        return lambda x: down(GatedActivation.apply(*_both(gate, up, x), gelu))

    return [form(False), form(True)]


def _both(gate: nn.Module, up: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    if not all(type(module) is nn.Linear and module.bias is None for module in (gate, up)):
        return gate(x), up(x)
    weights = [cast(nn.Linear, module).weight for module in (gate, up)]
    if any(weight.requires_grad for weight in weights):
        return gate(x), up(x)
    products: tuple[Tensor, Tensor] = TwoProducts.apply(x, *weights)
    return products


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
        linear = {name: nn.Linear(*sizes, bias=False) for name, sizes in widths.items()}
        narrow = {name: module.to(parameter).requires_grad_(False) for name, module in linear.items()}
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
