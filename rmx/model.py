"""One causal language model: loading it, its final hidden states, its output head."""

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from rmx.artefacts import fingerprint as fingerprint_of
from rmx.artefacts import replacing
from rmx.config import ModelConfig
from rmx.errors import RmxError
from rmx.progress import quiet
from rmx_kernels import precision


class ModelError(RmxError):
    """The model cannot be loaded, or its logits are not what its hidden states and head say."""


@dataclass(frozen=True)
class CausalLM:
    """A model, its tokenizer, and the head by which hidden states become logits.

    logits = cap(scale * hidden @ weight.T + bias), cap(u) = softcap * tanh(u / softcap) or u.
    """

    model: PreTrainedModel
    tokenizer: Any
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    scale: float
    eos_ids: frozenset[int]
    packing: bool = True  # whether sequences run end to end, or padded

    @property
    def vocabulary(self) -> str:
        """Fingerprint of the tokenizer's tokens and ids."""
        return fingerprint_of(json.dumps(self.tokenizer.get_vocab(), sort_keys=True).encode())

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Final hidden states [B, L, H] after the last norm, times ``scale``."""
        out = self.model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        return out.last_hidden_state * self.scale if self.scale != 1.0 else out.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of a few rows; scoring and training use the linear operators instead."""
        logits = hidden.float() @ self.weight.float().T
        if self.bias is not None:
            logits += self.bias.float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def head(self) -> dict[str, Any]:
        """The keyword arguments that every linear operator takes."""
        return {"weight": self.weight, "bias": self.bias, "softcap": self.softcap}


@quiet()
def load(config: ModelConfig) -> CausalLM:
    """Load a frozen model in evaluation mode from safetensors or GGUF; pickled weights are never opened.

    Raises:
        ModelError: no such directory or package, no usable weights, or a head that rmx does not reproduce.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, precision.choose(device).dtype if config.dtype == "auto" else config.dtype)
    source, gguf_file = _locate(config)
    common = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    weights: dict[str, Any] = {"use_safetensors": True}
    if gguf_file is not None:
        common["gguf_file"] = gguf_file
        weights = {"quantization_config": GgufConfig(dequantize=True)}
    try:
        # transformers would load the base model of an adapter, and the adapter from a pickle if it has no other file
        if find_adapter_config_file(source, revision=config.revision) is not None:
            raise ValueError("it is an adapter; name its base model")
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=config.attention, **common, **weights
        ).to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AssertionError, SafetensorError) as fault:
        raise ModelError(f"model.name={config.name!r}: cannot be loaded: {fault}") from fault
    model.eval().requires_grad_(False)
    return wrap(model, tokenizer, config.packing)


def fingerprint(config: ModelConfig) -> str | None:
    """Tells local weight files apart, by name, size, first and last MiB; None for a hub name."""
    source, gguf_file = _locate(config)
    folder = Path(source)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in [folder / gguf_file] if gguf_file else sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]


def wrap(model: PreTrainedModel, tokenizer: Any, packing: bool = True) -> CausalLM:
    """Describe the head of a loaded model, and check that the description gives the model's own logits."""
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head")
    if len(tokenizer) > head.weight.shape[0]:
        raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, the output head only {head.weight.shape[0]}")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere multiplies
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite divides
    eos: Any = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = eos if eos is not None else tokenizer.eos_token_id
    lm = CausalLM(
        model=model,
        tokenizer=tokenizer,
        weight=head.weight,
        bias=getattr(head, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None),
        scale=float(scale),
        eos_ids=frozenset([eos] if isinstance(eos, int) else eos or []),
        packing=packing,
    )
    _check_head(lm)
    return lm


@torch.no_grad()
def _check_head(lm: CausalLM) -> None:
    """Unknown logit transforms (a scale, a cap, an extra norm) would make every number wrong: compare once."""
    ids = torch.arange(1, 9, device=lm.device).unsqueeze(0) % lm.weight.shape[0]
    theirs = lm.model(input_ids=ids, use_cache=False).logits.float()
    ours = lm.logits(lm.hidden(ids, use_cache=False))
    error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
    if not error < 2e-2:  # bf16 rounding of the logits is about 3e-3
        raise ModelError(
            f"{type(lm.model).__name__}: hidden states and output head give logits that differ from the model's own "
            f"by {error:.1%}; it transforms its logits in a way that rmx does not know"
        )


@quiet()
def save(lm: CausalLM, path: Path) -> None:
    """Write model and tokenizer as a Hugging Face directory (safetensors), whole or not at all."""
    with replacing(path) as aside:
        lm.model.save_pretrained(aside)
        lm.tokenizer.save_pretrained(aside)


def _locate(config: ModelConfig) -> tuple[str, str | None]:
    """(directory or hub name, GGUF file name or None)."""
    name = config.name
    if name.startswith("package:"):
        package = name.removeprefix("package:")
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(f"model.name={name!r}: the Python package {package!r} is not installed")
        path = Path(spec.submodule_search_locations[0])
    else:
        path = Path(name).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), path.name
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")):
            raise ModelError(f"model.name={name!r}: no such directory")
        return name, config.gguf_file  # a hub name
    if config.gguf_file is not None:
        return str(path), config.gguf_file
    if any(path.glob("*.safetensors")):
        return str(path), None
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return str(path), ggufs[0]
    if ggufs:
        raise ModelError(f"model.name={name!r}: holds several GGUF files ({', '.join(ggufs)}); set model.gguf_file")
    pickles = sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
    raise ModelError(f"model.name={name!r}: the directory holds no weights (*.safetensors or *.gguf){hint}")


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
