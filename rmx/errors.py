"""The base of every error that is the user's to mend; the command line prints it without a traceback."""

import difflib
from collections.abc import Iterable

CONTROL = {c: 0x2400 + c for c in range(32)} | {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")
CONTROL |= dict.fromkeys([0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")  # of direction
SEEN = {c: sign for c, sign in CONTROL.items() if chr(c) not in "\n\t"}


def visible(text: str) -> str:
    """Text for a terminal: control characters, escape sequences among them, as signs that can be seen."""
    return text.translate(SEEN)


def close_to(word: str, known: Iterable[str]) -> str:
    """ "; did you mean 'epochs'?", or nothing where no known word is like it."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


class RmxError(ValueError):
    pass


class Interrupted(RmxError):
    """A signal ended the work; the message says what is kept of it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
