"""Files that are whole or absent: written aside, synced, then renamed. Readers name the file and line of a fault."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from rmx.errors import RmxError

R = TypeVar("R")


class ArtefactError(RmxError):
    """A file does not hold what its reader was promised."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (file or directory); rename it into place if the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    _remove(aside)
    try:
        yield aside
        for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        if path.is_dir():  # a directory cannot be replaced in one step: the old one is out of the way, then gone
            old = path.with_name(f".{path.name}.old.partial")
            _remove(old)
            os.replace(path, old)
            os.replace(aside, path)
            _remove(old)
        else:
            os.replace(aside, path)
    except BaseException as fault:
        _remove(aside)
        if isinstance(fault, OSError) and fault.filename is None:
            fault.filename = str(path)  # a full disk does not say what it had no room for
        raise


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fingerprint(content: bytes) -> str:
    """A short name of some content, to notice a change of it."""
    return hashlib.sha256(content).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_records(path: Path, records: Iterable[Any], meta: dict[str, Any]) -> None:
    """JSON lines: a first line ``{"meta": ...}``, then one dataclass record a line."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"meta": meta}, ensure_ascii=False) + "\n")
        for record in records:
            file.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n")


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of every line that is not blank."""
    if not path.is_file():
        raise ArtefactError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as fault:
                raise ArtefactError(f"{path}:{number}: not a JSON value: {fault}") from fault


def parser(cls: type[R]) -> Callable[[Any], R]:
    """A validating reader of one record type; unknown fields and wrong types are errors."""
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    adapter = pydantic.TypeAdapter(cls)

    def parse(value: Any) -> R:
        if not isinstance(value, dict):
            raise ArtefactError(f"expected a JSON object, got {type(value).__name__}")
        if unknown := sorted(set(value) - known):
            raise ArtefactError(f"unknown field {unknown[0]!r}; expected {', '.join(sorted(known))}")
        try:
            return adapter.validate_python(value)
        except pydantic.ValidationError as fault:
            raise ArtefactError(describe(fault)) from fault

    return parse


def describe(fault: pydantic.ValidationError) -> str:
    """Each error as "key.path: what was wrong, got value"."""
    lines = []
    for error in fault.errors():
        where = ".".join(str(part) for part in error["loc"]) or "value"
        got = "" if error["type"] in ("missing", "extra_forbidden") else f", got {error['input']!r}"
        text = {"missing": "missing", "extra_forbidden": "unknown key"}.get(error["type"], error["msg"])
        lines.append(f"{where}: {text}{got}")
    return "; ".join(lines)


def read_meta(path: Path) -> dict[str, Any]:
    """The meta line alone."""
    for number, value in read_lines(path):
        if isinstance(value, dict) and isinstance(value.get("meta"), dict):
            meta: dict[str, Any] = value["meta"]
            return meta
        raise ArtefactError(f'{path}:{number}: expected a first line {{"meta": ...}}')
    raise ArtefactError(f"{path}: empty; delete it and run its stage again")


def read_records(path: Path, cls: type[R]) -> tuple[dict[str, Any], list[R]]:
    """The meta line and the records that :func:`write_records` wrote."""
    meta = read_meta(path)
    records: list[R] = []
    parse = parser(cls)
    for number, value in itertools.islice(read_lines(path), 1, None):
        try:
            records.append(parse(value))
        except ArtefactError as fault:
            raise ArtefactError(f"{path}:{number}: {fault}") from fault
    return meta, records
