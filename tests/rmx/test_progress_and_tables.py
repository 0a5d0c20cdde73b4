"""What a log holds: a line a minute instead of bars, and tables whose numbers are whole."""

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from test_evaluate_and_report import evaluation
from tqdm.auto import tqdm

from rmx import cost, progress, tables
from rmx.config import CostConfig
from rmx.records import Evaluation, Interval
from rmx.reports import report


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error of a process whose output is piped."""
    file = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=file, width=80))
    return file


def minutes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Let every minute pass at once, whenever the last one's line is written, from when the returned event is set."""
    now, may_pass = iter(range(0, 10**6, 60)), threading.Event()

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            may_pass.wait(60)
            return super().wait(1e-4)

    monkeypatch.setattr(progress, "threading", SimpleNamespace(Event=Ended, Thread=threading.Thread))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    return may_pass


def lines_after(log: io.StringIO, count: int) -> list[str]:
    while len(log.getvalue().splitlines()) < count:
        threading.Event().wait(1e-3)
    return log.getvalue().splitlines()[:count]


def test_a_log_gets_a_line_a_minute(log: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    may_pass = minutes(monkeypatch)
    may_pass.set()
    with progress.progress("rollouts", 1280, "rollouts") as update:
        silent = lines_after(log, 2)  # the first unit takes its time
    assert silent[0] == "rollouts: 0 of 1280 rollouts after 60 s, time left not known yet"
    assert silent[1] == "rollouts: 0 of 1280 rollouts after 2 min, time left not known yet"
    log.truncate(0)
    log.seek(0)
    may_pass.clear()
    with progress.progress("train", 40, "steps") as update:
        update(10, "")  # of an earlier start
        update(20, "loss +0.1")
        may_pass.set()
        first = lines_after(log, 1)[0]
    assert first == "train: 20 of 40 steps after 60 s, about 2 min left loss +0.1"
    ended = log.getvalue()
    update(30, "")
    assert log.getvalue() == ended  # nobody speaks any more


def test_a_short_stage_says_nothing(log: io.StringIO) -> None:
    with progress.progress("select", 3, "rollouts") as update:
        for done in range(4):
            update(done, "")
    assert log.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.4, "3 s"), (89, "89 s"), (100, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text


def test_bars_of_other_libraries_are_drawn_on_terminals_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def bar() -> str:
        file = io.StringIO()
        with progress.quiet():
            list(tqdm(range(3), file=file))
        return file.getvalue()

    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=True))
    assert "3/3" in bar()
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO()))
    assert bar() == ""
    file = io.StringIO()
    list(tqdm(range(3), file=file))
    assert "3/3" in file.getvalue()  # as before


@pytest.mark.thorough
def test_a_model_loads_without_a_word(tiny_path: Path) -> None:
    program = "from rmx import config; from rmx.models import model; model.load(config.ModelConfig("
    program += f"name={str(tiny_path)!r}, device='cpu'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "it/s" not in done.stderr and "Loading" not in done.stderr, done.stderr


def named(*names: str) -> Evaluation:
    plain, gain = evaluation(0.125, 0.25), Interval(0.281, 0.125, 0.438)
    categories = dict.fromkeys(names, (0.25, 0.75))
    return Evaluation(plain.problems, plain.samples, plain.base, plain.tuned, gain, categories)


@pytest.mark.parametrize("columns", ["20", "60", "80", "200"])
@pytest.mark.parametrize("name", ["sum", "base_conversion", "a_task_whose_name_is_longer_than_a_terminal_is_wide" * 2])
def test_numbers_are_never_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    tables.show(report.table(named(f"reasoning_gym:{name}", "gcd")))
    rows = capsys.readouterr().out.splitlines()
    whole = "all 0.300 [0.200, 0.400] 0.500 [0.400, 0.600] 0.281 [0.125, 0.438]"
    assert whole in {" ".join(row.split()) for row in rows}
    (cut,) = [row.split() for row in rows if "0.750" in row and "gcd" not in row]
    assert cut[1:] == ["0.250", "0.750", "+0.500"]
    assert cut[0] == name or (cut[0].endswith("…") and name.startswith(cut[0][:-1]) and len(cut[0]) > 8)
    assert sum("…" in row for row in rows) <= 1  # in the name alone


def test_costs_are_never_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    row = cost.StageCost("rollouts", 123456.7, 123456789, 12345678, 123.45, 2.5)
    tables.show(cost.table([row], CostConfig(per_hour=1)))
    printed = capsys.readouterr().out
    assert "…" not in printed and "rollouts" in printed and "123,456,789" in printed and "12,345,678" in printed


def test_every_table_is_made_the_same_way() -> None:
    """A Table that is made elsewhere could cut its numbers."""
    sources = {path.name: path.read_text() for path in Path(tables.__file__).parent.rglob("*.py")}
    assert [name for name, text in sources.items() if "Table(" in text] == ["tables.py"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_files_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    from rmx.artefacts import replacing, write_json

    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", 1)
        with replacing(tmp_path / "folder") as aside:
            aside.mkdir()
            save_file({"x": zeros(1)}, aside / "a.safetensors")
        with replacing(tmp_path / "b.safetensors") as aside:
            save_file({"x": zeros(1)}, aside)
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert found == dict.fromkeys(["a.json", "a.safetensors", "b.safetensors"], mode)
