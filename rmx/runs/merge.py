"""The model with an adapter in its weights, as a plain Hugging Face directory."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rmx.models import lora, model
from rmx.models.source import locate
from rmx.runs.rundir import RunError

if TYPE_CHECKING:
    from rmx.runs.pipeline import Run


def merge(run: "Run", out: Path, adapter: Path | None = None) -> Path:
    """Write model and tokenizer, whole or not at all; the directory.

    Args:
        adapter: its directory; None: the run's own.
    """
    out = check(run, out, adapter)
    with lora.worn(run.lm.model, adapter or run.path("adapter")) as found:
        lora.merge(found)
    model.save(run.lm, out)
    return out


def check(run: "Run", out: Path, adapter: Path | None = None) -> Path:
    """What can be checked before the model is loaded; ``out`` as an absolute path.

    Raises:
        RunError: the directory is not empty or cannot be made, or the run has no adapter. AdapterError: the adapter is
            no plain LoRA. ModelError: there is no such model.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(
            f"{out}: is {'not empty' if out.is_dir() else 'a file'}: expected a directory that is empty or new"
        )
    check_writable(out, "merge")
    if adapter is None:
        run.check_adapter()
    path = adapter or run.path("adapter")
    lora.description(path)
    if not (path / lora.WEIGHTS).is_file():
        raise RunError(f"{path}: has no {lora.WEIGHTS}")
    locate(run.config.located_model)
    return out


def check_writable(path: Path, what: str) -> None:
    """Raise RunError where the nearest directory that exists takes no new files; ``what`` names the setting."""
    near = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not near.is_dir():
        raise RunError(f"{what}: {near} is a file; expected a directory or an unused name")
    if not os.access(near, os.W_OK | os.X_OK):
        raise RunError(f"{what}: {near} cannot be written: permission denied")
