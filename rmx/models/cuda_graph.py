"""One CUDA graph: kernels that are captured once and launched together."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


class Graph:
    """The kernels of a function, recorded once. Graphs of one pool share their memory."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self.device, self.pool, self.graph = device, pool, torch.cuda.CUDAGraph()

    @staticmethod
    def serves(device: torch.device) -> bool:
        return device.type == "cuda"

    @staticmethod
    def new_pool() -> Any:
        return torch.cuda.graph_pool_handle()

    @staticmethod
    def first(device: torch.device, function: Callable[[], None]) -> None:
        """Call a function that is recorded later: libraries choose kernels and take their workspaces now."""
        side, current = _side(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            function()
        current.wait_stream(side)

    def capture(self, function: Callable[[], None]) -> None:
        """Record what ``function`` launches; nothing of it runs. RuntimeError: it does what cannot be recorded."""
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # within a capture torch frees none of what it keeps for later, and would be out of it
        with torch.cuda.stream(_side(self.device)):  # torch.cuda.graph would stay on this stream after a fault
            self.graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                try:
                    function()
                finally:
                    self.graph.capture_end()
            except BaseException:  # torch's random numbers would wait for the end of the capture
                random = torch.cuda.default_generators[self.device.index or 0]
                random.graphsafe_set_state(random.clone_state())
                raise

    def replay(self) -> None:
        self.graph.replay()


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: each that multiplies matrices keeps a workspace."""
    return torch.cuda.Stream(device)


def raise_full_memory(fault: RuntimeError) -> None:
    """A fault during a capture is followed by one of its end; the first one counts."""
    found: BaseException | None = fault
    while found is not None:
        if isinstance(found, torch.OutOfMemoryError):
            raise found
        if "out of memory" in str(found):  # of the driver
            raise torch.OutOfMemoryError(str(found)) from fault
        found = found.__context__
