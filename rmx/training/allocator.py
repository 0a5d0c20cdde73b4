"""Memory that a step frees is kept for the next step.

glibc hands freed memory back to the system, and the next step touches every page anew: 0.6 ms a MB, six times what the
writing itself takes. Other C libraries, and GPUs, are left as they are.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
LARGEST = 32 << 20  # bytes; from here on glibc always maps a block for itself
SETTLED = 2 * LARGEST  # the trim threshold that glibc's own adaptation ends with


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Inside, freed blocks under 32 MiB stay with the process; at the end all that is free goes back to the system."""
    libc = ctypes.CDLL(None)
    mallopt, malloc_trim = (getattr(libc, name, None) for name in ("mallopt", "malloc_trim"))
    if mallopt is None or malloc_trim is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(M_TRIM_THRESHOLD, SETTLED)
        malloc_trim(0)
