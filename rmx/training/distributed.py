"""Data parallel training under torchrun: each process takes a share of every step's sequences, gradients are added."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a process alone needs neither
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import nn


@dataclass(frozen=True)
class Group:
    """The processes of a training; ``ALONE`` is the group of one."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints messages."""
        return self.rank == 0

    def share(self, items: Sequence[int]) -> list[int]:
        """Every size-th item, so that shares differ by at most one."""
        return list(items[self.rank :: self.size])

    def sum_gradients(self, parameters: "Sequence[nn.Parameter]") -> None:
        """Replace each gradient by the sum over processes: that of one process at the same global batch."""
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def sum(self, values: "np.ndarray") -> "np.ndarray":
        """The elementwise sum over processes."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        return _reduced(torch.from_numpy(values), dist.ReduceOp.SUM).numpy()

    def largest(self, value: int) -> int:
        """The maximum over processes."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX))

    def wait(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()


def _reduced(values: "torch.Tensor", op: "dist.ReduceOp.RedOpType") -> "torch.Tensor":
    """On the CPU; by way of the device that the backend works on."""
    import torch.distributed as dist

    there = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(there, op=op)
    return there.cpu()


ALONE = Group()


@contextmanager
def processes() -> Iterator[Group]:
    """The group that torchrun started this process in (NCCL on GPUs, else gloo), or :data:`ALONE`."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Group(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()
