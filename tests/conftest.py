"""What holds for all tests: a cache of models of this run's own, and Ctrl-C that is heard."""

import os
import signal
from collections.abc import Iterator

import pytest

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
