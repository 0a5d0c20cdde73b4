"""Training passes as CUDA graphs: the kernels of a forward or a backward pass in one launch.

A pass of a model with 28 layers is some 2000 kernels, which a host launches one by one more slowly than a GPU computes
them. Captured once, they are replayed together, on tensors that stay where they are. So passes are padded to one of a
few sizes, chosen for the whole training, and what they read is copied into the frame of their size. The first pass of
a size runs plainly, which readies all that must not happen while a graph is captured; the second is captured. The loss
between the two directions is not: its rows differ from pass to pass.
"""

import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from rmx.attention.packing import Frame
from rmx.config import TrainConfig
from rmx.models import forward
from rmx.models.cuda_graph import Graph, raise_full_memory
from rmx.models.lora_layers import Adapter, LoraEmbedding, LoraLayer
from rmx.models.model import CausalLM
from rmx.models.quantization import is_quantized
from rmx.progress import console

MULTIPLE = 64  # of a size, in tokens
TRIES = 2  # captures that may fail: what a library does once, on its first calls, cannot be captured
PREPARATION = 2.0  # what a size costs once, in passes of that size: its plain pass is slower, and it is captured


def chosen_sizes(tokens: Sequence[int]) -> list[int]:
    """The sizes to which passes of so many tokens are padded, ascending, so that their time in all is least.

    That time is counted in tokens: a size costs itself for each of its passes and :data:`PREPARATION` times once.
    """
    needed = Counter(-(-n // MULTIPLE) * MULTIPLE for n in tokens)
    ends = sorted(needed)
    before = [0, *itertools.accumulate(needed[size] for size in ends)]  # passes
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # of the first so many ends
    for last, size in enumerate(ends):
        costs = ((best[i][0] + size * (before[last + 1] - before[i] + PREPARATION), i) for i in range(last + 1))
        cost, i = min(costs)
        best.append((cost, [*best[i][1], size]))
    return best[-1][1]


class Passes:
    """:func:`rmx.models.forward.final_hidden` of one training, replayed where it can be.

    The adapter's layers must work on the same copies of their weights in each pass, and add the gradients of these to
    the same sums, as :meth:`rmx.models.lora_layers.Masters.lent` does.
    """

    def __init__(
        self, lm: CausalLM, adapter: Adapter, config: TrainConfig, passes: Iterable[Sequence[int]] | None = None
    ) -> None:
        """``passes``: the lengths of the sequences of each pass of the training."""
        self.lm, self.first = lm, adapter.config.first_layer
        self.layer = next(iter(adapter.layers.values()))
        self.on = capturable(lm, adapter, config)
        known = [lengths for lengths in passes or () if lengths] if self.on else []
        self.chosen = chosen_sizes([sum(lengths) for lengths in known])
        self.count = 1 + max(map(len, known), default=0)  # and what is left of a size
        self.longest = max((n for lengths in known for n in lengths), default=0)
        self.sizes: dict[int, _Size] = {}
        self.pool: Any = None
        self.faults = 0

    def final_hidden(
        self, lm: CausalLM, sequences: Sequence[Sequence[int]], first_layer: int = 0, entry: Tensor | None = None
    ) -> Tensor:
        """As :func:`rmx.models.forward.final_hidden`; the result is overwritten by the next pass."""
        tokens = sum(map(len, sequences))
        size = self._size(tokens)
        if size is None:
            return forward.final_hidden(lm, sequences, first_layer, entry)
        size.fill(sequences, entry)
        if not size.ran:
            size.ran = True
            states = size.states_of(lm, first_layer)
            self.on = not size.frame.read_on_host
        elif size.forward is not None or self._captured(size):
            states = _Replayed.apply(self.layer.wants, size)
        else:
            states = size.states_of(lm, first_layer)
        return states[:tokens]

    def close(self) -> bool:
        """Let all graphs and their memory go, for good; whether there were any."""
        had = self.on and bool(self.sizes)
        self.on, self.pool = False, None
        self.sizes.clear()
        return had

    def _size(self, tokens: int) -> "_Size | None":
        place = bisect.bisect_left(self.chosen, tokens)
        if not self.on or place == len(self.chosen):
            return None
        found = self.chosen[place]
        if found not in self.sizes:
            # what is left behind the sequences is less than the way to the size below
            rest = found - (self.chosen[place - 1] if place else 0)
            self.sizes[found] = _Size(Frame(found, self.count, max(self.longest, rest), self.lm.device))
        return self.sizes[found]

    def _captured(self, size: "_Size") -> bool:
        if self.pool is None:
            self.pool = Graph.new_pool()
        try:
            size.capture(self.lm, self.first, self.layer, self.pool)
        except RuntimeError as fault:
            raise_full_memory(fault)
            self.faults += 1
            self.pool = None  # which ended with the graph that failed, unless it has others
            if self.faults == TRIES:
                self.close()
                said = f"train: goes on without CUDA graphs: {(str(fault).splitlines() or [''])[0]}"
                console.print(said, markup=False, highlight=False, soft_wrap=True)
            return False
        return True


def capturable(lm: CausalLM, adapter: Adapter, config: TrainConfig) -> bool:
    """Whether a pass launches the same kernels on the same tensors each time, and its copies of weights stay."""
    if lm.device.type != "cuda" or not (lm.graphs and lm.packing) or adapter.config.dropout:
        return False
    if config.compile or config.activation_checkpointing:
        return False
    layers = adapter.layers.values()
    if any(isinstance(layer, LoraEmbedding) for layer in layers) or all(layer.at_end for layer in layers):
        return False  # how the gradient of a lookup is made depends on the tokens; of the head alone, no pass has one
    return not any(is_quantized(layer.base) for layer in layers)


class _Size:
    """The passes of one size: where they read and write, and their two graphs."""

    def __init__(self, frame: Frame) -> None:
        self.frame, self.ran = frame, False
        self.entry: Tensor | None = None  # [T, H], the states that enter the first layer that is visited
        self.states: Tensor | None = None  # [T, H]
        self.upstream: Tensor | None = None  # [T, H], the gradient of the states
        self.forward: Graph | None = None
        self.backward: Graph | None = None

    def fill(self, sequences: Sequence[Sequence[int]], entry: Tensor | None) -> None:
        self.frame.fill(sequences)
        if entry is not None:
            if self.entry is None:
                self.entry = entry.new_zeros(self.frame.tokens, entry.shape[1])
            self.entry[: len(entry)].copy_(entry)  # those behind are finite, and no row of the loss looks there

    def states_of(self, lm: CausalLM, first_layer: int) -> Tensor:
        return forward.frame_hidden(lm, self.frame, first_layer, self.entry)

    def capture(self, lm: CausalLM, first_layer: int, layer: LoraLayer, pool: Any) -> None:
        """``layer``: any that is adapted; all of them share the leaf of a pass."""
        ahead, back = Graph(lm.device, pool), Graph(lm.device, pool)
        self.upstream = lm.weight.new_zeros(self.frame.tokens, lm.weight.shape[1])

        def there() -> None:
            with torch.enable_grad():
                self.states = self.states_of(lm, first_layer)

        def and_back() -> None:
            assert self.states is not None and layer.wants is not None
            torch.autograd.grad(self.states, layer.wants, self.upstream, allow_unused=True)

        try:
            ahead.capture(there)
            back.capture(and_back)
        finally:
            if self.states is not None:
                self.states = self.states.detach()  # what the backward pass read is free for other sizes
        self.forward, self.backward = ahead, back


class _Replayed(torch.autograd.Function):
    """The states [T, H] of a size; their gradient goes into the sums of the adapter's layers."""

    @staticmethod
    def forward(ctx: Any, wants: Tensor, size: _Size) -> Tensor:
        assert size.forward is not None
        size.forward.replay()
        assert size.states is not None
        ctx.size = size
        return size.states.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        size: _Size = ctx.size
        assert size.upstream is not None and size.backward is not None
        size.upstream.copy_(gradient)
        size.backward.replay()
        return None, None
