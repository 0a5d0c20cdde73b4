"""What a run cost: counted tokens, seconds and memory of every start, and the price."""

import json
import mmap
from pathlib import Path

import pytest
from rich.console import Console
from test_pipeline import changed

from rmx.config import Config, CostConfig
from rmx.cost import GIB, StageCost, metered, stage_costs, table, total
from rmx.runs.pipeline import Run
from rmx.runs.stages import STAGES
from rmx.training.score import ScoreStore


def test_a_run_counts_what_it_reads_and_samples(finished: Run) -> None:
    run = finished
    rows = {row.stage: row for row in stage_costs(run.path("costs.jsonl"), list(STAGES), CostConfig(per_hour=3.6))}
    assert list(rows) == list(STAGES)
    rollouts = run.rollouts()
    assert rows["rollouts"].tokens_generated == sum(len(r.completion_ids) for r in rollouts)
    prompts = {r.problem_id: len(r.prompt_ids) for r in rollouts}
    batches = -(-12 // 128)  # the samples of a problem are one unit here, and read its prompt once
    assert rows["rollouts"].tokens_read == batches * sum(prompts.values())
    assert rows["score"].tokens_read == sum(len(r.ids) for r in run.to_score())
    assert rows["train"].tokens_read == sum(m.tokens for m in run.history())
    assert rows["verify"].tokens_read is rows["verify"].tokens_generated is None
    for row in rows.values():
        assert row.price == pytest.approx(row.seconds / 1000)
        assert row.peak_gib is not None and row.peak_gib > 0.05


def test_every_start_counts_also_one_that_failed(tmp_path: Path) -> None:
    log = tmp_path / "costs.jsonl"

    def fails() -> None:
        with metered("train", log) as meter:
            meter.read = 5
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    with metered("train", log) as meter:
        meter.read, meter.generated = 7, 2
    lines = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert [line[0]["finished"] for line in lines] == [False, True]
    log.write_text(log.read_text() + '[{"stage": "tr')  # torn by a full disk
    (row,) = stage_costs(log, ["score", "train"], CostConfig())
    assert (row.tokens_read, row.tokens_generated, row.price) == (12, 2, None)
    assert stage_costs(tmp_path / "none.jsonl", ["train"], CostConfig()) == []


@pytest.mark.thorough
def test_what_an_interrupted_scoring_read_is_counted_once(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(changed(tiny_config, score={"shard_tokens": 300}))
    for stage in list(STAGES)[:3]:
        run.execute(stage)
    write, made = ScoreStore._write, []

    def stops(self: ScoreStore, number: int, found: object) -> None:
        made.append(number)
        if len(made) == 3:
            raise KeyboardInterrupt
        write(self, number, found)  # type: ignore[arg-type]

    monkeypatch.setattr(ScoreStore, "_write", stops)
    with pytest.raises(KeyboardInterrupt):
        run.execute("score")
    run.execute("score")
    (row,) = stage_costs(run.path("costs.jsonl"), ["score"], CostConfig())
    assert len(made) > 4 and row.tokens_read == sum(len(r.ids) for r in run.to_score())


def test_the_peak_is_that_of_the_body(tmp_path: Path) -> None:
    log = tmp_path / "costs.jsonl"
    with metered("score", log), mmap.mmap(-1, GIB // 4) as held:  # the system's own: an allocator keeps what is freed
        for page in range(0, len(held), mmap.PAGESIZE):
            held[page] = 1
    with metered("select", log):
        pass
    peaks = {row.stage: row.peak_gib for row in stage_costs(log, ["score", "select"], CostConfig())}
    assert peaks["score"] is not None and peaks["select"] is not None
    assert peaks["score"] - peaks["select"] > 0.2


@pytest.mark.parametrize("rate", [None, 2.5])
def test_the_table_fits_a_terminal(rate: float | None) -> None:
    price = None if rate is None else rate
    rows = [StageCost(s, 123456.7, 123456789, 12345678, 123.45, price) for s in STAGES]
    console = Console(width=80, record=True)
    console.print(table(rows, CostConfig(per_hour=rate)))
    text = console.export_text()
    assert "…" not in text and "123,456,789" in text and f"{123456789 * len(STAGES):,}" in text
    assert total(rows).price == (None if rate is None else pytest.approx(rate * len(STAGES)))
