"""How torch's threads wait for each other, set before torch is loaded.

By default they spin for milliseconds. Where another program shares the cores, a thread then spins on the very core that
the thread it waits for needs, and a pass takes many times its time alone. Threads that sleep lose little
(docs/training.md has the figures).
"""

import os
import sys

CHOSEN_BY_THE_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def let_threads_sleep() -> None:
    """Let threads sleep while they wait, unless the user's environment says how; OpenMP reads it once, with torch."""
    if "torch" not in sys.modules and not any(name in os.environ for name in CHOSEN_BY_THE_USER):
        os.environ["OMP_WAIT_POLICY"] = "passive"
