"""Problems from data sets: of the Hugging Face hub, of a directory, or in one Parquet, JSON or CSV file."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rmx.config import ProblemSource
from rmx.errors import RmxError, close_to
from rmx.grading.answers import extract_answer
from rmx.records import Problem

FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
SHUFFLED = 10_000  # rows of a stream among which the next one is drawn
AFTER, BOXED = "after ", "boxed"
PLACE = re.compile(r"\{(\w[\w .-]*)\}")

Row = dict[str, Any]
Read = Callable[[Row], str]


class DataError(RmxError):
    """A data set cannot be loaded, or its rows are not what the configuration says."""


def read_dataset(source: ProblemSource, seed: int, locate: Callable[[str], Path] = Path) -> list[Problem]:
    """The problems of a source with a ``dataset``, the first ``limit`` rows of a shuffle by ``seed`` if there is one.

    Args:
        locate: where a path of the configuration is.

    Raises:
        DataError: it cannot be loaded, or a row lacks a column or has no text in it; the message names the row.
    """
    assert source.dataset is not None
    name = Path(source.dataset).stem if locate(source.dataset).exists() else source.dataset.rpartition("/")[2]
    question, answer = expression(source.question or "question"), expression(source.answer or "answer")
    category = None if source.category is None else expression(source.category)
    problems: list[Problem] = []
    for where, row in _rows(source, seed, locate):
        try:
            found = question(row), answer(row), name if category is None else category(row)
        except ValueError as fault:
            raise DataError(f"{where}: {fault}") from fault
        if found[2].startswith("reasoning_gym:"):
            raise DataError(f"{where}: category: the prefix reasoning_gym: is reserved for its tasks")
        problems.append(Problem(f"{name}-{len(problems) + 1}", *found))
    if not problems:
        raise DataError(f"{source.dataset}: contains no rows")
    return problems


def expression(text: str) -> Read:
    """How a text is read from a row.

    ``column``: that column: text or a number; a list of answers, joined by commas; or a chat with one user message.
    ``column: after ####``: the text after the last ``####``. ``column: boxed``: the answer of a worked solution.
    ``{a}: {b}``: a text with column names in braces.

    >>> expression("answer: after ####")({"answer": "3 + 4 = 7 #### 7"})
    '7'
    >>> expression("{passage} {question}")({"passage": "Ann has 3 pears.", "question": "How many?"})
    'Ann has 3 pears. How many?'
    """
    if PLACE.search(text):
        return lambda row: PLACE.sub(lambda place: _text(row, place[1]), text)
    column, colon, how = (part.strip() for part in text.partition(":"))
    if not colon:
        return lambda row: _text(row, column)
    if how.startswith(AFTER) and (mark := how.removeprefix(AFTER).strip()):
        return lambda row: _behind(_text(row, column), column, mark)
    if how == BOXED:
        return lambda row: _boxed(_text(row, column), column)
    forms = "a column, `column: after TEXT`, `column: boxed` or a text with {columns}"
    raise DataError(f"problems.sources: {text!r}: expected {forms}")


def _text(row: Row, column: str) -> str:
    if column not in row:
        raise ValueError(f"no column {column!r}; columns: {', '.join(map(repr, row))}{close_to(column, row)}")
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        return _asked(value, column)
    if isinstance(value, list) and value:
        return ", ".join(_plain(part, column) for part in value)
    return _plain(value, column)


def plain_text(value: Any) -> str:
    """A text or a number as text without surrounding space. Raises ValueError if it is neither, or empty."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError("expected text or a number")
    return str(value).strip()


def _plain(value: Any, column: str) -> str:
    try:
        return plain_text(value)
    except ValueError as fault:
        raise ValueError(f"{column}: {fault}, got {value!r}") from fault


def _asked(chat: list[dict[str, Any]], column: str) -> str:
    """The user's message of a chat with no other."""
    roles = [message.get("role") for message in chat]
    if roles != ["user"]:
        raise ValueError(
            f"{column}: expected a chat with one user message, got the roles {', '.join(map(str, roles))} "
            "(prompt.system sets a system message for all problems)"
        )
    return _plain(chat[0].get("content"), f"{column}: content")


def _behind(text: str, column: str, mark: str) -> str:
    _, found, behind = text.rpartition(mark)
    if not found or not behind.strip():
        raise ValueError(f"{column}: expected {mark!r} and an answer after it, got {text[-80:]!r}")
    behind = behind.strip()
    return behind.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", behind) else behind


def _boxed(text: str, column: str) -> str:
    found = extract_answer(text)
    if found is None:
        raise ValueError(f"{column}: expected a solution with an answer, got {text[-80:]!r}")
    return found


def _rows(source: ProblemSource, seed: int, locate: Callable[[str], Path]) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of the rows that are taken."""
    assert source.dataset is not None
    split, path = source.dataset_split or "train", locate(source.dataset)
    options: dict[str, Any] = {"split": split, "streaming": bool(source.streaming)}
    if path.is_file():
        if path.suffix not in FORMATS:
            raise DataError(f"{path}: expected a file that ends with {', '.join(FORMATS)}")
        more = {"sep": "\t"} if path.suffix == ".tsv" else {}
        rows = load_rows(FORMATS[path.suffix], None, data_files={split: str(path)}, **more, **options)
    elif path.is_dir():
        rows = load_rows(str(path), source.dataset_config, **options)
    else:
        rows = load_rows(source.dataset, source.dataset_config, revision=source.revision, **options)
    if source.limit is not None or source.streaming:
        rows = rows.shuffle(seed=seed, **({"buffer_size": SHUFFLED} if source.streaming else {}))
    for number, row in enumerate(itertools.islice(rows, source.limit), start=1):
        yield f"{source.dataset} {split}, row {number}", row


def load_rows(name: str, config: str | None, **options: Any) -> Any:
    """A split of a data set by the library datasets; code that comes with a data set is never run.

    Raises:
        DataError: the library is missing, or there is no such data set, configuration or split.
    """
    try:
        import datasets  # only what names a data set needs it
    except ImportError as fault:
        raise DataError(f"{name}: needs one more package: pip install 'rmx[benchmarks]'") from fault
    try:
        if Path(name).is_dir() and config not in datasets.get_dataset_config_names(name):
            config = None  # plain files in a folder have no configurations
        return datasets.load_dataset(name, config, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as fault:
        raise DataError(f"{name}: cannot be loaded: {fault}") from fault


def content(path: Path) -> Iterable[bytes]:
    """Names and bytes of a file, or of all files of a directory, for a fingerprint."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            yield str(file.relative_to(path)).encode() + b"\0" + file.read_bytes()
