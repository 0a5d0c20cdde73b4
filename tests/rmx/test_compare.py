"""Kinds of positions against full logits; refusals; the command on a finished run."""

import json
from pathlib import Path

import pytest
import torch
from command_line import command
from test_pipeline import write_yaml

from rmx.analyses.compare import KINDS, Comparison
from rmx.analyses.compare import compare_models as join
from rmx.analyses.pair import paired
from rmx.config import Config, LoraConfig, ScoreConfig
from rmx.errors import AnalysisError
from rmx.models import lora
from rmx.models.lora import Adapter, AdapterError
from rmx.models.model import CausalLM
from rmx.records import Rollout
from rmx.runs.pipeline import Run
from rmx.training.text_scores import score_text


def rollouts(count: int = 12) -> list[Rollout]:
    g = torch.Generator().manual_seed(0)
    found = []
    for n in range(count):
        ids = torch.randint(3, 21, (4 + n % 7,), generator=g).tolist()
        found.append(Rollout(f"p{n // 3}", n % 3, ids[:2], ids[2:], "length", ""))
    return found


def compare_models(base: CausalLM, other: Path | str, texts: list[Rollout], out: Path) -> Comparison:
    scores = score_text(base, "base", "base", texts, out / "base", ScoreConfig())
    dtype = str(base.weight.dtype).removeprefix("torch.")
    settings = {"name": "base", "dtype": dtype, "device": "cpu"}
    config = Config.model_validate(
        {"run_dir": "", "model": settings, "problems": {"sources": [{"task": "gcd"}]}, "evaluate": {"bootstrap": 500}}
    )
    with paired(base, other, config.model, "prompt") as pair:
        return join(pair, scores, texts, out, config)


@pytest.fixture
def adapter_path(tiny: CausalLM, tmp_path: Path) -> Path:
    adapter: Adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4), seed=0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, 0.5, generator=g)
    lora.save_adapter(adapter, tmp_path / "adapter", "tiny")
    lora.detach(tiny.model, adapter)
    return tmp_path / "adapter"


def test_kinds_ranks_and_entropies_are_those_of_full_logits(tiny: CausalLM, adapter_path: Path, tmp_path: Path) -> None:
    texts = rollouts()
    result = compare_models(tiny, adapter_path, texts, tmp_path / "out")
    adapter = lora.load_adapter(tiny.model, adapter_path)
    kinds: list[int] = []
    ranks, entropies, changes = [], [], []
    for r in texts:
        ids, P = torch.tensor([r.prompt_ids + r.completion_ids]), len(r.prompt_ids)
        other = tiny.model(ids).logits[0, P - 1 : -1].double().log_softmax(-1)
        with adapter.off():
            base = tiny.model(ids).logits[0, P - 1 : -1].double().log_softmax(-1)
        rank = (base > base.gather(1, other.argmax(-1, keepdim=True))).sum(-1) + 1
        kinds += [0 if n == 1 else 1 if n <= 5 else 2 for n in rank.tolist()]
        ranks += rank.tolist()
        entropies += (-(base.exp() * base).sum(-1)).tolist()
        target = torch.tensor(r.completion_ids)[:, None]
        changes += (other - base).gather(1, target).squeeze(1).tolist()
    lora.detach(tiny.model, adapter)
    assert result.tokens == len(kinds)
    assert [result.counts[name] for name in KINDS] == [kinds.count(n) for n in range(3)]
    assert all(result.counts[name] for name in KINDS)  # each kind is seen here
    assert result.mean_rank == pytest.approx(sum(n for n in ranks if 1 < n <= 5) / kinds.count(1))
    assert result.rank_counts == {n: ranks.count(n) for n in range(2, 6)}
    for n, name in enumerate(KINDS):
        own = [i for i, kind in enumerate(kinds) if kind == n]
        assert result.entropy[name] == pytest.approx(sum(entropies[i] for i in own) / len(own), rel=1e-4)
        assert result.logprob_change[name] == pytest.approx(sum(changes[i] for i in own) / len(own), rel=1e-3, abs=1e-5)
    assert list(result.outside_top) == list(range(1, 21))
    for k, share in result.outside_top.items():
        assert share.mean == pytest.approx(sum(n > k for n in ranks) / len(ranks))
        assert share.low <= share.mean <= share.high
    assert result.outside_top[5] == result.shifted
    assert result.reranked.mean == pytest.approx(kinds.count(1) / len(kinds))
    assert result.reranked.low <= result.reranked.mean <= result.reranked.high
    changed = sum(share * count for _, count, share in result.changed_by_entropy)
    assert changed == pytest.approx(len(kinds) - kinds.count(0))


def test_a_model_compared_with_itself_is_unshifted(tiny: CausalLM, tiny_path: Path, tmp_path: Path) -> None:
    result = compare_models(tiny, str(tiny_path), rollouts(), tmp_path)
    assert result.counts == {"unshifted": result.tokens, "reranked": 0, "shifted": 0}
    assert result.mean_rank is None


def test_what_cannot_be_compared_is_refused(tiny: CausalLM, adapter_path: Path, tmp_path: Path) -> None:
    from tiny import save_tiny_model

    with pytest.raises(AnalysisError, match="no completion tokens"):
        compare_models(tiny, adapter_path, [], tmp_path)
    with pytest.raises(AnalysisError, match="token id 99 is not in this vocabulary"):
        compare_models(tiny, adapter_path, [Rollout("p", 0, [1], [99], "stop", "")], tmp_path)
    with pytest.raises(AnalysisError, match=r"nowhere/at/all: neither a directory with an adapter nor a model"):
        compare_models(tiny, tmp_path / "nowhere/at/all", rollouts(), tmp_path)
    deeper = save_tiny_model(tmp_path / "deeper", num_hidden_layers=3)
    vocabulary = deeper / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"sum"', '"SUM"'))
    with pytest.raises(AnalysisError, match="deeper: its tokenizer differs"):
        compare_models(tiny, str(deeper), rollouts(), tmp_path)
    from rmx.config import ModelConfig
    from rmx.models import model

    other = model.load(ModelConfig(name=str(save_tiny_model(tmp_path / "d", num_hidden_layers=3)), dtype="float32"))
    with pytest.raises(AdapterError, match="belongs to another model"):
        compare_models(other, adapter_path, rollouts(), tmp_path)


@pytest.mark.thorough
def test_the_command_writes_table_json_and_picture(finished: Run, tmp_path: Path) -> None:
    run = finished
    done = command("compare", write_yaml(run.config, tmp_path / "run.yaml"))
    assert done.returncode == 0, done.stderr
    for words in ("unshifted", "reranked", "mean rank"):
        assert words in done.stdout
    assert json.loads(run.path("compare/compare.json").read_text())["tokens"] > 0
    assert run.path("compare/compare.png").read_bytes()[:4] == b"\x89PNG"
