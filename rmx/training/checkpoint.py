"""The state of a training on disk: complete or absent, restored if it fits, saved before a signal ends a run."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import safetensors
import safetensors.torch
import torch

from rmx.artefacts import replacing
from rmx.errors import Interrupted
from rmx.models.lora_layers import Masters

PARTS = ("exp_avg", "exp_avg_sq")  # of AdamW
FIELDS = ("step", "token_budget", "shifts", "stopped")  # of State


@dataclass
class State:
    """All that changes from step to step."""

    masters: Masters
    optimizer: torch.optim.Optimizer  # of the masters
    token_budget: int  # halved where memory ran out
    step: int = 0  # steps that were made: the data position, the schedule and the random streams follow from it
    shifts: list[float] = field(default_factory=list)  # of the last steps, for the early stop
    stopped: bool = False  # early


class Checkpoint:
    """One file with the last saved state of one training.

    Args:
        origin: what the training depends on; a checkpoint of another origin is not restored.
        seconds: minimum time between two writes.
        write: whether this process writes (one of a group does).
    """

    def __init__(self, path: Path, origin: str, seconds: float = 10.0, write: bool = True) -> None:
        self.path, self.origin, self.seconds, self.write = path, origin, seconds, write
        self.signum = 0  # of the signal that came in, or 0
        self.saved: int | None = None  # the step of the file's state
        self.last = time.monotonic()

    def peek(self) -> int:
        """The step from which training will continue: 0 without a complete checkpoint of the same origin."""
        meta = self._meta()
        return int(meta["step"]) if meta else 0

    def _meta(self) -> dict[str, Any] | None:
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                meta: dict[str, Any] = json.loads((file.metadata() or {}).get("rmx", "{}"))
        except (OSError, safetensors.SafetensorError, ValueError):
            return None  # none was written, or it is torn: the training starts at its beginning
        return meta if meta.get("origin") == self.origin else None

    def restore(self, state: State) -> None:
        """Set ``state`` to what the file holds, if it belongs to this training."""
        meta = self._meta()
        if meta is None:
            return
        tensors = safetensors.torch.load_file(self.path)
        count = len(state.masters.sizes)
        moments = {part: torch.cat([tensors[f"{n}.{part}"].flatten() for n in range(count)]) for part in PARTS}
        moments["step"] = torch.tensor(float(meta["step"]))
        with torch.no_grad():
            state.masters.flat.copy_(torch.cat([tensors[f"{n}.value"].flatten() for n in range(count)]))
        state.optimizer.load_state_dict({**state.optimizer.state_dict(), "state": {0: moments}})
        for name in FIELDS:
            setattr(state, name, meta[name])
        self.saved = state.step

    def save(self, state: State) -> None:
        """Write ``state``, whole or not at all."""
        if not self.write or state.step == self.saved:
            return
        tensors = {}
        masters = state.masters
        own = state.optimizer.state[masters.flat]
        for part, whole in (("value", masters.flat), *((part, own[part]) for part in PARTS)):
            pieces = whole.detach().cpu().split(masters.sizes)
            for number, (piece, shape) in enumerate(zip(pieces, masters.shapes, strict=True)):
                tensors[f"{number}.{part}"] = piece.view(shape)
        meta = {"origin": self.origin, **{name: getattr(state, name) for name in FIELDS}}
        with replacing(self.path) as aside:
            safetensors.torch.save_file(tensors, aside, metadata={"rmx": json.dumps(meta)})
        self.saved, self.last = state.step, time.monotonic()

    def after_step(self, state: State, last: bool, stop: int) -> None:
        """Save if it is time, after the last step, or before stopping for the signal ``stop`` (0: none).

        Raises:
            Interrupted: because of ``stop``.
        """
        if last or stop or time.monotonic() - self.last >= self.seconds:
            self.save(state)
        if stop:
            name, kept = signal.Signals(stop).name, f"checkpoint of step {state.step} in {self.path}"
            raise Interrupted(f"train: {name} after step {state.step}; {kept}; start again to continue", stop)

    def describe(self) -> str:
        """Where the last good state is."""
        made = self.peek()  # the file itself: another process may have written it
        return f"checkpoint of step {made} in {self.path}" if made else "no checkpoint yet"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the first SIGTERM or SIGINT is kept for :meth:`after_step`; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set handlers
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def keep(signum: int, _: FrameType | None) -> None:
            self.signum = signum
            for number, handler in before.items():
                signal.signal(number, handler)

        try:
            for number in before:
                signal.signal(number, keep)
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signum:
            signal.raise_signal(self.signum)  # it came after the last look at it
