"""The base of every error that is the user's to mend; the command line prints it without a traceback."""


class RmxError(ValueError):
    pass


class Interrupted(RmxError):
    """A signal ended the work; the message says what is kept of it."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum
