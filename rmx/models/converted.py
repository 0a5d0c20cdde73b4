"""GGUF files, converted once: a cache of models as plain Hugging Face directories.

transformers needs half a minute of CPU time to unpack even a small GGUF file. What it made is kept in RMX_CACHE
(default: rmx in XDG_CACHE_HOME or ~/.cache) under a key of all that it depends on. An entry is used only if it is
whole; where the cache cannot be used, this is said, and the model is loaded without it.
"""

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rmx.artefacts import lock_file, remove, replacing, write_json
from rmx.digests import file_sha256, place, sha256
from rmx.progress import console

FORM = 1  # of the entries: another one where their content changes
MADE_BY = ("transformers", "tokenizers", "gguf")  # packages whose versions may change what is made
BESIDE = (
    ".json",
    ".jinja",
    ".model",
    ".txt",
)  # files beside a GGUF from which transformers takes parts of the tokenizer
INDEX = "rmx.json"  # of an entry: its files, their sizes and SHA-256; written last
FOLDER = "models"


@dataclass(frozen=True)
class Entry:
    """The place of one GGUF file, loaded in one dtype, in the cache; it need not be there yet."""

    cache: Path
    gguf: Path
    folder: Path  # of the model, in which the GGUF file lies
    dtype: str  # of the tensors that are kept: those of the loaded model

    @cached_property
    def key(self) -> str:
        """Of the content of the GGUF file and of the files beside it, the dtype, and what converts them."""
        beside = sorted(p for p in self.folder.iterdir() if p.suffix in BESIDE and p.is_file())
        gguf, *digests = sha256([self.gguf, *beside])
        parts = {
            "form": FORM,
            "dtype": self.dtype,
            "made by": {name: importlib.metadata.version(name) for name in MADE_BY},
            "gguf": gguf,
            "beside": {p.name: digest for p, digest in zip(beside, digests, strict=True)},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def path(self) -> Path:
        return self.cache / FOLDER / self.key

    def whole(self, weights: bool = True) -> bool:
        """Whether the entry is there, with the content that was written; ``weights=False`` leaves the weights out."""
        try:
            files = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["files"]
            return bool(files) and all(
                (self.path / name).stat().st_size == size and file_sha256(self.path / name) == content
                for name, (size, content) in files.items()
                if weights or not name.endswith(".safetensors")
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False  # absent, or damaged: it is made again

    def write(self, model: Any, tokenizer: Any) -> None:
        """Keep a model and tokenizer that were loaded from the GGUF file.

        Raises:
            OSError, SafetensorError: it cannot be written; nothing half-written is left behind.
        """
        need = sum(p.numel() * p.element_size() for p in model.parameters())
        free = shutil.disk_usage(self.cache).free
        if need > 0.9 * free:
            raise OSError(f"it needs {_size(need)}, but the disk has {_size(free)} left")
        with replacing(self.path) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            files = {p.name: (p.stat().st_size, file_sha256(p)) for p in sorted(aside.iterdir())}
            write_json(aside / INDEX, {"source": str(self.gguf), "dtype": self.dtype, "files": files})
        size = _size(sum(size for size, _ in files.values()))
        say(f"{self.gguf.name} was converted once and is kept in {self.path} ({size}; RMX_CACHE sets the place)")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time: the others wait, and find the entry.

        Raises:
            OSError: the directory cannot be written, or its file system has no locks.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(self.path.with_suffix(".lock")) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that converts {self.gguf.name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def entry(gguf: Path, folder: Path, dtype: str) -> Entry | None:
    """None where the cache is off."""
    cache = place()
    return None if cache is None else Entry(cache, gguf, folder, dtype)


@dataclass(frozen=True)
class Kept:
    """One entry, as `rmx cache` lists it."""

    path: Path
    source: str  # the GGUF file that it was made from
    dtype: str
    bytes: int


def listed(cache: Path) -> list[Kept]:
    """What is in the cache; an entry that is damaged has the source "damaged"."""
    found = []
    for path in sorted((cache / FOLDER).glob("*")):
        if not path.is_dir():
            continue
        try:
            index = json.loads((path / INDEX).read_text(encoding="utf-8"))
            source, dtype = str(index["source"]), str(index["dtype"])
        except (OSError, ValueError, KeyError, TypeError):
            source, dtype = "damaged", ""
        found.append(Kept(path, source, dtype, sum(p.stat().st_size for p in path.rglob("*") if p.is_file())))
    return found


def clear(cache: Path) -> None:
    """Delete all entries."""
    remove(cache / FOLDER)


def say(text: str) -> None:
    console.print(f"model cache: {text}", markup=False, highlight=False, soft_wrap=True)


def say_not_kept(entry: Entry, fault: OSError | SafetensorError) -> None:
    say(f"{entry.gguf.name} is loaded without the cache, which is slower: {entry.cache}: {fault}")


def _size(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
