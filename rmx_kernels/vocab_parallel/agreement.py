"""The door of a call that all ranks of a group make together: either each of them passes, or each raises."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rmx_kernels import checks
from rmx_kernels.dispatch import BackendUnavailable
from rmx_kernels.vocab_parallel.merge import gather

# What is compared, by the argument that it belongs to. All of it travels as float64.
ALIKE = (
    "operator",
    "hidden.dtype",
    "hidden rows",
    "hidden.shape[-1]",
    "hidden.requires_grad",
    "reduce_hidden_grad",
    "k",
    "bias given",
    "temperature",
    "softcap",
    "lora rank",
    "lora scale",
    "lora A.requires_grad",
    "target given",
    "lowest target",
    "highest target",
    "rows with ce_weight",
    "rows with kl_weight",
    "values of hidden, by a checksum",
    "values of base_hidden, by a checksum",
    "values of target, by a checksum",
    "values of temperature, by a checksum",
    "values of ce_weight, by a checksum",
    "values of kl_weight, by a checksum",
    "values of lora A, by a checksum",
)
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 20  # values at a time, so that the check needs little memory
SIZE = ("start", "rows of weight")
MAX_VOCAB = 2**31 - 1  # ids travel as int32
UNKNOWN = -1  # a first row that follows from the other ranks' shards
Claim = dict[str, float]  # of ALIKE, those that are not 0, and SIZE


def membership(group: object) -> int:
    """The number of ranks in the group, which this process has to be one of."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: expected torch.distributed to be initialised (init_process_group), it is not")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group: expected a group that this process is a member of, got one that it is not in")
        raise TypeError(f"group: expected a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected a group that this process is a member of, got one that it is not in")
    return dist.get_world_size(group)


def targets_of(target: Tensor | None, used: Tensor | None = None) -> Claim:
    """The lowest and the highest id in the rows that are used."""
    if target is None:
        return {}
    ids = target if used is None else target[used]
    lowest, highest = (0, 0) if ids.numel() == 0 else torch.stack(torch.aminmax(ids)).tolist()
    return {"target given": 1, "lowest target": lowest, "highest target": highest}


def values_of(name: str, x: Tensor) -> Claim:
    """A checksum of the bits of all values and their places, exact in float64."""
    flat = x.detach().contiguous().flatten()
    bits = flat.view(WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long() & 0xFFFFFFFF
        if flat.element_size() == 8:
            part = part ^ (bits[start : start + CHUNK] >> 32)
        place = torch.arange(start, start + len(part), device=x.device)
        total += ((part + 1) * (place * 2654435761 % 4294967291 | 1) ^ (part >> 7)).sum()  # overflows wrap around
    return {f"values of {name}, by a checksum": float(int(total) % 2**53)}


def agree(local: Callable[[], Claim], group: dist.ProcessGroup | None) -> int:
    """Run this rank's own checks, compare what comes of them with the other ranks, and return the id of its first row.

    Raises on every rank, if on any: its own error where a rank has one, and a ValueError that tells it elsewhere; or
    one that names the argument and what came from each rank. Each rank sends 28 numbers of 8 bytes.
    """
    error: Exception | None = None
    claim: Claim = {}
    try:
        claim = local()
    except (TypeError, ValueError, BackendUnavailable) as caught:
        error = caught
    numbers = [0.0 if error is None else 1.0, *(float(claim.get(name, 0)) for name in (*ALIKE, *SIZE))]
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    table = gather(torch.tensor(numbers, dtype=torch.float64, device=device), group).tolist()
    if any(row[0] for row in table):
        said: list[str | None] = [None] * len(table)
        dist.all_gather_object(said, None if error is None else str(error), group=group)
        if error is not None:
            raise error
        raise ValueError("; ".join(f"rank {rank}: {message}" for rank, message in enumerate(said) if message))
    for column, name in enumerate(ALIKE, start=1):
        values = [row[column] for row in table]
        if any(value != values[0] for value in values):
            shown = (str(checks.FLOATS[int(v)]) if name == "hidden.dtype" else f"{v:.17g}" for v in values)
            came = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(shown))
            raise ValueError(f"{name}: expected the same on every rank, got {came}")
    starts = _covered([(int(start), int(rows)) for *_, start, rows in table])
    V = starts.pop()
    checks.top_k(int(claim["k"]), V)
    for name in ("lowest target", "highest target"):
        if not 0 <= claim.get(name, 0) < V:
            raise ValueError(f"target: expected ids in [0, {V}), got {int(claim[name])}")
    return starts[dist.get_rank(group)]


def _covered(shards: list[tuple[int, int]]) -> list[int]:
    """Where shards (first row, or UNKNOWN; rows) begin that follow each other, and the size of the vocabulary."""
    starts = [0]
    for start, rows in shards:
        if start not in (starts[-1], UNKNOWN):
            came = ", ".join(f"[{s}, {s + n}) on rank {rank}" for rank, (s, n) in enumerate(shards))
            raise ValueError(f"start: expected consecutive rows in rank order, from row 0, got {came}")
        starts.append(starts[-1] + rows)
    return starts


def shard_start(start: object, rows: int, known_by_others: bool) -> None:
    if start is None and known_by_others:
        return
    if isinstance(start, bool) or not isinstance(start, int):
        raise TypeError(f"start: expected an int, got {type(start).__name__}")
    if not 0 <= start <= MAX_VOCAB - rows:
        raise ValueError(f"start: expected the first id of {rows} rows below {MAX_VOCAB}, got {start}")


def gradient_of(name: str, x: Tensor) -> Claim:
    """Whether its gradient will be summed over ranks, which all of them have to take part in."""
    return {f"{name}.requires_grad": float(torch.is_grad_enabled() and x.requires_grad)}
