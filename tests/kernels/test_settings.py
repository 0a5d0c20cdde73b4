"""The two settings of the linear operators on a GPU: how many bytes of logits, and in which dtype."""

from collections.abc import Iterator

import cases
import pytest
import torch

import rmx_kernels
from rmx_kernels.head import configs
from rmx_kernels.head.triton import Head
from rmx_kernels.logits import Logits


@pytest.fixture(autouse=True)
def _defaults() -> Iterator[None]:
    yield
    rmx_kernels.set_scratch_bytes(None)
    rmx_kernels.set_logits_dtype(None)


def test_scratch_sets_the_rows_of_a_product() -> None:
    z = Logits(torch.empty(3, 8, dtype=torch.bfloat16), torch.empty(1000, 8, dtype=torch.bfloat16))
    rmx_kernels.set_scratch_bytes(1000 * 2 * 1024)
    assert Head(z, models=1).chunk == 1024
    assert Head(z, models=2).chunk == 512
    rmx_kernels.set_logits_dtype(torch.float32)  # 4 bytes of logits, and 2 of their gradient beside them
    assert Head(z, models=1).chunk == 256
    rmx_kernels.set_scratch_bytes(1)
    assert Head(z, models=1).chunk == configs.ROW_MULTIPLE
    rmx_kernels.set_scratch_bytes(None)
    assert configs.scratch_bytes(torch.device("cpu")) == configs.LEAST_SCRATCH


def test_dtypes_of_logits() -> None:
    assert [configs.logits_dtype(d) for d in (torch.bfloat16, torch.float16, torch.float32)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]
    rmx_kernels.set_logits_dtype(torch.float32)
    assert configs.logits_dtype(torch.bfloat16) == torch.float32


@pytest.mark.parametrize("wrong", [0, -5])
def test_wrong_scratch(wrong: int) -> None:
    with pytest.raises(ValueError, match="set_scratch_bytes: expected None or a positive number"):
        rmx_kernels.set_scratch_bytes(wrong)


def test_wrong_dtype() -> None:
    with pytest.raises(ValueError, match="set_logits_dtype: expected None, torch"):
        rmx_kernels.set_logits_dtype(torch.float16)


@pytest.mark.interpreted
@pytest.mark.skipif(
    "triton" not in [b.name for b in rmx_kernels.backends().values() if b.available], reason="no Triton"
)
@pytest.mark.parametrize("op", ["linear_entropy_topk", "linear_gated_contrastive_loss", "linear_logprob_kl"])
def test_float32_logits_are_not_rounded_with_triton(op: str) -> None:
    """Statistics of bfloat16 inputs as exact as those of their float32 copies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = cases.make(op, (6,), 203, 16, torch.bfloat16, device)
    exact = {n: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in given.items()}
    expected = cases.call(op, exact, impl="reference")
    errors = {}
    for dtype in (torch.bfloat16, torch.float32):
        rmx_kernels.set_logits_dtype(dtype)
        got = cases.call(op, given, impl="triton")
        errors[dtype] = float((got.logprob - expected.logprob).nan_to_num(0).abs().max())
        gradient = cases.forward_backward(op, given, impl="triton")[-1]
        assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()
    assert errors[torch.float32] < 2e-6 < 1e-3 < errors[torch.bfloat16]
