"""What the processes of test_vocab_parallel.py run: operators on a shard of the vocabulary each, and their refusals.

A spawn of processes takes seconds, so each group runs all its calls once, in ``calls``, and keeps what came of them;
the tests compare.
"""

import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
import torch.distributed as dist
from cases import SCALED, Arguments, randint, randn
from torch import Tensor

from rmx_kernels import backends
from rmx_kernels.dispatch import INTERPRETED
from rmx_kernels.vocab_parallel import vocab_parallel_entropy_topk, vocab_parallel_gated_contrastive_loss

SHARDS = {2: (0, 9, 23), 3: (0, 4, 15, 23)}  # unequal, and one of fewer rows than k
LONG = {2: (0, 1100, 2600), 3: (0, 1024, 1025, 2600)}  # blocks of 1024 columns, and a shard of one row
# Interpreted, the Triton kernels take minutes: they get a few of the cases, on two processes, and only they do.
IMPLS = ["triton"] if INTERPRETED else [b.name for b in backends().values() if b.available and "cpu" in b.devices]
natively = pytest.mark.skipif(INTERPRETED, reason="minutes under Triton's interpreter")
DTYPES = [torch.float32] if INTERPRETED else [torch.bfloat16, torch.float32, torch.float64]
STATS, LOSS = "linear_entropy_topk", "linear_gated_contrastive_loss"
PARALLEL: dict[str, Callable[..., Any]] = {
    STATS: vocab_parallel_entropy_topk,
    LOSS: vocab_parallel_gated_contrastive_loss,
}
INF = math.inf


def arguments_of(
    op: str, variant: str, dtype: torch.dtype, bounds: tuple[int, ...]
) -> tuple[Arguments, dict[str, Any]]:
    """(arguments of the whole head, scaling) of a variant; targets are of every rank."""
    V = bounds[-1]
    made = cases.make(op, (2, 6), V, 7, dtype)
    made["target"][0] = torch.arange(6) * (V - 1) // 5
    if op == STATS:
        made["k"] = 6
    if variant == "scaled":
        return made, SCALED
    if variant == "temperature":
        return made, {"temperature": 0.3}
    if variant == "row temperature":
        return made, {"temperature": cases.temperatures(2, 6), "softcap": 5.0}
    if variant == "lora":
        return cases.with_lora(made), {}
    if variant == "no bias":
        del made["bias"]
    if variant == "ties":  # the head repeats itself, and so do the logits
        made["hidden"], made["weight"] = (made[n].mul(2).round() / 2 for n in ("hidden", "weight"))  # exact products
        made["weight"] = made["weight"][torch.arange(V) % 3]
        made["bias"].zero_()
        return made, {"temperature": 0.7}
    if variant == "masked":  # more of the vocabulary than k leaves, so that the top-k holds some of it
        made["bias"][bounds[1] : bounds[2]] = -INF
        made["bias"][: bounds[1] - 3] = -INF
        made["bias"][bounds[-2] :][2:] = -INF
        made["target"].fill_(bounds[1] - 1)
    if variant == "one position" and op == LOSS:
        made["ce_weight"].zero_()
        made["kl_weight"].zero_()
        made["ce_weight"][1, 2] = 1.0
    return made, {}


VARIANTS = ["lora", "masked", "temperature", "row temperature"]
if not INTERPRETED:
    VARIANTS += ["plain", "scaled", "no bias", "ties", "one position", "long"]
CASES = [(op, variant, dtype, impl) for op in PARALLEL for variant in VARIANTS for dtype in DTYPES for impl in IMPLS]


def shard(arguments: Arguments, first: int, last: int) -> Arguments:
    """The arguments of the rank that holds rows [first, last) of the head."""
    own = arguments | {n: arguments[n][first:last] for n in ("weight", "bias") if n in arguments}
    if "lora" in arguments:
        A, B, scale = arguments["lora"]
        own["lora"] = A, B[first:last], scale
    return own | {"start": first}


def forward_backward(function: Callable[..., Any], op: str, arguments: Arguments, **options: Any) -> list[Tensor]:
    """All results, then the gradients of hidden, weight, bias, A and B, where they are."""
    fresh, inputs = cases.leaves(op, arguments)
    result = function(**fresh, **options)
    outputs = cases.differentiable(result)
    gradients = torch.autograd.grad(outputs, inputs, cases.cotangents(outputs))
    return [value.detach() for value in result if value is not None] + list(gradients)


# What the processes run.


def calls(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found = {}
    for case in CASES:
        op, variant, dtype, impl = case
        bounds = (LONG if variant == "long" else SHARDS)[world]
        arguments, scaling = arguments_of(op, variant, dtype, bounds)
        own = shard(arguments, bounds[rank], bounds[rank + 1])
        found[case] = forward_backward(PARALLEL[op], op, own, impl=impl, **scaling)
    if not INTERPRETED:
        found |= {name: call(rank, world) for name, call in SINGLE.items()}
        found["errors"] = {name: refusal(partial(call, rank, world)) for name, (call, _, _) in ERRORS.items()}
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def own_case(rank: int, world: int, op: str = STATS, variant: str = "plain", **changes: Any) -> Arguments:
    bounds = SHARDS[world]
    arguments = arguments_of(op, variant, torch.float32, bounds)[0] | changes
    return shard(arguments, bounds[rank], bounds[rank + 1])


def alone(rank: int, world: int) -> list[list[Tensor]]:
    """In a group of one: what the plain operator gives, for the test to hold it to its bits."""
    groups = [dist.new_group([r]) for r in range(world)]
    both = []
    for op in PARALLEL:
        arguments = arguments_of(op, "lora", torch.float32, SHARDS[world])[0]
        whole = arguments | {"start": 0, "group": groups[rank]}
        both += [forward_backward(PARALLEL[op], op, whole), cases.forward_backward(op, arguments)]
    return both


def unchecked(rank: int, world: int) -> list[list[Tensor]]:
    own = [own_case(rank, world, op) for op in PARALLEL]
    return [
        forward_backward(PARALLEL[op], op, x, check=check)
        for op, x in zip(PARALLEL, own, strict=True)
        for check in (True, False)
    ]


def frozen_head(rank: int, world: int) -> list[Tensor]:
    """d hidden alone, twice from one graph, then d weight alone."""
    gradients = []
    for op in PARALLEL:
        own = own_case(rank, world, op)
        hidden = own["hidden"].clone().requires_grad_()
        first = PARALLEL[op](**own | {"hidden": hidden})[0].sum()
        gradients += torch.autograd.grad(first, hidden, retain_graph=True)
        gradients += torch.autograd.grad(first, hidden)
        weight = own["weight"].clone().requires_grad_()
        gradients += torch.autograd.grad(PARALLEL[op](**own | {"weight": weight})[0].sum(), weight)
    return gradients


def nothing(rank: int, world: int) -> list[Tensor]:
    """No rows, no targets, no k; and rows of which none has a weight."""
    own = own_case(rank, world)
    empty = own | {"hidden": own["hidden"][:, :0].clone().requires_grad_(), "target": None, "k": 0}
    stats = vocab_parallel_entropy_topk(**empty)
    loss = own_case(rank, world, LOSS, "one position")
    hidden = loss["hidden"].clone().requires_grad_()
    loss["ce_weight"].zero_()
    result = vocab_parallel_gated_contrastive_loss(**loss | {"hidden": hidden})
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    (none,) = torch.autograd.grad(stats.lse.sum(), empty["hidden"])
    return [stats.lse, none, result.loss.detach(), result.logprob, result.kl, gradient]


def offset(rank: int, world: int) -> list[Tensor]:
    bounds = SHARDS[world]
    own = shard(offset_arguments(bounds[-1]), bounds[rank], bounds[rank + 1])
    return forward_backward(vocab_parallel_entropy_topk, STATS, own)


def offset_arguments(V: int) -> Arguments:
    """Logits of +10000 that are exact in float32, with whatever shape the products have."""
    made = cases.make(STATS, (5,), V, 4)
    made["hidden"], made["weight"] = ((x * 2).round() / 2 for x in (made["hidden"], made["weight"]))
    return made | {"bias": torch.full((V,), 1e4), "k": 4}


def nan_row(rank: int, world: int) -> list[Tensor]:
    own = own_case(rank, world)
    own["hidden"][0, 1, 3] = math.nan
    return [x for x in vocab_parallel_entropy_topk(**own) if x.is_floating_point()]


def equal_states(rank: int, world: int) -> list[Tensor]:
    own = own_case(rank, world, LOSS)
    own |= {"hidden": own["base_hidden"].clone().requires_grad_(), "ce_weight": torch.zeros(2, 6)}
    result = vocab_parallel_gated_contrastive_loss(**own)
    return [result.kl, *torch.autograd.grad(result.loss, own["hidden"])]


def near_states(rank: int, world: int) -> list[Tensor]:
    bounds = LONG[world]
    arguments = near_arguments(bounds[-1])
    return [vocab_parallel_gated_contrastive_loss(**shard(arguments, bounds[rank], bounds[rank + 1])).kl]


def near_arguments(V: int) -> Arguments:
    base = randn(20, 12)
    rest = {"target": randint(V, 20), "ce_weight": torch.zeros(20), "kl_weight": torch.ones(20)}
    return {"hidden": base + 3e-4 * randn(20, 12, seed=1), "base_hidden": base, "weight": randn(V, 12, seed=2)} | rest


SINGLE: dict[str, Callable[[int, int], Any]] = {
    "alone": alone,
    "unchecked": unchecked,
    "frozen head": frozen_head,
    "nothing": nothing,
    "offset": offset,
    "nan row": nan_row,
    "equal states": equal_states,
    "near states": near_states,
}


def stats_with(rank: int, world: int, on_rank_1: Arguments, **on_all: Any) -> None:
    own = own_case(rank, world) | on_all
    vocab_parallel_entropy_topk(**own | (on_rank_1 if rank == 1 else {}))


def loss_with(rank: int, world: int, on_rank_1: Arguments, **on_all: Any) -> None:
    own = own_case(rank, world, LOSS) | on_all
    vocab_parallel_gated_contrastive_loss(**own | (on_rank_1 if rank == 1 else {}))


def other_dtype(rank: int, world: int) -> None:
    own = own_case(rank, world)
    names = ("hidden", "weight", "bias") if rank == 1 else ()
    vocab_parallel_entropy_topk(**own | {name: own[name].double() for name in names})


def other_width(rank: int, world: int) -> None:
    own = own_case(rank, world)
    names = ("hidden", "weight") if rank == 1 else ()
    vocab_parallel_entropy_topk(**own | {name: own[name][..., :5] for name in names})


def other_operator(rank: int, world: int) -> None:
    (loss_with if rank == 1 else stats_with)(rank, world, {})


def one_bit(rank: int, world: int) -> None:
    hidden = own_case(rank, world)["hidden"].clone()
    hidden[1, 3, 2] = torch.nextafter(hidden[1, 3, 2], torch.tensor(9.0))
    stats_with(rank, world, {"hidden": hidden})


def permuted(rank: int, world: int, call: Callable[..., None], name: str) -> None:
    own = own_case(rank, world, LOSS) if call is loss_with else own_case(rank, world)
    call(rank, world, {name: own[name].flip(1)})


def other_lora(rank: int, world: int) -> None:
    own = own_case(rank, world)
    B = randn(own["weight"].shape[0], 3)
    stats_with(rank, world, {"lora": (randn(3, 7, seed=2), B, 1.0)}, lora=(randn(3, 7), B, 1.0))


def not_a_member(rank: int, world: int) -> None:
    groups = [dist.new_group([r]) for r in range(world)]
    vocab_parallel_entropy_topk(**own_case(rank, world), group=groups[(rank + 1) % world])


def two_rows(rank: int, world: int) -> Arguments:
    return {"hidden": randn(2, 7), "target": randint(5, 2)}


OWN = "ValueError: rank 1: {}: expected"
# name -> (the call, what rank 1 says, what the others say)
ERRORS: dict[str, tuple[Callable[[int, int], None], str, str]] = {
    "k": (partial(stats_with, on_rank_1={"k": 2}), "k: expected the same", r"k: .*6 on rank 0, 2 on rank 1"),
    "rows": (
        partial(stats_with, on_rank_1=two_rows(1, 2)),
        "hidden rows: expected the same",
        "12 on rank 0, 2 on rank 1",
    ),
    "H": (other_width, r"hidden.shape\[-1\]: expected the same", "7 on rank 0, 5 on rank 1"),
    "dtype": (other_dtype, "hidden.dtype: expected the same", "torch.float32 on rank 0, torch.float64 on rank 1"),
    "temperature": (partial(stats_with, on_rank_1={"temperature": 0.5}), "temperature: ", "1 on rank 0, 0.5 on rank 1"),
    "a number and a tensor": (
        partial(stats_with, on_rank_1={"temperature": torch.ones(2, 6)}),
        "temperature: expected the same",
        "1 on rank 0, 0 on rank 1",
    ),
    "temperatures": (
        partial(loss_with, on_rank_1={"temperature": cases.temperatures(2, 6)}, temperature=torch.ones(2, 6)),
        "values of temperature, by a checksum: expected the same",
        "values of temperature",
    ),
    "own temperatures": (
        partial(stats_with, on_rank_1={"temperature": torch.zeros(2, 6)}),
        "temperature: expected finite numbers above 0, got 0.0",
        OWN.format("temperature"),
    ),
    "softcap": (partial(stats_with, on_rank_1={"softcap": 2.0}), "softcap: ", "0 on rank 0, 2 on rank 1"),
    "bias": (partial(stats_with, on_rank_1={"bias": None}), "bias given: ", "1 on rank 0, 0 on rank 1"),
    "overlap": (partial(stats_with, on_rank_1={"start": 3}), r"start: .* got \[0, ", r"start: .*\[3, \d+\) on rank 1"),
    "gap": (partial(stats_with, on_rank_1={"start": 10}), r"start: .* got \[0, ", r"start: .*\[10, \d+\) on rank 1"),
    "start": (partial(stats_with, on_rank_1={"start": -1}), "start: expected the first id", OWN.format("start")),
    "start type": (
        partial(stats_with, on_rank_1={"start": 1.0}),
        "start: expected an int, got float",
        OWN.format("start"),
    ),
    "own": (
        partial(stats_with, on_rank_1={"weight": None}),
        "TypeError: weight: expected a torch.Tensor",
        OWN.format("weight"),
    ),
    "own k": (partial(stats_with, on_rank_1={"k": -1}), "k: expected 0 <= k", OWN.format("k")),
    "k > V": (partial(stats_with, on_rank_1={}, k=24), "k: expected 0 <= k <= V = 23, got 24", "V = 23, got 24"),
    "target": (
        partial(stats_with, on_rank_1={}, target=torch.full((2, 6), 23)),
        r"target: expected ids in \[0, 23\), got 23",
        r"got 23",
    ),
    "other target": (
        partial(stats_with, on_rank_1={"target": torch.ones(2, 6, dtype=torch.int64)}),
        "lowest target: expected the same",
        "lowest target: ",
    ),
    "no target": (partial(stats_with, on_rank_1={"target": None}), "target given: ", "1 on rank 0, 0 on rank 1"),
    "gradient": (
        partial(stats_with, on_rank_1={"hidden": randn(2, 6, 7, seed=1).requires_grad_()}),
        "hidden.requires_grad: ",
        "0 on rank 0, 1 on rank 1",
    ),
    "lora": (
        partial(stats_with, on_rank_1={"lora": (randn(3, 7), randn(14, 3), 1.0)}, weight=randn(14, 7), bias=None),
        "lora rank: ",
        "0 on rank 0, 3 on rank 1",
    ),
    "ce_weight": (
        partial(loss_with, on_rank_1={"ce_weight": torch.ones(2, 6)}),
        "rows with ce_weight: ",
        "10 on rank 0, 12 on rank 1",
    ),
    "hidden": (
        partial(stats_with, on_rank_1={"hidden": randn(2, 6, 7, seed=1)}),
        "values of hidden, by a checksum: expected the same",
        "values of hidden",
    ),
    "one bit of hidden": (one_bit, "values of hidden, by a checksum: expected the same", "values of hidden"),
    "permuted rows": (
        partial(permuted, call=stats_with, name="hidden"),
        "values of hidden, by a checksum: expected the same",
        "values of hidden",
    ),
    "permuted targets": (
        partial(permuted, call=stats_with, name="target"),
        "values of target, by a checksum: expected the same",
        "values of target",
    ),
    "permuted targets of the loss": (
        partial(permuted, call=loss_with, name="target"),
        "values of target, by a checksum: expected the same",
        "values of target",
    ),
    "permuted base": (partial(permuted, call=loss_with, name="base_hidden"), "values of base_hidden", "base_hidden"),
    "permuted ce_weight": (partial(permuted, call=loss_with, name="ce_weight"), "values of (hidden|ce_weight)", ""),
    "permuted kl_weight": (
        partial(permuted, call=loss_with, name="kl_weight"),
        "values of (.*hidden|kl_weight)",
        "same",
    ),
    "lora A": (other_lora, "values of lora A, by a checksum: expected the same", "values of lora A"),
    "impl": (partial(loss_with, on_rank_1={"impl": "cuda"}), "impl: expected None or one of", OWN.format("impl")),
    "operator": (other_operator, "operator: expected the same", "0 on rank 0, 1 on rank 1"),
    "member": (not_a_member, "group: expected a group that this process is a member of", "group: expected"),
}


# The tests.
