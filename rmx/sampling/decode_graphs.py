"""Decoding on a GPU by CUDA graphs: a step of hundreds of kernels is recorded once, and launched as one.

A recorded kernel reads and writes the same addresses at every replay. So keys and values stand in buffers
[B, heads, C, D] with room for C tokens, and the place of the next token is a number on the device. Attention sees the
first ``width`` columns, a multiple of 64, by an additive mask [B, 1, 1, width]: 0 where a token is, -inf where none is.
One graph serves the steps of one batch size and one width. A model of another kind decodes as on a CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from rmx.attention.decode import decoding
from rmx.models.cuda_graph import Graph, raise_full_memory
from rmx.models.forward import changing_rotation
from rmx.models.model import CausalLM
from rmx.progress import console

WIDTH = 64  # columns by which attention widens: narrower, and more graphs are recorded
SMALL = 1024  # tokens; up to here the buffers have room for all from the start
BOUNDED = ("window", "chunk", "local")  # in the names of settings by which a layer sees its last tokens alone
MARK = "_rmx_graphs"  # attribute of a model that was tried: whether its steps are replayed
ENDLESS = 1 << 62  # tokens


def rounded(tokens: int) -> int:
    """The next multiple of 64."""
    return -(-tokens // WIDTH) * WIDTH


def capacity(tokens: int, most: int) -> int:
    """Tokens that buffers have room for: all of ``most`` if they are few, else by doubling as ``tokens`` come."""
    room = SMALL
    while room < tokens:
        room *= 2
    return max(rounded(tokens), min(room, rounded(most)))


class _Layer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer, in buffers with room; a token goes where ``place`` [1] int64 says."""

    def __init__(self, place: Tensor) -> None:
        super().__init__()
        self.place, self.width, self.is_initialized = place, 0, True

    def take(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Copy [B, heads, L, D] into buffers with ``room`` >= L."""
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values = _into(keys, room), _into(values, room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def _into(states: Tensor, room: int) -> Tensor:
    """Zeros behind the tokens: what a mask hides is multiplied by 0, and may not be NaN."""
    made = states.new_zeros(*states.shape[:2], room, states.shape[-1])
    made[:, :, : states.shape[2]] = states
    return made


class Steps:
    """One model over completions under way, token by token; takes over the keys and values of their prompts.

    Args:
        cache: of the prompts, one row a completion; its layers are replaced.
        mask: [B, L] 1 where a prompt has a token. position: [B] of its last token. hidden: [B, H] there.
        most: tokens, with those of the prompt, that a completion may have; None: not known.
        within: entered for each forward pass that is not a replay.

    Attributes:
        hidden: [B, H] at the last token, of the model's dtype; the next step writes over it.
        captured: graphs so far.
        steady: whether the last step took as long as the next ones of this width will.
    """

    @torch.no_grad()
    def __init__(
        self,
        lm: CausalLM,
        cache: Cache,
        mask: Tensor,
        position: Tensor,
        hidden: Tensor,
        most: int | None,
        within: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.lm, self.cache, self.within = lm, cache, within
        self.length, self.most = mask.shape[1], ENDLESS if most is None else most
        self.place = torch.full((1,), self.length - 1, device=lm.device)
        self.position, self.hidden = position[:, None].clone(), hidden.clone()
        self.ids = torch.zeros_like(self.position)
        self.room = capacity(self.length + 1, self.most)
        for number, prompt in enumerate(cache.layers):
            layer = _Layer(self.place)
            layer.take(prompt.keys, prompt.values, self.room)
            cache.layers[number] = layer  # the prompt's keys and values are freed layer by layer
        self.mask = mask.new_full((mask.shape[0], self.room), float("-inf"), dtype=cache.layers[0].dtype)
        self.mask[:, : self.length].masked_fill_(mask.bool(), 0)
        self.captured, self.width, self.steady = 0, 0, False
        self._forget()

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Go on by one token a row, [B] int64; returns :attr:`hidden`."""
        self.length += 1
        if self.length > self.room:
            self._grow()
        if self.width != rounded(self.length):
            self.width, self.warm = rounded(self.length), False
            for layer in self.cache.layers:
                layer.width = self.width
        self.ids.copy_(tokens[:, None])
        recorded = self.graph is not None and self.graph_width == self.width
        self.steady = self.warm and (recorded or not replays(self.lm))
        if not replays(self.lm):
            self._step()
        elif not self.warm:
            Graph.first(self.lm.device, self._step)
        elif (recorded or self._capture()) and self.graph is not None:
            self.graph.replay()
        else:
            self._step()
        self.warm = True
        return self.hidden

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self._forget()
        for layer in self.cache.layers:
            layer.keep(rows)
        self.ids, self.mask, self.position, self.hidden = (
            x.index_select(0, rows) for x in (self.ids, self.mask, self.position, self.hidden)
        )

    def _forget(self) -> None:
        """Drop the graph, whose buffers go. A pool ends with its last graph, so the next one has another."""
        self.graph: Graph | None = None
        self.graph_width, self.warm, self.pool = 0, False, Graph.new_pool()

    def _grow(self) -> None:
        self._forget()
        self.room = capacity(self.length, self.most)
        for layer in self.cache.layers:
            layer.take(layer.keys, layer.values, self.room)
        seen = self.mask
        self.mask = seen.new_full((seen.shape[0], self.room), float("-inf"))
        self.mask[:, : seen.shape[1]] = seen

    def _step(self) -> None:
        """All that changes from step to step is on the device."""
        self.place += 1
        self.position += 1
        self.mask.index_fill_(1, self.place, 0)
        given = {"past_key_values": self.cache, "position_ids": self.position, "use_cache": True}
        with self.within(), decoding(self.lm.model):
            hidden = self.lm.hidden(self.ids, self.mask[:, None, None, : self.width], **given)
        self.hidden.copy_(hidden[:, -1])

    def _capture(self) -> bool:
        """Whether the step was recorded; the graph before it goes after that, so that its pool stays."""
        graph = Graph(self.lm.device, self.pool)
        try:
            graph.capture(self._step)
        except RuntimeError as fault:
            raise_full_memory(fault)
            _refuse(self.lm, str(fault))
            self._forget()
            return False
        self.graph, self.graph_width = graph, self.width
        self.captured += 1
        return True


def _refuse(lm: CausalLM, reason: str) -> None:
    setattr(lm.model, MARK, False)
    said = f"{type(lm.model).__name__}: decodes without CUDA graphs: {(reason.splitlines() or [''])[0]}"
    console.print(said, markup=False, highlight=False, soft_wrap=True)


def plain(lm: CausalLM) -> bool:
    """Whether a model attends by "sdpa" to all tokens before, has no experts, and has rotations that do not change.

    Routing to experts waits for the host, which cannot be recorded.
    """
    config = lm.model.config.get_text_config()
    settings = list(_settings(config.to_dict()))
    experts = any("expert" in key and type(value) is int and value > 1 for key, value in settings)
    kinds = getattr(config, "layer_types", None) or ["unknown"]
    bounded = set(kinds) != {"full_attention"} and any(
        value and any(word in key for word in BOUNDED) for key, value in settings
    )
    changing = changing_rotation(lm, ENDLESS) is not None
    together = all(p.device == lm.device for p in lm.model.parameters())
    return config._attn_implementation == "sdpa" and together and not (experts or bounded or changing)


def _settings(tree: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        yield str(key), value
        if isinstance(value, dict):
            yield from _settings(value)


class Reader(Protocol):
    """What reads tokens: :class:`rmx.sampling.engines.Decoder`."""

    hidden: Tensor

    def read(self, tokens: Tensor) -> None: ...


def replayed(lm: CausalLM, reader: Callable[[list[list[int]], bool], Reader]) -> bool:
    """Whether the steps of a model are replayed: on a GPU those of a :func:`plain` one, after a trial.

    The first time, a few steps are compared with those without graphs. A model whose states differ, or that cannot be
    recorded, is named.

    Args:
        reader: of prompts, with graphs or without.
    """
    if torch.is_grad_enabled() or not (lm.graphs and Graph.serves(lm.device)):  # a replay makes no gradients
        return False
    if MARK not in lm.model.__dict__:
        served = plain(lm)
        if served and (reason := _trial(lm, reader)):
            _refuse(lm, reason)
        lm.model.__dict__.setdefault(MARK, served)  # a capture of the trial may have failed
    return replays(lm)


def replays(lm: CausalLM) -> bool:
    """Whether no trial or capture has said otherwise."""
    return bool(lm.model.__dict__.get(MARK, True))


@torch.no_grad()
def _trial(lm: CausalLM, reader: Callable[[list[list[int]], bool], Reader]) -> str:
    """Why not, or nothing; of two prompts, one of them padded, and a plain step, a recorded one, and a replay."""
    V = lm.weight.shape[0]
    prompts = [[(5 * i + 3 * j + 1) % V for j in range(n)] for i, n in enumerate((3, 6))]
    states = []
    try:
        for graphs in (False, True):
            made = reader(prompts, graphs)
            for step in range(3):
                made.read(torch.tensor([(2 * step + 3) % V, (7 * step + 4) % V], device=lm.device))
            states.append(made.hidden.double())
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as fault:
        if isinstance(fault, RuntimeError):
            raise_full_memory(fault)
        return repr(fault)
    error = float((states[1] - states[0]).norm() / states[0].norm())
    limit = 1e-3 if lm.weight.dtype in (torch.float32, torch.float64) else 5e-2
    return "" if error < limit else f"its states would differ by {error:.1%}"
