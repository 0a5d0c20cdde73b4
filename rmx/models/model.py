"""One causal language model: loading it, its final hidden states, its output head."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file, find_adapter_config_file

from rmx.artefacts import fingerprint as fingerprint_of
from rmx.artefacts import replacing
from rmx.config import ModelConfig
from rmx.models import converted, gguf_header, quantization
from rmx.models.lora_layers import LoraLinear
from rmx.models.source import ModelError, fingerprint, locate, reach
from rmx.progress import console, quiet
from rmx_kernels import CausalLMHead, head_of, precision

__all__ = ["CausalLM", "ModelError", "Vocabulary", "batches", "fingerprint", "load", "load_vocabulary", "pad", "save"]


@dataclass(frozen=True)
class CausalLM:
    """A model, its tokenizer, and the head that turns hidden states into logits.

    logits = cap(scale * (hidden @ weight.T + bias)), cap(u) = softcap * tanh(u / softcap) or u, as of head_of.
    """

    model: PreTrainedModel
    tokenizer: Any
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float
    eos_ids: frozenset[int]
    packing: bool = True  # whether sequences run end to end, or padded
    graphs: bool = True  # whether work of one shape is captured on a GPU, and replayed
    settings: ModelConfig | None = None  # by which it was loaded; None: it was made here
    gguf: bool = False  # whether from a GGUF file
    adapted: bool = True  # whether an adapter on the head counts; False: the head of the base, whatever is attached

    @property
    def vocabulary(self) -> str:
        """Fingerprint of the tokenizer's tokens and ids."""
        return fingerprint_of(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Final hidden states [B, L, H] after the last norm."""
        out = text_decoder(self.model)(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden: Tensor = out.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of a few rows; scoring and training use the linear operators instead."""
        logits = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            logits += self.bias.float()
        if (lora := self.lora(torch.float32)) is not None:
            logits += hidden.float() @ lora[0].T @ lora[1].T
        logits *= self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def lora(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float] | None:
        """The active adapter on the head, as every linear operator takes it."""
        head = self.model.get_output_embeddings() if self.adapted else None
        if not (isinstance(head, LoraLinear) and head.enabled):
            return None
        return (*head.pair(dtype), 1.0)  # the second one has the scale

    @property
    def head(self) -> dict[str, Any]:
        """The keyword arguments that every linear operator takes."""
        return self.head_at(1.0)

    def head_at(self, temperature: float) -> dict[str, Any]:
        """The same, for logits that are divided by ``temperature``."""
        softcap = None if self.softcap is None else self.softcap / self.scale
        scaling = {"softcap": softcap, "temperature": temperature / self.scale}
        return {"weight": self.weight, "bias": self.bias, "lora": self.lora(self.weight.dtype), **scaling}


@dataclass(frozen=True)
class Vocabulary:
    """A model without its weights: enough to render prompts and to decode tokens."""

    tokenizer: Any
    config: Any  # of transformers

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @property
    def size(self) -> int:
        """Number of rows of the output head."""
        return int(self.config.get_text_config().vocab_size)


@quiet()
def load(config: ModelConfig, vocabulary: Vocabulary | None = None) -> CausalLM:
    """Load a frozen model in evaluation mode from safetensors or GGUF; pickled weights are never opened.

    Args:
        vocabulary: of this model, if it is already loaded.

    Raises:
        ModelError: no such directory or package, no usable weights, or a head that rmx does not support.
    """
    with _faults(config):
        files = _Files(config)
        if vocabulary is not None:
            files.known = vocabulary.tokenizer
        model, tokenizer = _converted(files) if files.gguf is not None else (files.model(), files.tokenizer())
        if config.quantization is None:
            model = model.to(files.device)
    model.eval().requires_grad_(False)
    for layer in quantization.quantized(model):
        # on some CPUs an evaluated layer would pack its weights into a form that no gradient can be made from
        layer.training = True
    found = wrap(model, tokenizer, config.packing)
    return replace(found, settings=config, gguf=files.gguf is not None, graphs=config.cuda_graphs)


def load_vocabulary(config: ModelConfig) -> Vocabulary:
    """The tokenizer and the configuration of the model that :func:`load` loads.

    Raises:
        ModelError: as :func:`load`.
    """
    with _faults(config):
        files = _Files(config)
        if files.gguf is not None:
            entry = files.entry()
            if entry is not None and entry.whole(weights=False):
                files = files.at(entry)
        return Vocabulary(files.tokenizer(), files.config())


class _Files:
    """What transformers is told to read."""

    def __init__(self, config: ModelConfig) -> None:
        self.settings = config
        self.known: Any = None  # the tokenizer, where it is loaded already
        self.name, gguf_file = locate(config)
        self.source = self.name  # where the files are read
        if not Path(self.name).is_dir():
            self.source = reach(self.name, config.revision, gguf_file or "config.json")
        revision = {"revision": config.revision}
        # transformers would load the base model of an adapter, and the adapter from a pickle if it has no other file
        if find_adapter_config_file(self.source, **revision) is not None:
            raise ValueError("it is an adapter; expected its base model")
        self.common: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **revision}
        self.gguf: Path | None = None
        if gguf_file is not None:
            self.gguf = Path(str(cached_file(self.source, gguf_file, **revision)))
            self.common["gguf_file"] = gguf_file
            gguf_header.check(self.gguf)
            if config.quantization is not None:
                raise ValueError(
                    "model.quantization: a GGUF file's weights are quantised already and would be rounded a second "
                    "time: use the model's safetensors files"
                )
        if config.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("model.quantization: bitsandbytes is not installed: pip install 'rmx[bitsandbytes]'")

    @property
    def device(self) -> str:
        if self.settings.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.settings.device

    @cached_property
    def dtype(self) -> torch.dtype:
        name = precision.choose(self.device).dtype if self.settings.dtype == "auto" else self.settings.dtype
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def entry(self) -> converted.Entry | None:
        """Where the cache keeps what a GGUF file is converted to; None where the cache is off."""
        assert self.gguf is not None
        folder = self.gguf.parents[len(Path(self.common["gguf_file"]).parts) - 1]
        return converted.entry(self.gguf, folder, self.dtype_name)

    def at(self, entry: converted.Entry) -> "_Files":
        """The same model, converted."""
        self.source, self.gguf, self.common = str(entry.path), None, {}
        return self

    def config(self) -> Any:
        return AutoConfig.from_pretrained(self.source, **self.common)

    def tokenizer(self) -> Any:
        if self.known is not None:
            return self.known
        tokenizer = AutoTokenizer.from_pretrained(self.source, **self.common)
        tokenizer.name_or_path = self.name
        return tokenizer

    def model(self) -> PreTrainedModel:
        weights: dict[str, Any] = {"use_safetensors": True}
        if self.gguf is not None:
            weights = {"quantization_config": GgufConfig(dequantize=True)}
        elif self.settings.quantization is not None:
            weights |= {"quantization_config": quantization.nf4(self.dtype), "device_map": {"": self.device}}
        weights |= {"dtype": self.dtype, "output_loading_info": True, **self.common}
        try:
            model, found = self._loaded(self.settings.attention, weights)
        except ValueError as fault:
            if self.settings.attention != "sdpa" or "scaled_dot_product_attention" not in str(fault):
                raise
            said = f"model: {str(fault).split()[0]} does not support attention 'sdpa', so it generates with 'eager'"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            model, found = self._loaded("eager", weights)
        if missing := sorted(found["missing_keys"]):  # tied ones are not among them
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(
                f"its files lack {missing[0]}{more}, so these weights would be random: expected every tensor of "
                f"{type(model).__name__} as config.json describes it"
            )
        model.name_or_path = model.config.name_or_path = self.name
        return model

    def _loaded(self, attention: str, more: dict[str, Any]) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, attn_implementation=attention, **more)


def _converted(files: _Files) -> tuple[PreTrainedModel, Any]:
    """A model of a GGUF file and its tokenizer: from the cache, else from the file itself, and then into the cache."""
    assert files.gguf is not None
    entry = files.entry()
    if entry is None:
        return files.model(), files.tokenizer()
    if not entry.whole():
        with ExitStack() as stack:
            try:
                stack.enter_context(entry.locked())
            except OSError as fault:
                converted.say_not_kept(entry, fault)
                return files.model(), files.tokenizer()
            if not entry.whole():  # another process may have made it since
                made = files.model(), files.tokenizer()
                try:
                    entry.write(*made)
                except (OSError, SafetensorError) as fault:
                    converted.say_not_kept(entry, fault)
                return made
    files = files.at(entry)
    return files.model(), files.tokenizer()


@contextmanager
def _faults(config: ModelConfig) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError, SafetensorError) as fault:
        raise ModelError(f"model.name={config.name!r}: cannot be loaded: {fault}") from fault


def wrap(model: PreTrainedModel, tokenizer: Any, packing: bool = True) -> CausalLM:
    """Describe the head of a loaded model by :func:`rmx_kernels.head_of`, which checks it.

    Raises:
        ModelError: an unsupported head, or one with fewer rows than the tokenizer has tokens.
    """
    try:
        head = head_of(model)
        given = head.kwargs()
        _check_text(model, head)
    except ValueError as fault:
        raise ModelError(f"{type(model).__name__}: {fault}") from fault
    weight = given["weight"]
    if len(tokenizer) > weight.shape[0]:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the output head only {weight.shape[0]}")
    return CausalLM(
        model=model,
        tokenizer=tokenizer,
        weight=weight,
        bias=given["bias"],
        softcap=head.softcap,
        scale=head.scale,
        eos_ids=_end_tokens(model, tokenizer),
        packing=packing,
    )


def _end_tokens(model: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    """Those of the generation settings, and the tokenizer's own, which some settings leave out."""
    settings = model.generation_config
    found: Any = settings.eos_token_id if settings is not None else None
    given = [found] if isinstance(found, int) else list(found or [])
    return frozenset(given + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]))


@contextmanager
def embedded_leaves(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, the embedded tokens of each pass are leaf tensors that require a gradient; the list collects them."""
    leaves: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1].clone()  # which some models change in place

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        yield leaves
    finally:
        handle.remove()


def text_decoder(model: PreTrainedModel) -> Any:
    """The part of the model that computes the final hidden states, without image encoders."""
    found = model.get_decoder()
    if isinstance(found, PreTrainedModel) and found is not model and found.get_output_embeddings() is None:
        return found
    return CausalLMHead(model).decoder


@torch.no_grad()
def _check_text(model: PreTrainedModel, head: CausalLMHead) -> None:
    """Without images the whole decoder has to give the states of its text part."""
    if (decoder := text_decoder(model)) is head.decoder:
        return
    ids = torch.arange(1, 9, device=head.kwargs()["weight"].device).unsqueeze(0)
    whole, text = head.hidden(ids), decoder(input_ids=ids, use_cache=False).last_hidden_state
    error = float((whole.float() - text.float()).norm() / whole.float().norm().clamp(min=1e-30))
    if not error <= 1e-3:
        raise ValueError(
            f"{type(decoder).__name__} gives other states than {type(head.decoder).__name__} ({error:.2%})"
        )


@quiet()
def save(lm: CausalLM, path: Path) -> None:
    """Write model and tokenizer as a Hugging Face directory (safetensors), completely or not at all."""
    with replacing(path) as aside:
        lm.model.save_pretrained(aside)
        lm.tokenizer.save_pretrained(aside)


def pad(rows: Sequence[Sequence[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), each [B, L] int64, padded with id 0, on the right or the left."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, where] = torch.tensor(row, dtype=torch.int64)
        mask[number, where] = 1
    return ids.to(device), mask.to(device)


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped so that no group exceeds ``token_budget`` padded tokens (a longer sequence goes alone)."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= token_budget:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
