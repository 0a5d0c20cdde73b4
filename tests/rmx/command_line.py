"""Commands of ``rmx`` as a user calls them, with what they print: in this process, or in one of their own."""

import contextlib
import io
import os
import subprocess
import sys
from unittest.mock import patch

from rmx import cli

Done = subprocess.CompletedProcess[str]


def command(*arguments: object) -> Done:
    """In this process, which has imported already what a new one needs seconds for."""
    line = ["rmx", *map(str, arguments)]
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.object(sys, "argv", line),
        patch.dict(os.environ, {"COLUMNS": "200"}),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(line, code, output.getvalue(), errors.getvalue())


def process(*arguments: object) -> Done:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    line = [sys.executable, "-m", "rmx.cli", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300, check=False)
