"""Models that tests convert from GGUF files are kept for this run of the tests alone."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_model_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # by the processes of pytest-xdist
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RMX_CACHE", str(shared / "rmx-cache"))
        yield
