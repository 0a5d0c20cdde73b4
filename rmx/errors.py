"""The base of every error that is the user's to mend; the command line prints it without a traceback."""


class RmxError(ValueError):
    pass
