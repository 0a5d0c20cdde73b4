"""The model card of a run's adapter, read by the hub's own reader, and what is sent."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from rmx.cli import app
from rmx.errors import RmxError
from rmx.runs.pipeline import Run


@pytest.fixture
def config_file(finished: Run, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(finished.config.model_dump(mode="json")))
    return path


def push(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["push", *arguments], catch_exceptions=True)


def test_a_dry_run_writes_a_card_that_the_hub_understands(finished: Run, config_file: Path) -> None:
    done = push(str(config_file), "me/adapter", "--dry-run")
    assert done.exit_code == 0, done.output
    folder = finished.path("hub")
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "report.png", "rmx.json"}
    assert (folder / "adapter_model.safetensors").read_bytes() == finished.path(
        "adapter/adapter_model.safetensors"
    ).read_bytes()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and "reasonmaxxer" in card.data.tags
    found = finished.evaluation()
    (result,) = card.data.eval_results
    assert result.metric_value == pytest.approx(found.tuned.pass_at_1.mean, abs=1e-4)
    text = card.text
    for said in (str(found.gain), str(found.base.pass_at_1), f"max-lora-rank {finished.config.lora.r}", "me/adapter"):
        assert said in text
    assert "A LoRA adapter of the base model, trained" in text
    assert finished.config.model.name not in text and 'from_pretrained("BASE")' in text
    assert "base_model" not in card.data.to_dict()  # a directory of this machine is nobody else's base
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_what_is_sent(finished: Run, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Hub:
        def create_repo(self, repo: str, **given: Any) -> str:
            calls.append((repo, given))
            return f"https://hub/{repo}"

        def upload_folder(self, **given: Any) -> None:
            calls.append(given)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    done = push(str(config_file), "me/adapter", "--private")
    assert done.exit_code == 0, done.output
    assert calls[0] == ("me/adapter", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/adapter" and Path(calls[1]["folder_path"]) == finished.path("hub")


def test_a_hub_that_refuses_is_one_line(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def create_repo(self, *_: Any, **__: Any) -> str:
            raise OSError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    done = push(str(config_file), "me/adapter")
    assert isinstance(done.exception, RmxError) and "push: me/adapter: no connection; `hf auth login`" in str(
        done.exception
    )


def test_a_run_that_is_not_finished_has_no_card(config_file: Path, tmp_path: Path) -> None:
    done = push(str(config_file), "me/adapter", "--set", f"run_dir={tmp_path / 'other'}")
    assert "run `rmx problems` first" in str(done.exception)
