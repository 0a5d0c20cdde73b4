"""What a training step frees stays with the process until the training ends: counted in page faults, not in seconds."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from rmx.training.allocator import keeping_freed_memory

MIB = 1 << 20
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")


def faults() -> int:
    """Page faults of 100 MiB of blocks that are all held at once and then freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(MIB) for _ in range(25)]
    assert all(bool(block[-1]) for block in blocks)
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@glibc
def test_a_later_step_touches_no_new_page_and_the_end_gives_all_back() -> None:
    with keeping_freed_memory():
        steps = [faults() for _ in range(3)]
        assert steps[-1] < 6400  # of the 25600 that 100 MiB have
        held = resident()
    assert resident() < held - 60 * MIB
    with keeping_freed_memory():  # again, from the settings that the first one left
        steps = [faults() for _ in range(3)]
        assert steps[-1] < 6400


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    with keeping_freed_memory():
        pass
