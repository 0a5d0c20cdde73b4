"""A GGUF file of a Hugging Face directory, made by llama.cpp's own converter."""

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rmx.artefacts import replacing
from rmx.errors import RmxError, close_to
from rmx.models import gguf_header
from rmx.models.source import ModelError

SCRIPT = "convert_hf_to_gguf.py"
VARIABLE = "RMX_LLAMA_CPP"  # a folder with llama.cpp's sources
TYPES = ("auto", "f32", "f16", "bf16", "q8_0", "tq1_0", "tq2_0")  # that the converter writes
SHOWN = 15  # last lines of a converter that failed


class GGUFError(RmxError):
    """The converter is missing, it failed, or it cannot write the requested type."""


@dataclass(frozen=True)
class Wanted:
    """What ``--gguf`` asks for."""

    file: Path
    type: str  # one of TYPES


def wanted(asked: str, model: Path) -> Wanted:
    """The file and the type of ``asked``, which is a type, or a file whose name may end with one (model-q8_0.gguf).

    A type alone is written to ``model``/NAME-TYPE.gguf, as llama.cpp names it.

    Raises:
        GGUFError: neither a type nor a file.
    """
    if asked.lower().endswith(".gguf"):
        file = Path(asked).expanduser().resolve()
        if file.exists():
            raise GGUFError(f"--gguf {asked}: already exists; expected a new file")
        stem = file.stem.lower()
        kind = next((kind for kind in TYPES if stem == kind or stem.endswith((f"-{kind}", f".{kind}"))), "auto")
        return Wanted(file, kind)
    kind = asked.lower()
    if kind in TYPES:
        return Wanted(model / f"{model.name}-{kind}.gguf", kind)
    known = f"expected {', '.join(TYPES)}, or a file that ends in .gguf"
    if kind.startswith(("q2", "q3", "q4", "q5", "q6", "iq")):
        raise GGUFError(f"--gguf {asked}: {known}; llama.cpp's llama-quantize converts an f16 file to this type")
    raise GGUFError(f"--gguf {asked}: {known}{close_to(kind, TYPES)}")


def converter() -> list[str]:
    """The command that starts llama.cpp's converter: of the folder in RMX_LLAMA_CPP, else the one on PATH.

    Raises:
        GGUFError: there is none; the message says what to install.
    """
    install = (
        f"get llama.cpp (git clone https://github.com/ggml-org/llama.cpp) and set {VARIABLE} to its folder, or put "
        f"{SCRIPT} on PATH"
    )
    if folder := os.environ.get(VARIABLE):
        script = Path(folder).expanduser() / SCRIPT
        if not script.is_file():
            raise GGUFError(f"--gguf: {VARIABLE}={folder}: contains no {SCRIPT}; {install}")
        return [sys.executable, str(script)]
    if found := shutil.which(SCRIPT):  # whose first line names its own Python
        return [found]
    raise GGUFError(f"--gguf: {SCRIPT} is not installed; {install}")


def convert(model: Path, asked: Wanted, command: list[str]) -> Path:
    """Convert the Hugging Face directory ``model``; the file is there whole or not at all.

    Raises:
        GGUFError: the converter failed, with its last lines, or wrote no GGUF file. OSError: it cannot be started.
    """
    with replacing(asked.file) as aside:
        arguments = [str(model), "--outfile", str(aside), "--outtype", asked.type]
        again = shlex.join([*command, str(model), "--outfile", str(asked.file), "--outtype", asked.type])
        rest = f"the merged model is complete in {model}; to try again: {again}"
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            lines = done.stdout.decode(errors="replace").strip().splitlines()
            said = "\n".join(lines[-SHOWN:]) or "it printed nothing"
            raise GGUFError(f"--gguf: {command[-1]} ended with code {done.returncode}:\n{said}\n{rest}")
        if not aside.is_file():
            raise GGUFError(f"--gguf: {command[-1]} succeeded but wrote no file; {rest}")
        try:
            gguf_header.check(aside)
        except ModelError as fault:
            raise GGUFError(f"--gguf: {command[-1]} succeeded, but its file is damaged: {fault}; {rest}") from fault
    return asked.file
