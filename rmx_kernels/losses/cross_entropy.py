"""linear_cross_entropy and LinearCrossEntropyLoss: as in torch, but without a tensor of rows x vocabulary."""

from typing import Any

import torch
from torch import Tensor, nn

from rmx_kernels import checks
from rmx_kernels.ignored import check as check_ignored
from rmx_kernels.logits import LoRA, chunks, compute_dtype
from rmx_kernels.losses.api import linear_gated_contrastive_loss
from rmx_kernels.results import CrossEntropy
from rmx_kernels.statistics.api import linear_entropy_topk

CLASSES = 8192  # of the head that are summed up at a time
IGNORED = -100  # torch's default of ignore_index
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    shift: bool = False,
    lora: LoRA | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    statistics: bool = False,
    impl: str | None = None,
) -> Any:
    r"""Cross-entropy of ``input @ linear_weight.T + linear_bias``, whose logits are never stored.

    .. math::
        \ell_i = (1 - \epsilon) \, w_{y_i} (-\log p_i(y_i)) + \frac{\epsilon}{V} \sum_v w_v (-\log p_i(v))
            + \zeta \, w_{y_i} \mathrm{lse}_i^2, \qquad
        \mathrm{mean} = \frac{\sum_i \ell_i}{\sum_i w_{y_i}}

    The sums are over the rows whose target is not ``ignore_index``. It replaces
    ``torch.nn.functional.linear_cross_entropy`` and ``cross_entropy(linear(input, weight, bias), target)``.

    A mean or a sum without label smoothing, z-loss and statistics computes the gradient of ``input`` with the value:
    2 products with a frozen head. All other cases compute the logits again in the backward pass: 3 products.

    Args:
        input: hidden states [..., H], bfloat16, float16, float32 or float64. Differentiable.
        linear_weight, linear_bias: output head [V, H] and [V] or None. Differentiable. Dtypes may differ, and
            autocast applies, as in :func:`linear_entropy_topk`.
        target: token ids [...], int64 or int32, in [0, V) or ``ignore_index``. Ignored rows are not read.
        weight: [V] floating point, one weight per class, a constant; None for 1.
        reduction: "mean", "sum" or "none".
        ignore_index: target id of the rows to ignore; None for -100.
        label_smoothing: epsilon in [0, 1]. Not together with ``softcap``.
        z_loss: zeta >= 0, the weight of the squared log-sum-exp.
        shift: True predicts the next token: ``input[..., :-1, :]`` with ``target[..., 1:]``.
        lora, temperature, softcap, impl: as in :func:`linear_entropy_topk`; temperature a number, or [...] for one per
            row of ``input``, not read in ignored rows.
        statistics: True returns :class:`CrossEntropy`, with the loss, lse, predicted token and accuracy.

    Returns:
        The loss of float32 (float64 for float64 inputs), in nats: a scalar, or [...] for "none", 0 in ignored rows.
        A mean over no rows is NaN, as in torch.

    Raises:
        TypeError, ValueError: a wrong argument, by name. BackendUnavailable: ``impl`` cannot run here.

    Source: torch.nn.functional.cross_entropy; z-loss of PaLM (arXiv 2204.02311, section 5).

    >>> linear_cross_entropy(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([1, -100]))
    tensor(1.3863)
    """
    ignored = IGNORED if ignore_index is None else ignore_index
    _check(linear_weight, weight, reduction, ignored, label_smoothing, z_loss)
    checks.floating("input", input, 2 if shift else 1)
    if label_smoothing and softcap is not None:
        raise ValueError("label_smoothing: expected 0 with a softcap, since the mean of capped logits is not linear")
    if isinstance(temperature, Tensor):
        checks.row_temperature(temperature, input)
        temperature = temperature[..., :-1] if shift else temperature
    if shift:
        input, target = input[..., :-1, :], target[..., 1:]
    live = target != ignored
    checks.targets(target, input.shape[:-1], linear_weight.shape[0], input.device, used=live)
    real = compute_dtype(input.dtype)
    ids = torch.where(live, target, 0)
    row_weight = live.to(real) if weight is None else torch.where(live, weight.detach().to(real)[ids], 0.0)
    head: dict[str, Any] = {"bias": linear_bias, "lora": lora, "impl": impl}
    head |= {"temperature": temperature, "softcap": softcap}
    if reduction != "none" and not (label_smoothing or z_loss or statistics):
        none = torch.zeros_like(row_weight)
        found = linear_gated_contrastive_loss(input, input.detach(), linear_weight, ids, row_weight, none, **head)
        return found.loss / row_weight.sum() if reduction == "mean" else found.loss
    rows = input[live]
    head["temperature"] = checks.temperature_of(temperature, input, live)
    stats = linear_entropy_topk(rows, linear_weight, ids[live], k=int(statistics), **head)
    assert stats.logprob is not None
    own = row_weight[live]
    terms = -own * stats.logprob
    if label_smoothing:
        classes = torch.ones(linear_weight.shape[0], dtype=real, device=input.device)
        classes = classes if weight is None else weight.detach().to(real)
        total = _weighted_sum_of_logits(rows, linear_weight, linear_bias, lora, classes) / head["temperature"]
        smooth = (classes.sum() * stats.lse - total) / classes.shape[0]
        terms = (1 - label_smoothing) * terms + label_smoothing * smooth
    if z_loss:
        terms = terms + z_loss * own * stats.lse.square()
    loss = terms.new_zeros(live.shape).masked_scatter(live, terms) if reduction == "none" else terms.sum()
    if reduction == "mean":
        loss = loss / row_weight.sum()
    if not statistics:
        return loss
    assert stats.topk_ids is not None
    lse = stats.lse.new_full(live.shape, float("nan")).masked_scatter(live, stats.lse)
    prediction = target.new_full(live.shape, ignored, dtype=torch.int64).masked_scatter(live, stats.topk_ids[:, 0])
    right = ((prediction == target) & live).sum()
    return CrossEntropy(loss, lse, prediction, (right / live.sum()).to(real))


def _weighted_sum_of_logits(
    rows: Tensor, head: Tensor, bias: Tensor | None, lora: LoRA | None, classes: Tensor
) -> Tensor:
    """sum_v classes_v z_v of each row [n], before the temperature: linear in the rows, so a product with one vector."""
    real = classes.dtype
    with torch.autocast(rows.device.type, enabled=False):
        vector = _weighted_sum(head, classes)
        if lora is not None:
            A, B, scale = lora
            vector = vector + scale * (A.to(real).T @ _weighted_sum(B, classes))
        total = rows.to(real) @ vector
        return total if bias is None else total + (bias.to(real) * classes).sum()


def _weighted_sum(matrix: Tensor, classes: Tensor) -> Tensor:
    """matrix.T @ classes in the dtype of the latter, a slice of the classes at a time."""
    parts = [matrix[part].to(classes.dtype).T @ classes[part] for part in chunks(classes.shape[0], CLASSES)]
    return torch.stack(parts).sum(0)


def _check(
    head: object, weight: object, reduction: object, ignored: object, label_smoothing: object, z_loss: object
) -> None:
    checks.floating("linear_weight", head, 2)
    assert isinstance(head, Tensor)
    if weight is not None:
        checks.is_tensor("weight", weight)
        assert isinstance(weight, Tensor)
        if tuple(weight.shape) != (head.shape[0],) or not weight.is_floating_point():
            raise ValueError(
                f"weight: expected a floating-point tensor of shape [{head.shape[0]}], one weight per class, got "
                f"{weight.dtype} of shape {tuple(weight.shape)}"
            )
        checks.frozen("weight", weight, "class weights are constants")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_ignored(ignored)
    for name, value, most in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, float("inf"))):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 <= value <= most or value == float("inf"):
            bounds = "of at least 0 and at most 1" if most == 1 else "of at least 0"
            raise ValueError(f"{name}: expected a number {bounds}, got {value}")


class LinearCrossEntropyLoss(nn.Module):
    r"""A linear layer and the cross-entropy of its output, :func:`linear_cross_entropy`, in one module.

    Its parameters are ``linear.weight`` [V, H] and, with a bias, ``linear.bias`` [V], as in
    ``torch.nn.LinearCrossEntropyLoss``, whose state dict it loads. To tie it to the head of a model, set
    ``loss.linear = model.lm_head``.

    Args:
        in_features: H. num_classes: V. bias: whether to have a bias. device, dtype: of the parameters.
        weight, reduction, ignore_index, label_smoothing: as in :func:`linear_cross_entropy`.
        options: other keyword arguments of that function: z_loss, shift, temperature, softcap, impl.

    >>> loss = LinearCrossEntropyLoss(16, 100)
    >>> loss(torch.randn(5, 16), torch.randint(100, (5,))).backward()
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.weight: Tensor | None
        self.register_buffer("weight", weight)
        self.options = options

    def forward(self, input: Tensor, target: Tensor) -> Any:
        """As :func:`linear_cross_entropy`: input [..., H], target [...]."""
        head = self.linear.weight, target
        return linear_cross_entropy(input, *head, linear_bias=self.linear.bias, weight=self.weight, **self.options)
