"""What `model.dtype: auto` becomes on each kind of device, whose answers are put in place of this machine's."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import pytest

from rmx_kernels import precision
from rmx_kernels.precision import Precision


@contextmanager
def on_cpu(supported: bool | None, flags: list[str], rates: tuple[float, float] | None = None) -> Iterator[None]:
    """A CPU of which oneDNN says ``supported``; without ``rates`` a measurement fails the test."""
    with ExitStack() as stack:
        stack.enter_context(patch("torch.cuda.is_available", lambda: False))
        stack.enter_context(patch.object(precision, "_onednn_takes_bfloat16", lambda: supported))
        stack.enter_context(patch.object(precision, "_instructions", lambda: flags))
        measured = (lambda: rates) if rates else (lambda: pytest.fail("the flags say it all"))
        stack.enter_context(patch.object(precision, "_measured", measured))
        yield


@pytest.mark.parametrize(
    ("supported", "flags", "rates", "dtype", "words"),
    [
        (True, ["avx512_bf16", "amx_bf16"], None, "bfloat16", "multiplies bfloat16 (avx512_bf16, amx_bf16)"),
        (True, ["bf16"], None, "bfloat16", "multiplies bfloat16 (bf16)"),  # of Arm
        (False, [], None, "float32", "no bfloat16 instructions"),  # AVX2
        (False, ["avx512_bf16"], None, "float32", "no bfloat16 instructions"),  # oneDNN was told to use less
        (True, [], (40e9, 90e9), "float32", "40 GFLOP/s in bfloat16 and 90 in float32"),  # AVX-512 that converts
        (True, [], (180e9, 90e9), "bfloat16", "180 GFLOP/s in bfloat16 and 90 in float32"),
        (None, ["bf16"], (3e9, 700e9), "float32", "3 GFLOP/s in bfloat16"),  # torch without oneDNN
    ],
)
def test_a_cpu(
    supported: bool | None, flags: list[str], rates: tuple[float, float] | None, dtype: str, words: str
) -> None:
    with on_cpu(supported, flags, rates):
        found = precision.choose("cpu")
        assert precision.choose("auto") == found
    assert found.dtype == dtype and words in found.reason


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "words"),
    [
        ((9, 0), None, "bfloat16", "A GPU multiplies bfloat16"),
        ((8, 0), None, "bfloat16", "A GPU multiplies bfloat16"),
        ((7, 5), None, "float16", "A GPU (compute capability 7.5) has no bfloat16 products"),
        ((6, 1), "6.4", "bfloat16", "A GPU multiplies bfloat16"),  # ROCm counts otherwise
    ],
)
def test_a_gpu(capability: tuple[int, int], hip: str | None, dtype: str, words: str) -> None:
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.get_device_name", lambda: "A GPU"),
        patch("torch.cuda.get_device_capability", lambda: capability),
        patch("torch.version.hip", hip),
    ):
        found = precision.choose()
        assert precision.choose("cuda") == found
    assert found.dtype == dtype and words in found.reason


def test_the_measurement_takes_the_fastest_of_rounds_by_turns() -> None:
    taken = iter([4.0, 1.0, 2.0, 3.0])  # seconds: bfloat16, float32, bfloat16, float32
    now = 0.0

    def product(*_: object) -> None:
        nonlocal now
        now += next(taken) if ready else 0.0

    ready, clock = False, iter(range(100))

    def tick() -> float:
        nonlocal ready
        ready = ready or next(clock) >= 0  # the two products before the first look at the clock only prepare
        return now

    with patch.object(precision, "linear", product), patch("time.perf_counter", tick):
        half, single = precision._measured(seconds=6)
    work = 2 * precision.ROWS * precision.WIDTH**2
    assert (half, single) == (work / 2.0, work / 1.0)
    assert next(taken, None) is None


def test_this_machine_has_an_answer() -> None:
    assert isinstance(precision.choose(), Precision)
    assert min(precision._measured(seconds=0)) > 0
