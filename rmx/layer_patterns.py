"""Settings of single layers, by regular expressions of their paths, as PEFT's rank_pattern and alpha_pattern."""

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, TypeVar

import pydantic

MOST_REPEATS, MOST_OPTIONAL, LONGEST = 3, 8, 200  # of a pattern: *, + and {}; ?; characters

T = TypeVar("T")


def _checked(pattern: str) -> str:
    """Refuse what is no regular expression, and what could be searched for ever in a path of a hundred characters.

    Adapters of others bring patterns with them. A repeat of a group can take exponential time, and each repeat of a
    character takes one more power of the length.
    """
    bare = re.sub(r"\\.|\[(?:\\.|[^\]\\])+\]", "x", pattern).replace("(?", "(")
    if re.search(r"\)[*+{]", bare):
        raise ValueError(f"{pattern!r} repeats a group, so matching may never end: repeat a character or a class")
    repeats, optional = sum(map(bare.count, "*+{")), bare.count("?")
    if repeats > MOST_REPEATS or optional > MOST_OPTIONAL or len(pattern) > LONGEST:
        raise ValueError(
            f"{pattern[:LONGEST]!r} is too complex: expected at most {MOST_REPEATS} repeats, {MOST_OPTIONAL} "
            f"question marks and {LONGEST} characters; write several patterns"
        )
    try:
        re.compile(_whole(pattern))
    except (re.error, OverflowError) as fault:
        raise ValueError(f"{pattern!r} is not a regular expression: {fault}") from fault
    return pattern


LayerPattern = Annotated[str, pydantic.AfterValidator(_checked)]


def _whole(pattern: str) -> str:
    """As get_pattern_key of PEFT 0.21 writes it: the pattern is a dotted end of the path, or all of it."""
    return rf"(.*\.)?({pattern})$"


def value_of(patterns: Mapping[str, T] | None, path: str, default: T) -> T:
    """The value of the first pattern that matches the path of a layer, else ``default``."""
    for pattern, value in (patterns or {}).items():
        if re.match(_whole(pattern), path):
            return value
    return default


def unmatched(patterns: Mapping[str, T] | None, paths: Iterable[str]) -> str | None:
    """The first pattern that matches none of the paths."""
    known = list(paths)
    return next((p for p in patterns or {} if not any(re.match(_whole(p), path) for path in known)), None)
