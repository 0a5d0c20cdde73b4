"""SHA-256 of files, kept in the cache of RMX_CACHE: a large file is read once, and again when it was touched."""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rmx.artefacts import write_json

KEPT = "digests.json"
SETTLED_S = 2.0  # a file that is younger may change again within the resolution of its times


def place() -> Path | None:
    """The directory of the cache; None where RMX_CACHE=off."""
    given = os.environ.get("RMX_CACHE")
    if given == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(given or f"{base}/rmx").expanduser()


def file_sha256(path: Path) -> str:
    """Of its content, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256(paths: list[Path], *, keep: bool = True) -> list[str]:
    """Of the content of each file, in hexadecimal digits.

    A digest is stored with the file's size, inode, and times of modification and of change. Programs cannot set the
    time of change, so another file with the same name and time is noticed. ``keep``: whether to store new digests.

    Raises:
        OSError: a file cannot be read.
    """
    cache = place()
    kept = {} if cache is None else _read(cache / KEPT)
    found, fresh = [], {}
    for path in paths:
        name, stat = str(path.resolve()), path.stat()
        state = [stat.st_size, stat.st_ino, stat.st_dev, stat.st_mtime_ns, stat.st_ctime_ns]
        if kept.get(name, [None])[:-1] != state:
            kept[name] = [*state, file_sha256(path)]
            if time.time() - max(stat.st_mtime_ns, stat.st_ctime_ns) / 1e9 > SETTLED_S:
                fresh[name] = kept[name]
        found.append(kept[name][-1])
    if cache is not None and fresh and keep:
        with suppress(OSError):  # a cache that cannot be written costs time, nothing else
            known = {name: entry for name, entry in _read(cache / KEPT).items() if Path(name).exists()}
            write_json(cache / KEPT, {**known, **fresh})
    return found


def _read(path: Path) -> dict[str, list[Any]]:
    """What is kept; nothing where there is none, or it is damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {name: entry for name, entry in value.items() if isinstance(entry, list) and len(entry) == 6}
