"""Forward passes of a decoder over sequences end to end: all its layers, or from a later layer on."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmx.attention.packed import packed
from rmx.attention.packing import Frame, PackingError, pack, packing_of, sent
from rmx.config import TrainConfig
from rmx.fused.layers import fused
from rmx.models.model import CausalLM, batches, embedded_leaves, pad, text_decoder
from rmx_kernels import native
from rmx_kernels.dispatch import INTERPRETED


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """(path from the model, the list of its decoder layers).

    Raises:
        PackingError: the model keeps no such list.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    inside = {id(module) for module in text_decoder(model).modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return name, module
    raise PackingError(f"{type(model).__name__} has no list of {count} decoder layers; set lora.first_layer=0")


def final_hidden(
    lm: CausalLM, sequences: Sequence[Sequence[int]], first_layer: int = 0, entry: Tensor | None = None
) -> Tensor:
    """Final hidden states [T, H] of the tokens of ``sequences``, end to end; differentiable.

    Args:
        first_layer, entry: states [T, H] that enter the layer ``first_layer``; the layers below are not visited.
    """
    if first_layer == 0:
        return _run(lm, sequences)
    assert entry is not None
    with _starting_at(lm, first_layer, entry if lm.packing else _pad_rows(entry, sequences)):
        return _run(lm, sequences)


def frame_hidden(lm: CausalLM, frame: Frame, first_layer: int = 0, entry: Tensor | None = None) -> Tensor:
    """The same of all tokens of a frame, [T, H]; reads nothing on the host."""
    starting = nullcontext() if entry is None else _starting_at(lm, first_layer, entry)
    with starting, packed(lm.model):
        given = {"position_ids": frame.position_ids, "packing": frame}
        return lm.hidden(frame.ids, use_cache=False, **given).squeeze(0)


def all_states(lm: CausalLM, sequences: Sequence[Sequence[int]], layer: int = 0) -> tuple[Tensor, Tensor | None]:
    """(final hidden states [T, H], the states [T, H] that enter ``layer`` or None for layer 0)."""
    if layer == 0:
        return _run(lm, sequences), None
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = decoder_layers(lm.model)[1][layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        hidden = _run(lm, sequences)
    finally:
        handle.remove()
    (states,) = seen
    return hidden, states[0] if lm.packing else _unpad(states, sequences)


def passes(lm: CausalLM, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of the sequences of each forward pass of at most ``token_budget`` tokens, padding included."""
    return pack(lengths, token_budget) if lm.packing else batches(lengths, token_budget)


@torch.no_grad()
def check(lm: CausalLM, first_layer: int = 0) -> None:
    """Whether sequences of a pass keep apart, and a start at ``first_layer`` gives the bits of all layers.

    On a few tokens: the states of packed sequences are those of the same sequences alone; no gradient of a sequence's
    states reaches another one, exactly, so that neither small weights nor rounding hide a leak; and another first
    sequence leaves the bits of the others. A model that passed is not asked again.

    Raises:
        PackingError: they do not: tokens of one sequence reach another, or layers hand on more than hidden states.
    """
    passed: set[tuple[bool, int]] = lm.model.__dict__.setdefault("_rmx_passed", set())
    if (lm.packing, first_layer) in passed:
        return
    try:
        _check_apart(lm)
        if first_layer:
            _check_start(lm, first_layer)
    except PackingError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as fault:
        hint = "set model.packing=false" if lm.packing else "set lora.first_layer=0"
        raise PackingError(f"{type(lm.model).__name__}: cannot run this way ({fault!r}); {hint}") from fault
    passed.add((lm.packing, first_layer))


def _check_apart(lm: CausalLM) -> None:
    name = type(lm.model).__name__
    form = f"{name}: {'packed' if lm.packing else 'padded'} sequences give hidden states that"
    hint = "set model.packing=false" if lm.packing else "rmx cannot train it in batches"
    probe = _probe(lm, (5, 9, 3, 9))
    together = _run(lm, probe)
    alone = torch.cat([lm.hidden(torch.tensor([ids], device=lm.device), use_cache=False)[0] for ids in probe])
    # float32 rounds at 1e-7, bfloat16 at 4e-3 a layer; a leak moves the states by their own size
    limit = 1e-3 if together.dtype in (torch.float32, torch.float64) else 5e-2
    error = float((together.float() - alone.float()).norm() / alone.float().norm())
    if not error < limit:
        raise PackingError(f"{form} differ by {error:.1%} from those of the same sequences alone; {hint}")
    for chosen in (0, len(probe) - 1):
        if _reaches_others(lm, probe, chosen):
            kinds = getattr(lm.model.config.get_text_config(), "layer_types", None) or []
            others = sorted({kind for kind in kinds if "attention" not in kind or "linear" in kind})
            what = ", ".join(others) or "recurrence, convolution or attention of its own"
            raise PackingError(f"{form} depend on other sequences in the batch ({what}); {hint}")
    if not lm.packing:
        return
    if "position_ids" not in inspect.signature(text_decoder(lm.model).forward).parameters:
        raise PackingError(f"{name} takes no position_ids, so it counts positions across sequences; {hint}")
    first = len(probe[0])
    changed = [(token + 1) % lm.weight.shape[0] for token in probe[0]]
    after, before = _run(lm, [changed, *probe[1:]])[first:].float(), together[first:].float()
    # experts multiply as many rows as tokens chose them, which moves the last bits
    if not (after.equal(before) or (_has_experts(lm) and (after - before).norm() < limit * before.norm())):
        raise PackingError(f"{form} change when the sequence before them changes; {hint}")


def _check_start(lm: CausalLM, first_layer: int) -> None:
    """Of equal length: padding that takes part in nothing is still counted by experts, which moves the last bits."""
    probe = _probe(lm, (9, 9, 9))
    together, entry = all_states(lm, probe, first_layer)
    error = float((final_hidden(lm, probe, first_layer, entry).float() - together.float()).abs().max())
    if error != 0.0:
        raise PackingError(
            f"{type(lm.model).__name__}: a forward pass that starts at layer {first_layer} differs from the whole "
            f"by {error:g}: its layers pass on more than hidden states; set lora.first_layer=0"
        )


def _probe(lm: CausalLM, lengths: Sequence[int]) -> list[list[int]]:
    return [[(7 * i + 3 * j + 1) % lm.weight.shape[0] for j in range(n)] for i, n in enumerate(lengths)]


def _reaches_others(lm: CausalLM, sequences: Sequence[Sequence[int]], chosen: int) -> bool:
    """Whether the states of the sequence ``chosen`` have a gradient with respect to the tokens of another."""
    with torch.enable_grad(), embedded_leaves(lm.model) as embedded:
        states = _run(lm, sequences).split([len(ids) for ids in sequences])[chosen]
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states)
        (gradient,) = torch.autograd.grad((100 * weights * states).sum(), embedded[:1])
    gradient = gradient.nan_to_num()  # 0 times infinity, by roots of 0: then the bits below decide
    rows = gradient[0] if lm.packing else _unpad(gradient, sequences)
    parts = rows.split([len(ids) for ids in sequences])
    return any(bool(part.any()) for i, part in enumerate(parts) if i != chosen)


def _has_experts(lm: CausalLM) -> bool:
    return any("expert" in type(m).__name__.lower() or "moe" in type(m).__name__.lower() for m in lm.model.modules())


def _run(lm: CausalLM, sequences: Sequence[Sequence[int]]) -> Tensor:
    _check_rotation(lm, sequences)
    if not lm.packing:
        ids, mask = pad(sequences, lm.device)
        return _unpad(lm.hidden(ids, mask, use_cache=False), sequences)
    packing = packing_of(tuple(map(len, sequences)), lm.device)
    ids = sent(torch.tensor([[token for sequence in sequences for token in sequence]]), lm.device)
    with packed(lm.model):
        hidden = lm.hidden(ids, position_ids=packing.position_ids, use_cache=False, packing=packing.ends)
        return hidden.squeeze(0)  # the gradient of [0] would be a copy


def changing_rotation(lm: CausalLM, longest: int) -> tuple[str, int] | None:
    """(kind, limit) of a rotary embedding that a sequence of ``longest`` tokens changes for its whole pass."""
    config = lm.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    for own in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        limit = own.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if own.get("rope_type") in ("longrope", "dynamic") and limit and longest > limit:
            return own["rope_type"], limit
    return None


def _check_rotation(lm: CausalLM, sequences: Sequence[Sequence[int]]) -> None:
    """Neighbours would change each other."""
    longest = max(map(len, sequences))
    if len(sequences) > 1 and (found := changing_rotation(lm, longest)):
        raise PackingError(
            f"{type(lm.model).__name__}: its rotary embedding ({found[0]}) changes for all sequences of a "
            f"pass if one has more than {found[1]} tokens, and one has {longest}: set score.token_budget=1 and "
            "train.token_budget=1 (one sequence a pass), or shorten with select.max_completion_tokens"
        )


def _unpad(states: Tensor, sequences: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([states[i, : len(ids)] for i, ids in enumerate(sequences)])


def _pad_rows(states: Tensor, sequences: Sequence[Sequence[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence(states.split([len(ids) for ids in sequences]), batch_first=True)


class _Below(nn.Module):
    """Stands for a layer that is not visited: hands on ``states``, or what it is given."""

    def __init__(self, layer: nn.Module, states: Tensor | None) -> None:
        super().__init__()
        self.states = states
        if hasattr(layer, "attention_type"):  # by which some models choose the layer's mask
            self.attention_type = layer.attention_type

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states if self.states is None else self.states


@contextmanager
def _starting_at(lm: CausalLM, first: int, states: Tensor) -> Iterator[None]:
    layers = decoder_layers(lm.model)[1]
    below = list(layers[:first])
    shaped = states if states.dim() == 3 else states[None]
    try:
        for i, layer in enumerate(below):
            layers[i] = _Below(layer, shaped if i == first - 1 else None)
        yield
    finally:
        for i, layer in enumerate(below):
            layers[i] = layer


@contextmanager
def layer_options(lm: CausalLM, config: TrainConfig) -> Iterator[None]:
    """Inside, the decoder layers run as ``activation_checkpointing`` and ``compile`` say; dropout stays off.

    On a GPU, and on a CPU in float32, layers that are not compiled run their element-wise work fused. Backward passes
    belong inside too: layers that run again there need the attention of packed sequences.
    """
    if not (config.activation_checkpointing or config.compile):
        with _fused(lm.model):
            yield
        return
    layers = decoder_layers(lm.model)[1]
    dropouts = [(layer, name) for layer in layers for name, value in vars(layer).items() if _is_dropout(name, value)]
    before = [getattr(*place) for place in dropouts]
    try:
        for place in dropouts:
            setattr(*place, 0.0)
        if config.activation_checkpointing:
            _checkpointing(lm.model, "enable")({"use_reentrant": False})
            for layer in layers:  # what transformers asks of a layer; its parts stay in evaluation mode
                layer.training = True
                if config.activation_checkpointing == "offload":
                    vars(layer)["_gradient_checkpointing_func"] = _offloaded(layer)
        if config.compile:
            for layer in layers:
                layer._compiled_call_impl = _compiled(layer)
        with packed(lm.model) if lm.packing else nullcontext(), nullcontext() if config.compile else _fused(lm.model):
            yield
    finally:
        if config.activation_checkpointing:
            _checkpointing(lm.model, "disable")()
        for layer in layers:
            layer.training = False
            layer._compiled_call_impl = None
        for place, value in zip(dropouts, before, strict=True):
            setattr(*place, value)


def _checkpointing(model: PreTrainedModel, way: str) -> Callable[..., None]:
    """transformers' switch; versions before 5.23 know it by its older name alone."""
    found: Callable[..., None] | None = getattr(model, f"activation_checkpointing_{way}", None)
    return found or getattr(model, f"gradient_checkpointing_{way}")


def _offloaded(layer: nn.Module) -> Callable[..., Any]:
    """The checkpoint of ``layer`` with its inputs in the host's memory, pinned for a GPU, until the backward pass."""
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if not callable(checkpoint):
        raise PackingError(
            f"{type(layer).__name__} cannot checkpoint its own activations: set train.activation_checkpointing=true"
        )

    def run(function: Callable[..., Any], *inputs: Any) -> Any:
        # of all that the layer computes the checkpoint keeps nothing, so that its inputs alone are saved here
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(function, *inputs)

    return run


def _fused(model: PreTrainedModel) -> AbstractContextManager[Any]:
    on_cpu = model.device.type == "cpu" and model.dtype == torch.float32 and not (native.missing() or INTERPRETED)
    return fused(model) if on_cpu or model.device.type == "cuda" else nullcontext()


def _compiled(layer: nn.Module) -> Callable[..., Any]:
    """Calls of ``layer`` compiled once for all layers of its kind and any number of tokens.

    The states that enter the lowest layer have no gradient; they are told to want one, or a second form would be
    compiled for that layer alone.
    """
    run = torch.compile(layer._call_impl, dynamic=True)

    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not hidden_states.requires_grad:
            hidden_states = hidden_states.detach().requires_grad_()
        return run(hidden_states, *args, **kwargs)

    return call


def _is_dropout(name: str, value: Any) -> bool:
    return "drop" in name and isinstance(value, float)
