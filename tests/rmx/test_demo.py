"""The demo's size: what a machine's rate of products makes of it, and that a run keeps the one that it began with."""

from importlib.resources import files
from pathlib import Path

import pytest
import torch

from rmx import demo
from rmx.config import Config
from rmx.demo import SMALL, demo_config, flops, product_rate, seconds
from rmx.runs.pipeline import Run

PATH = Path(str(files("rmx") / "demo.yaml"))


def sized(tmp_path: Path, *overrides: str, size: demo.Size = "auto") -> Config:
    return demo_config(PATH, 3, str(tmp_path / "run"), ["model.device=cpu", *overrides], size)


def at_rate(monkeypatch: pytest.MonkeyPatch, rate: float) -> list[torch.dtype]:
    """Let products run at ``rate``; the dtypes that are asked for."""
    asked: list[torch.dtype] = []

    def told(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return rate

    monkeypatch.setattr(demo, "product_rate", told)
    return asked


def problems_of(config: Config) -> int:
    return config.problems.train_count


def test_a_fast_machine_runs_the_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = at_rate(monkeypatch, 900e9)
    config = sized(tmp_path, "model.dtype=bfloat16")
    assert (config, problems_of(config)) == (sized(tmp_path, "model.dtype=bfloat16", size="full"), 160)
    assert (config.seed, config.run_dir) == (3, str(tmp_path / "run"))
    assert asked == [torch.bfloat16]
    assert capsys.readouterr().err == ""


def test_a_slow_machine_runs_the_small_size_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_rate(monkeypatch, 60e9)
    config = sized(tmp_path, "model.dtype=float32")
    assert config == sized(tmp_path, "model.dtype=float32", size="small")
    assert (problems_of(config), config.select.max_sequences) == (48, 192)
    said = capsys.readouterr().err
    assert "demo: the full size would take about " in said and "products in float32 at 60 GFLOP/s" in said
    assert "the small size runs instead, about " in said and "--size full runs" in said
    assert problems_of(sized(tmp_path, size="full")) == 160


def test_settings_that_are_given_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_rate(monkeypatch, 60e9)
    few = sized(tmp_path, "problems.train_count=10", "problems.evaluate_count=10", "select.max_problems=5")
    assert (problems_of(few), few.select.max_sequences) == (10, 320)  # the full size, as it takes no time like this
    assert problems_of(sized(tmp_path, "problems.train_count=150")) == 150


@pytest.mark.parametrize("size", ["full", "small"])
def test_a_run_goes_on_in_the_size_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: demo.Size
) -> None:
    begun = Run(sized(tmp_path, size=size))
    begun.execute("problems")
    monkeypatch.setattr(demo, "product_rate", lambda _: pytest.fail("it is known"))
    assert sized(tmp_path) == begun.config
    assert len(begun.problems("train")) == (160 if size == "full" else SMALL["problems.train_count"])


def test_the_small_size_is_half_the_work(tmp_path: Path) -> None:
    full, small = (sized(tmp_path, size=size) for size in ("full", "small"))  # type: ignore[arg-type]
    assert 0.45 < sum(flops(small).values()) / sum(flops(full).values()) < 0.55
    assert 40e12 < sum(flops(full).values()) < 50e12
    assert seconds(full, 60e9) > seconds(full, 120e9) > seconds(full, 900e9) > seconds(small, 900e9)


@pytest.mark.thorough
def test_the_count_is_that_of_the_model(demo_lm: object) -> None:
    """Per token, against torch's own counter of the products."""
    from torch.utils.flop_counter import FlopCounterMode

    from rmx.models.model import CausalLM

    assert isinstance(demo_lm, CausalLM)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        hidden = demo_lm.hidden(torch.ones(1, 16, dtype=torch.int64), use_cache=False)
        linear = counter.get_total_flops()
        torch.nn.functional.linear(hidden, demo_lm.weight)
        head = counter.get_total_flops() - linear
    assert linear / 16 == pytest.approx(demo.DECODER, rel=0.03)  # the rest is attention
    assert head / 16 == pytest.approx(demo.HEAD, rel=0.01)


def test_the_rate_is_of_all_products_in_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def product(*_: object) -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr("torch.nn.functional.linear", product)
    monkeypatch.setattr(demo.time, "perf_counter", lambda: now)
    work = 2 * demo.ROWS * demo.WIDTHS[0] * demo.WIDTHS[1]
    assert product_rate(torch.float32, 1.0) == 4 * work
    assert product_rate(torch.float32, 0.0) == 4 * work  # one at least
