"""What files and texts of others may do here: follow no link, run no code, reach no terminal raw; and what is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from test_html import page, written  # noqa: F401  # a fixture
from test_html import page as _page

from rmx.analyses.pair import paired
from rmx.artefacts import ArtefactError, remove
from rmx.cli import main
from rmx.config import Config, ModelConfig
from rmx.config_file import load_config
from rmx.errors import AnalysisError, visible
from rmx.models.model import CausalLM
from rmx.reports import html, report
from rmx.runs.rundir import RunDirectory
from rmx.tables import new_table, show

ESCAPE = "\x1b]0;owned\x07\x1b[31m"


def test_a_lock_follows_no_link_and_empties_no_file(tiny_config: Config, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    diary.write_text("mine")
    directory = RunDirectory(tiny_config)
    directory.dir.mkdir(parents=True)
    lock = directory.path(".lock")
    lock.symlink_to(diary)
    with (
        pytest.raises(ArtefactError, match=r"\.lock: expected a file to lock, got a symbolic link"),
        directory.locked(),
    ):
        pass
    assert diary.read_text() == "mine"
    lock.unlink()
    lock.write_text("kept")
    with directory.locked():
        pass
    assert lock.read_text() == "kept"


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    remove(tmp_path / "link")
    assert folder.is_dir() and not (tmp_path / "link").is_symlink()


def test_the_other_model_runs_no_code_because_the_base_may(tiny: CausalLM, tiny_path: Path, tmp_path: Path) -> None:
    other, ran = tmp_path / "other", tmp_path / "ran"
    shutil.copytree(tiny_path, other)
    (other / "modeling_mine.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Mine(LlamaForCausalLM):\n    pass\nclass MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    settings = json.loads((other / "config.json").read_text())
    code = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.Mine"}
    (other / "config.json").write_text(json.dumps({**settings, "model_type": "mine", "auto_map": code}))
    base = ModelConfig(name=str(tiny_path), dtype="float32", device="cpu", trust_remote_code=True)
    with pytest.raises(AnalysisError, match="--trust-other-code"), paired(tiny, other, base, "prompt"):
        pass
    assert not ran.exists()


@pytest.mark.thorough
@pytest.mark.parametrize("category", [r"$\frac{$", "a$b", "$x^$", ESCAPE, "[bold]x[/nonsense]", "two\nlines", "\ud800"])
def test_any_category_can_be_drawn_printed_and_put_on_the_page(
    page: html.Page,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    category: str,
) -> None:
    result = replace(page.evaluation, categories={category: (0.3, 0.5)})
    report.plot(tmp_path / "report.png", page.entropies, 1.4, page.history, result)
    assert "\x1b" not in written(replace(page, evaluation=result), tmp_path)
    if category != "\ud800":  # refused where problems are read
        show(report.table(result))
        assert "\x1b" not in capsys.readouterr().out


def test_tables_and_errors_show_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = new_table(("name", "value"))
    grid.add_row(ESCAPE, "1")
    show(grid)
    assert "\x1b" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["rmx", "run", f"{ESCAPE}.yaml"])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "\x1b" not in said and "␛]0;owned" in said
    assert visible("a\tb\nc\u202e") == "a\tb\nc\ufffd"


def test_the_page_can_be_mailed(page: html.Page, tmp_path: Path) -> None:  # noqa: F811
    tree = page.config.model_dump()
    tree["run_dir"] = "/home/anna/runs/secret-run"
    tree["model"]["name"] = "/data/anna/qwen-mine"
    tree["problems"]["sources"] = [
        {"jsonl": "/home/anna/p.jsonl"},
        {"jsonl": "~/anna/q.jsonl"},
        {"jsonl": "../anna/r.jsonl"},
    ]
    tree["rollouts"] |= {"engine": "openai", "base_url": "http://gpu7.anna.internal:8000/v1"}
    text = written(replace(page, config=Config.model_validate(tree)), tmp_path)
    assert "anna" not in text and "gpu7" not in text
    for kept in ("secret-run", "qwen-mine", "p.jsonl", "q.jsonl", "r.jsonl"):
        assert kept in text
    settings = html._settings(load(tree, tmp_path))
    assert settings["rollouts"]["base_url"] == "a server"


def load(tree: object, folder: Path) -> Config:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return load_config(path)


assert _page  # the fixture is used by its name
