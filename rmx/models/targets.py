"""Which layers an adapter is on, and whether PEFT finds the same ones by its settings."""

import inspect
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rmx.config import LoraConfig
from rmx.errors import RmxError
from rmx.layer_patterns import unmatched
from rmx.models.forward import decoder_layers
from rmx.models.model import text_decoder
from rmx.models.quantization import is_quantized

# Of PEFT's Mamba rule, tuners_utils.py of 0.21: it adapts none of these layers in models of these types.
STATE_SPACE, NOT_THERE = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"), ("out_proj", "conv1d")
# Names that PEFT 0.21 takes for the experts of models whose experts are one tensor.
OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
ALL = "all-linear"  # among the targets, as PEFT spells it
WHOLE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # dtypes of weights that are not quantised


class AdapterError(RmxError):
    """The adapter does not fit the model, cannot be read, or is not worth saving."""


def matching(model: PreTrainedModel, config: LoraConfig) -> dict[str, nn.Linear | nn.Embedding]:
    """Each layer whose last name (or dotted end) is in ``config.targets``, from ``first_layer`` on, by its path.

    Layers are linear ones, the output head among them, and the input embedding.

    Raises:
        AdapterError: a target names no layer, one of another kind or one that is adapted already; the input embedding,
            where layers are left out, or the head, where there is dropout; the model has no layer ``first_layer``; a
            pattern matches none of the layers.
    """
    below = ""
    if config.first_layer:
        path, stack = decoder_layers(model)
        if config.first_layer >= len(stack):
            raise AdapterError(f"lora.first_layer={config.first_layer}: the model has layers 0 to {len(stack) - 1}")
        below = rf"{re.escape(path)}\.({'|'.join(map(str, range(config.first_layer)))})\."
    found: dict[str, nn.Module] = {}
    # the text decoder and the head: vision or audio towers are not trained on text
    inside = {id(m) for m in text_decoder(model).modules()} | {id(model.get_output_embeddings())}
    modules = {n: m for n, m in model.named_modules() if id(m) in inside}
    for target in config.targets:
        if target == ALL:
            found |= _all_linear(model, modules)
            continue
        matches = {n: m for n, m in modules.items() if n == target or n.endswith(f".{target}")}
        if not matches:
            fit = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) or m is model.get_input_embeddings()}
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in fit}))
            raise AdapterError(f"lora.targets: {target!r} matches no layer; this model's layers: {known}")
        found |= matches
    layers: dict[str, nn.Linear | nn.Embedding] = {}
    for name, module in modules.items():  # the order of the model, whatever that of the targets
        if name not in found or (below and re.match(below, name)):
            continue
        why = _other_kind(model, module, config)
        if why or not isinstance(module, nn.Linear | nn.Embedding):
            raise AdapterError(f"lora.targets: {name} {why}")
        if not (module.weight.dtype in WHOLE or is_quantized(module)):
            raise AdapterError(
                f"lora.targets: {name} is a {type(module).__name__} with weights in {module.weight.dtype}, which "
                "cannot be trained here: use the model without that quantisation, or model.quantization=nf4"
            )
        if why := _unfit(model, name):
            raise AdapterError(f"lora.targets: {name} {why}; leave it out of the targets")
        layers[name] = module
    _check_patterns(config, list(layers))
    return layers


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the input embedding and the head are one weight."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(end, "weight", None) for end in ends)
    return first is not None and first is last


def size(module: nn.Linear | nn.Embedding) -> int:
    """Numbers in a pair A, B of rank 1."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings + module.embedding_dim
    return module.in_features + module.out_features


def _other_kind(model: PreTrainedModel, module: nn.Module, config: LoraConfig) -> str:
    """Why a layer that is no linear one, or is the head, cannot be adapted; empty where it can."""
    if isinstance(module, nn.Linear):
        if config.dropout and module is model.get_output_embeddings():
            return "is the output head; dropout is not supported there: set lora.dropout=0 or leave it out"
        return ""
    if module is not model.get_input_embeddings() or not isinstance(module, nn.Embedding):
        return f"is a {type(module).__name__}, not a plain linear layer or the input embedding"
    if type(module).forward is not nn.Embedding.forward or module.max_norm is not None:
        return f"is a {type(module).__name__}, which does more than look up a row: leave it out of the targets"
    if config.first_layer:
        return f"comes before the layers that lora.first_layer={config.first_layer} skips: set it to 0"
    return ""


def _check_patterns(config: LoraConfig, names: list[str]) -> None:
    """Each pattern is of some adapted layer."""
    for setting in ("rank_pattern", "alpha_pattern"):
        if (lost := unmatched(getattr(config, setting), names)) is not None:
            near = min(names, key=lambda name: -SequenceMatcher(None, lost, name[-len(lost) :]).ratio(), default="none")
            raise AdapterError(f"lora.{setting}: {lost!r} matches no adapted layer; the nearest one is {near}")


def _all_linear(model: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Every linear layer on which an adapter acts and is what PEFT loads, but for the output head."""
    head = model.get_output_embeddings()
    linear = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) and m is not head}
    return {n: m for n, m in linear.items() if not _unfit(model, n)}


def _unfit(model: PreTrainedModel, name: str) -> str:
    """Why an adapter on this layer would not act, or not be what PEFT loads; empty where it would."""
    path, _, last = name.rpartition(".")
    parent, kind = model.get_submodule(path), model.config.get_text_config().model_type
    if kind in STATE_SPACE and last in NOT_THERE:
        return f"is a layer that PEFT does not adapt in models of type {kind}"
    if last in OF_EXPERTS and any(p.dim() == 3 and "experts." in n for n, p in model.named_parameters()):
        return "has the name of an expert layer; the experts here are one tensor, and PEFT would adapt that instead"
    try:
        source = inspect.getsource(type(parent))
    except (OSError, TypeError):  # a class that was made at run time
        return ""
    reads = re.search(rf"self\.{re.escape(last)}\.weight\b(?!\.(dtype|device))", source)
    # A state space may call a layer on one device and read its weight on another.
    if reads and (hasattr(parent, "A_log") or f"self.{last}(" not in source):
        return f"is not called by {type(parent).__name__}, which only reads its weight: an adapter would have no effect"
    return ""


def spelled_for_peft(model: PreTrainedModel, config: LoraConfig, names: list[str]) -> dict[str, Any]:
    """The adapted layers for PEFT: by the targets, or by whole names where the targets mean other layers there.

    Raises:
        AdapterError: neither means the same layers.
    """
    numbers = layer_numbers(names) if config.first_layer else []
    given = {"target_modules": list(config.targets)} | ({"layers_to_transform": numbers} if numbers else {})
    for spelled in (given, {"target_modules": list(names)}):
        if _peft_matches(model, **spelled) == set(names):
            return spelled
    raise AdapterError(f"lora.targets: {', '.join(config.targets)}: PEFT would adapt other layers with these names")


def _peft_matches(
    model: PreTrainedModel, target_modules: list[str], layers_to_transform: list[int] | None = None
) -> set[str]:
    """The modules that PEFT adapts, by its check_target_module_exists."""
    found = {n for n, _ in model.named_modules() if any(n == t or n.endswith(f".{t}") for t in target_modules)}
    if layers_to_transform is None:
        return found
    numbers = {name: re.match(r".*?\.[^.]*\.(\d+)\.", name) for name in found - set(target_modules)}
    kept = {name for name, number in numbers.items() if number and int(number[1]) in layers_to_transform}
    return kept | found & set(target_modules)


def layer_numbers(names: Iterable[str]) -> list[int]:
    """The decoder layers of these modules, by the first number in each path (as PEFT reads it)."""
    return sorted({int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name))})
