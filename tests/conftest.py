"""What holds for all tests: a model cache of their own, Ctrl-C that is heard, and a list of what was skipped."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest

ELSEWHERE = {"gpu": "on a GPU only", "interpreted": "on a GPU or under TRITON_INTERPRET=1"}

# A shell starts background jobs with SIGINT ignored, and so would the processes be that tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _own_model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # by the processes of pytest-xdist
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMX_CACHE", str(shared / "rmx-cache"))
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What did not run on this machine, and why."""
    skipped = Counter[tuple[str, str, str]]()
    for report in terminalreporter.stats.get("skipped", []):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        where = next((title for marker, title in ELSEWHERE.items() if marker in report.keywords), "skipped")
        skipped[where, report.nodeid.partition("::")[0], reason.removeprefix("Skipped: ")] += 1
    for where in sorted({where for where, *_ in skipped}):
        terminalreporter.section(where)
        if where == ELSEWHERE["gpu"]:
            terminalreporter.write_line(
                "      tests/kernels: the cases of every operator on the device cuda, if there is one"
            )
        for (of, path, reason), count in sorted(skipped.items()):
            if of == where:
                terminalreporter.write_line(f"{count:5} {path}: {reason}")
