"""Reading and writing the files of a run.

A file is written beside its place, synced and renamed, so it is complete or absent. A journal grows by complete lines.
An error of a reader names the file and the line.
"""

import codecs
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import re
import reprlib
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import pydantic

from rmx.errors import RmxError, close_to

R = TypeVar("R")


class ArtefactError(RmxError):
    """A file is missing, damaged, or does not have the expected content."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (file or directory), and rename it to ``path`` if the body succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    remove(aside)
    try:
        yield aside
        usual = _usual_mode(path)
        for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            fd = os.open(file, os.O_RDONLY)
            try:
                if file.is_file():  # safetensors makes its files readable for their owner only
                    os.fchmod(fd, stat.S_IMODE(os.fstat(fd).st_mode) | usual)
                os.fsync(fd)
            finally:
                os.close(fd)
        old = path.with_name(f".{path.name}.old.partial")
        if path.is_dir():  # a directory cannot be replaced in one step: rename the old one, then delete it
            remove(old)
            os.replace(path, old)
        os.replace(aside, path)
        remove(old)  # also if an earlier process was killed between these steps
    except BaseException as fault:
        remove(aside)
        if isinstance(fault, OSError) and fault.filename is None:
            fault.filename = str(path)  # the error of a full disk names no file
        if (
            number := re.search(r"\(os error (\d+)\)", str(fault))
            if type(fault).__name__ == "SafetensorError"
            else None
        ):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from fault
        raise


def _usual_mode(path: Path) -> int:
    """Permissions of a new file beside ``path``. A file is made to find out, since reading the umask changes it."""
    probe = path.with_name(f".{path.name}.mode.partial")
    try:
        fd = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        os.close(fd)
    finally:
        probe.unlink(missing_ok=True)
    return mode


@contextmanager
def lock_file(path: Path) -> Iterator[int]:
    """Yield the descriptor of a file to lock. The file is created if it is missing, and its content is kept.

    Raises:
        ArtefactError: the path is a symbolic link, which another user may have made to one of your files.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as fault:
        if fault.errno == errno.ELOOP:
            raise ArtefactError(f"{path}: expected a file to lock, got a symbolic link; remove it") from fault
        raise
    try:
        yield fd
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fingerprint(content: bytes) -> str:
    """A short hash of some content, by which a change is noticed."""
    return hashlib.sha256(content).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_records(path: Path, records: Iterable[Any], meta: dict[str, Any]) -> None:
    """Write JSON lines: a first line ``{"meta": ...}``, then one dataclass record in each line."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"meta": meta}, ensure_ascii=False) + "\n")
        for record in records:
            file.write(json.dumps(_written(record), ensure_ascii=False) + "\n")


def _written(record: Any) -> dict[str, Any]:
    """Without the fields that have the value at which they are not written."""
    value = dataclasses.asdict(record)
    for own in dataclasses.fields(record):
        if "unwritten" in own.metadata and value[own.name] == own.metadata["unwritten"]:
            del value[own.name]
    return value


def read_lines(path: Path, *, plain: bool = False, whole: bool = False) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of every line that is not blank.

    Args:
        plain: also refuse NaN, infinite numbers, numbers beyond the range of a float, text that is not valid Unicode,
            and duplicate keys.
        whole: leave out a last line without its end, which is being written or was cut off by a kill.
    """
    if not path.is_file():
        raise ArtefactError(f"{path}: {'expected a file' if path.exists() else 'no such file'}")
    strict: dict[str, Any] = {"parse_constant": _refused, "parse_float": _finite, "object_pairs_hook": _once}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not text.strip() or (whole and not line.endswith(b"\n")):
                continue
            try:
                value = json.loads(text.decode("utf-8"), **strict if plain else {})
                if plain:
                    json.dumps(value, ensure_ascii=False).encode()
            except UnicodeEncodeError as fault:
                said = "text with half of a surrogate pair, which is not a character"
                raise ArtefactError(f"{path}:{number}: not a JSON value: {said}") from fault
            except RecursionError as fault:
                raise ArtefactError(f"{path}:{number}: not a JSON value: nested too deeply") from fault
            except ValueError as fault:  # also of a number with more digits than Python reads
                raise ArtefactError(f"{path}:{number}: not a JSON value: {fault}") from fault
            yield number, value


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is beyond the range of a float; write it as text in quotes")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
    return value


def parser(cls: type[R]) -> Callable[[Any], R]:
    """Return a function that makes a record of a JSON value; unknown fields and wrong types are errors."""
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


SHORT = reprlib.Repr()  # shortens a wrong value in a message, which may have any size
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother, SHORT.maxlong = 3, 200, 200, 80


def describe(fault: pydantic.ValidationError, model: type[pydantic.BaseModel] | None = None) -> str:
    """Describe each error as "key.path: what is wrong, got value"; suggest the most similar key of ``model``."""
    lines = []
    for error in fault.errors():
        where = ".".join(str(part) for part in error["loc"]) or "value"
        got = "" if error["type"] in ("missing", "extra_forbidden") else f", got {SHORT.repr(error['input'])}"
        text = {"missing": "missing", "extra_forbidden": "unknown key"}.get(error["type"], error["msg"])
        if error["type"] == "extra_forbidden" and model is not None:
            got = close_to(str(error["loc"][-1]), _keys(model, error["loc"][:-1]))
        lines.append(f"{where}: {text}{got}")
    return "; ".join(lines)


def _keys(model: type[pydantic.BaseModel], where: Iterable[int | str]) -> list[str]:
    """The keys of the section at ``where``."""
    for part in where:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            sections = [annotation, *get_args(annotation)]
            model = next(s for s in sections if isinstance(s, type) and issubclass(s, pydantic.BaseModel))
    return list(model.model_fields)


def read_meta(path: Path) -> dict[str, Any]:
    """Read the meta line only."""
    for number, value in read_lines(path):
        if isinstance(value, dict) and isinstance(value.get("meta"), dict):
            meta: dict[str, Any] = value["meta"]
            return meta
        raise ArtefactError(f'{path}:{number}: expected a first line {{"meta": ...}}')
    raise ArtefactError(f"{path}: the file is empty; delete it and run its stage again")


def read_records(path: Path, cls: type[R]) -> tuple[dict[str, Any], list[R]]:
    """Read the meta line and the records of a file that :func:`write_records` wrote."""
    meta = read_meta(path)
    records: list[R] = []
    parse = parser(cls)
    for number, value in itertools.islice(read_lines(path), 1, None):
        try:
            records.append(parse(value))
        except ArtefactError as fault:
            raise ArtefactError(f"{path}:{number}: {fault}") from fault
    return meta, records


class Journal(Generic[R]):
    """A file to which units of records are appended, so that a kill loses at most the unit that is being written.

    It has JSON lines: a first line ``{"meta": ...}``, then one array of records for each unit, synced before
    :meth:`append` returns.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)

    @classmethod
    def open(cls, path: Path, record: type[R], meta: dict[str, Any]) -> tuple["Journal[R]", list[R]]:
        """Return (the journal, the records in it). It starts empty if there is none, or if its ``meta`` differs.

        An incomplete last line, which a kill leaves behind, is cut off.

        Raises:
            ArtefactError: a complete line is damaged. OSError: the file cannot be read or written; the error names it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        header = {"meta": json.loads(json.dumps(meta))}
        if path.exists():
            with path.open("rb") as file:
                whole = sum(len(line) for line in file if line.endswith(b"\n"))
            os.truncate(path, whole)
            lines = read_lines(path)
            if next(lines, (1, None))[1] == header:
                return cls(path), list(_records(path, lines, parser(record)))
        with replacing(path) as aside:
            aside.write_text(json.dumps(header, ensure_ascii=False) + "\n", encoding="utf-8")
        return cls(path), []

    @staticmethod
    def read(path: Path, record: type[R], meta: dict[str, Any]) -> list[R]:
        """The records of the lines that are whole, without touching the file; none if its ``meta`` differs.

        Raises:
            ArtefactError: a complete line is damaged, or there is no such file.
        """
        lines = read_lines(path, whole=True)
        if next(lines, (1, None))[1] != {"meta": json.loads(json.dumps(meta))}:
            return []
        return list(_records(path, lines, parser(record)))

    def append(self, records: Iterable[R]) -> None:
        """Write one unit."""
        unit = [dataclasses.asdict(record) for record in records]  # type: ignore[call-overload]
        line = memoryview((json.dumps(unit, ensure_ascii=False) + "\n").encode())
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as fault:
            fault.filename = str(self.path)
            raise

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Journal[R]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _records(path: Path, units: Iterable[tuple[int, Any]], parse: Callable[[Any], R]) -> Iterator[R]:
    for number, unit in units:
        try:
            if not isinstance(unit, list):
                raise ArtefactError(f"expected a JSON array, got {type(unit).__name__}")
            yield from map(parse, unit)
        except ArtefactError as fault:
            raise ArtefactError(f"{path}:{number}: {fault}") from fault
