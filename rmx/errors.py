"""The base class of errors that the user can fix; the command line prints their message without a traceback."""

import difflib
from collections.abc import Iterable

CONTROL = {c: 0x2400 + c for c in range(32)} | {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
CONTROL |= dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")  # of direction
SEEN = {c: sign for c, sign in CONTROL.items() if chr(c) not in "\n\t"}


def visible(text: str) -> str:
    """Make text safe for a terminal: control characters, also those of escape sequences, become visible signs."""
    return text.translate(SEEN)


def close_to(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'epochs'?" for the known word that is most similar; "" if none is similar."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


class RmxError(ValueError):
    """An error that the user can fix. The message says what was expected, what came, and what to do."""


class AnalysisError(RmxError):
    """An analysis cannot run: two models, or a model and a text, do not match, or an option is invalid."""


class Interrupted(RmxError):
    """A signal stopped the work. The message says what is kept."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
