"""What runs survive: kills at any moment. RMX_KILLS sets how many kills of `rmx run` are tried."""

import json
import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import (
    KILLS,
    PER_RUN,
    Kept,
    kill,
    many_units,
    moments,
    outcome,
    start,
)
from test_pipeline import write_yaml

from rmx import artefacts
from rmx.artefacts import Journal
from rmx.config import Config
from rmx.runs import pipeline
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES
from rmx.training.train import MetricsLog

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.thorough
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tiny_config: Config, tmp_path: Path) -> None:
    draw = random.Random(KILLS)
    undisturbed = many_units(tiny_config, tmp_path / "undisturbed")
    began = time.monotonic()
    process = start(write_yaml(undisturbed, tmp_path / "undisturbed.yaml"))
    assert process.wait() == 0
    seconds = time.monotonic() - began
    expected = outcome(Path(undisturbed.run_dir))
    assert expected["left"] == []
    steps = len(expected["metrics"])  # type: ignore[arg-type]
    order = moments(sum(name.startswith("shard") for name in expected), steps)
    assert steps > 4 and len(order) > 40
    where: Counter[str] = Counter()
    for first in range(0, KILLS, PER_RUN):
        config = many_units(tiny_config, tmp_path / f"run-{first}")
        folder, path = Path(config.run_dir), write_yaml(config, tmp_path / f"{first}.yaml")
        kept: list[Kept] = []
        for left in range(min(PER_RUN, KILLS - first), 0, -1):
            came = max((i for i, moment in enumerate(order) if moment.came(folder)), default=-1)
            rest = order[came + 1 :]
            process = start(path)
            if draw.random() < 0.25 or not rest:
                time.sleep(draw.uniform(0.2, 1) * seconds)
            else:
                moment = draw.choice(rest[: math.ceil(len(rest) / left)])
                while process.poll() is None and not moment.came(folder):
                    time.sleep(0.0005)
                time.sleep(draw.choice([0, draw.uniform(0, 0.05)]))
            if not kill(process):
                assert process.returncode == 0
                where["after its end"] += 1
                break
            done = json.loads((folder / "stages.json").read_text()) if (folder / "stages.json").exists() else {}
            where[next((stage for stage in STAGES if stage not in done), "report")] += 1
            kept.append(Kept(folder))
        assert start(path).wait() == 0
        for before in kept:
            before.check()
        found = outcome(folder)
        assert [name for name in expected if found[name] != expected[name]] == []
        assert found.keys() == expected.keys()
    print(f"{KILLS} kills: {', '.join(f'{stage} {count}' for stage, count in where.items())}")


class Killed(BaseException):
    pass


@pytest.mark.thorough
@pytest.mark.parametrize("stage", ["rollouts", "train", "evaluate"])
def test_work_is_not_lost_between_an_artefact_and_the_note_that_it_is_done(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    config = many_units(tiny_config, tmp_path / "run")
    write = artefacts.write_json

    def dying(path: Path, value: Any) -> None:
        if stage in value:
            raise Killed
        write(path, value)

    monkeypatch.setattr(pipeline, "write_json", dying)
    with pytest.raises(Killed):
        Run(config).run()
    monkeypatch.undo()
    run = Run(config)
    assert run.path(STAGES[stage].output).exists() and stage not in run.stages()
    append = Journal.append

    def forbidden(self: Journal[Any] | MetricsLog, unit: Any) -> None:
        assert isinstance(self, Journal) and self.path.name == "costs.jsonl", "it was finished"
        append(self, unit)

    with monkeypatch.context() as patch:
        for cls, name in ((Journal, "append"), (MetricsLog, "__call__")):
            patch.setattr(cls, name, forbidden)
        run.execute(stage)
    assert not any(run.path(name).exists() for each in STAGES.values() for name in each.spent)
    assert list(run.stages()) == list(STAGES)[: list(STAGES).index(stage) + 1]


@pytest.mark.thorough
def test_what_a_done_stage_could_not_clear_away_goes_with_the_next(tiny_config: Config, tmp_path: Path) -> None:
    run = Run(many_units(tiny_config, tmp_path / "run"))
    for stage in list(STAGES)[:2]:
        run.execute(stage)
    journal = run.path("rollouts.journal.jsonl")
    journal.write_text('{"meta": {}}\n')
    run.execute("verify")
    assert not journal.exists()


@pytest.mark.thorough
def test_new_settings_in_the_middle_of_the_rollouts_start_them_anew(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No stage is done yet that could say so: the journal has to."""
    append = Journal.append

    def twice(self: Journal[Any], records: Any) -> None:
        append(self, records)
        if self.path.read_bytes().count(b"\n") == 3:
            raise Killed

    others: tuple[dict[str, Any], ...] = ({"model": {"dtype": "float32"}}, {"rollouts": {"temperature": 0.9}})
    for number, other in enumerate(others):
        config = many_units(tiny_config, tmp_path / f"run-{number}")
        monkeypatch.setattr(Journal, "append", twice)
        with pytest.raises(Killed):
            Run(config).run()
        monkeypatch.undo()
        expected = Run(many_units(tiny_config, tmp_path / f"expected-{number}", **other))
        found = Run(many_units(tiny_config, tmp_path / f"run-{number}", **other))
        for run in (found, expected):
            run.execute("problems")
            run.execute("rollouts")
        assert found.path("rollouts.jsonl").read_bytes() == expected.path("rollouts.jsonl").read_bytes()


@pytest.mark.thorough
def test_shards_of_a_killed_start_do_not_count_against_the_room_on_the_disk(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(many_units(tiny_config, tmp_path / "run"))
    for stage in list(STAGES)[:4]:
        run.execute(stage)
    shards = sorted(run.path("scores").glob("shard-*"))
    for shard in shards[2:]:
        shard.unlink()
    (run.path("scores") / ".shard-00099.safetensors.partial").write_bytes(b"torn")
    times = [shard.stat().st_mtime_ns for shard in shards[:2]]
    need = run.wanted().bytes(run.to_score(), run.lm.weight.shape[1], torch.bfloat16)
    usage = shutil.disk_usage(tmp_path)._replace(free=int(need / 0.9) - shards[0].stat().st_size)
    monkeypatch.setattr("rmx.training.score.shutil.disk_usage", lambda _: usage)
    run.execute("score")
    assert [shard.stat().st_mtime_ns for shard in shards[:2]] == times
    assert run.kept_scores()[1] == run.wanted()
    assert not list(run.path("scores").glob(".*"))


def test_a_kill_between_the_two_renames_of_a_directory_leaves_nothing_behind(tmp_path: Path) -> None:
    for name in (".adapter.partial", ".adapter.old.partial"):
        (tmp_path / name).mkdir()
    with artefacts.replacing(tmp_path / "adapter") as aside:
        aside.mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
