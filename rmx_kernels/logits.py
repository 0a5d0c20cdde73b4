"""The operand of every operator: rows of logits, given as they are or as hidden states with an output head."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LoRA = tuple[Tensor, Tensor, float]  # A [r, H], B [V, r], scale
Gradients = Sequence[Tensor | None]  # of TENSORS; those that are not asked for are left out by the operators
Needs = Sequence[bool]  # which gradients of TENSORS are asked for

TENSORS = ("x", "weight", "bias", "lora_hidden", "lora_weight")
SCHEMA = (
    "Tensor x, Tensor? weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "float temperature, float? softcap, Tensor? row_temperature"
)
GRADIENTS = "Tensor[]"  # of TENSORS, those that are asked for alone


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of statistics, sums and results: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of products with the head on a CPU: bfloat16 where it is multiplied natively, else full precision.

    float16 lacks the range for gradients.
    """
    if dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return dtype
    return compute_dtype(dtype)


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """In which hidden states meet their head: under autocast its dtype, elsewhere the wider of the two.

    As torch's own linear under autocast, which leaves float64 alone; as torch promotes types elsewhere, where its
    linear refuses to mix. bfloat16 with float16 is float32.
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def gradient_dtype(x: Tensor, impl: str) -> torch.dtype:
    """Of a gradient for hidden states that is still to be multiplied by the upstream gradient."""
    if impl == "reference":
        return compute_dtype(x.dtype)
    if x.device.type == "cpu":
        return product_dtype(x.dtype)
    return x.dtype if x.dtype == torch.bfloat16 else compute_dtype(x.dtype)


def flat(x: Tensor | None) -> Tensor | None:
    """The rows of x [B..., columns], [N, columns]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices of ``size``, the last one shorter, that cover range(count)."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


class Logits(NamedTuple):
    r"""z = cap(x) / temperature, or z = cap(x @ weight.T + bias + lora_hidden @ lora_weight.T) / temperature.

    cap(u) = softcap * tanh(u / softcap), or u without a softcap. row_temperature, where given, has the temperature of
    each row, in the place of ``temperature``. The fields stand in the order of :data:`SCHEMA`.
    """

    x: Tensor  # [B..., V] without a weight, [B..., H] with one
    weight: Tensor | None = None  # [V, H]
    bias: Tensor | None = None  # [V]
    lora_hidden: Tensor | None = None  # [B..., r], of a LoRA pair on the head
    lora_weight: Tensor | None = None  # [V, r]
    temperature: float = 1.0
    softcap: float | None = None
    row_temperature: Tensor | None = None  # [B...], of the dtype of the results; a constant

    @property
    def V(self) -> int:
        return self.x.shape[-1] if self.weight is None else self.weight.shape[0]

    @property
    def lead(self) -> torch.Size:
        """B..., the leading dimensions."""
        return self.x.shape[:-1]

    @property
    def real(self) -> torch.dtype:
        """The dtype of the results."""
        return compute_dtype(self.x.dtype)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of :data:`TENSORS`, the differentiable ones."""
        return self.x, self.weight, self.bias, self.lora_hidden, self.lora_weight

    def rows(self) -> "Logits":
        """With the leading dimensions in one: x [N, columns], lora_hidden [N, r]."""
        x, lora_hidden = self.x.reshape(-1, self.x.shape[-1]), flat(self.lora_hidden)
        return self._replace(x=x, lora_hidden=lora_hidden, row_temperature=self.temperatures())

    def temperatures(self, rows: Tensor | slice = slice(None)) -> Tensor | None:
        """Of some of the flattened rows [N], without strides; None where all rows have one."""
        return None if self.row_temperature is None else self.row_temperature.reshape(-1)[rows].contiguous()

    def divisors(self, rows: Tensor | slice = slice(None)) -> Tensor | None:
        """:meth:`temperatures` as a column [n, 1], NaN where one is no positive number.

        So that such a row has no plausible result on a GPU, where the values are not looked at beforehand.
        """
        own = self.temperatures(rows)
        return None if own is None else torch.where((own > 0) & own.isfinite(), own, torch.nan)[:, None]

    def of_base(self, base_x: Tensor) -> "Logits":
        """The base's logits: of the same head and scaling, without the LoRA pair."""
        return self._replace(x=base_x, lora_hidden=None, lora_weight=None)

    def of_logits(self, raw: Tensor, rows: slice) -> "Logits":
        """Of logits [n, V] that were made already, of some of the flattened rows."""
        return Logits(raw, None, None, None, None, self.temperature, self.softcap, self.temperatures(rows))

    def scaled(self, raw: Tensor, rows: slice = slice(None)) -> Tensor:
        """z of logits that are not scaled yet, or of some of each row: raw [n, columns] of the flattened ``rows``."""
        if self.softcap is not None:
            raw = self.softcap * torch.tanh(raw / self.softcap)
        own = self.divisors(rows)
        return raw / (self.temperature if own is None else own)

    @property
    def rows_require_grad(self) -> bool:
        """Whether hidden states with a head, or what a LoRA pair makes of them, ask for a gradient."""
        made_of = self.x, self.lora_hidden
        return (
            self.weight is not None
            and torch.is_grad_enabled()
            and any(x is not None and x.requires_grad for x in made_of)
        )

    def empty_row_gradients(self, wanted: bool, impl: str) -> tuple[Tensor, Tensor]:
        """Room for the flattened rows of gradients of x and lora_hidden that are still to be multiplied.

        Without elements if not wanted.
        """
        N = math.prod(self.lead)  # symbolic where it is traced, unlike numel()
        shapes = [(N, x.shape[-1]) if x is not None and wanted else (0,) for x in (self.x, self.lora_hidden)]
        x, lora_hidden = (self.x.new_empty(shape, dtype=gradient_dtype(self.x, impl)) for shape in shapes)
        return x, lora_hidden

    def shaped(self, dx: Tensor, du: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the flattened rows in the shape of x and lora_hidden; one without a row dimension as it is."""
        x, lora_hidden = (
            g.view(like.shape) if like is not None and g.dim() == 2 else g
            for g, like in ((dx, self.x), (du, self.lora_hidden))
        )
        return x, lora_hidden

    def empty_gradients(self, needs: Needs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Room for the gradients of :data:`TENSORS`, of the shape of each; without elements where not needed."""
        shapes = [x.shape if x is not None and need else (0,) for x, need in zip(self.tensors, needs, strict=True)]
        x, weight, bias, lora_hidden, lora_weight = (self.x.new_empty(shape) for shape in shapes)
        return x, weight, bias, lora_hidden, lora_weight


OPERANDS = len(Logits._fields)  # arguments of SCHEMA


def asked(gradients: Gradients, needs: Needs) -> list[Tensor]:
    """As an operator returns them: those that are asked for alone."""
    return [g for g, need in zip(gradients, needs, strict=True) if need and g is not None]


def spread(gradients: Sequence[Tensor], needs: Needs) -> list[Tensor | None]:
    """As autograd takes what an operator returned: one for each of TENSORS, None where not asked for."""
    found = iter(gradients)
    return [next(found) if need else None for need in needs]


OF_ROWS = (0, 3)  # the places of x and lora_hidden in TENSORS: a row of their gradients is that of one row of logits


def left_after(early: bool, needs: Needs) -> list[bool]:
    """Which gradients are still to be made, where ``early`` says that those of OF_ROWS were made with the value."""
    return [need and not (early and place in OF_ROWS) for place, need in enumerate(needs)]


def add_early(
    found: list[Tensor | None], made: Sequence[Tensor], upstream: Tensor, needs: Needs, dtype: torch.dtype
) -> list[Tensor | None]:
    """``found`` with the gradients of OF_ROWS that were ``made`` for an upstream of 1, times that upstream."""
    for place, gradient in zip(OF_ROWS, made, strict=True):
        if needs[place]:
            found[place] = torch.ops.rmx_kernels.times(gradient, upstream, dtype)
    return found


def fake_gradients(*arguments: Any) -> list[Tensor]:
    """The fake kernel of an operator of gradients, whose arguments begin with a Logits and end with (needs, impl)."""
    pairs = zip(arguments[: len(TENSORS)], arguments[-2], strict=True)
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x, need in pairs if need]


class Scaling(NamedTuple):
    """The last fields of :class:`Logits`."""

    temperature: float
    softcap: float | None
    row_temperature: Tensor | None


def scaling_of(temperature: float | Tensor, softcap: float | None, x: Tensor) -> Scaling:
    """From the arguments of an operator on x [B..., columns]: a temperature for all rows, or one [B...] for each."""
    if not isinstance(temperature, Tensor):
        return Scaling(temperature, softcap, None)
    return Scaling(1.0, softcap, temperature.detach().to(compute_dtype(x.dtype)).contiguous())


def plain(logits: Tensor, temperature: float | Tensor, softcap: float | None) -> Logits:
    """The operand from an operator's arguments: logits as they are."""
    return Logits(logits, None, None, None, None, *scaling_of(temperature, softcap, logits))


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoRA | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> Logits:
    """The operand from an operator's arguments: hidden states and a head, all in :func:`operand_dtype`.

    The casts are under autograd, so that every argument gets its gradient in its own dtype.

    The first product of a LoRA pair, lora_hidden = scale * hidden @ A.T, is a small one under autograd, from which the
    gradients of A and of hidden through A come; the operators make the second. On a CPU its rows come in fours, as in
    head/cpu.py, so that neither a value nor a gradient depends on the number of rows. (MKL's float64 product at ranks
    of 16 to 32 also depends on whether there are more than 2 r rows.)
    """
    scaling, dtype = scaling_of(temperature, softcap, hidden), operand_dtype(hidden, weight)
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if lora is None:
        return Logits(hidden, weight, bias, None, None, *scaling)
    A, B, scale = lora[0].to(dtype), lora[1].to(dtype), lora[2]
    x = hidden.reshape(-1, hidden.shape[-1])
    N = x.shape[0]
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.device.type == "cpu" and (torch.compiler.is_compiling() or N % 4):
            x = F.pad(x, (0, 0, 0, -N % 4))
        lora_hidden = torch.addmm(x.new_zeros(()), x, A.T, beta=0, alpha=scale)  # scaled before it is rounded
    lora_hidden = lora_hidden[:N].view(*hidden.shape[:-1], A.shape[0])
    return Logits(hidden, weight, bias, lora_hidden, B, *scaling)
