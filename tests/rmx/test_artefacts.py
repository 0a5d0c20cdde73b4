"""The journal: what a kill, a full disk, other settings or a damaged line leave of it."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from rmx.artefacts import ArtefactError, Journal, read_records
from rmx.records import Rollout

META = {"seed": 3, "model": "tiny", "files": ("a", "b")}


def unit(name: str, samples: int = 2) -> list[Rollout]:
    return [
        Rollout(name, n, [1, 3], [5, n, 2], "stop", f"{name}\n é {n}", [-0.5, -1.25e-5, 0.0]) for n in range(samples)
    ]


def written(path: Path, *units: list[Rollout]) -> bytes:
    journal, found = Journal.open(path, Rollout, META)
    assert found == []
    with journal:
        for rollouts in units:
            journal.append(rollouts)
    return path.read_bytes()


def test_units_are_read_back_and_more_can_follow(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rollouts.journal"
    whole = written(path, unit("a"), unit("b", 1))
    assert whole.count(b"\n") == 3
    journal, found = Journal.open(path, Rollout, META)
    assert found == unit("a") + unit("b", 1)
    with journal:
        journal.append(unit("c"))
    assert path.read_bytes().startswith(whole)
    assert Journal.open(path, Rollout, META)[1] == unit("a") + unit("b", 1) + unit("c")


def test_a_unit_is_on_the_disk_when_append_returns(tmp_path: Path) -> None:
    journal, _ = Journal.open(tmp_path / "j", Rollout, META)
    journal.append(unit("a"))
    assert Journal.open(tmp_path / "j", Rollout, META)[1] == unit("a")  # the first is still open


def test_a_unit_torn_at_any_byte_is_lost_alone(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.journal"
    first = written(path, unit("a"))
    journal, _ = Journal.open(path, Rollout, META)
    with journal:
        journal.append(unit("b"))
    whole = path.read_bytes()
    for size in range(len(first), len(whole)):
        path.write_bytes(whole[:size])
        journal, found = Journal.open(path, Rollout, META)
        assert found == unit("a")
        with journal:
            journal.append(unit("b"))
        assert path.read_bytes() == whole


def test_a_file_torn_in_its_first_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.journal"
    whole = written(path, unit("a"))
    for size in range(whole.index(b"\n") + 1):
        path.write_bytes(whole[:size])
        assert written(path, unit("a")) == whole


def test_other_settings_begin_anew(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.journal"
    written(path, unit("a"))
    journal, found = Journal.open(path, Rollout, {**META, "seed": 4})
    assert found == []
    with journal:
        journal.append(unit("b"))
    assert Journal.open(path, Rollout, {**META, "seed": 4})[1] == unit("b")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"sample": 0', b'"sample": ?', r"rollouts.journal:2: not a JSON value"),
        (b'"sample": 0', b'"sample": "x"', r"rollouts.journal:2: sample: .* got 'x'"),
        (b'"sample": 0', b'"smaple": 0', r"rollouts.journal:2: unknown field 'smaple'"),
        (b"[{", b'{"a": [{', r"rollouts.journal:2: not a JSON value"),
        (b'{"meta"', b'{"meta', r"rollouts.journal:1: not a JSON value"),
    ],
)
def test_a_damaged_line_is_an_error_that_names_it(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = tmp_path / "rollouts.journal"
    whole = written(path, unit("a"), unit("b"))
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(ArtefactError, match=message):
        Journal.open(path, Rollout, META)


def test_a_full_disk_names_the_file_and_keeps_what_was_whole(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the second unit fits in part."""
    path = tmp_path / "rollouts.journal"
    script = (
        "import resource, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_artefacts import META, Rollout, unit\n"
        "from rmx.artefacts import Journal\n"
        "path = Path(sys.argv[1])\n"
        "journal, _ = Journal.open(path, Rollout, META)\n"
        "journal.append(unit('a'))\n"
        "size = path.stat().st_size + 30\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n"
        "try:\n"
        "    journal.append(unit('b'))\n"
        "except OSError as fault:\n"
        "    print(fault.errno, fault)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(errno.EFBIG)) and str(path) in done.stdout
    assert not path.read_bytes().endswith(b"\n")
    assert Journal.open(path, Rollout, META)[1] == unit("a")


def test_rollouts_written_before_there_were_logprobs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    line = '{"problem_id": "a", "sample": 0, "prompt_ids": [1], "completion_ids": [2], '
    line += '"finish_reason": "stop", "text": ""}'
    path.write_text('{"meta": {}}\n' + line + "\n")
    assert read_records(path, Rollout)[1] == [Rollout("a", 0, [1], [2], "stop", "", None)]
