"""`make bench`: pytest-benchmark runs the rounds; the table and the file of results are ours (report.py)."""

import pytest
import shapes
from report import Report

REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()
    config.option.benchmark_quiet = True  # its table knows neither ratios nor shares


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    return request.config.stash[REPORT]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if report.rows or report.skipped:
        terminalreporter.write_line("\n" + report.table())
    if report.rows and shapes.mode_name() != "quick":
        terminalreporter.write_line(f"\nWritten to {report.write()}")
