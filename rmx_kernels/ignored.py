"""Targets that do not count, marked by an id of their own as in torch.nn.functional.cross_entropy."""

import torch
from torch import Tensor


def without(target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor | None]:
    """(the target with token 0 in the place of ``ignore_index``, where that is); (target, None) without an index.

    Raises:
        TypeError: ignore_index is neither None nor an int.
    """
    if ignore_index is None or not isinstance(target, Tensor):  # what is no tensor is refused by its own check
        return target, None
    check(ignore_index)
    ignored = target == ignore_index
    return target.masked_fill(ignored, 0), ignored


def check(ignore_index: object) -> None:
    """That it is an id."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int or None, got {type(ignore_index).__name__}")


def filled(values: Tensor, ignored: Tensor | None, value: float = 0.0) -> Tensor:
    """values [B...] with a constant, which has no gradient, where the target is ignored."""
    return values if ignored is None else torch.where(ignored, value, values)
