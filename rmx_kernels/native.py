"""The native CPU kernels of csrc/: finding the library, and its C ABI (csrc/rmx_cpu.h) as ctypes structures.

Only pointers cross: the functions here take tensors that their callers have already checked, and keep them alive.
"""

import ctypes
import functools
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ABI = 7  # RMX_ABI of csrc/rmx_cpu.h
LIBRARY = Path(__file__).with_name("librmx_cpu.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


class Scale(Structure):
    _fields_ = [("temperature", c_double), ("softcap", c_double), ("row_temperature", c_void_p)]


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("rows", c_void_p), ("dtype", c_int32)]


class Sums(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("m", "d", "T", "chosen", "target")),
        ("K", c_int64),
        ("best", c_void_p),
    ]


class Stats(Structure):
    _fields_ = [(name, c_void_p) for name in ("log_d", "lse", "entropy", "logprob", "topk_logprobs", "topk_ids")]


class StatsGradient(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("m", "log_d", "entropy", "target", "topk_ids")),
        *((name, c_void_p) for name in ("along_p", "g_entropy", "g_logprob", "g_topk")),
        ("K", c_int64),
    ]


class Loss(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("target", "ce", "kl_weight", "m", "log_d", "base_m", "base_log_d")),
        *((name, c_void_p) for name in ("logprob", "kl")),
        ("upstream", c_double),
        ("mass_tolerance", c_double),
        ("find_base_norm", c_int32),
    ]


class DivergenceRows(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("norms", "value", "g_divergence", "g_entropy")),
        ("norm_stride", c_int64),
        ("beta", c_double),
        ("kind", c_int32),
    ]


class Attention(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "bias", "scores", "out")),
        *((name, c_int64) for name in ("k_batch", "k_head", "v_batch", "v_head", "B", "Hk", "G", "L", "D")),
        ("scale", c_double),
    ]


class Packed(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "g", "out", "norms", "dq", "dk", "dv", "scratch", "ends")),
        *((name, c_int64) for name in ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head")),
        *((name, c_int64) for name in ("N", "Hk", "G", "D", "longest", "window", "slots")),
        ("scale", c_double),
    ]


class Norm(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "weight", "g", "y", "rstd")),
        *((name, c_int64) for name in ("N", "H")),
        *((name, c_double) for name in ("eps", "offset")),
        *((name, c_int32) for name in ("dtype", "rounded")),
    ]


class Gated(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("gate", "up", "g", "y", "d_up")),
        ("size", c_int64),
        *((name, c_int32) for name in ("dtype", "gelu")),
    ]


class Rotation(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "cos", "sin", "y")),
        *((name, c_int64) for name in ("x_batch", "x_head", "x_token", "y_batch", "y_head", "y_token")),
        *((name, c_int64) for name in ("table_batch", "B", "T", "heads", "half")),
        *((name, c_int32) for name in ("dtype", "inverse")),
    ]


SIGNATURES: dict[str, list[Any]] = {
    "rmx_entropy_topk": [POINTER(Rows), POINTER(Scale), c_int64, c_int64, c_int64, POINTER(Sums), c_void_p],
    "rmx_entropy_topk_finish": [c_int32, c_int64, POINTER(Sums), POINTER(Stats), c_void_p],
    "rmx_entropy_topk_backward": [
        *(POINTER(Rows), POINTER(Scale), c_int64, c_int64, c_int64),
        *(POINTER(StatsGradient), POINTER(Rows), c_void_p),
    ],
    "rmx_gated_contrastive_loss": [
        *(POINTER(Rows), POINTER(Rows), c_int64, POINTER(Scale), c_int64, c_int64),
        *(POINTER(Loss), POINTER(Rows), c_void_p),
    ],
    "rmx_gated_contrastive_loss_backward": [
        *(POINTER(Rows), POINTER(Rows), c_int64, POINTER(Scale), c_int64, c_int64, c_int64),
        *(POINTER(Loss), POINTER(Rows), c_void_p),
    ],
}
SIGNATURES["rmx_divergence"] = [
    *(POINTER(Rows), POINTER(Rows), POINTER(Scale), POINTER(Scale), c_int64, c_int64),
    *(POINTER(DivergenceRows), POINTER(Rows), c_void_p),
]
SIGNATURES["rmx_decode_attention"] = [POINTER(Attention), c_void_p]
SIGNATURES["rmx_packed_attention"] = [POINTER(Packed), c_void_p]
SIGNATURES |= {"rmx_rms_norm": [POINTER(Norm), c_void_p], "rmx_gated_activation": [POINTER(Gated), c_void_p]}
SIGNATURES["rmx_rotate"] = [POINTER(Rotation), c_void_p]
HUGE = 4 << 20  # bytes from which huge pages pay
ERRORS = {1: "unknown dtype", 2: "torch's thread pool refused the work", 3: "heads of a width that it does not know"}


@functools.cache
def _open() -> tuple[ctypes.CDLL | None, str]:
    """(the library, "") or (None, why there is none)."""
    if not LIBRARY.exists():
        return (
            None,
            "the native kernels were not built: install a C++17 compiler (g++ or clang++), then install rmx again "
            "(pip install --no-cache-dir --force-reinstall --no-deps)",
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as fault:
        return None, f"the native kernels cannot be loaded: {fault}"
    if library.rmx_abi() != ABI:
        return None, f"{LIBRARY} was built for another version of rmx_kernels: install rmx again"
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.rmx_isa.restype = c_char_p
    library.rmx_use_huge_pages.argtypes, library.rmx_use_huge_pages.restype = [c_void_p, c_int64], None
    return library, ""


def missing() -> str:
    """Why the native kernels cannot be used, or an empty string."""
    return _open()[1]


def isa() -> str:
    """The instruction set that the kernels run on: x86-64-v4 (AVX-512), x86-64-v3 (AVX2) or baseline."""
    library, reason = _open()
    assert library is not None, reason
    return str(library.rmx_isa().decode())


@functools.cache
def _pool() -> int | None:
    """The address of torch's own parallel_for, so that torch.set_num_threads rules; None: one thread."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        symbol = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
        if symbol is not None:
            return ctypes.cast(symbol, c_void_p).value
    return None


def call(name: str, *arguments: Any) -> None:
    """Call a kernel on torch's thread pool. Structures go by reference; None is a null pointer."""
    library, reason = _open()
    assert library is not None, reason
    passed = [ctypes.byref(a) if isinstance(a, Structure) else a for a in arguments]
    status = getattr(library, name)(*passed, _pool())
    if status:
        raise RuntimeError(f"{name}: {ERRORS.get(status, status)}")


def scratch(count: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor [count] on huge pages, where the system has them."""
    x = torch.empty(count, dtype=dtype)
    library, _ = _open()
    if library is not None and x.nbytes >= HUGE:
        library.rmx_use_huge_pages(x.data_ptr(), x.nbytes)
    return x


def address(x: Tensor | None) -> int | None:
    """Where a contiguous tensor begins; None for None, and for an empty tensor."""
    assert x is None or x.is_contiguous()
    return None if x is None or x.numel() == 0 else x.data_ptr()


def addresses(rows: slice, *parts: Tensor | None) -> list[int | None]:
    """Where the ``rows`` of each begin, as :func:`address`, without a view of each: calls of few rows would feel it."""
    found: list[int | None] = []
    for part in parts:
        start = address(part)
        if start is not None and rows.start:
            assert part is not None
            start += rows.start * part.stride(0) * part.element_size()
        found.append(start)
    return found


def rows(x: Tensor, index: Tensor | None = None) -> Rows:
    """The rows of x [B..., columns] in order, or those that ``index`` [n] names, without a copy.

    Only where the columns of a row are apart from each other is x copied.
    """
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    if x.dim() == 2:
        found = Rows(x.data_ptr(), x.stride(0), address(index), DTYPES[x.dtype])
    else:
        at = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
            at = at.unsqueeze(-1) + stride * torch.arange(size)
        index = (at.flatten() if index is None else at.flatten()[index]).contiguous()
        found = Rows(x.data_ptr(), 1, address(index), DTYPES[x.dtype])
    found.keep = x, index  # pointers keep nothing alive
    return found


def scale(temperature: float, softcap: float | None, row_temperature: Tensor | None = None) -> Scale:
    """row_temperature: of the rows of a call, in their order, in the dtype of their statistics."""
    found = Scale(temperature, softcap or 0.0, address(row_temperature))
    found.keep = row_temperature  # a pointer keeps nothing alive
    return found
