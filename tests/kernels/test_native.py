"""What the native kernels promise beyond the grid: the same bits wherever and however they run, without copies."""

import ctypes
import math
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from distutils.core import run_setup  # that of setuptools
from pathlib import Path
from typing import Any

import cases
import oracles
import pytest
import torch
from cases import SCALED, another_library, assert_same_bits, forward_backward, randint, randn
from test_memory import Ledger, inside
from torch import Tensor

from rmx_kernels import backends, entropy_topk, native
from rmx_kernels.checks import FLOATS
from rmx_kernels.dispatch import OPERATORS
from rmx_kernels.statistics.cpu import RunningStats

ROOT = Path(native.__file__).parents[1]
LEVELS = ("baseline", "x86-64-v3", "x86-64-v4")  # of instruction sets, each a superset of the one before
INF = math.inf


def test_the_library_is_built_and_loaded() -> None:
    """A missing compiler fails here: an installation goes on without one, and the grid would leave impl="cpu" out."""
    backend = backends()["cpu"]
    assert backend.available and backend.reason == "" and backend.operators == OPERATORS
    assert native.isa() in LEVELS


# ---- the same bits on every instruction set ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """csrc/ with the flags of setup.py, once for every level that this CPU runs, without clones."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("levels of instruction sets are those of x86-64")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no compiler {compiler[0]}")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        (extension,) = run_setup("setup.py", stop_after="init").ext_modules
    folder = tmp_path_factory.mktemp("levels")
    running = {}
    for level in LEVELS[: LEVELS.index(native.isa()) + 1]:
        path = folder / f"{level}.so"
        flags = [*extension.extra_compile_args, "-DRMX_NO_CLONES", f"-march={level.replace('baseline', 'x86-64')}"]
        command = [*compiler, *flags, "-shared", "-fPIC", *extension.sources, "-o", str(path)]
        running[level] = path, subprocess.Popen(command, cwd=ROOT)
    assert [process.wait() for _, process in running.values()] == [0] * len(running)
    return {level: path for level, (path, _) in running.items()}


def rows_of_every_kind(V: int, dtype: torch.dtype) -> Tensor:
    x = randn(12, V, seed=V).double() * 3
    x[1, ::2] = -INF
    x[2, V // 2] = math.nan
    x[3, V // 3] = INF
    x[4] = -INF
    x[5, V - 1] = 60  # confident
    x[6] += 1e4
    x[7] -= 1e4
    x[8] = 0.25
    x[9] *= 100  # most probabilities underflow
    x[10, ::3] = torch.finfo(dtype).max
    x[11] *= 1e-7  # subnormal in float16
    return x.to(dtype)


def loss_with_gradient(logits: Tensor, base: Tensor, target: Tensor, scaling: dict[str, Any]) -> list[Tensor]:
    """All that rmx_gated_contrastive_loss writes where it is asked for the gradient; the last two rows have no base."""
    N, V = logits.shape
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ce, kl_weight = randn(N, seed=1, dtype=real), randn(N, seed=2, dtype=real)
    written = torch.full((6, N), math.nan, dtype=real)
    dx = torch.zeros_like(logits)
    loss = native.Loss(*(native.address(x) for x in (target, ce, kl_weight, *written)), 1.0, 0.05, 1)
    t = scaling.get("temperature", 1.0)
    by_row = t.to(real) if isinstance(t, Tensor) else None
    scale = native.scale(t if by_row is None else 1.0, scaling.get("softcap"), by_row)
    student, anchor, gradient = native.rows(logits), native.rows(base), native.rows(dx)
    native.call("rmx_gated_contrastive_loss", student, anchor, N - 2, scale, N, V, loss, gradient)
    return [written, dx]


def everything(V: int, dtype: torch.dtype, scaling: dict[str, Any]) -> list[Tensor]:
    """The results of every exported kernel, as integers, and NaN whatever its payload."""
    logits = rows_of_every_kind(V, dtype)
    N = logits.shape[0]
    target = randint(V, N)
    base = rows_of_every_kind(V, dtype).roll(1, 0) + randn(N, V, seed=3, dtype=dtype)
    results = loss_with_gradient(logits, base, target, scaling)
    for k in {0, min(5, V), min(64, V)}:
        results += forward_backward("entropy_topk", {"logits": logits, "target": target, "k": k}, impl="cpu", **scaling)
    weights = {"ce_weight": randn(N, seed=4), "kl_weight": randn(N, seed=5).relu()}
    arguments = {"logits": logits, "base_logits": base, "target": target, **weights}
    results += forward_backward("gated_contrastive_loss", arguments, impl="cpu", **scaling)
    return [cases.integers(x) for x in results]


@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_instruction_set_gives_the_same_bits(builds: dict[str, Path], level: str, dtype: torch.dtype) -> None:
    if level not in builds:
        pytest.skip(f"this CPU does not run {level}")
    for V in (1, 15, 1023, 1024, 1025, 5000):  # on both sides of a block, and of a register
        for scaling in ({}, {"temperature": 0.7}, SCALED, {"temperature": cases.temperatures(12)}):
            expected = everything(V, dtype, scaling)
            with another_library(builds[level]):
                got = everything(V, dtype, scaling)
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                assert torch.equal(a, b), f"V = {V}, {scaling}, result {i}"


def packed_attention(lengths: tuple[int, ...], Hk: int, G: int, D: int, window: int) -> list[Tensor]:
    """What rmx_packed_attention makes of large scores: out and its norms, then dq, dk and dv."""
    T, ends, longest = sum(lengths), torch.tensor([0, *lengths]).cumsum(0), max(lengths)
    q, k, v, g = (randn(T, h, D, seed=s) for s, h in enumerate((Hk * G, Hk, Hk, Hk * G)))
    q *= 30
    found = [torch.full(shape, math.nan) for shape in (q.shape, (*q.shape[:2], 2), q.shape, k.shape, v.shape)]
    scratch = torch.full((2 * (D + 64) * (longest + 16),), math.nan)
    for gradient in (None, g.data_ptr()):
        before, after = ([x.data_ptr() for x in part] for part in ((q, k, v), (*found, scratch, ends)))
        pointers = [*before, gradient, *after]
        strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
        sizes = len(lengths), Hk, G, D, longest, window, 1
        native.call("rmx_packed_attention", native.Packed(*pointers, *strides, *sizes, 0.3))
    return found


def attention(B: int, Hk: int, G: int, L: int, D: int) -> Tensor:
    """What rmx_decode_attention makes of keys with room behind them, large scores and hidden keys."""
    q, k, v = randn(B, Hk, G, D, seed=1) * 30, randn(B, Hk, L + 3, D, seed=2)[:, :, :L], randn(B, Hk, L, D, seed=3)
    bias = randn(B, L, seed=4)
    bias[0, : L // 2] = -INF
    scores, out = torch.empty(B, Hk, G, L), torch.full((B, Hk, G, D), math.nan)
    pointers = [x.data_ptr() for x in (q, k, v, bias, scores, out)]
    strides = [*k.stride()[:2], *v.stride()[:2]]
    native.call("rmx_decode_attention", native.Attention(*pointers, *strides, B, Hk, G, L, D, 0.3))
    return out


@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS)
def test_attention_has_the_same_bits_on_every_instruction_set(builds: dict[str, Path], level: str) -> None:
    if level not in builds:
        pytest.skip(f"this CPU does not run {level}")
    for shape in ((2, 1, 1, 1, 16), (2, 3, 3, 70, 64), (1, 2, 8, 129, 80), (3, 1, 64, 33, 128)):
        expected = attention(*shape)
        assert bool(torch.isfinite(expected).all())
        with another_library(builds[level]):
            assert torch.equal(attention(*shape), expected), shape
    for lengths, *sizes in (((80, 71, 3), 2, 3, 64, 80), ((130, 1, 17), 1, 2, 48, 9)):
        every = packed_attention(lengths, *sizes)  # type: ignore[arg-type]
        assert all(bool(torch.isfinite(x).all()) for x in every)
        with another_library(builds[level]):
            got = packed_attention(lengths, *sizes)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(got, every, strict=True)), lengths


def decoder_layer(H: int, dtype: torch.dtype) -> list[Tensor]:
    """What the element-wise kernels of a decoder layer write, forward and backward, into memory full of NaN."""
    real, kind = (torch.float64 if dtype == torch.float64 else torch.float32), native.DTYPES[dtype]
    x, g, w = (4 * randn(3, 2 * H, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    rstd = torch.full((3,), math.nan, dtype=real)
    results = [torch.full_like(x, math.nan) for _ in range(9)]
    for rounded, offset, upstream, y in (
        (1, 0.0, None, results[0]),
        (0, 1.0, None, results[1]),
        (0, 1.0, g, results[2]),
    ):
        pointers = [native.address(t) for t in (x, w, upstream, y, rstd)]
        native.call("rmx_rms_norm", native.Norm(*pointers, 3, 2 * H, 1e-6, offset, kind, rounded))
    for gelu, (y, d_gate, d_up) in enumerate((results[3:6], results[6:9])):
        for upstream, to, other in ((None, y, None), (g, d_gate, d_up)):
            pointers = [native.address(t) for t in (x, w, upstream, to, other)]
            native.call("rmx_gated_activation", native.Gated(*pointers, x.numel(), kind, gelu))
    for inverse in (0, 1):
        results.append(torch.full_like(x, math.nan))
        pointers = [t.data_ptr() for t in (x, w, g, results[-1])]
        native.call("rmx_rotate", native.Rotation(*pointers, *[0, 0, 2 * H] * 2, 0, 1, 3, 1, H, kind, inverse))
    return [cases.integers(t) for t in [rstd, *results]]


@pytest.mark.thorough
@pytest.mark.parametrize("level", LEVELS)
def test_a_decoder_layer_has_the_same_bits_on_every_instruction_set(builds: dict[str, Path], level: str) -> None:
    if level not in builds:
        pytest.skip(f"this CPU does not run {level}")
    for H, dtype in ((1, torch.float32), (37, torch.float64), (600, torch.float32), (96, torch.bfloat16)):
        expected = decoder_layer(H, dtype)
        with another_library(builds[level]):
            got = decoder_layer(H, dtype)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (H, dtype)


def test_attention_refuses_widths_that_it_does_not_know() -> None:
    with pytest.raises(RuntimeError, match="width"):
        attention(1, 1, 1, 4, 24)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tile", [1024, 3072])
def test_tiles_give_the_bits_of_the_whole_row(dtype: torch.dtype, tile: int) -> None:
    """Sums are carried on from tile to tile as they are from block to block, since tiles hold whole blocks."""
    V, k = 5000, 64
    logits = rows_of_every_kind(V, dtype)
    N = logits.shape[0]
    target, scale = randint(V, N), native.scale(**SCALED)

    def fold(columns: int) -> tuple[Tensor, ...]:
        stats = RunningStats(N, k, torch.float64 if dtype == torch.float64 else torch.float32, target)
        for first in range(0, V, columns):
            part = logits[:, first : first + columns]
            stats.fold(native.rows(part), scale, slice(0, N), first, part.shape[1])
        stats.finish(slice(0, N // 2))  # of some rows at a time
        stats.finish(slice(N // 2, N))
        assert stats.logprob is not None
        return stats.lse, stats.entropy, stats.logprob, stats.values, stats.ids, stats.m, stats.log_d

    for a, b in zip(fold(tile), fold(V), strict=True):
        assert torch.equal(cases.integers(a), cases.integers(b))


# ---- the same bits on any number of threads, and for any number of rows ------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_threads_change_no_bit(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows of 5000 are ten times what the pool hands to a thread at least (WORK of csrc/parallel.h)."""
    arguments = cases.make(op, (64,), 5000, 64, dtype)
    torch.set_num_threads(1)
    expected = forward_backward(op, arguments, impl="cpu", **SCALED)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert_same_bits(forward_backward(op, arguments, impl="cpu", **SCALED), expected)
    monkeypatch.setattr(native, "_pool", lambda: None)
    assert_same_bits(forward_backward(op, arguments, impl="cpu", **SCALED), expected)


RANGE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
POOL = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, RANGE, ctypes.c_void_p)


@pytest.mark.parametrize("op", cases.TARGETED)  # linear_divergence has no native kernel
def test_the_pool_may_split_rows_in_any_way(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the rows singly and backwards; this also shows that the kernels do hand their rows to the pool."""
    arguments = cases.make(op, (40,), 5000, 16)
    expected = forward_backward(op, arguments, impl="cpu")
    ranges = []

    def backwards(begin: int, end: int, grain: int, func: Any, context: int) -> int:
        ranges.append((end - begin, grain))
        for i in reversed(range(begin, end)):
            func(i, i + 1, context)
        return 0

    pool = POOL(backwards)
    monkeypatch.setattr(native, "_pool", lambda: ctypes.cast(pool, ctypes.c_void_p).value)
    assert_same_bits(forward_backward(op, arguments, impl="cpu"), expected)
    assert len(ranges) >= 2  # forward and backward
    assert all(count > grain >= 6 for count, grain in ranges)  # 32768 // 5000: no share is too small to pay


def test_a_pool_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = POOL(lambda *_: 1)
    monkeypatch.setattr(native, "_pool", lambda: ctypes.cast(pool, ctypes.c_void_p).value)
    with pytest.raises(RuntimeError, match=r"^rmx_entropy_topk: torch's thread pool refused the work$"):
        entropy_topk(torch.zeros(64, 5000), impl="cpu")


def test_torch_has_a_pool() -> None:
    """Without it everything runs, but on one thread."""
    assert native._pool() is not None


def row_results(op: str, arguments: cases.Arguments) -> dict[str, Tensor]:
    """What belongs to a row: its results, and the gradient of its own input."""
    name = cases.DIFFERENTIABLE[op][0]
    fresh = arguments | {name: arguments[name].clone().requires_grad_()}
    result = cases.call(op, fresh, impl="cpu", **SCALED)
    outputs = cases.differentiable(result)
    (gradient,) = torch.autograd.grad(outputs, [fresh[name]], [torch.full_like(o, 1.5) for o in outputs])
    fields = {n: v.detach() for n, v in result._asdict().items() if v is not None and n != "loss"}
    return fields | {"gradient": gradient}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("op", "V", "H"),
    [*((op, 5003, 64) for op in OPERATORS), *((op, 5000, 1536) for op in OPERATORS if op.startswith("linear"))],
)
def test_rows_do_not_depend_on_their_number_or_place(op: str, V: int, H: int, dtype: torch.dtype) -> None:
    """At sizes and counts for which BLAS libraries change their way of multiplying."""
    arguments = cases.make(op, (107,), V, H, dtype)
    whole = row_results(op, arguments)
    for rows in [slice(0, n) for n in (1, 2, 3, 5, 7, 16, 33, 64, 100)] + [slice(n, n + 7) for n in (1, 6, 50, 100)]:
        part = row_results(op, {n: v[rows] if n in cases.PER_ROW else v for n, v in arguments.items()})
        for field, value in part.items():
            assert torch.equal(cases.integers(value), cases.integers(whole[field][rows])), f"{field} of rows {rows}"


# ---- top-k -------------------------------------------------------------------------------------------------------


def ordered_rows(V: int) -> Tensor:
    """Ties, order and masks that a heap, a block's maximum and a lane's maximum could each get wrong."""
    x = randint(4, 9, V, seed=V).float()
    x[1] = 2.5
    x[2] = -INF
    x[2, V // 2 :: max(1, V // 3)] = 1.0  # nothing but -inf but a few
    x[3] = torch.arange(V)
    x[4] = -torch.arange(V)
    x[5] = randn(V, seed=V)
    x[6] = x[5].round()
    x[7] = 0
    x[7, [i for i in (1023, 1024, 1025, 2047, 2048) if i < V]] = 7.0  # on both sides of the blocks' borders
    x[8] = torch.arange(V) % 64  # one lane of a block holds its maxima
    return x


@pytest.mark.parametrize("V", [1, 63, 1024, 1025, 5000])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_top_k_is_that_of_a_stable_sort(V: int, dtype: torch.dtype) -> None:
    logits = ordered_rows(V).to(dtype)
    order = oracles.top_k(logits, V)
    for k in sorted({min(k, V) for k in (1, 2, 7, 64, 100, 1000, V)}):
        result = entropy_topk(logits, k=k, impl="cpu")
        assert torch.equal(result.topk_ids, order[:, :k]), f"k = {k}"
        exact = (logits.double() - logits.double().logsumexp(-1, keepdim=True)).gather(-1, order[:, :k])
        torch.testing.assert_close(result.topk_logprobs.double(), exact, rtol=3e-7, atol=3e-7)


# ---- views without copies ----------------------------------------------------------------------------------------


def views(x: Tensor) -> dict[str, Tensor]:
    """Layouts of [2, 9, V + 5] logits in which the columns of a row are next to each other."""
    return {
        "fewer columns": x[..., :-5],
        "all tokens but the last": x[:, :-1],
        "every second row": x[:, ::2],
        "later rows": x[:, 3:],
        "transposed": x.transpose(0, 1),
        "flattened": x[0, :, 3:],
        "expanded": x[:, :1].expand(-1, 9, -1),
        "one row for all": x[0, 0].expand(18, -1),
    }


@pytest.mark.parametrize("layout", list(views(torch.empty(2, 9, 6))))
@pytest.mark.parametrize("op", ["entropy_topk", "gated_contrastive_loss"])
def test_views_are_read_in_place(op: str, layout: str) -> None:
    """The bits of the contiguous copy, and no tensor of the size of the logits but the gradient."""
    x, base = (views(randn(2, 9, 4096 + 5, seed=seed))[layout] for seed in (0, 1))
    assert not x.is_contiguous()
    arguments = cases.make(op, x.shape[:-1], 2) | {"logits": x}
    if "loss" in op:
        arguments |= {"base_logits": base, "ce_weight": arguments["ce_weight"] + 1}
    name, given = "logits", [v for v in arguments.values() if isinstance(v, Tensor)]
    expected = run_both(op, {n: v.contiguous() if isinstance(v, Tensor) else v for n, v in arguments.items()})
    logits = arguments[name].detach().requires_grad_()
    with inside(Ledger(given), op, "cpu") as ledger:
        result = cases.call(op, arguments | {name: logits}, impl="cpu", **SCALED)
        assert 0 < ledger.most_elements < 4096  # rows x 64 at most: no row of logits, even
        outputs = cases.differentiable(result)
        gradients = torch.autograd.grad(outputs, logits, [torch.full_like(o, 0.5) for o in outputs])
    sizes = [size for size in ledger.alive.values() if size >= x.numel() * 4]
    assert ledger.largest == x.numel() * 4 and len(sizes) == 1
    assert_same_bits([*(v.detach() for v in result if v is not None), *gradients], expected)


def run_both(op: str, arguments: cases.Arguments) -> list[Tensor]:
    logits = arguments["logits"].detach().requires_grad_()
    result = cases.call(op, arguments | {"logits": logits}, impl="cpu", **SCALED)
    outputs = cases.differentiable(result)
    gradients = torch.autograd.grad(outputs, logits, [torch.full_like(o, 0.5) for o in outputs])
    return [*(v.detach() for v in result if v is not None), *gradients]
