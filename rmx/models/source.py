"""Where a model's files are: in a directory, in an installed package, or on the hub. Needs no torch.

A name is a path where it looks like one, so that a typo in a path is an error at once and no question to the hub.
"""

import functools
import hashlib
import importlib.util
import os
import re
import threading
from pathlib import Path

from rmx.config import ModelConfig
from rmx.errors import RmxError

ENDINGS = (".gguf", ".safetensors")  # of names that are files
# What a model is made of, beside its weights.
BESIDE = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab*", "merges.txt", "chat_template*", "*.jinja", "*.model", "*.tiktoken"),
)
HUB_SECONDS = 8.0  # that one question to the hub may take, name resolution and all


class ModelError(RmxError):
    """The model cannot be loaded, or its logits are not what its hidden states and head say."""


def locate(config: ModelConfig) -> tuple[str, str | None]:
    """(directory or hub name, GGUF file name or None).

    Raises:
        ModelError: no such directory, file or package, or no usable weights in it.
    """
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
        if reason := _why_path(name):
            raise ModelError(f"model.name={name!r}: {_absent(path)} ({reason})")
        return name, config.gguf_file  # a hub name
    if not os.access(path, os.R_OK | os.X_OK):
        raise ModelError(f"model.name={name!r}: the directory cannot be read: permission denied")
    if config.gguf_file is not None:
        return str(path), config.gguf_file
    if any(path.glob("*.safetensors")):
        return str(path), None
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if len(ggufs) == 1:
        return str(path), ggufs[0]
    if ggufs:
        raise ModelError(f"model.name={name!r}: contains several GGUF files ({', '.join(ggufs)}); set model.gguf_file")
    pickles = sorted(file.name for file in [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    hint = f"; {pickles[0]} is a pickle, which is never opened: convert it to safetensors" if pickles else ""
    raise ModelError(f"model.name={name!r}: the directory contains no weights (*.safetensors or *.gguf){hint}")


def _why_path(name: str) -> str:
    """Why the name of no directory is still a path and no name of the hub; empty for a hub name."""
    path = Path(name).expanduser()
    if path.is_absolute() or name.startswith((".", "~")):
        return "the name is a path"
    if path.suffix in ENDINGS:
        return f"a name that ends in {path.suffix} is a path"
    if path.is_file():
        return "it is a file"
    if name.count("/") > 1 or "\\" in name or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return "it cannot be a name on the Hugging Face hub: these are NAME or OWNER/NAME"
    if path.parent != Path() and path.parent.is_dir():
        return f"{str(path.parent)!r} is a directory here, so this is a path and not a name on the Hugging Face hub"
    return ""


def _absent(path: Path) -> str:
    if path.is_file():
        return "expected a directory or a .gguf file, got another file: give the directory that contains it"
    if path.suffix in ENDINGS:
        return "no such file"
    near = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    return f"no such directory; the nearest existing one is {str(near)!r}"


def fingerprint(config: ModelConfig, *, keep: bool = True) -> str | None:
    """Of the whole content of a local model: weights, configuration, generation settings and tokenizer.

    None for a hub name. ``keep``: see :func:`rmx.digests.sha256`.
    """
    from rmx.digests import sha256

    source, gguf_file = locate(config)
    folder = Path(source)
    if not folder.is_dir():
        return None
    files = {folder / gguf_file} if gguf_file else set(folder.glob("*.safetensors"))
    files |= {path for pattern in BESIDE for path in folder.glob(pattern)}
    if config.trust_remote_code:
        files |= set(folder.glob("*.py"))
    used = sorted(path for path in files if path.is_file())
    return hashlib.sha256(
        repr([(path.name, d) for path, d in zip(used, sha256(used, keep=keep), strict=True)]).encode()
    ).hexdigest()[:16]


def reach(name: str, revision: str | None, file: str = "config.json") -> str:
    """The name itself where the hub answers; else the directory of the hub's local cache that holds the model.

    One question, without the many tries that transformers would make for each file of the model.

    Args:
        file: one of the model's, by which to know that the local cache holds it.

    Raises:
        ModelError: the hub has no such model, or it cannot be reached and the local cache does not hold the model.
    """
    found, said, _ = _ask_hub(name, revision, file)
    if said:
        raise ModelError(
            f"model.name={name!r}: {said}. Expected a directory that exists, a .gguf file, package:NAME, or a model on "
            "the Hugging Face hub"
        )
    return found


def commit(config: ModelConfig) -> str | None:
    """The commit of a hub model that is used now: the hub's, else that of the local cache.

    None for a local model, and where neither tells.
    """
    name, gguf_file = locate(config)
    return None if Path(name).is_dir() else _ask_hub(name, config.revision, gguf_file or "config.json")[2]


@functools.cache
def _ask_hub(name: str, revision: str | None, file: str) -> tuple[str, str, str | None]:
    """(what :func:`reach` returns, what is wrong or an empty text, the commit or None)."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    found = try_to_load_from_cache(name, file, revision=revision)
    kept = str(Path(found).parents[len(Path(file).parts) - 1]) if isinstance(found, str) else ""
    held = Path(kept).name if kept else None  # models--OWNER--NAME/snapshots/COMMIT
    if constants.HF_HUB_OFFLINE:
        return kept, "" if kept else "HF_HUB_OFFLINE is set, but the hub's local cache does not have this model", held
    answers: list[str | None] = []
    faults: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS).sha)
        except Exception as fault:  # looked at below
            faults.append(fault)

    # The time limit of a request does not hold for the resolution of names.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answers:
        return name, "", answers[0]
    fault = faults[0] if faults else TimeoutError(f"no answer in {HUB_SECONDS:g} s")
    if isinstance(fault, GatedRepoError):
        return (
            name,
            "the hub lets only users with access see this model: log in with `hf auth login`, or set HF_TOKEN",
            None,
        )
    if isinstance(fault, RevisionNotFoundError):
        return name, f"the hub's model has no revision {revision!r}", None
    if isinstance(fault, RepositoryNotFoundError):
        return name, "no directory of this name is here, and the hub has no such model (or a private one)", None
    if kept:
        return kept, "", held
    why = next(iter(str(fault).strip().splitlines()), type(fault).__name__)
    said = f"no directory of this name is here, the hub's local cache does not hold it, and {constants.ENDPOINT} "
    return kept, f"{said}cannot be reached ({why})", None
