"""Models in fully_shard (FSDP2) on two gloo processes, each with its own rows, against one process with all of them.

The processes run every case once, in ``calls``; the tests compare what came of them.
"""

import copy
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import test_causal_lm as lm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from rmx_kernels import gathered, in_forward, linear_cross_entropy, linear_entropy_topk, token_logprobs

pytestmark = pytest.mark.thorough
WORLD, STEPS, RATE = 2, 2, 0.1


def model_of(case: str) -> Any:
    model = lm.make()
    if case == "tied, in forward":
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    if case.startswith("lora"):
        model = lm.adapted(model)
    return model


def sharded(model: Any, case: str) -> Any:
    """As training scripts do: each layer, then what they want gathered by itself, then all that is left."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in causal_lm.model.layers:
        fully_shard(layer, mesh=mesh)
    if "outside" in case:
        fully_shard(causal_lm.model, mesh=mesh)
        if "own group" in case:
            fully_shard(causal_lm.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def of_head(model: Any, ids: Tensor) -> Tensor:
    return -token_logprobs(model, ids).logprob.mean()


def of_hidden(model: Any, ids: Tensor) -> Tensor:
    """Hidden states and the head by hand."""
    hidden = model.model(ids)[0][:, :-1]
    return linear_cross_entropy(hidden, gathered(model.lm_head.weight), ids[:, 1:])


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in forward": lambda model, ids: in_forward(model, lambda inner: of_head(inner, ids)),
    "tied, in forward": lambda model, ids: in_forward(model, lambda inner: of_head(inner, ids)),
    "outside": of_head,
    "outside, own group": of_head,
    "outside, by hand": of_hidden,
    "lora, in forward": lambda model, ids: in_forward(model, lambda inner: of_head(inner, ids)),
    "lora, outside": of_head,
}


def trained(model: Any, ids: Tensor, loss_of: Callable[[Any, Tensor], Tensor]) -> Iterator[dict[str, Tensor]]:
    """The loss and all gradients of each step of SGD."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, ids)
        loss.backward()
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        yield {"loss": loss.detach()} | {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
        optimizer.step()


# What the processes run.


def calls(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    found: dict[str, Any] = {}
    for case, loss_of in LOSSES.items():
        model = sharded(model_of(case), case)
        steps = trained(model, lm.tokens(2 * WORLD)[2 * rank : 2 * rank + 2], loss_of)
        found[case] = [{name: x.clone() for name, x in step.items()} for step in steps]
    found["refused"] = {name: refusal(call) for name, (call, _) in REFUSED.items()}
    found["uneven"] = uneven(rank)
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def uneven(rank: int) -> list[Tensor]:
    """A plain DTensor of 5 rows, and of two dimensions of a mesh: the mean of the ranks' gradients."""
    results = []
    for shape in ((WORLD,), (1, WORLD)):
        mesh = init_device_mesh("cpu", shape)
        whole = torch.arange(15.0).view(5, 3)
        placements: Any = [Shard(0)] if len(shape) == 1 else [Replicate(), Shard(0)]
        parameter = nn.Parameter(distribute_tensor(whole, mesh, placements))
        got = gathered(parameter)
        (got * (rank + 1)).sum().backward()
        assert isinstance(parameter.grad, DTensor) and parameter.grad.placements == parameter.placements
        results += [got.detach(), parameter.grad.full_tensor()]
    return results


def refusal(call: Callable[[Any], Any]) -> str:
    try:
        call(sharded(model_of("refused"), "refused"))
    except (TypeError, ValueError) as error:
        return str(error)
    return "no error"


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a head as it is": (
        lambda model: linear_entropy_topk(torch.zeros(2, model.config.hidden_size), model.lm_head.weight),
        r"weight: expected a plain torch.Tensor, got a DTensor; pass rmx_kernels.gathered\(parameter\)",
    ),
    "a pair as it is": (
        lambda model: linear_entropy_topk(
            torch.zeros(2, model.config.hidden_size),
            torch.zeros(model.config.vocab_size, model.config.hidden_size),
            lora=(torch.zeros(2, model.config.hidden_size), model.lm_head.weight, 1.0),
        ),
        "lora: B: expected a plain torch.Tensor, got a DTensor",
    ),
    "a decoder that the root gathers": (
        lambda model: token_logprobs(model, lm.tokens(2), check=False),
        "model: expected a decoder with full parameters .*in_forward",
    ),
}

# The tests.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(calls, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("case", LOSSES)
def test_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """In every parameter, in two steps, of which the second sees what the first has changed."""
    loss_of = of_hidden if case == "outside, by hand" else of_head
    expected = trained(copy.deepcopy(model_of(case)), lm.tokens(2 * WORLD), loss_of)
    for step, own in enumerate(expected):
        found = [rank[case][step] for rank in ranks]
        loss = torch.stack([rank.pop("loss") for rank in found]).mean()
        torch.testing.assert_close(loss, own.pop("loss"))
        for rank in found:
            assert rank.keys() == own.keys() and any("lm_head" in name or "embed" in name for name in own)
            for name, value in own.items():
                torch.testing.assert_close(rank[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gathered_means_the_gradients(ranks: list[dict[str, Any]]) -> None:
    """Of a number of rows that the ranks do not divide, and where a dimension of the mesh holds copies."""
    for rank in ranks:
        for whole, gradient in zip(*[iter(rank["uneven"])] * 2, strict=True):
            assert whole.equal(torch.arange(15.0).view(5, 3))
            assert gradient.equal(torch.full((5, 3), 1.5))
    plain = torch.ones(2)
    assert gathered(plain) is plain


@pytest.mark.parametrize("name", REFUSED)
def test_refused(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert re.search(REFUSED[name][1], rank["refused"][name]), rank["refused"][name]
