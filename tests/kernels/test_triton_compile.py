"""The launches that ship, compiled ahead of time for four architectures: no spills, and within shared memory.

The launches are recorded from the operators themselves, over real vocabularies, so a new kernel, argument or
configuration is compiled without being named here: all for the warps of Hopper and of AMD, and those with a softcap,
which need the most registers, for the others. No GPU is needed.
"""

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rmx_kernels import dispatch
from rmx_kernels.divergences.op import KINDS, HeadPair
from rmx_kernels.head import configs
from rmx_kernels.logits import Logits
from rmx_kernels.losses.op import Pair
from rmx_kernels.statistics.op import Saved, Upstream

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="the interpreter compiles nothing")

Launch = tuple[Any, tuple[Any, ...], dict[str, Any], int]  # (kernel, arguments, constants, warps)
TARGETS = {  # and the shared memory of one program, in KiB (CUDA programming guide; CDNA3 instruction set)
    "sm_80": (GPUTarget("cuda", 80, 32), 163),
    "sm_90": (GPUTarget("cuda", 90, 32), 227),
    "sm_100": (GPUTarget("cuda", 100, 32), 227),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64),
}
WHOLE = ("sm_90", "gfx942")  # of which every launch is compiled
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


FAMILIES = ("statistics", "losses", "divergences")


def kernels_of(family: str) -> Any:
    return importlib.import_module(f"rmx_kernels.{family}.triton")


def scaling(softcap: float | None, by_row: bool) -> dict[str, Any]:
    return {"softcap": softcap} | ({"row_temperature": torch.ones(2)} if by_row else {"temperature": 0.7})


def run_statistics(dtype: torch.dtype, V: int, k: int, softcap: float | None, by_row: bool = False) -> None:
    z, target = Logits(torch.zeros(2, V, dtype=dtype), **scaling(softcap, by_row)), torch.zeros(2).long()
    statistics(z, target, k)


def run_int32_targets() -> None:
    """With the gradient of a top-k, whose ids are int64."""
    z, target = Logits(torch.zeros(2, 8192)), torch.zeros(2, dtype=torch.int32)
    statistics(z, target, 2)
    loss(Pair(z, z.x, target))


def statistics(z: Logits, target: Tensor, k: int) -> None:
    module, g = kernels_of("statistics"), torch.zeros(2)
    _, entropy, _, _, ids, m, log_d, *_ = module.forward(z, target, k, False)
    upstream = Upstream(g, g, g, torch.zeros(2, k) if k else None)
    module.backward(z, Saved(target, ids.zero_(), m, log_d, entropy), upstream, (True, *[False] * 4))


def loss(pair: Pair) -> None:
    module, w = kernels_of("losses"), torch.ones(2)
    norms = module.contrastive_loss(pair, (w, w), None, False)[3]
    module.contrastive_loss_backward(pair, (w, w), norms, w[0], (True, *[False] * 4))


def run_loss(dtype: torch.dtype, V: int, softcap: float | None, by_row: bool = False) -> None:
    x, target, w = torch.zeros(2, V, dtype=dtype), torch.zeros(2, dtype=torch.int64), torch.ones(2)
    loss(Pair(Logits(x, **scaling(softcap, by_row)), x, target))
    h, head = torch.zeros(2, 4, dtype=dtype), torch.zeros(V, 4, dtype=dtype)
    pair = Pair(Logits(h, head, **scaling(softcap, by_row)), h, target)
    kernels_of("losses").logprob_kl(pair)
    kernels_of("losses").contrastive_loss(pair, (w, w), w, True)


def run_divergence(
    dtype: torch.dtype, V: int, kind: str, softcap: float | None, by_row: bool = False, of_teacher: Any = None
) -> None:
    """With a teacher of another width and scaling; the gradient of the divergence alone, and of both results."""
    module, g = kernels_of("divergences"), torch.ones(2)
    student, teacher = (
        Logits(torch.zeros(2, H, dtype=t), torch.zeros(V, H, dtype=t), **scaling(cap, by_row))
        for t, H, cap in ((dtype, 4, softcap), (of_teacher or dtype, 8, None))
    )
    pair = HeadPair(student, teacher, kind, 0.5)
    norms = module.divergence(pair, True)[2]
    module.divergence_backward(pair, norms, (g, g), (True, *[False] * 4))
    module.divergence_backward(pair, norms, (None, g), (True, *[False] * 4))


def recorded(*runs: Callable[[], None], architecture: str = "sm_90") -> list[Launch]:
    """What the operators launch there, each variant once."""
    found: dict[Any, Launch] = {}

    def record(kernel: Any, programs: int, device: torch.device, *arguments: Any, warps: int, **constants: Any) -> None:
        launch = kernel, arguments, constants, warps
        found[variant(launch)] = launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "architecture", lambda device: architecture)
        for family in FAMILIES:
            patch.setattr(kernels_of(family), "launch", record)
        for run in runs:
            run()
    return list(found.values())


def launches(architecture: str) -> list[Launch]:
    """What ships, over real vocabularies."""
    runs: list[Callable[[], None]] = []
    for dtype in POINTERS:
        if dtype == torch.float16 and architecture not in WHOLE:
            continue  # it takes the registers of bfloat16
        for softcap in () if not dtype.is_floating_point else (30.0, None) if architecture in WHOLE else (30.0,):
            runs.append(partial(run_statistics, dtype, 50257, 2, softcap))  # an odd vocabulary: nothing is aligned
            runs.append(partial(run_loss, dtype, 151936, softcap))
        if dtype.is_floating_point:
            kinds = KINDS if dtype == torch.bfloat16 and architecture in WHOLE else ("jsd",)  # of the most registers
            runs += [partial(run_divergence, dtype, 151936, kind, 30.0) for kind in kinds]
    runs.append(partial(run_statistics, torch.bfloat16, 151936, 8, 30.0, by_row=True))
    runs.append(partial(run_loss, torch.bfloat16, 151936, 30.0, by_row=True))
    runs.append(partial(run_divergence, torch.bfloat16, 151936, "jsd", 30.0, by_row=True))
    if architecture in WHOLE:
        for own, other in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            runs.append(partial(run_divergence, own, 151936, "jsd", 30.0, of_teacher=other))
        for V, k in ((49152, 1), (151936, 0), (151936, 8), (262144, 32), (262144, 128)):
            runs.append(partial(run_statistics, torch.bfloat16, V, k, None))
        runs.append(partial(run_loss, torch.bfloat16, 50257, None))
        runs.append(partial(run_divergence, torch.bfloat16, 50257, "jsd", None))
    return recorded(*runs, architecture=architecture)


def kind(argument: Any) -> str:
    """The type of an argument in a kernel's signature, with what Triton specialises on: 16 bytes of alignment."""
    if argument is None:
        return "constexpr"
    if isinstance(argument, Tensor):
        return POINTERS[argument.dtype]
    if isinstance(argument, float):
        return "fp32"
    return ("i64" if abs(argument) >= 2**31 else "i32") + (":16" if argument % 16 == 0 else "")


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """As the launch compiles it: an argument that is not specialised says nothing of its alignment."""
    kernel, arguments, constants, warps = launch
    kinds = dict(zip(kernel.arg_names, (kind(a) for a in arguments), strict=False))
    kinds |= dict.fromkeys(constants, "constexpr")
    for parameter in kernel.params:
        if parameter.do_not_specialize:
            kinds[parameter.name] = kinds[parameter.name].removesuffix(":16")
    signature = {name: kinds[name].removesuffix(":16") for name in kernel.arg_names}
    values = {name: constants.get(name) for name, of in signature.items() if of == "constexpr"}
    aligned = [i for i, name in enumerate(kernel.arg_names) if kinds[name][0] == "*" or kinds[name].endswith(":16")]
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=target, options={"num_warps": warps})


SCALARS = 16  # scalar registers that an AMD kernel may keep in the lanes of a vector register, at one instruction each


def spills(binary: Any) -> int:
    """What goes to memory for want of registers, by the assembler: in bytes on NVIDIA, in registers on AMD."""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        counted = {kind: re.findall(rf"\.{kind}gpr_spill_count:\s+(\d+)", text) for kind in "vs"}
        vector, scalar = (sum(map(int, counted[kind])) for kind in "vs")
        return vector + max(0, scalar - SCALARS)
    report = of_cubin(binary, "-res-usage")
    counted = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    assert counted, report
    return sum(int(n) for pair in counted for n in pair)


def of_cubin(binary: Any, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module", autouse=True)
def _compiled_in_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that another version left counts, and what a test has compiled serves the others."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(shared / "triton"))
        yield


@pytest.mark.thorough
def test_spills_are_found() -> None:
    """One warp for the work of four: more numbers than a thread has registers."""
    kernel, arguments, constants, _ = of_kernel("losses", "fold", torch.bfloat16)[0]
    assert spills(compiled((kernel, arguments, constants, 1), TARGETS["sm_90"][0])) > 0


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", TARGETS)
def test_no_spills_and_within_shared_memory(architecture: str) -> None:
    target, shared_kib = TARGETS[architecture]
    names = set()
    for launch in launches(architecture):
        binary = compiled(launch, target)
        names.add(launch[0].fn.__qualname__ + launch[0].fn.__module__)
        what = f"{launch[0].fn.__name__} {[kind(a) for a in launch[1]]} {launch[2]}, {launch[3]} warps"
        assert spills(binary) == 0, what
        assert binary.metadata.shared <= shared_kib * 1024, f"{what}: {binary.metadata.shared} bytes"
    assert len(names) == 9


def test_every_architecture_has_a_configuration() -> None:
    assert set(configs.CONFIGS) == set(TARGETS)


# Instructions a logit in the longest loop, counted in the disassembly for sm_90. At 8192 x 151936 bfloat16 logits an
# H200 issues about 13 a logit in the time in which it reads them.
BUDGETS = {("statistics", "fold"): 13.0, ("losses", "fold"): 32.0, ("divergences", "fold"): 18.0}
OF_KIND = {
    "forward_kl": (36.0, 41.0),
    "reverse_kl": (46.0, 41.0),
    "jsd": (126.0, 116.0),
    "alpha": (68.0, 68.0),
}  # values, gradient
FP32_MORE = 3.0  # a step holds half as many logits; they also take twice the time to be read
GRADIENT_BUDGET = 20.0  # a logit, of the floating-point and conversion instructions of a step that is not masked


@pytest.mark.thorough
@pytest.mark.parametrize(("family", "kernel"), BUDGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("by_row", [False, True], ids=["one temperature", "temperature of each row"])
def test_instructions_a_logit(family: str, kernel: str, dtype: torch.dtype, by_row: bool) -> None:
    for launch in of_kernel(family, kernel, dtype, by_row):
        shape = launch[2]
        logits = shape["R"] * shape["J"]  # a thread and step
        longest = max(loops(disassembly(compiled(launch, TARGETS["sm_90"][0]))), key=len)
        budget = BUDGETS[family, kernel] + (FP32_MORE if dtype == torch.float32 else 0)
        assert len(longest) / logits <= budget, f"{len(longest) / logits:.1f} a logit"


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_instructions_of_each_divergence(dtype: torch.dtype) -> None:
    """A pair of logits, student's and teacher's. The JSD is bound by its arithmetic: a logarithm, four exponentials."""
    for kernel in ("values", "gradient"):
        for launch in of_kernel("divergences", kernel, dtype):
            constants = launch[2]
            longest = max(loops(disassembly(compiled(launch, TARGETS["sm_90"][0]))), key=len)
            used = len(longest) / (constants["R"] * constants["J"])
            kind = KINDS[constants["KIND"]]
            assert used <= OF_KIND[kind][kernel == "gradient"], f"{kernel} of {kind}: {used:.1f} a pair"


@pytest.mark.thorough
@pytest.mark.parametrize("by_row", [False, True], ids=["one temperature", "temperature of each row"])
@pytest.mark.parametrize("family", ["statistics", "losses"])
def test_arithmetic_of_the_gradients(family: str, by_row: bool) -> None:
    """The pairs of branches (masked or not, anchored or not, with the target or not) cost code, not time."""
    for launch in of_kernel(family, "gradient", torch.bfloat16, by_row):
        kinds = [
            line.split()[0].split(".")[0] for line in instructions(disassembly(compiled(launch, TARGETS["sm_90"][0])))
        ]
        arithmetic = sum(kinds.count(kind) for kind in ("FADD", "FMUL", "FFMA", "MUFU", "FMNMX", "F2F", "F2FP"))
        assert arithmetic / (launch[2]["R"] * launch[2]["J"]) <= GRADIENT_BUDGET


def test_a_new_size_or_k_compiles_nothing() -> None:
    """Aligned vocabularies of a dtype share their compilations, whatever their size and k."""
    sizes = ((49152, 1), (128256, 8), (151936, 8), (151936, 64), (131072, 128))
    seen = set()
    for V, k in sizes:
        variants = {variant(launch) for launch in recorded(lambda V=V, k=k: run_statistics(torch.bfloat16, V, k, None))}
        seen.add(frozenset(variants))
    assert len(seen) == 1
    for run in (run_loss, partial(run_divergence, kind="jsd")):
        found = {
            frozenset(variant(launch) for launch in recorded(partial(run, torch.bfloat16, V, softcap=None)))
            for V in (49152, 128256, 151936)
        }
        assert len(found) == 1


def of_kernel(family: str, kernel: str, dtype: torch.dtype, by_row: bool = False) -> list[Launch]:
    """The launches of a kernel on plain logits of an aligned vocabulary, each variant once."""
    run = {
        "statistics": lambda: run_statistics(dtype, 151936, 8, None, by_row),
        "losses": lambda: run_loss(dtype, 151936, None, by_row),
        "divergences": lambda: [run_divergence(dtype, 151936, kind, None) for kind in KINDS],
    }[family]
    found = [
        launch
        for launch in recorded(run)
        if launch[0].fn.__name__ == kernel
        and family in launch[0].fn.__module__
        and (launch[1][0].dtype == dtype or family == "divergences")  # float16 heads give float32 logits
    ]
    assert found
    return found


def variant(launch: Launch) -> Any:
    """What a compilation depends on."""
    kernel, arguments, constants, warps = launch
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    kinds = (
        kind(a).removesuffix(":16") if name in free else kind(a) + (":1" if isinstance(a, int) and a == 1 else "")
        for name, a in zip(kernel.arg_names, arguments, strict=False)
    )
    return kernel.fn.__module__, kernel.fn.__name__, tuple(kinds), tuple(constants.items()), warps


def disassembly(binary: Any) -> str:
    return of_cubin(binary, "-sass")


ADDRESSED = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(.*?);", re.M)


def instructions(sass: str) -> list[str]:
    return [text for _, text in ADDRESSED.findall(sass)]


def loops(sass: str) -> list[list[str]]:
    """The instructions from the target of each backward branch to the branch."""
    found = [(int(at, 16), text) for at, text in ADDRESSED.findall(sass)]
    bodies = []
    for at, text in found:
        target = re.search(r"BRA.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:
            bodies.append([other for place, other in found if int(target[1], 16) <= place <= at])
    return bodies


@pytest.mark.thorough
@pytest.mark.parametrize("kernel", ["fold", "gradient"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_move_16_bytes_at_a_time(family: str, kernel: str) -> None:
    """bfloat16 rows of an aligned vocabulary: no scalar load of a logit in a step that is not masked."""
    for launch in of_kernel(family, kernel, torch.bfloat16):
        ptx = compiled(launch, TARGETS["sm_90"][0]).asm["ptx"]
        assert re.search(r"ld\.global\.v4\.b32", ptx), ptx[-3000:]
        if kernel == "gradient":
            assert re.search(r"st\.global\.v4\.b32", ptx), ptx[-3000:]
