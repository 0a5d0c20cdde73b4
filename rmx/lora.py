"""Low-rank adapters on linear layers, stored as PEFT stores them.

Master weights are float32 over a base of any dtype; the low-rank products run in the dtype of the base layer. Layers
that read the same tensor (q, k and v; gate and up) are computed together.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from rmx.artefacts import fingerprint, replacing
from rmx.config import LoraConfig
from rmx.targets import AdapterError, matching, spelled_for_peft

CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "rmx.json"
PREFIX = "base_model.model."  # of PEFT's tensor names
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # siblings that read one tensor, in this order


# Of adapter_config.json. What is in neither has to be empty, since it would change what the adapter is.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base's weights as well
}
FREE: tuple[str, ...] = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "layers_to_transform",
    "base_model_name_or_path",
)
FREE += ("task_type", "inference_mode", "auto_mapping", "revision", "peft_version")
FREE += ("megatron_core", "qalora_group_size", "eva_config")  # settings of what is off, or of the initialisation


class LoraLinear(nn.Module):
    r"""A frozen linear layer plus a low-rank update.

    .. math:: y = W x + b + \frac{\alpha}{r} B A x, \qquad A \in R^{r \times in},\; B \in R^{out \times r}

    A starts random (Kaiming uniform), B at zero, so that the layer starts as the base layer (arXiv 2106.09685).
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.base, self.scaling, self.enabled, self.dropout = base, alpha / r, True, 0.0
        self.shared: SharedInput | None = None
        self.place = 0  # in it
        self.lent: tuple[Tensor, Tensor] | None = None  # A and alpha / r B for one pass: see Masters
        self.sums: tuple[Tensor, Tensor] | None = None  # and where their gradients are added up
        bound = base.in_features**-0.5  # kaiming_uniform_ with a = sqrt(5)
        A = torch.empty(r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A.to(base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base(x)
        if torch.compiler.is_compiling():  # which makes the sums part of what follows
            z = F.linear(F.dropout(x, self.dropout), self.A(x.dtype)) if self.shared is None else self.shared.z(x, self)
            return self.base(x) + F.linear(z, self.B(x.dtype))
        return adapted(x, [self])[0] if self.shared is None else self.shared.y(x, self)

    @property
    def weight(self) -> Tensor:
        """Of the base, for models that ask it for its dtype."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def A(self, dtype: torch.dtype) -> Tensor:
        return (self.lora_A if self.lent is None else self.lent[0]).to(dtype)

    def B(self, dtype: torch.dtype) -> Tensor:
        """Times alpha / r."""
        return (self.scaling * self.lora_B if self.lent is None else self.lent[1]).to(dtype)


class _Adapted(torch.autograd.Function):
    """y_i = W_i x + b_i + B_i A_i x' of layers of one input; x' is x after dropout, or None for x.

    Sums are made inside the products, forward and backward, so that no tensor is read for an addition alone. Where the
    layers have ``sums``, the gradients of A and B are added to them, and ``flat`` has them computed at all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        flat: Tensor | None,
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
                dx = g @ layer.base.weight if dx is None else dx.addmm_(g, layer.base.weight)
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


def adapted(x: Tensor, layers: list[LoraLinear]) -> tuple[Tensor, ...]:
    """The results of layers that read the same x."""
    A = torch.cat([layer.A(x.dtype) for layer in layers]) if len(layers) > 1 else layers[0].A(x.dtype)
    dropout = layers[0].dropout
    dropped = F.dropout(x, dropout) if dropout else None
    flat = None if layers[0].sums is None else layers[0].lora_A
    Bs = [layer.B(x.dtype) for layer in layers]
    results: tuple[Tensor, ...] = _Adapted.apply(x, dropped, flat, layers, A, *Bs)
    return results


class SharedInput:
    """Layers that read the same tensor, one after the other; the first call computes for all."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers = layers
        self.x: Tensor | None = None
        self.left: dict[int, Tensor] = {}

    def y(self, x: Tensor, layer: LoraLinear) -> Tensor:
        """The result of a layer."""
        return self._own(x, layer, lambda: adapted(x, self.layers))

    def z(self, x: Tensor, layer: LoraLinear) -> Tensor:
        """A x of a layer."""

        def products() -> tuple[Tensor, ...]:
            A = torch.cat([member.A(x.dtype) for member in self.layers])
            return F.linear(F.dropout(x, layer.dropout), A).chunk(len(self.layers), -1)

        return self._own(x, layer, products)

    def _own(self, x: Tensor, layer: LoraLinear, compute: Callable[[], tuple[Tensor, ...]]) -> Tensor:
        if self.x is not x or layer.place not in self.left:  # another tensor, or the same one in another pass
            self.x, self.left = x, dict(enumerate(compute()))
        own = self.left.pop(layer.place)
        if not self.left:
            self.x = None
        return own


@dataclass(frozen=True)
class Adapter:
    """The adapted layers of one model, by module path."""

    layers: dict[str, LoraLinear]
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
        self.kept: dict[torch.dtype, tuple[Tensor, Tensor]] = {}  # copies and sums of gradients, used again

    @contextmanager
    def lent(self, dtype: torch.dtype, compiled: bool = False) -> Iterator[None]:
        """Inside, forward and backward passes work on copies of the weights; gradients end in that of ``flat``.

        Args:
            compiled: whether layers are, which then may count on the shapes of these copies.
        """
        if compiled:  # the gradients come back by way of the graph
            copies, sums = (self.flat * self.scale).to(dtype), None
        else:
            if dtype not in self.kept:
                self.kept[dtype] = torch.empty_like(self.scale, dtype=dtype), torch.empty_like(self.scale, dtype=dtype)
            copies, sums = self.kept[dtype]
            copies.copy_(self.flat.detach() * self.scale)
            sums.zero_()
        places = zip(self.layers, self._pairs(copies), self._pairs(sums), strict=True)
        try:
            for layer, own, own_sums in places:
                for part in own if compiled and own is not None else ():
                    torch._dynamo.mark_static(part)
                layer.lent, layer.sums = own, own_sums
            yield
        finally:
            for layer in self.layers:
                layer.lent = layer.sums = None
        if sums is not None:
            gradient = sums * self.scale
            self.flat.grad = gradient if self.flat.grad is None else self.flat.grad.add_(gradient)

    def _pairs(self, whole: Tensor | None) -> list[tuple[Tensor, Tensor] | None]:
        """The parts (of A, of B) of each layer in a tensor of all."""
        if whole is None:
            return [None] * len(self.layers)
        parts = [p.view(shape) for p, shape in zip(whole.split(self.sizes), self.shapes, strict=True)]
        return list(zip(parts[::2], parts[1::2], strict=True))


def attach(model: PreTrainedModel, config: LoraConfig, seed: int) -> Adapter:
    """Replace each layer of :func:`matching`.

    Raises:
        AdapterError: see there.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = matching(model, config)
    spelled = spelled_for_peft(model, config, list(chosen))
    layers = {name: LoraLinear(module, config.r, config.alpha, generator) for name, module in chosen.items()}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for family in SAME_INPUT:
            members = [layers[f"{parent}.{last}"] for last in family if f"{parent}.{last}" in layers]
            if len(members) > 1 and len({member.base.in_features for member in members}) == 1:
                shared = SharedInput(members)
                for place, member in enumerate(members):
                    member.shared, member.place = shared, place
    return Adapter(layers, config, spelled)


@torch.no_grad()
def merge(adapter: Adapter, sign: float = 1.0) -> None:
    """Add each update to its base weight, in float32 and rounded to the weight's dtype, and switch the adapter off.

    In low precision the sum is rounded where the adapter itself is not: an update far below the weights' rounding is
    lost. :func:`unmerge` brings the weights back to rounding.
    """
    for layer in adapter.layers.values():
        weight = layer.base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + sign * layer.scaling * (layer.lora_B @ layer.lora_A))
        layer.enabled = sign < 0


def unmerge(adapter: Adapter) -> None:
    """Undo :func:`merge` to rounding, and switch the adapter on again."""
    merge(adapter, sign=-1.0)


def detach(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put the base layers back."""
    for name, layer in adapter.layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base)


def adapter_mark(path: Path) -> str:
    """Tells the adapter in a directory from another one, by both of its files."""
    return fingerprint(b"".join((path / name).read_bytes() for name in (CONFIG, WEIGHTS)))


@contextmanager
def worn(model: PreTrainedModel, path: Path, prompt: str | None = None) -> Iterator[Adapter]:
    """Inside, ``model`` wears the adapter in ``path``; ``prompt``: see :func:`check_prompt`, None: any."""
    adapter = load_adapter(model, path)
    try:
        if prompt is not None:
            check_prompt(path, prompt)
        yield adapter
    finally:
        detach(model, adapter)


def check_prompt(path: Path, prompt: str) -> None:
    """Refuse an adapter that says that it learned from other prompts than those with this fingerprint.

    Raises:
        AdapterError: it did.
    """
    notes = path / NOTES
    if notes.exists() and json.loads(notes.read_text(encoding="utf-8")).get("prompt", prompt) != prompt:
        raise AdapterError(
            f"{path}: was trained with other prompts than this model and style give now (prompt.template fixes a chat "
            "template that writes today's date)"
        )


def save_adapter(adapter: Adapter, path: Path, base_model: str, **notes: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into the directory ``path``, whole or not at all.

    Args:
        notes: kept beside them in ``rmx.json``, as the prompt's fingerprint: PEFT knows no such keys, and the order of
            safetensors' own metadata differs from one process to the next.

    Raises:
        AdapterError: the adapter changes nothing, or holds values that are not finite.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        for part, tensor in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            tensors[f"{PREFIX}{name}.{part}.weight"] = tensor.detach().cpu().contiguous()
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise AdapterError(f"{path}: not saved: {bad[0]} holds values that are not finite")
    if not any(bool(layer.lora_A.any()) and bool(layer.lora_B.any()) for layer in adapter.layers.values()):
        raise AdapterError(f"{path}: not saved: the adapter changes nothing (every product B A is zero)")
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.config.r,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "bias": "none",
        "inference_mode": True,
    } | adapter.spelled
    with replacing(path) as aside:
        aside.mkdir()
        (aside / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        if notes:
            (aside / NOTES).write_text(json.dumps(notes) + "\n", encoding="utf-8")


def _described(path: Path, model: PreTrainedModel) -> LoraConfig:
    """The settings of a plain LoRA adapter.

    Raises:
        AdapterError: there are none, or one that would make it another adapter, by name.
    """
    try:
        description: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise AdapterError(f"{path}: cannot be read as an adapter: {fault}") from fault
    if not isinstance(description, dict):
        raise AdapterError(f"{path}/{CONFIG}: expected settings by name, got {type(description).__name__}")
    for key, value in description.items():
        plain = FIXED.get(key)
        if plain is not None and not any(value is x or value == x for x in plain):
            raise AdapterError(f"{path}: {key} is {value!r}; only {', '.join(map(repr, plain))} is supported")
        if plain is None and key not in FREE and value not in (None, False, "", [], {}):
            raise AdapterError(f"{path}: {key} is {value!r}, which is not supported: the adapter is no plain LoRA")
    try:
        targets, numbers = description["target_modules"], description.get("layers_to_transform")
        if not isinstance(targets, list):
            raise ValueError(f"target_modules is {targets!r}; only lists of names are supported")
        numbers = [numbers] if isinstance(numbers, int) else numbers or []
        last = model.config.get_text_config().num_hidden_layers - 1
        if numbers and sorted(numbers) != list(range(min(numbers), last + 1)):
            raise ValueError(
                f"layers_to_transform is {numbers}; only all layers from one on to the last, {last}, are supported"
            )
        return LoraConfig(
            r=description["r"],
            alpha=float(description["lora_alpha"]),
            targets=sorted(targets),
            first_layer=min(numbers, default=0),
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise AdapterError(f"{path}/{CONFIG}: {fault}") from fault


def load_adapter(model: PreTrainedModel, path: Path) -> Adapter:
    """Attach an adapter that :func:`save_adapter` or PEFT (plain LoRA) wrote.

    Raises:
        AdapterError: no such adapter, another kind of adapter, values that are not finite, or shapes that belong to
            another model.
    """
    config = _described(path, model)
    try:
        tensors = safetensors.torch.load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as fault:
        raise AdapterError(f"{path}: cannot be read as an adapter: {fault}") from fault
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise AdapterError(f"{path}: {bad[0]} holds values that are not finite")
    adapter = attach(model, config, seed=0)
    expected = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part)
        for name, layer in adapter.layers.items()
        for part in ("lora_A", "lora_B")
    }
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))[0]
        detach(model, adapter)
        raise AdapterError(f"{path}: belongs to another model: {odd} is only on one side")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            detach(model, adapter)
            raise AdapterError(
                f"{path}: belongs to another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"this model needs {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return adapter
