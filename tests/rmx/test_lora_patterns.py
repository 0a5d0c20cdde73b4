"""Ranks and scales of single layers: what PEFT makes of the same patterns, and which are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from pydantic import ValidationError
from test_lora import IDS, logits_and_gradient, randomise

from rmx.config import LoraConfig
from rmx.layer_patterns import value_of
from rmx.models import lora, model
from rmx.models.lora import AdapterError

RANKS = {r"layers\.1\.self_attn\.q_proj": 5, "q_proj": 3, "^model.layers.[0-9]+.mlp.down_proj": 1}
ALPHAS = {"k_proj": 7.0, r".*\.0\..*": 11.0}
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("rslora", [None, True])
@torch.no_grad()
def test_patterns_mean_what_they_mean_to_peft(tiny: model.CausalLM, tmp_path: Path, rslora: bool | None) -> None:
    config = LoraConfig(r=2, alpha=6, targets=TARGETS, rslora=rslora, rank_pattern=RANKS, alpha_pattern=ALPHAS)
    adapter = lora.attach(tiny.model, config, seed=0)
    found = {name.removeprefix("model.layers."): layer for name, layer in adapter.layers.items()}
    assert len(found["1.self_attn.q_proj"].lora_A) == 5 and len(found["0.self_attn.q_proj"].lora_A) == 3
    assert found["0.mlp.down_proj"].lora_B.shape == (32, 1)
    assert found["1.self_attn.k_proj"].scaling == (7 / 2**0.5 if rslora else 3.5)
    assert found["0.self_attn.q_proj"].scaling == (11 / 3**0.5 if rslora else 11 / 3)  # each by its own rank
    assert found["1.mlp.down_proj"].scaling == 6.0
    randomise(adapter)
    ours = tiny.model(IDS).logits
    lora.save_adapter(adapter, tmp_path / "adapter", "m")
    lora.detach(tiny.model, adapter)
    theirs = PeftModel.from_pretrained(tiny.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-5, atol=1e-5)
    theirs.unload()
    again = lora.load_adapter(tiny.model, tmp_path / "adapter")
    assert torch.equal(tiny.model(IDS).logits, ours)
    assert again.config.rank_pattern == RANKS and list(again.config.rank_pattern) == list(RANKS)  # the first one counts


@torch.no_grad()
def test_an_adapter_with_patterns_of_peft_is_loaded(tiny: model.CausalLM, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rank_pattern": RANKS, "alpha_pattern": {"k_proj": 7}, "use_rslora": True}
    peft_model = get_peft_model(tiny.model, PeftLoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, **settings))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1)
    theirs = peft_model(IDS).logits
    peft_model.save_pretrained(tmp_path)
    peft_model.unload()
    lora.load_adapter(tiny.model, tmp_path)
    torch.testing.assert_close(tiny.model(IDS).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "pattern", ["q_proj", "proj", "self_attn.q_proj", "q_proj|k_proj", "[qk]_proj", "^q_proj", ".*"]
)
@pytest.mark.parametrize(
    "path", ["q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.k_proj", "a.selfxattn.q_proj"]
)
def test_a_pattern_matches_where_that_of_peft_does(pattern: str, path: str) -> None:
    theirs = get_pattern_key([pattern], path) == pattern
    assert (value_of({pattern: 1}, path, 0) == 1) == theirs


def test_layers_of_one_input_and_several_ranks_have_their_own_gradients(tiny: model.CausalLM) -> None:
    config = LoraConfig(r=2, alpha=4, targets=["q_proj", "k_proj", "v_proj"], rank_pattern={"k_proj": 5})
    adapter = lora.attach(tiny.model, config, seed=0)
    randomise(adapter, 0.3)

    shared, gradient = logits_and_gradient(tiny, adapter)
    assert adapter.layers["model.layers.0.self_attn.k_proj"].shared is not None
    for layer in adapter.layers.values():
        layer.shared = None
    alone, expected = logits_and_gradient(tiny, adapter)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_no_layer_is_named_with_the_nearest_one(tiny: model.CausalLM, setting: str) -> None:
    for lost, near in (("q_pro", "q_proj"), (r"layers\.7\.self_attn\.v_proj", "v_proj"), ("up_proj", "proj")):
        config = LoraConfig(targets=["q_proj", "v_proj"], **{setting: {"q_proj": 2, lost: 3}})
        with pytest.raises(AdapterError, match=rf"lora.{setting}: .* matches no adapted layer; the nearest .*{near}"):
            lora.attach(tiny.model, config, seed=0)
    assert not any(isinstance(m, lora.LoraLinear) for m in tiny.model.modules())


@torch.no_grad()
def test_a_training_goes_on_with_the_same_patterns_alone(tiny: model.CausalLM, tmp_path: Path) -> None:
    config = LoraConfig(r=2, alpha=4, targets=["q_proj"], rank_pattern={"q_proj": 3})
    adapter = lora.attach(tiny.model, config, seed=0)
    randomise(adapter)
    lora.save_adapter(adapter, tmp_path / "a", "m")
    lora.detach(tiny.model, adapter)
    lora.detach(tiny.model, lora.begin(tiny.model, config, 0, tmp_path / "a"))
    with pytest.raises(AdapterError, match=r"rank_pattern is {'q_proj': 3} there, {} in the configuration"):
        lora.begin(tiny.model, config.model_copy(update={"rank_pattern": None}), 0, tmp_path / "a")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|a)*b", "(.*)*", ".*.*.*.*", "(a?){50}b", "a" * 300, r"(x)\1+", "(?:(a))+"]
)
def test_a_pattern_of_a_stranger_cannot_take_for_ever(tiny: model.CausalLM, tmp_path: Path, pattern: str) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, targets=["q_proj"]), seed=0)
    randomise(adapter)
    lora.save_adapter(adapter, tmp_path / "a", "m")
    lora.detach(tiny.model, adapter)
    path = tmp_path / "a" / lora.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {pattern: 2}}))
    with pytest.raises(AdapterError, match="rank_pattern"):
        lora.load_adapter(tiny.model, tmp_path / "a")


def test_the_worst_pattern_that_is_taken_ends() -> None:
    """Three repeats and eight question marks, on a path of one letter: a third of a second."""
    pattern = ".*.*.*" + "a?" * 8 + "!"
    LoraConfig(rank_pattern={pattern: 1})
    assert value_of({pattern: 1}, "a" * 60, 0) == 0
    with pytest.raises(ValidationError):
        LoraConfig(rank_pattern={pattern + "a*": 1})
