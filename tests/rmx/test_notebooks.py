"""The notebooks in docs/ run from top to bottom, and are stored without their outputs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import full_logits

from rmx.models.model import CausalLM
from rmx.runs.pipeline import Run

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"


def execute(name: str) -> dict[str, Any]:
    """The names that the notebook's cells leave."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}, {cell['id']}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_outputs_are_stored(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not [cell["id"] for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_operators(capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells compare every operator with eager PyTorch; the toy training moves right and wrong decisions apart."""
    found = execute("operators.ipynb")
    assert "reference  runs here" in capsys.readouterr().out
    assert found["right"] > -2 and found["wrong"] < -15 and found["kl"] < 0.5


@pytest.mark.thorough
def test_demo_token_by_token(finished: Run, tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a run of the tiny model: the entropies are those of the base's full logits, the gate is the run's."""
    monkeypatch.setenv("RMX_RUN", str(finished.dir))
    monkeypatch.setenv("RMX_MODEL", finished.config.model.name)
    found = execute("demo_token_by_token.ipynb")
    rollouts = finished.rollouts()[:: found["step"]][:40]
    expected = []
    for rollout in rollouts:
        logp = full_logits(tiny, torch.tensor([rollout.ids])).log_softmax(-1)[0, len(rollout.prompt_ids) - 1 : -1]
        expected.append(-(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(found["entropies"], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert found["tau"] == finished.tau()
    assert len(found["ranks"]) == int(found["changed"].sum())
