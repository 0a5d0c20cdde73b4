"""The number format of a model whose configuration says ``model.dtype: auto``.

bfloat16 if the device multiplies it; else float32 on a CPU and float16 on a GPU. A CPU without bfloat16 instructions
emulates bfloat16 products in torch, many times slower than float32 products.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # that multiply bfloat16: of x86, and of Arm
SECONDS = 0.2  # of the measurement, where the CPU's flags leave the answer open
ROWS, WIDTH = 64, 512  # of its product


@dataclass(frozen=True)
class Precision:
    dtype: str  # bfloat16, float16 or float32
    reason: str


def choose(device: str = "auto") -> Precision:
    """What ``model.dtype: auto`` means on ``device``: "cpu", "cuda", or "auto" (cuda if torch finds a GPU)."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _of_gpu() if device == "cuda" else _of_cpu()


def _of_gpu() -> Precision:
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if torch.version.hip is not None or capability >= (8, 0):
        return Precision("bfloat16", f"{name} multiplies bfloat16")
    said = ".".join(map(str, capability))
    return Precision("float16", f"{name} (compute capability {said}) has no bfloat16 products, which need 8.0")


def _of_cpu() -> Precision:
    supported, flags = _onednn_takes_bfloat16(), _instructions()
    if supported and flags:
        return Precision("bfloat16", f"this CPU multiplies bfloat16 ({', '.join(flags)})")
    if supported is False:
        return Precision("float32", "this CPU has no bfloat16 instructions: such products would be emulated, slowly")
    # oneDNN also says yes where it only converts (AVX-512 without BF16), and not every build of torch has oneDNN
    half, single = _measured()
    said = f"products run at {half / 1e9:.0f} GFLOP/s in bfloat16 and {single / 1e9:.0f} in float32 here"
    return Precision("bfloat16" if half > single else "float32", said)


def _onednn_takes_bfloat16() -> bool | None:
    """What oneDNN says of this CPU; None where torch is built without it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if torch.backends.mkldnn.is_available() else None


def _instructions() -> list[str]:
    """Those of INSTRUCTIONS that this CPU has; none where torch does not tell."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return [flag for flag in INSTRUCTIONS if told.get(flag)]


def _measured(seconds: float = SECONDS) -> tuple[float, float]:
    """FLOP/s of products in bfloat16 and in float32: the fastest of rounds by turns, for ``seconds``."""
    wide = torch.randn(ROWS, WIDTH), torch.randn(WIDTH, WIDTH)
    operands = {dtype: [x.to(dtype) for x in wide] for dtype in (torch.bfloat16, torch.float32)}
    fastest = dict.fromkeys(operands, float("inf"))
    for x, weight in operands.values():
        linear(x, weight)  # the first call prepares
    end = time.perf_counter() + seconds
    while True:
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            linear(x, weight)
            fastest[dtype] = min(fastest[dtype], time.perf_counter() - start)
        if time.perf_counter() >= end:
            half, single = (2 * ROWS * WIDTH * WIDTH / taken for taken in fastest.values())
            return half, single
