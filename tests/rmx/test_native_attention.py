"""Attention of packed sequences by the native kernel: against float64, and what its bits do not depend on."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmx.attention import grouped as grouped_attention
from rmx.attention.packed import backend, native_packed
from rmx.attention.packing import Packing
from rmx_kernels import native

pytestmark = pytest.mark.skipif(bool(native.missing()), reason="the native kernels were not built")
CPU = torch.device("cpu")


def tensors(T: int, Hk: int, G: int, D: int, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as a model lays them out, heads of a token side by side, and a gradient."""
    g = torch.Generator().manual_seed(T * D + G)
    q, k, v = (torch.randn(T, heads, D, generator=g) for heads in (Hk * G, Hk, Hk))
    return q * spread, k, v, torch.randn(T, Hk * G, D, generator=g)


def found(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, lengths: tuple[int, ...], window: int | None, way: str = "native"
) -> list[Tensor]:
    """out, dq, dk, dv."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    attend = native_packed if way == "native" else grouped_attention.grouped
    out = attend(*inputs, Packing(lengths, CPU), 0.3, window, None)
    return [out.detach(), *torch.autograd.grad(out, inputs, g)]


def check(lengths: tuple[int, ...], Hk: int, G: int, D: int, window: int | None, spread: float = 1.0) -> None:
    """At most twice as far from float64 as the products of padded groups, and a rounding or two."""
    given_ = tensors(sum(lengths), Hk, G, D, spread)
    longest = max(lengths)
    window = None if window is None or window >= longest else window
    expected = found(*(x.double() for x in given_), lengths, window, "grouped")  # type: ignore[arg-type]
    eager = found(*given_, lengths, window, "grouped")
    poisoned = lambda count, dtype: torch.full((count,), float("nan"), dtype=dtype)  # noqa: E731
    with mock.patch.object(native, "scratch", poisoned):
        got = found(*given_, lengths, window)
    for name, x, by_eager, exact in zip(("out", "dq", "dk", "dv"), got, eager, expected, strict=True):
        bound = 2 * float((by_eager - exact).norm()) + 1e-6 * float(exact.norm() + given_[3].norm())
        assert float((x - exact).norm()) <= bound, name
        assert x.shape == exact.shape and x.is_contiguous()


@pytest.mark.parametrize(
    ("lengths", "Hk", "G", "D", "window"),
    [
        ((1,), 1, 1, 16, None),
        ((80, 71, 3, 64, 65, 1), 3, 3, 64, None),
        ((130, 16, 17, 15), 2, 1, 32, None),
        ((200, 333), 1, 7, 128, None),
        ((130, 5, 64, 63, 200), 2, 2, 48, 1),
        ((130, 5, 64, 63, 200), 2, 2, 48, 7),
        ((130, 5, 64, 63, 200), 2, 2, 48, 64),
        ((300, 129), 1, 2, 16, 70),
    ],
)
def test_it_is_attention(lengths: tuple[int, ...], Hk: int, G: int, D: int, window: int | None) -> None:
    check(lengths, Hk, G, D, window)


@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=5),
    *(st.integers(1, 3), st.integers(1, 4), st.sampled_from([16, 32, 80])),
    st.one_of(st.none(), st.integers(1, 160)),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(lengths: list[int], Hk: int, G: int, D: int, window: int | None) -> None:
    check(tuple(lengths), Hk, G, D, window)


def test_large_scores_do_not_overflow() -> None:
    check((70, 33), 2, 2, 32, None, spread=200.0)


def test_a_sequence_has_the_same_bits_alone_and_with_others() -> None:
    lengths = (37, 80, 5)
    q, k, v, g = tensors(sum(lengths), 2, 3, 32)
    together = found(q, k, v, g, lengths, None)
    alone = found(*(x[37:117] for x in (q, k, v, g)), (80,), None)  # type: ignore[arg-type]
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[37:117], b)


def test_the_bits_depend_neither_on_threads_nor_on_strides() -> None:
    lengths = (37, 80, 5)
    q, k, v, g = tensors(sum(lengths), 2, 3, 32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = found(q, k, v, g, lengths, 9)
        torch.set_num_threads(4)
        four = found(q, k, v, g, lengths, 9)
    finally:
        torch.set_num_threads(before)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]  # tokens of a head side by side
    spread = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]  # elements of a head apart
    for others in (four, found(*strided, g, lengths, 9), found(*spread, g, lengths, 9)):  # type: ignore[call-arg]
        assert all(torch.equal(a, b) for a, b in zip(one, others, strict=True))


@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_a_nan_stays_in_its_sequence_and_head(place: str) -> None:
    lengths = (20, 30)
    q, k, v, g = tensors(50, 2, 2, 16)
    {"q": q, "k": k, "v": v}[place][25, 1, 3] = float("nan")
    out = found(q, k, v, g, lengths, None)[0]
    heads = [1] if place == "q" else [2, 3]
    broken = out.isnan().any(-1)
    assert bool(broken[25, heads].all()) and not broken[:20].any() and not broken[20:24].any()
    assert not broken[:, [h for h in range(4) if h not in heads]].any()


def test_what_it_takes() -> None:
    q, k, v, _ = tensors(8, 2, 2, 16)
    assert backend(q, k, v, None) is native_packed
    for others in ((q.double(), k.double(), v.double()), tensors(8, 2, 2, 24)[:3], (q, k, v[..., :8])):
        assert backend(*others, None) is grouped_attention.grouped  # type: ignore[arg-type]
    assert backend(q, k, v, 5.0) is grouped_attention.grouped
    with mock.patch.object(native, "missing", return_value="not built"):
        assert backend(q, k, v, None) is grouped_attention.grouped
