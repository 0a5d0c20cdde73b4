"""Adapters on the input embedding and the output head: PEFT's own, the loss, the training, samples, and refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_lora import IDS
from test_train import CONFIGS, SEQUENCES, gradient, kept, naive_loss
from tiny import save_tiny_model
from torch import Tensor

from rmx.analyses.pair import paired
from rmx.config import LoraConfig, ModelConfig, TrainConfig
from rmx.errors import RmxError
from rmx.models import lora, model
from rmx.models.lora import AdapterError
from rmx.models.lora_layers import Adapter, LoraEmbedding, LoraLayer, Masters
from rmx.models.model import CausalLM
from rmx.records import Rollout
from rmx.sampling import vllm_engine
from rmx.sampling.nucleus import SamplingParams, sample_tokens
from rmx.training.graphs import capturable
from rmx.training.loss import batch_loss
from rmx.training.score import Keep, score_rollouts
from rmx.training.train import learning_rate, step_order, train_adapter

ENDS = [["lm_head"], ["embed_tokens"], ["embed_tokens", "q_proj", "k_proj", "lm_head"], ["all-linear", "lm_head"]]
TRAINED = ["embed_tokens", "q_proj", "lm_head"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("ends"), tie_word_embeddings=request.param)


@pytest.fixture
def lm(place: Path) -> CausalLM:
    return loaded(place)


def loaded(place: Path, dtype: str = "float32") -> CausalLM:
    return model.load(ModelConfig(name=str(place), dtype=dtype, device="cpu"))


def worn(lm: CausalLM, targets: list[str], **more: Any) -> Adapter:
    """With updates of the size of the weights."""
    adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4, targets=targets, **more), seed=0)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapter.layers.values():
            (layer.lora_A if isinstance(layer, LoraEmbedding) else layer.lora_B).normal_(0, 0.2, generator=g)
    return adapter


@pytest.mark.parametrize("targets", ENDS, ids="+".join)
@torch.no_grad()
def test_peft_loads_it_to_the_same_logits(lm: CausalLM, tmp_path: Path, targets: list[str]) -> None:
    base = lm.model(IDS).logits
    fresh = lora.attach(lm.model, LoraConfig(r=2, targets=targets), seed=0)
    assert torch.equal(lm.model(IDS).logits, base)
    lora.detach(lm.model, fresh)
    adapter = worn(lm, targets, rank_pattern={targets[0]: 3} if targets[0] != "all-linear" else None)
    ours = lm.model(IDS).logits
    assert (ours - base).abs().max() > 0.1
    with adapter.off():
        assert torch.equal(lm.model(IDS).logits, base)
    lora.save_adapter(adapter, tmp_path / "adapter", "m")
    lora.detach(lm.model, adapter)
    theirs = PeftModel.from_pretrained(copy.deepcopy(lm.model), str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-5, atol=1e-5)
    lora.load_adapter(lm.model, tmp_path / "adapter")
    assert torch.equal(lm.model(IDS).logits, ours)


@pytest.mark.parametrize("targets", ENDS[:3], ids="+".join)
@torch.no_grad()
def test_what_peft_writes_loads(lm: CausalLM, tmp_path: Path, targets: list[str]) -> None:
    """PEFT saves the base's weight of such layers too: it has to be this model's."""
    peft_model = get_peft_model(copy.deepcopy(lm.model), PeftLoraConfig(r=3, lora_alpha=5, target_modules=targets))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name or "embedding_A" in name:
            parameter.normal_(0, 0.1)
    theirs = peft_model(IDS).logits
    peft_model.save_pretrained(tmp_path)
    adapter = lora.load_adapter(lm.model, tmp_path)
    torch.testing.assert_close(lm.model(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    lora.detach(lm.model, adapter)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    name = next(name for name in tensors if "base_layer" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, tmp_path / lora.WEIGHTS)
    with pytest.raises(AdapterError, match=r"it contains another weight of "):
        lora.load_adapter(lm.model, tmp_path)
    assert not any(isinstance(m, LoraLayer) for m in lm.model.modules())


@pytest.mark.parametrize("targets", ENDS[:3], ids="+".join)
@pytest.mark.parametrize("config", CONFIGS, ids=["completion", "all", "no-anchor"])
def test_loss_and_gradient_are_the_naive_ones(lm: CausalLM, config: TrainConfig, targets: list[str]) -> None:
    """With states of the base that are kept, and with those of a pass with the adapter off."""
    base = kept(lm, SEQUENCES, Keep("all"))
    adapter = worn(lm, targets)
    expected = naive_loss(lm, adapter, SEQUENCES, config)
    expected_gradient = gradient(adapter, [expected])
    for source in (base, None):
        loss = batch_loss(lm, adapter, SEQUENCES, config, len(SEQUENCES), base=source)[0].loss
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient(adapter, [loss]), expected_gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"token_budget": 20}], ids=str)
def test_training_follows_the_eager_trajectory(lm: CausalLM, options: dict[str, Any]) -> None:
    """Every weight: AdamW on the naive loss, with two full log-softmaxes, against train_adapter."""
    config = TrainConfig(epochs=4, sequences_per_step=3, learning_rate=3e-3, warmup_steps=2, **options)
    base = kept(lm, SEQUENCES, Keep("all"))
    adapter = worn(lm, TRAINED)
    start = [p.detach().clone() for p in adapter.parameters()]
    optimizer = torch.optim.AdamW(adapter.parameters(), weight_decay=0.0)
    order = step_order(len(SEQUENCES), config, 0)
    losses = []
    for step, chosen in enumerate(order):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(order), config)
        loss = naive_loss(lm, adapter, [SEQUENCES[i] for i in chosen], config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), config.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    expected = [p.detach().clone() for p in adapter.parameters()]
    lora.detach(lm.model, adapter)
    again = worn(lm, TRAINED)
    history = train_adapter(lm, again, SEQUENCES, config, 0, base=base)
    assert [m.loss for m in history] == pytest.approx(losses, abs=1e-4)
    for ours, theirs, before in zip(again.parameters(), expected, start, strict=True):
        moved = (theirs - before).norm()
        assert moved > 1e-3 and (ours - theirs).norm() < 0.02 * moved


def test_borrowed_weights_have_the_gradients_of_their_own(lm: CausalLM) -> None:
    """What a pass lends the ends adds its gradient to the same sums as the layers between them, pass after pass."""
    config, adapter = CONFIGS[0], worn(lm, TRAINED)

    def loss() -> Tensor:
        return batch_loss(lm, adapter, SEQUENCES, config, len(SEQUENCES))[0].loss

    expected = gradient(adapter, [loss()])
    masters = Masters(adapter)
    with masters.lent(torch.float32):
        for _ in range(2):
            loss().backward()
    assert masters.flat.grad is not None
    torch.testing.assert_close(masters.flat.grad, 2 * expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.thorough
def test_a_compiled_training_moves_the_ends_as_well(place: Path) -> None:
    config = TrainConfig(epochs=1, sequences_per_step=3, learning_rate=3e-3, warmup_steps=0, compile=True)
    ends = []
    for own in (config, config.model_copy(update={"compile": False})):
        lm = loaded(place)
        adapter = worn(lm, TRAINED)
        train_adapter(lm, adapter, SEQUENCES, own, 0)
        ends.append(torch.cat([p.detach().flatten() for p in adapter.parameters()]))
    start = torch.cat([p.detach().flatten() for p in worn(loaded(place), TRAINED).parameters()])
    assert (ends[0] - ends[1]).norm() < 0.02 * (ends[1] - start).norm()


@torch.no_grad()
def test_scores_and_samples_are_those_of_the_adapted_head(lm: CausalLM) -> None:
    worn(lm, TRAINED)
    s = SEQUENCES[0]
    whole = lm.model(torch.tensor([s.ids])).logits[0].double().log_softmax(-1)
    found = score_rollouts(lm, [Rollout("p", 0, s.prompt_ids, s.completion_ids, "stop", "")])[0][0]
    rows = whole[len(s.prompt_ids) - 1 : -1]
    torch.testing.assert_close(found.entropy.double(), -(rows.exp() * rows).sum(-1), rtol=1e-4, atol=1e-5)
    hidden = lm.hidden(torch.tensor([s.ids]))[0]
    torch.testing.assert_close(lm.logits(hidden).double().log_softmax(-1), whole, rtol=1e-4, atol=1e-5)
    for params in (SamplingParams(0), SamplingParams(1.0, top_p=0.9)):
        ids, logprob = sample_tokens(lm, hidden, torch.full((len(hidden),), 0.4, dtype=torch.float64), params)
        torch.testing.assert_close(logprob, whole.gather(1, ids[:, None])[:, 0], rtol=1e-4, atol=1e-5)
    greedy = lm.model.generate(torch.tensor([s.ids]), max_new_tokens=1, do_sample=False)[0, -1]
    assert int(greedy) == int(whole[-1].argmax())


@torch.no_grad()
def test_beside_its_adapter_the_base_keeps_its_head(lm: CausalLM, tmp_path: Path) -> None:
    """An analysis draws from both in turn, while the adapter is on."""
    hidden = lm.hidden(IDS)[0]
    base = lm.logits(hidden)
    lora.save_adapter(worn(lm, ["lm_head"]), tmp_path / "a", "m")
    lora.detach(lm.model, Adapter({"lm_head": lm.model.lm_head}, LoraConfig(), {}))
    with paired(lm, tmp_path / "a", ModelConfig(name="m"), "prompt") as pair:
        assert torch.equal(pair.base.logits(hidden), base) and pair.base.head["lora"] is None
        assert not torch.allclose(pair.other.logits(hidden), base, atol=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_merged_weights_give_the_adapted_logits_unless_they_are_tied(place: Path, dtype: str, tmp_path: Path) -> None:
    lm = loaded(place, dtype)
    adapter = worn(lm, TRAINED)
    before = [layer.base.weight.clone() for layer in adapter.layers.values()]
    tuned = lm.model(IDS).logits
    if lm.model.config.tie_word_embeddings:
        with pytest.raises(
            AdapterError,
            match=r"merge: model.embed_tokens is the weight of.*tie_word_embeddings=false",
        ):
            lora.merge(adapter)
        assert all(torch.equal(layer.base.weight, w) for layer, w in zip(adapter.layers.values(), before, strict=True))
        return
    lora.merge(adapter)
    eps = torch.finfo(lm.weight.dtype).eps
    assert (lm.model(IDS).logits - tuned).double().norm() < 30 * eps * tuned.double().norm()
    torch.testing.assert_close(lm.logits(lm.hidden(IDS)), lm.model(IDS).logits.float(), rtol=0.05, atol=60 * eps)
    lora.detach(lm.model, adapter)
    model.save(lm, tmp_path / "merged")
    again = loaded(tmp_path / "merged", dtype)
    assert (again.model(IDS).logits - tuned).double().norm() < 30 * eps * tuned.double().norm()
    lora.unmerge(adapter)
    for layer, weight in zip(adapter.layers.values(), before, strict=True):
        assert (layer.base.weight - weight).abs().max() <= 2 * eps * layer.base.weight.abs().max()


def test_what_cannot_be_adapted_is_named(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, message in (
        ({"targets": ["embed_tokens"], "first_layer": 1}, r"embed_tokens comes before .*lora.first_layer=1.* to 0"),
        ({"targets": ["lm_head"], "dropout": 0.1}, r"lm_head is the output head.*lora.dropout=0"),
        ({"targets": ["embed_token"]}, r"'embed_token' matches no layer.*embed_tokens"),
        ({"targets": ["rotary_emb"]}, r"rotary_emb is a LlamaRotaryEmbedding, not a plain linear layer or the input"),
    ):
        with pytest.raises(AdapterError, match=message):
            lora.attach(lm.model, LoraConfig(**settings), seed=0)
    adapter = lora.attach(lm.model, LoraConfig(targets=["q_proj", "lm_head"], first_layer=1), seed=0)  # which is above
    assert set(adapter.layers) == {"model.layers.1.self_attn.q_proj", "lm_head"}
    with pytest.raises(AdapterError, match="lm_head is a LoraLinear"):
        lora.attach(lm.model, LoraConfig(targets=["lm_head"]), seed=0)
    lora.detach(lm.model, adapter)
    monkeypatch.setitem(__import__("sys").modules, "vllm", object())
    monkeypatch.setattr(vllm_engine, "_on_gpu", lambda _: True)
    vllm_engine.check(lm)
    with pytest.raises(RmxError, match=r"engine=vllm: the adapter is on the input embedding or the output head"):
        vllm_engine.check(lm, [lm.model.lm_head])
    worn(lm, ["embed_tokens"])
    with pytest.raises(RmxError, match=r"leave them out of lora.targets"):
        vllm_engine.check(lm)


def test_an_embedding_that_does_more_than_to_look_up_is_refused() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    gemma = transformers.AutoModelForCausalLM.from_config(transformers.Gemma3TextConfig(**sizes, **more))
    with pytest.raises(AdapterError, match="Gemma3TextScaledWordEmbedding, which does more than look up a row"):
        lora.attach(gemma, LoraConfig(targets=["embed_tokens"]), seed=0)
    opt = transformers.AutoModelForCausalLM.from_config(transformers.OPTConfig(**sizes, ffn_dim=48))
    with pytest.raises(AdapterError, match="OPTLearnedPositionalEmbedding, not a plain linear layer or the input"):
        lora.attach(opt, LoraConfig(targets=["embed_positions"]), seed=0)


def test_passes_with_them_are_not_captured(lm: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU, which this only looks at by name: a lookup's gradient, and passes that have none."""
    monkeypatch.setattr(CausalLM, "device", torch.device("cuda"))
    for targets, expected in (
        (["q_proj"], True),
        (["q_proj", "lm_head"], True),
        (["lm_head"], False),
        (TRAINED, False),
    ):
        adapter = worn(lm, targets)
        assert capturable(lm, adapter, TrainConfig()) == expected
        lora.detach(lm.model, adapter)
