"""Low-rank adapters of a model: attached to its layers, merged into them, and stored as PEFT stores them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from rmx.artefacts import fingerprint, replacing
from rmx.config import LoraConfig
from rmx.models.lora_layers import Adapter as Adapter
from rmx.models.lora_layers import LoraEmbedding, LoraLayer, LoraLinear, SharedInput
from rmx.models.quantization import is_quantized
from rmx.models.targets import AdapterError, is_tied, matching, spelled_for_peft

CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "rmx.json"
PREFIX = "base_model.model."  # of PEFT's tensor names
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # siblings that read one tensor, in this order
PATTERNS = ("rank_pattern", "alpha_pattern")

# Of adapter_config.json. What is in neither has to be empty, since it would change what the adapter is.
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base's weights as well
}
FREE: tuple[str, ...] = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "layers_to_transform",
    "base_model_name_or_path",
)
FREE += ("task_type", "inference_mode", "auto_mapping", "revision", "peft_version")
FREE += ("megatron_core", "qalora_group_size", "eva_config")  # settings of what is off, or of the initialisation


def attach(model: PreTrainedModel, config: LoraConfig, seed: int) -> Adapter:
    """Replace each layer of :func:`matching`.

    Raises:
        AdapterError: see there.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = matching(model, config)
    spelled = spelled_for_peft(model, config, list(chosen))
    tied = is_tied(model)
    layers: dict[str, LoraLayer] = {}
    for name, module in chosen.items():
        r, scaling = config.of(name)
        if isinstance(module, nn.Embedding):
            layers[name] = LoraEmbedding(module, r, scaling, generator)
        else:
            layers[name] = LoraLinear(module, r, scaling, generator)
        layers[name].at_end = module in (model.get_input_embeddings(), model.get_output_embeddings())
        layers[name].tied = layers[name].at_end and tied
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for family in SAME_INPUT:
            found = (layers.get(f"{parent}.{last}") for last in family)
            members = [layer for layer in found if isinstance(layer, LoraLinear)]
            if len(members) > 1 and len({member.base.in_features for member in members}) == 1:
                shared = SharedInput(members)
                for place, member in enumerate(members):
                    member.shared, member.place = shared, place
    return Adapter(layers, config, spelled)


@torch.no_grad()
def merge(adapter: Adapter, sign: float = 1.0) -> None:
    """Add each update to its base weight, in float32 and rounded to the weight's dtype, and switch the adapter off.

    In low precision the sum is rounded, while a separate adapter is not: an update far below the weights' rounding is
    lost. :func:`unmerge` restores the weights up to rounding.

    Raises:
        AdapterError: the weights are in 4 bits, or one weight is shared by embedding and head.
    """
    if tied := [name for name, layer in adapter.layers.items() if layer.tied]:
        raise AdapterError(
            f"merge: {tied[0]} is the weight of input embedding and output head (tied), and both would change: "
            "use the adapter unmerged, or merge it into a copy of the model that was saved with a separate head "
            "(tie_word_embeddings=false)"
        )
    if any(is_quantized(layer.base) for layer in adapter.layers.values()):
        raise AdapterError(
            "merge: the weights are in 4 bits (model.quantization); rounding to 4 bits would lose most of the adapter; "
            "--adapter DIR --set model.quantization=null merges it into the full weights, on which it was not trained"
        )
    for layer in adapter.layers.values():
        weight = layer.base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + sign * layer.scaling * layer.product())
        layer.enabled = sign < 0


def unmerge(adapter: Adapter) -> None:
    """Undo :func:`merge` to rounding, and switch the adapter on again."""
    merge(adapter, sign=-1.0)


def detach(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put the base layers back."""
    for name, layer in adapter.layers.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base)


def adapter_mark(path: Path) -> str:
    """A fingerprint of the adapter in a directory, computed from both of its files."""
    return fingerprint(b"".join((path / name).read_bytes() for name in (CONFIG, WEIGHTS)))


@contextmanager
def worn(model: PreTrainedModel, path: Path, prompt: str | None = None) -> Iterator[Adapter]:
    """Temporarily attach the adapter in ``path`` to ``model``; ``prompt``: see :func:`check_prompt`, None: any."""
    adapter = load_adapter(model, path)
    try:
        if prompt is not None:
            check_prompt(path, prompt)
        yield adapter
    finally:
        detach(model, adapter)


def check_prompt(path: Path, prompt: str) -> None:
    """Refuse an adapter whose notes say that it was trained with prompts of another fingerprint.

    Raises:
        AdapterError: the fingerprints differ.
    """
    notes = path / NOTES
    if notes.exists() and json.loads(notes.read_text(encoding="utf-8")).get("prompt", prompt) != prompt:
        raise AdapterError(
            f"{path}: was trained with other prompts than this model and style render now (prompt.template fixes "
            "the date of a chat template that writes today's date)"
        )


def save_adapter(adapter: Adapter, path: Path, base_model: str, **notes: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into the directory ``path``, whole or not at all.

    Args:
        notes: stored beside them in ``rmx.json``, such as the prompt's fingerprint: PEFT knows no such keys, and the
            order of safetensors' own metadata differs between processes.

    Raises:
        AdapterError: the adapter changes nothing, or contains values that are not finite.
    """
    tensors = {}
    for name, layer in adapter.layers.items():
        for part, tensor in layer.stored().items():
            tensors[f"{PREFIX}{name}.{part}"] = tensor.detach().cpu().contiguous()
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise AdapterError(f"{path}: not saved: {bad[0]} contains values that are not finite")
    if not any(bool(layer.lora_A.any()) and bool(layer.lora_B.any()) for layer in adapter.layers.values()):
        raise AdapterError(f"{path}: not saved: the adapter changes nothing (every product B A is zero)")
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": adapter.config.r,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "bias": "none",
        "inference_mode": True,
    } | adapter.spelled
    if adapter.config.rslora:
        description["use_rslora"] = True
    description |= {name: own for name in PATTERNS if (own := getattr(adapter.config, name))}
    with replacing(path) as aside:
        aside.mkdir()
        (aside / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        if notes:
            (aside / NOTES).write_text(json.dumps(notes) + "\n", encoding="utf-8")


def description(path: Path) -> dict[str, Any]:
    """adapter_config.json of a plain LoRA adapter.

    Raises:
        AdapterError: the file is missing, or a setting in it, named in the message, is not supported.
    """
    try:
        found: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise AdapterError(f"{path}: cannot be read as an adapter: {fault}") from fault
    if not isinstance(found, dict):
        raise AdapterError(f"{path}/{CONFIG}: expected settings by name, got {type(found).__name__}")
    for key, value in found.items():
        plain = FIXED.get(key)
        if plain is not None and not any(value is x or value == x for x in plain):
            raise AdapterError(f"{path}: {key} is {value!r}; only {', '.join(map(repr, plain))} is supported")
        if plain is None and key not in FREE and value not in (None, False, "", [], {}):
            raise AdapterError(f"{path}: {key} is {value!r}, which is not supported: expected a plain LoRA adapter")
    return found


def _described(path: Path, model: PreTrainedModel) -> LoraConfig:
    """The settings of a plain LoRA adapter.

    Raises:
        AdapterError: see :func:`description`, or layers that this model does not have.
    """
    found = description(path)
    try:
        targets, numbers = found["target_modules"], found.get("layers_to_transform")
        if not isinstance(targets, list):
            raise ValueError(f"target_modules is {targets!r}; only lists of names are supported")
        numbers = [numbers] if isinstance(numbers, int) else numbers or []
        last = model.config.get_text_config().num_hidden_layers - 1
        if numbers and sorted(numbers) != list(range(min(numbers), last + 1)):
            raise ValueError(
                f"layers_to_transform is {numbers}; expected all layers from the first number to the last layer, {last}"
            )
        return LoraConfig(
            r=found["r"],
            alpha=float(found["lora_alpha"]),
            targets=sorted(targets),
            first_layer=min(numbers, default=0),
            rslora=True if found.get("use_rslora") else None,
            rank_pattern=found.get("rank_pattern") or None,
            alpha_pattern=found.get("alpha_pattern") or None,
        )
    except (KeyError, TypeError, ValueError) as fault:
        raise AdapterError(f"{path}/{CONFIG}: {fault}") from fault


def load_adapter(model: PreTrainedModel, path: Path) -> Adapter:
    """Attach an adapter that :func:`save_adapter` or PEFT (plain LoRA) wrote.

    Raises:
        AdapterError: no such adapter, another kind of adapter, values that are not finite, or shapes that belong to
            another model.
    """
    config = _described(path, model)
    try:
        tensors = safetensors.torch.load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as fault:
        raise AdapterError(f"{path}: cannot be read as an adapter: {fault}") from fault
    if bad := [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        raise AdapterError(f"{path}: {bad[0]} contains values that are not finite")
    adapter = attach(model, config, seed=0)
    expected = {
        f"{PREFIX}{name}.{part}": tensor
        for name, layer in adapter.layers.items()
        for part, tensor in layer.stored().items()
    }
    for name, layer in adapter.layers.items():
        theirs = tensors.pop(f"{PREFIX}{name}.base_layer.weight", None) if layer.at_end else None
        if theirs is not None and not _same(theirs, layer.base.weight):  # PEFT saves those of embeddings and heads too
            detach(model, adapter)
            raise AdapterError(f"{path}: belongs to another model: it contains another weight of {name}")
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))[0]
        detach(model, adapter)
        raise AdapterError(f"{path}: belongs to another model: only one of adapter and model has {odd}")
    for name, parameter in expected.items():
        if parameter.shape != tensors[name].shape:
            detach(model, adapter)
            raise AdapterError(
                f"{path}: belongs to another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"this model needs {tuple(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return adapter


def _same(theirs: Tensor, ours: Tensor) -> bool:
    """Whether two weights are equal in the narrower of their dtypes."""
    dtype = min(theirs.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
    return theirs.shape == ours.shape and bool(torch.equal(theirs.to(dtype), ours.detach().cpu().to(dtype)))


def begin(model: PreTrainedModel, config: LoraConfig, seed: int, start: Path | None = None) -> Adapter:
    """The adapter that a training starts from: a new one, or the one in ``start``.

    Raises:
        AdapterError: as :func:`attach` and :func:`load_adapter`; the adapter in ``start`` is on other layers, or of
            another rank or scale, than the configuration says.
    """
    if start is None:
        return attach(model, config, seed)
    wanted = list(matching(model, config))
    found = load_adapter(model, start)
    theirs, ours = (
        {
            "r": own.r,
            "alpha": own.alpha,
            "rslora": bool(own.rslora),
            **{name: getattr(own, name) or {} for name in PATTERNS},
        }
        for own in (found.config, config)
    )
    odd = [
        f"{key} is {theirs[key]} there, {ours[key]} in the configuration" for key in ours if ours[key] != theirs[key]
    ]
    if set(found.layers) != set(wanted):
        layer = sorted(set(found.layers) ^ set(wanted))[0]
        odd.append(f"{layer} is adapted only {'there' if layer in found.layers else 'by the configuration'}")
    if odd:
        detach(model, found)
        raise AdapterError(f"lora.start={start}: {odd[0]}")
    return replace(found, config=config)
