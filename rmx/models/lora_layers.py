"""Layers with a low-rank update: their products, and their weights in training.

Master weights are float32 over a base of any dtype; the low-rank products run in the dtype of the base layer. Layers
that read the same tensor (q, k and v; gate and up) are computed together.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rmx.config import LoraConfig
from rmx.models.quantization import dense


class LoraLayer(nn.Module):
    """A frozen layer plus a low-rank update s B A of its weight, s = alpha / r or, rank-stabilised, alpha / sqrt(r)."""

    parts = ("lora_A.weight", "lora_B.weight")  # as PEFT names them

    def __init__(self, base: nn.Module, scaling: float, A: Tensor, B: Tensor) -> None:
        super().__init__()
        self.base: Any = base
        self.scaling, self.enabled, self.dropout = scaling, True, 0.0
        self.at_end = self.tied = False  # is the input embedding or the head; shares its weight with the other one
        self.lent: tuple[Tensor, Tensor] | None = None  # A and s B for one pass: see Masters
        self.sums: tuple[Tensor, Tensor] | None = None  # and where their gradients are added up
        self.wants: Tensor | None = None  # then, what makes autograd ask for them
        self.lora_A = nn.Parameter(A.to(base.weight.device))  # type: ignore[arg-type]
        self.lora_B = nn.Parameter(B.to(base.weight.device))  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """Of the base, for models that ask it for its dtype."""
        weight: Tensor = self.base.weight
        return weight

    def A(self, dtype: torch.dtype) -> Tensor:
        return (self.lora_A if self.lent is None else self.lent[0]).to(dtype)

    def B(self, dtype: torch.dtype) -> Tensor:
        """Times s."""
        return (self.scaling * self.lora_B if self.lent is None else self.lent[1]).to(dtype)

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(A, s B), differentiable, also where they are lent."""
        if self.sums is None:
            return self.A(dtype), self.B(dtype)
        found: tuple[Tensor, Tensor] = _Borrowed.apply(self.wants, self)
        return found

    def product(self) -> Tensor:
        """B A in the shape of the weight."""
        return self.lora_B @ self.lora_A

    def stored(self) -> dict[str, Tensor]:
        return dict(zip(self.parts, (self.lora_A, self.lora_B), strict=True))


class LoraLinear(LoraLayer):
    r"""A frozen linear layer plus a low-rank update.

    .. math:: y = W x + b + s B A x, \qquad A \in R^{r \times in},\; B \in R^{out \times r}

    A starts random (Kaiming uniform), B at zero, so that the layer starts as the base layer (arXiv 2106.09685).
    """

    def __init__(self, base: nn.Linear, r: int, scaling: float, generator: torch.Generator | None) -> None:
        bound = base.in_features**-0.5  # kaiming_uniform_ with a = sqrt(5)
        A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        super().__init__(base, scaling, A, torch.zeros(base.out_features, r))
        self.shared: SharedInput | None = None
        self.place = 0  # in it

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            plain: Tensor = self.base(x)
            return plain
        if torch.compiler.is_compiling():  # which makes the sums part of what follows
            z = projected(x, [self])[0] if self.shared is None else self.shared.own(x, self, projected)
            y: Tensor = self.base(x) + F.linear(z, self.B(x.dtype))
            return y
        return adapted(x, [self])[0] if self.shared is None else self.shared.own(x, self, adapted)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias
        return bias


class LoraEmbedding(LoraLayer):
    r"""A frozen input embedding plus a low-rank update.

    .. math:: y = W_t + s (B A)_t, \qquad A \in R^{r \times V},\; B \in R^{H \times r}

    of the token t: row t of W, column t of B A. A starts at zero and B random (normal), as in PEFT. Its input are
    tokens, which no dropout is applied to.
    """

    parts = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base: nn.Embedding, r: int, scaling: float, generator: torch.Generator | None) -> None:
        B = torch.empty(base.embedding_dim, r).normal_(generator=generator)
        super().__init__(base, scaling, torch.zeros(r, base.num_embeddings), B)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        if not self.enabled:
            return y
        A, B = self.pair(y.dtype)
        return y + F.embedding(ids, A.T, self.base.padding_idx) @ B.T

    def product(self) -> Tensor:
        return super().product().T


class _Borrowed(torch.autograd.Function):
    """What a layer is lent, for products that autograd makes; their gradients are added to the layer's sums."""

    @staticmethod
    def forward(ctx: Any, wants: Tensor, layer: LoraLayer) -> tuple[Tensor, Tensor]:
        assert layer.lent is not None
        ctx.sums = layer.sums
        ctx.set_materialize_grads(False)
        A, B = layer.lent
        return A.view_as(A), B.view_as(B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, None]:
        for whole, own in zip(ctx.sums, gradients, strict=True):
            if own is not None:
                whole.add_(own)
        return None, None


class _Adapted(torch.autograd.Function):
    """y_i = W_i x + b_i + B_i A_i x' of layers of one input; x' is x after dropout, or None for x.

    Sums are made inside the products, forward and backward, so that no tensor is read for an addition alone. Where the
    layers have ``sums``, the gradients of A and B are added to them, and ``wants`` has them computed at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        wants: Tensor | None,
        layers: list[LoraLinear],
        A: Tensor,
        *Bs: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)
        source = rows if dropped is None else dropped.flatten(0, -2)
        z = source @ A.T
        ctx.save_for_backward(source, A, z, *Bs)
        ctx.layers, ctx.shape, ctx.apart = layers, x.shape, dropped is not None
        ctx.sums = [layer.sums for layer in layers]
        ctx.set_materialize_grads(False)
        parts = z.split([B.shape[1] for B in Bs], -1)
        ys = (layer.base(rows).addmm_(part, B.T) for layer, B, part in zip(layers, Bs, parts, strict=True))
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        source, A, z, *Bs = ctx.saved_tensors
        sizes = [B.shape[1] for B in Bs]
        dz, dx = torch.empty_like(z), None
        dBs: list[Tensor | None] = [None] * len(Bs)
        parts = zip(upstream, ctx.layers, Bs, z.split(sizes, -1), dz.split(sizes, -1), ctx.sums, strict=True)
        for i, (g, layer, B, own, d_own, sums) in enumerate(parts):
            if g is None:
                d_own.zero_()
                continue
            g = g.flatten(0, -2)
            torch.mm(g, B, out=d_own)
            if sums is None:
                dBs[i] = g.T @ own
            else:
                sums[1].addmm_(g.T, own)
            if ctx.needs_input_grad[0]:
                W = dense(layer.base)
                dx = g @ W if dx is None else dx.addmm_(g, W)
        dA = dz.T @ source
        added = ctx.sums[0] is not None
        if added:
            torch._foreach_add_([sums[0] for sums in ctx.sums], dA.split(sizes))
        d_dropped = None
        if ctx.apart:
            d_dropped = (dz @ A).view(ctx.shape) if ctx.needs_input_grad[1] else None
        elif dx is not None:
            dx.addmm_(dz, A)
        return None if dx is None else dx.view(ctx.shape), d_dropped, None, None, None if added else dA, *dBs


def _stacked_A(layers: list[LoraLinear], dtype: torch.dtype) -> Tensor:
    return torch.cat([layer.A(dtype) for layer in layers]) if len(layers) > 1 else layers[0].A(dtype)


def projected(x: Tensor, layers: list[LoraLinear]) -> tuple[Tensor, ...]:
    """A x of layers that read the same x."""
    z = F.linear(F.dropout(x, layers[0].dropout), _stacked_A(layers, x.dtype))
    return z.split([len(layer.lora_A) for layer in layers], -1)


def adapted(x: Tensor, layers: list[LoraLinear]) -> tuple[Tensor, ...]:
    """The results of layers that read the same x."""
    A = _stacked_A(layers, x.dtype)
    dropout = layers[0].dropout
    dropped = F.dropout(x, dropout) if dropout else None
    Bs = [layer.B(x.dtype) for layer in layers]
    results: tuple[Tensor, ...] = _Adapted.apply(x, dropped, layers[0].wants, layers, A, *Bs)
    return results


class SharedInput:
    """Layers that read the same tensor, one after the other; the first call computes for all."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.left: dict[int, Tensor] = {}

    def own(
        self, x: Tensor, layer: LoraLinear, of_all: Callable[[Tensor, list[LoraLinear]], tuple[Tensor, ...]]
    ) -> Tensor:
        """A layer's part of what ``of_all`` makes of x for all of them."""
        if self.x is not x or layer.place not in self.left:  # another tensor, or the same one in another pass
            self.x, self.left = x, dict(enumerate(of_all(x, self.layers)))
        own = self.left.pop(layer.place)
        if not self.left:
            self.x = None
        return own


@dataclass(frozen=True)
class Adapter:
    """The adapted layers of one model, by module path."""

    layers: dict[str, LoraLayer]
    config: LoraConfig
    spelled: dict[str, Any]  # the layers in PEFT's settings: target_modules, layers_to_transform

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, the adapter's inputs are dropped out with the probability of its configuration."""
        try:
            for layer in self.layers.values():
                layer.dropout = self.config.dropout
            yield
        finally:
            for layer in self.layers.values():
                layer.dropout = 0.0

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the model is its own base: the same weights, no second copy."""
        before = [layer.enabled for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer, enabled in zip(self.layers.values(), before, strict=True):
                layer.enabled = enabled


class Masters:
    """The adapter's float32 weights end to end, one tensor for the optimiser; the layers' own are views of it.

    A pass lends the layers copies in the model's dtype, made for all of them at once, and the gradients of all come
    back the same way: a few kernels a pass instead of a few for each layer.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.layers = list(adapter.layers.values())
        parameters = adapter.parameters()
        self.shapes = [p.shape for p in parameters]
        self.sizes = [p.numel() for p in parameters]
        self.flat = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
        self.scale = torch.ones_like(self.flat.data)
        for parameter, own in zip(parameters, self.flat.data.split(self.sizes), strict=True):
            parameter.data = own.view_as(parameter)
        for layer, own in zip(self.layers, self.scale.split(self.sizes)[1::2], strict=True):
            own.fill_(layer.scaling)
        self.kept: dict[torch.dtype, _Lent] = {}  # used again

    @contextmanager
    def lent(self, dtype: torch.dtype, compiled: bool = False) -> Iterator[None]:
        """Inside, forward and backward passes work on copies of the weights; gradients end in that of ``flat``.

        Args:
            compiled: whether layers are, which then may count on the shapes of these copies.
        """
        if compiled:  # the gradients come back by way of the graph
            lent = self._lent((self.flat * self.scale).to(dtype), None)
        else:
            if dtype not in self.kept:
                copies, sums = (torch.empty_like(self.scale, dtype=dtype) for _ in range(2))
                self.kept[dtype] = self._lent(copies, sums)
            lent = self.kept[dtype]
            assert lent.sums is not None
            lent.copies.copy_(self.flat.detach() * self.scale)
            lent.sums.zero_()
        # a new leaf in each pass: autograd waits for the stream on which it first met a leaf
        wants = None if lent.sums is None else torch.empty((), device=self.flat.device, requires_grad=True)
        try:
            for layer, own, own_sums in zip(self.layers, lent.own, lent.own_sums, strict=True):
                for part in own if compiled and own is not None else ():
                    torch._dynamo.mark_static(part)
                layer.lent, layer.sums, layer.wants = own, own_sums, wants
            yield
        finally:
            for layer in self.layers:
                layer.lent = layer.sums = layer.wants = None
        if lent.sums is not None:
            gradient = lent.sums * self.scale
            self.flat.grad = gradient if self.flat.grad is None else self.flat.grad.add_(gradient)

    def _lent(self, copies: Tensor, sums: Tensor | None) -> "_Lent":
        return _Lent(copies, sums, self._pairs(copies), self._pairs(sums))

    def _pairs(self, whole: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
        """The parts (of A, of B) of each layer in a tensor of all."""
        if whole is None:
            return [None] * len(self.layers)
        parts = [p.view(shape) for p, shape in zip(whole.split(self.sizes), self.shapes, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))


@dataclass(frozen=True)
class _Lent:
    """What a pass works on: copies of all weights, sums of their gradients, and the parts of each layer in both."""

    copies: Tensor
    sums: Tensor | None
    own: list[tuple[Tensor, Tensor] | None]
    own_sums: list[tuple[Tensor, Tensor] | None]
