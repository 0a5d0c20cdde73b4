"""``process_group=`` and ``reduce_hidden_grad=`` of the linear operators: on gloo, and on NCCL where GPUs are.

Each group of processes runs all calls once, in ``calls``; the tests compare what came of them with one process.
"""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import cases
import oracles
import pytest
import torch
import torch.distributed as dist
from cases import SCALED, Arguments
from torch import Tensor

import rmx_kernels
from rmx_kernels.vocab_parallel import vocab_parallel_entropy_topk, vocab_parallel_gated_contrastive_loss

BOUNDS = {2: (0, 9, 23), 3: (0, 4, 15, 23)}  # unequal
STATS, LOSS = "linear_entropy_topk", "linear_gated_contrastive_loss"
OPERATORS = {STATS: vocab_parallel_entropy_topk, LOSS: vocab_parallel_gated_contrastive_loss}
# name -> (dtype of hidden and base, dtype of the head, with a LoRA pair, scaling)
VARIANTS: dict[str, tuple[torch.dtype, torch.dtype, bool, dict[str, Any]]] = {
    "plain": (torch.float32, torch.float32, False, {}),
    "scaled": (torch.bfloat16, torch.bfloat16, False, SCALED),
    "lora": (torch.float32, torch.float32, True, {"temperature": 0.7}),
    "bf16 hidden, fp32 head": (torch.bfloat16, torch.float32, True, {}),
}
CASES = [(op, variant, reduced) for op in OPERATORS for variant in VARIANTS for reduced in (True, False)]
NAMES = ("hidden", "weight", "bias", "A", "B")  # in the order of cases.leaves


def arguments_of(op: str, variant: str, V: int, device: str = "cpu") -> Arguments:
    dtype, of_head, lora, _ = VARIANTS[variant]
    made = cases.make(op, (2, 6), V, 7, dtype, device)
    made["target"][0] = torch.arange(6, device=device) * (V - 1) // 5  # of every rank
    if op == STATS:
        made["k"] = 6
    if lora:
        made = cases.with_lora(made)
        made["lora"] = (*(x.to(of_head) for x in made["lora"][:2]), 0.5)
    return made | {name: made[name].to(of_head) for name in ("weight", "bias")}


def part(arguments: Arguments, first: int, last: int) -> Arguments:
    own = arguments | {name: arguments[name][first:last] for name in ("weight", "bias")}
    if "lora" in arguments:
        A, B, scale = arguments["lora"]
        own["lora"] = A, B[first:last], scale
    return own


def forward_backward(function: Callable[..., Any], op: str, arguments: Arguments, **options: Any) -> list[list[Tensor]]:
    """The results, and the gradients of hidden, weight, bias, A and B, where they are."""
    fresh, inputs = cases.leaves(op, arguments)
    result = function(**fresh, **options)
    outputs = cases.differentiable(result)
    gradients = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    return [[value.detach().cpu() for value in result if value is not None], [g.cpu() for g in gradients]]


# What the processes run.


def calls(rank: int, world: int, folder: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    bounds, whole = BOUNDS[world], dist.group.WORLD
    found: dict[Any, Any] = {}
    for op, variant, reduced in CASES:
        own = part(arguments_of(op, variant, bounds[-1], device), bounds[rank], bounds[rank + 1])
        options = VARIANTS[variant][3] | {"reduce_hidden_grad": reduced}
        found[op, variant, reduced] = forward_backward(
            getattr(rmx_kernels, op), op, own, process_group=whole, **options
        )
        by_name = {"start": bounds[rank], "group": whole, "check": False}
        found[op, variant, reduced, "by name"] = forward_backward(OPERATORS[op], op, own, **by_name, **options)
    found["errors"] = {name: refusal(call, rank, world, device) for name, (call, _) in ERRORS.items()}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refusal(call: Callable[[Arguments, int], Any], rank: int, world: int, device: str) -> str:
    bounds = BOUNDS[world]
    own = part(arguments_of(LOSS, "plain", bounds[-1], device), bounds[rank], bounds[rank + 1])
    try:
        call(own, rank)
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


def by_group(own: Arguments, **changes: Any) -> Any:
    return rmx_kernels.linear_gated_contrastive_loss(**own, process_group=dist.group.WORLD, **changes)


ERRORS: dict[str, tuple[Callable[[Arguments, int], Any], str]] = {
    "one rank leaves the sum to its caller": (
        lambda own, rank: by_group(own, reduce_hidden_grad=rank == 0),
        "reduce_hidden_grad: expected the same on every rank, got 1 on rank 0, 0 on rank 1",
    ),
    "a target beyond the vocabulary": (
        lambda own, rank: by_group(own | {"target": own["target"] + 23}),
        r"target: expected ids in \[0, 23\), got ",
    ),
    "a known log-sum-exp": (
        lambda own, rank: by_group(own, base_lse=torch.zeros(2, 6, device=own["hidden"].device)),
        "base_lse: expected None with a process_group",
    ),
    "no first row where nothing is exchanged": (
        lambda own, rank: vocab_parallel_gated_contrastive_loss(**own, check=False),
        "start: expected an int, got NoneType",
    ),
}

# The tests.


@pytest.fixture(
    scope="module",
    params=[
        ("cpu", 2),
        pytest.param(("cpu", 3), marks=pytest.mark.thorough),
        pytest.param(("cuda", 2), marks=pytest.mark.gpu),
        pytest.param(("cuda", 3), marks=pytest.mark.gpu),
    ],
    ids=lambda place: f"{place[1]} on {place[0]}",
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each rank of a group found."""
    device, world = request.param
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(calls, (world, str(folder), device), nprocs=world)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(ranks: list[dict[Any, Any]], case: tuple[str, str, bool]) -> None:
    """Off the truth at most twice as far as one process is; every rank has the same values and gradients of rows."""
    op, variant, reduced = case
    dtype, _, _, scaling = VARIANTS[variant]
    arguments = arguments_of(op, variant, BOUNDS[len(ranks)][-1])
    plain, gradients = forward_backward(getattr(rmx_kernels, op), op, arguments, **scaling)
    ids = plain[-1] if op == STATS else None
    exact = cases.full_logits(op, arguments, ids, torch.float64, **scaling)
    truth = dict(zip(NAMES, exact[-len(gradients) :], strict=False))
    found = [rank[case] for rank in ranks]
    for values, of_plain in zip(zip(*(x for x, _ in found), strict=True), plain, strict=True):
        cases.assert_same_bits(values[1:], [values[0]] * (len(ranks) - 1))
        torch.testing.assert_close(values[0], of_plain, rtol=1e-4, atol=1e-4, equal_nan=True)
    for name, own, of_plain in zip(NAMES, zip(*(x for _, x in found), strict=True), gradients, strict=False):
        assert {x.dtype for x in own} == {of_plain.dtype}
        if name in ("weight", "bias", "B"):
            got = torch.cat(own)
        elif name == "hidden" and not reduced:  # what a framework adds up
            got = torch.stack(own).double().sum(0).to(of_plain.dtype)
            assert not torch.equal(own[0], own[1])
        else:
            cases.assert_same_bits(own[1:], [own[0]] * (len(ranks) - 1))
            got = own[0]
        # Shares that the caller adds up were rounded each.
        size, roundings = truth[name].detach().abs() + 1, 1 if reduced else 1 + len(ranks)
        oracles.assert_as_good_as_eager(
            got, of_plain, truth[name], size=size, what=name, input_dtype=dtype, roundings=roundings
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bits_of_the_function_by_name(ranks: list[dict[Any, Any]], case: tuple[str, str, bool]) -> None:
    for rank in ranks:
        for got, expected in zip(rank[case], rank[*case, "by name"], strict=True):
            cases.assert_same_bits(got, expected)


@pytest.mark.parametrize("name", ERRORS)
def test_refused(ranks: list[dict[Any, Any]], name: str) -> None:
    for rank in ranks:
        assert re.search(ERRORS[name][1], rank["errors"][name]), rank["errors"][name]
