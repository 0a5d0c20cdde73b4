"""Sequences end to end in one row, without padding: where each begins, and in which passes they go.

The model runs on ``input_ids`` [1, T] with positions that start anew in each sequence, ``use_cache=False`` and no mask.
What keeps sequences apart is the attention of :mod:`rmx.attention.packed`.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rmx.errors import RmxError

# What models hand to any attention function, and what changes nothing here.
HARMLESS = ["position_ids", "position_embeddings", "cache_position", "past_key_values", "use_cache", "is_causal"]
HARMLESS += ["output_attentions", "output_hidden_states", "output_router_logits", "return_dict"]
PADDING = 1.25  # at most this many padded tokens per token inside one group of sequences


class PackingError(RmxError):
    """The model cannot run on packed sequences."""


def sent(x: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for what it is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" and not x.is_cuda else x


@dataclass(frozen=True)
class Packing:
    """Sequences of ``lengths`` tokens end to end: T = sum(lengths) on ``device``."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def ends(self) -> Tensor:
        """[N + 1] int64 on the CPU: where each sequence starts, and T. This is what models hand to the attention."""
        return torch.tensor((0, *self.lengths)).cumsum(0)

    @cached_property
    def offsets(self) -> Tensor:
        """The ends as int32, on the device."""
        return sent(self.ends.to(torch.int32), self.device)

    @cached_property
    def position_ids(self) -> Tensor:
        """[1, T]: 0 .. length - 1 of each sequence."""
        return sent(torch.cat([torch.arange(n) for n in self.lengths])[None], self.device)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(B, L): B sequences of at most L tokens, similar in length; longest first."""
        return [(len(group), self.lengths[group[0]]) for group in self._members]

    @cached_property
    def gather(self) -> Tensor | None:
        """[S], S = sum of B * L: packed tokens to padded rows, group after group; None where they are that already.

        Padding repeats a sequence's last token: causal attention of real tokens never looks there.
        """
        if len(set(self.lengths)) == 1:
            return None
        starts = self.ends.tolist()
        rows = [
            starts[i] + torch.arange(L).clamp(max=self.lengths[i] - 1)
            for group, (_, L) in zip(self._members, self.groups, strict=True)
            for i in group
        ]
        return sent(torch.cat(rows), self.device)

    @cached_property
    def places(self) -> Tensor:
        """[T]: where each packed token is among the padded rows."""
        first: dict[int, int] = {}
        start = 0
        for group, (_, L) in zip(self._members, self.groups, strict=True):
            for i in group:
                first[i] = start
                start += L
        return sent(torch.cat([first[i] + torch.arange(n) for i, n in enumerate(self.lengths)]), self.device)

    @cached_property
    def _members(self) -> list[list[int]]:
        members: list[list[int]] = []
        for i in sorted(range(len(self.lengths)), key=lambda i: (-self.lengths[i], i)):
            group = [*(members[-1] if members else []), i]
            tokens = sum(self.lengths[j] for j in group)
            if members and self.lengths[group[0]] * len(group) <= PADDING * tokens:
                members[-1].append(i)
            else:
                members.append([i])
        return members


class Frame:
    """Room for sequences end to end in tensors that stay where they are, for work that is captured and repeated.

    All of ``tokens`` are always computed: those after the last sequence are one sequence more. What is left of
    ``count`` sequences is empty. No sequence is longer than ``longest``. The attributes are those of a Packing.
    """

    def __init__(self, tokens: int, count: int, longest: int, device: torch.device) -> None:
        self.tokens, self.count, self.longest, self.device = tokens, count, longest, device
        self._rows = torch.zeros(2, 1, tokens, dtype=torch.int64, device=device)
        self.ids, self.position_ids = self._rows
        self.offsets = torch.zeros(count + 1, dtype=torch.int32, device=device)
        self.read_on_host = False  # by an attention that cannot be captured

    def fill(self, sequences: Sequence[Sequence[int]]) -> None:
        """Put in other sequences, without waiting for the device."""
        lengths = [len(sequence) for sequence in sequences]
        if rest := self.tokens - sum(lengths):
            lengths.append(rest)
        if rest < 0 or len(lengths) > self.count or max(lengths) > self.longest:
            raise ValueError(f"{lengths} do not fit into {self.tokens} tokens of {self.count} x {self.longest}")
        rows = torch.zeros(2, 1, self.tokens, dtype=torch.int64)
        rows[0, 0, : self.tokens - rest] = torch.tensor([token for sequence in sequences for token in sequence])
        rows[1, 0] = torch.cat([torch.arange(n) for n in lengths])
        offsets = torch.full((self.count + 1,), self.tokens, dtype=torch.int32)
        offsets[: len(lengths)] = torch.tensor([0, *lengths[:-1]]).cumsum(0)
        for own, new in ((self._rows, rows), (self.offsets, offsets)):
            own.copy_(new.pin_memory() if self.device.type == "cuda" else new, non_blocking=True)

    @property
    def ends(self) -> Tensor:
        return self._now.ends

    @property
    def groups(self) -> list[tuple[int, int]]:
        return self._now.groups

    @property
    def gather(self) -> Tensor | None:
        return self._now.gather

    @property
    def places(self) -> Tensor:
        return self._now.places

    @property
    def _now(self) -> Packing:
        self.read_on_host = True
        return packing_of(tuple(n for n in self.offsets.diff().tolist() if n), self.device)


@functools.lru_cache(maxsize=8)
def packing_of(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """The last few are kept, with what was sent to the device."""
    return Packing(lengths, device)


@contextmanager
def attention_function(model: PreTrainedModel, name: str, instead_of: str | None = None) -> Iterator[None]:
    """Inside, the model's attention is transformers' function ``name``, where it is ``instead_of`` or that is None."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    text = model.config.get_text_config()
    configs[id(text)] = text
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for key, config in configs.items():
            if instead_of is None or before[key] == instead_of:
                config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


def pack(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in groups of at most ``token_budget`` tokens (a longer sequence goes alone), best fit, longest first."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [g for g, left in enumerate(room) if left >= lengths[i]]
        if fitting:
            g = min(fitting, key=lambda g: room[g])
            groups[g].append(i)
            room[g] -= lengths[i]
        else:
            groups.append([i])
            room.append(token_budget - lengths[i])
    return groups
