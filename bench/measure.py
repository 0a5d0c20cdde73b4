"""One provider in one case: first correctness, then memory, then time in rounds that alternate with eager's.

The rounds of a provider, of eager PyTorch and of the floor (see roofline.py) take turns, so that all three see the same
machine: ratio = median eager / median provider, share = median floor / median provider.
"""

import ctypes
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import providers
import pytest
import roofline
import shapes
import torch
from oracle import LEAST_ROWS, Oracle, Outputs
from report import Report, Row, Spread

MOST_ROUNDS = 50


@dataclass
class Work:
    """A case with its inputs: ``compute(run, rows)`` calls a provider with those rows, backward included."""

    case: shapes.Case
    compute: Callable[[providers.Run, slice], Outputs]
    oracle: Oracle
    floor: roofline.Floor

    def all_rows(self, run: providers.Run) -> Outputs:
        """Of N rows, or of at least LEAST_ROWS: then in calls of N rows each."""
        N = self.case.N
        parts = [self.compute(run, slice(start, start + N)) for start in range(0, max(N, LEAST_ROWS), N)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def once(self, run: providers.Run) -> None:
        self.compute(run, slice(0, self.case.N))


_prepared: dict[shapes.Case, Work] = {}


def prepare(build: Callable[[shapes.Case], Work], case: shapes.Case) -> Work:
    """The case's inputs and oracle, made once for all its providers; those of the case before go first."""
    if case not in _prepared:
        _prepared.clear()
        _prepared[case] = build(case)
    return _prepared[case]


def _status(field: str) -> int:
    """Bytes, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _return_free_memory() -> None:
    """Otherwise memory that malloc kept from earlier calls serves the next one, and is not seen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def extra_peak_bytes(work: Callable[[], object]) -> int | None:
    """The peak above what was held before the call, results included; None where the system doesn't tell."""
    gc.collect()
    if providers.DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    _return_free_memory()
    reset.write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    work()
    return max(0, _status("VmHWM") - before)


def compare(benchmark: Any, report: Report, work: Work, name: str) -> None:
    """Add one row to the report, of a measurement or of the reason why there is none.

    Raises:
        AssertionError: the provider's results are off by over twice eager's error; then nothing is timed. Of a
            library that is not ours, this is reported in place of a time, for no change here would mend it.
    """
    case, operator = work.case, work.case.operator
    reason = providers.missing(operator, name)
    if name in ("eager", "compile"):
        reason = reason or case.eager_misfit
    if reason:
        report.skip(case, name, reason)
        pytest.skip(reason)
    run = providers.provider(operator, name)
    try:
        outputs = work.all_rows(run)
    except torch._dynamo.exc.TorchDynamoException as fault:
        reason = f"torch.compile failed: {str(fault).strip().splitlines()[0]}"
        report.skip(case, name, reason)
        pytest.skip(reason)
    try:
        errors = work.oracle.check(outputs)
    except AssertionError as fault:
        if name not in providers.OTHERS:
            raise
        reason = f"not timed, its results fail the check: {fault}"
        report.skip(case, name, reason)
        pytest.xfail(reason)
    del outputs
    if benchmark.disabled:
        return
    memory = extra_peak_bytes(lambda: work.once(run))
    heavy = case.eager_seconds > shapes.HEAVY
    alone = case.eager_misfit or (heavy and name == "eager")  # its ratio to itself is not worth the minutes
    eager = None if alone else providers.provider(operator, "eager")
    eager_times: list[float] = []
    floor_times: list[float] = []
    times: list[float] = []

    def interleave() -> None:
        roofline.flush()
        floor_times.append(work.floor.measure())
        if eager is not None:
            roofline.flush()
            eager_times.append(roofline.seconds(lambda: work.once(eager)))
        roofline.flush()

    def timed() -> None:
        times.append(roofline.seconds(lambda: work.once(run)))

    rounds = shapes.mode().fewest
    if not heavy:  # else each round counts, and the calls above have warmed everything
        round_seconds = roofline.seconds(interleave) + roofline.seconds(timed)
        rounds = min(MOST_ROUNDS, max(rounds, int(case.budget / round_seconds)))
        for warmed in (times, eager_times, floor_times):
            warmed.clear()
    benchmark.pedantic(timed, setup=interleave, rounds=rounds)
    median, floor = statistics.median(times), statistics.median(floor_times)
    row = Row(
        operator=operator,
        shape=case.shape,
        dtype=case.dtype_name,
        provider=name,
        rows=case.N,
        hidden=case.H or None,
        vocabulary=case.V,
        rounds=rounds,
        time=Spread.of(times),
        eager=Spread.of(eager_times) if eager_times else None,
        no_eager=case.eager_misfit,
        ratio=statistics.median(eager_times) / median if eager_times else None,
        floor=Spread.of(floor_times),
        floor_of=work.floor.label,
        floor_flops=work.floor.flops,
        floor_bytes=work.floor.bytes,
        share=floor / median,
        extra_memory_mib=None if memory is None else memory / 2**20,
        errors=errors,
        eager_errors=work.oracle.eager,
    )
    benchmark.extra_info.update(ratio=row.ratio, share=row.share, extra_memory_mib=row.extra_memory_mib)
    report.add(row)
