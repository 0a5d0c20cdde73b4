"""KL and perplexity on a text against full logits; windows; refusals; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import command
from test_pipeline import write_yaml

from rmx.analyses.drift import cut, drift, measure, summarise
from rmx.config import LoraConfig
from rmx.errors import AnalysisError
from rmx.models import lora
from rmx.models.model import CausalLM
from rmx.runs.pipeline import Run
from rmx.runs.rundir import RunError

TEXT = "sum of 3 and 4 is 7 Question: 1 2 Answer: 3 is 9 and 5 of 2 sum 8 and 8 is 6 0"


def test_windows_hold_the_text_once(tiny: CausalLM) -> None:
    ids = tiny.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for window in (2, 5, 1000):
        found = cut(tiny, TEXT, window)
        assert max(map(len, found)) <= window
        assert [t for own in found for t in own] == ids[: len(ids) - (len(ids) % window == 1)]  # one token alone
    with pytest.raises(AnalysisError, match="the text has no token to predict"):
        cut(tiny, "7", 5)
    with pytest.raises(AnalysisError, match=r"--window: expected at least 2 and less than the model's \d+ positions"):
        cut(tiny, TEXT, 10**6)


def test_a_window_begins_as_the_tokenizer_begins_a_text(tiny: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    class Begins:
        bos_token_id = 1

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [1] * add_special_tokens + [5 + int(word) for word in text.split()]}

    monkeypatch.setitem(tiny.__dict__, "tokenizer", Begins())
    assert cut(tiny, "0 1 2 3 4", 2) == [[1, 5, 6], [1, 7, 8], [1, 9]]


def test_kl_and_perplexity_are_those_of_full_logits(tiny: CausalLM) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4), seed=0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.3, generator=g)
    windows = cut(tiny, TEXT, 6)
    kl, before, after = [], [], []
    for own in windows:
        ids, target = torch.tensor([own]), torch.tensor(own[1:])[:, None]
        with torch.no_grad():
            tuned = tiny.model(ids).logits[0, :-1].double().log_softmax(-1)
            with adapter.off():
                base = tiny.model(ids).logits[0, :-1].double().log_softmax(-1)
        kl.append((base.exp() * (base - tuned)).sum(-1))
        before.append(base.gather(1, target)[:, 0])
        after.append(tuned.gather(1, target)[:, 0])
    for budget in (8, 1000):
        found = measure(tiny, adapter, windows, budget)
        for own, *expected in zip(found, kl, before, after, strict=True):
            for one, other in zip(own, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    result = summarise(found, "mark", 500, 0)
    whole = torch.cat(kl)
    assert (result.windows, result.tokens) == (len(windows), len(whole))
    assert result.kl.mean == pytest.approx(float(whole.mean()), rel=1e-4) and result.kl.mean > 0.01
    assert result.kl.low < result.kl.mean < result.kl.high
    assert result.base_perplexity.mean == pytest.approx(float(torch.cat(before).mean().neg().exp()), rel=1e-4)
    assert result.tuned_perplexity.mean == pytest.approx(float(torch.cat(after).mean().neg().exp()), rel=1e-4)
    assert result.ratio.mean == pytest.approx(result.tuned_perplexity.mean / result.base_perplexity.mean)
    assert result.kl_quantiles[0.9] == pytest.approx(float(np.quantile(whole.numpy(), 0.9)), rel=1e-4, abs=1e-6)
    lora.detach(tiny.model, adapter)


def test_an_adapter_that_does_nothing_does_not_drift(tiny: CausalLM) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4), seed=0)  # its B is zero
    result = summarise(measure(tiny, adapter, cut(tiny, TEXT, 6), 100), "", 50, 0)
    assert (result.kl.mean, result.ratio.mean) == (0, pytest.approx(1))
    lora.detach(tiny.model, adapter)


def test_a_run_without_an_adapter_is_refused(tiny_config: object) -> None:
    with pytest.raises(RunError, match="or name an adapter"):
        drift(Run(tiny_config), TEXT)  # type: ignore[arg-type]


@pytest.mark.thorough
def test_the_command_writes_table_json_and_picture(finished: Run, tmp_path: Path) -> None:
    path, text = write_yaml(finished.config, tmp_path / "run.yaml"), tmp_path / "novel.txt"
    text.write_text(TEXT)
    done = command("drift", path, text, "--window", 8)
    assert done.returncode == 0, done.stderr
    assert "KL(base || tuned)" in done.stdout and "tuned / base" in done.stdout
    found = json.loads(finished.path("drift/drift.json").read_text())
    assert found["window"] == 8 and found["kl"]["mean"] > 0
    assert finished.path("drift/drift.png").read_bytes()[:4] == b"\x89PNG"
    missing = command("drift", path, tmp_path / "none.txt")
    assert missing.returncode == 1 and "cannot be read as text" in missing.stderr
