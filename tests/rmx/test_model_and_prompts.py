"""Loading from safetensors and GGUF, refusing pickles and missing weights, the head's self-check."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import full_logits
from safetensors.torch import load_file, save_file

from rmx.config import ModelConfig, PromptConfig
from rmx.models import model
from rmx.models.model import ModelError
from rmx.models.prompts import Renderer
from rmx_kernels import causal_lm, linear_entropy_topk

SIZES: dict[str, Any] = {"vocab_size": 21, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def config(name: object, **more: object) -> ModelConfig:
    return ModelConfig.model_validate({"name": str(name), "dtype": "float32", "device": "cpu", **more})


def test_hidden_states_and_head_give_the_models_logits(tiny: model.CausalLM) -> None:
    ids = torch.randint(3, 20, (3, 7))
    torch.testing.assert_close(full_logits(tiny, ids), tiny.model(ids).logits)
    assert not tiny.model.training
    assert not any(p.requires_grad for p in tiny.model.parameters())
    assert tiny.eos_ids == {2}


@pytest.mark.thorough
def test_the_gguf_of_the_demo_loads(demo_lm: model.CausalLM) -> None:
    assert demo_lm.weight.shape == (49152, 576)
    ids = torch.tensor([Renderer(demo_lm.tokenizer, PromptConfig())("What is the capital of France?")])
    with torch.no_grad():
        best = full_logits(demo_lm, ids)[0, -1].argmax()
    assert demo_lm.tokenizer.decode([best]) == "The"


def test_a_directory_without_weights_says_so(tiny_path: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ModelError, match=r"contains no weights \(\*.safetensors or \*.gguf\)$"):
        model.load(config(bare))
    with pytest.raises(ModelError, match="no such directory"):
        model.load(config(tmp_path / "absent"))
    with pytest.raises(ModelError, match="'no_such_pkg' is not installed"):
        model.load(config("package:no_such_pkg"))


def test_pickled_weights_are_never_opened(tiny_path: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(tiny_path, tmp_path / "p", ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a pickle, which is never opened"):
        model.load(config(pickled))


def test_an_adapter_is_not_a_model(tiny_path: Path, tmp_path: Path) -> None:
    """transformers would fetch its base, and read the adapter itself from a pickle if there is no other file."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x", "peft_type": "LORA"}')
    shutil.copy(tiny_path / "model.safetensors", tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="it is an adapter; expected its base model"):
        model.load(config(tmp_path))


def test_ordinary_mistakes_are_model_errors(tiny: model.CausalLM, tiny_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'no\.such' is not installed"):
        model.load(config("package:no.such"))
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="cannot be loaded"):
            model.load(config(tiny_path, device="cuda"))
    tiny.tokenizer.add_tokens(["one", "too many"])
    with pytest.raises(ModelError, match="the tokenizer has 23 tokens, the output head only 21"):
        model.wrap(tiny.model, tiny.tokenizer)


def test_several_ggufs_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ModelError, match=r"several GGUF files \(a.gguf, b.gguf\); set model.gguf_file"):
        model.load(config(tmp_path))
    with pytest.raises(ModelError, match="expected a GGUF file, got one without the GGUF header"):
        model.load(config(tmp_path, gguf_file="a.gguf"))  # empty


def test_torn_weights_are_an_error(tiny_path: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(tiny_path, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be loaded"):
        model.load(config(torn))


def changed(source: Path, path: Path, file: str = "config.json", **settings: object) -> Path:
    """A copy of a model's directory with other settings."""
    shutil.copytree(source, path)
    given = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(given | settings))
    return path


def test_missing_weights_are_refused_by_name(tiny_path: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers after a warning."""
    with pytest.raises(ModelError, match=r"files lack model.layers.2.* and 8 others, so .* would be random"):
        model.load(config(changed(tiny_path, tmp_path / "deeper", num_hidden_layers=3)))
    empty = shutil.copytree(tiny_path, tmp_path / "empty")
    save_file({}, empty / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"files lack lm_head.weight and 20 others"):
        model.load(config(empty))
    headless = shutil.copytree(tiny_path, tmp_path / "headless")
    tensors = load_file(headless / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, headless / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"files lack lm_head.weight, so these weights would be random"):
        model.load(config(headless))
    tied = changed(headless, tmp_path / "tied", tie_word_embeddings=True)
    assert model.load(config(tied)).weight is not None  # that of the embedding


def test_a_model_without_sdpa_is_loaded_with_eager_which_is_said(
    tiny_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8))
    shutil.copytree(tiny_path, tmp_path / "gemma")
    gemma.save_pretrained(tmp_path / "gemma")
    lm = model.load(config(tmp_path / "gemma"))
    assert lm.model.config._attn_implementation == "eager"
    assert (
        "Gemma2ForCausalLM does not support attention 'sdpa', so it generates with 'eager'" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("ends", "expected"), [([4, 7], {2, 4, 7}), (4, {2, 4}), (2, {2}), (None, {2})])
def test_the_tokenizers_own_end_is_always_one(
    tiny_path: Path, tmp_path: Path, ends: object, expected: set[int]
) -> None:
    path = changed(tiny_path, tmp_path / "ends", "generation_config.json", eos_token_id=ends)
    assert model.load(config(path)).eos_ids == expected


def test_known_logit_transforms_are_followed_and_unknown_ones_refused(tiny: model.CausalLM) -> None:
    inner = tiny.model.forward

    def transformed(transform):  # type: ignore[no-untyped-def]
        def forward(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = inner(*args, **kwargs)
            out.logits = transform(out.logits)
            return out

        tiny.model.forward = forward  # type: ignore[method-assign]

    causal_lm.CHECKED.pop(tiny.model)  # loading has seen it to be right
    transformed(lambda z: z * 0.5)
    with pytest.raises(ModelError, match="the model transforms them in another way"):
        model.wrap(tiny.model, tiny.tokenizer)
    tiny.model.config.logit_scale = 0.5
    assert model.wrap(tiny.model, tiny.tokenizer).scale == 0.5
    tiny.model.config.final_logit_softcapping = 3.0
    transformed(lambda z: 3 * torch.tanh(z * 0.5 / 3))
    assert model.wrap(tiny.model, tiny.tokenizer).softcap == 3.0


GRIFFIN = {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "head_dim": 8}
HEADS: dict[str, transformers.PretrainedConfig] = {
    "soft_cap": transformers.RecurrentGemmaConfig(**SIZES, **GRIFFIN, logits_soft_cap=3.0, w_init_variance_scale=1.0),
    "multiplies": transformers.HyperCLOVAXConfig(**SIZES, logits_scaling=3.0, initializer_range=0.3),
    "divides": transformers.GraniteConfig(**SIZES, logits_scaling=3.0, initializer_range=0.3),
    "Llama 4": transformers.Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, head_dim=8, num_local_experts=2, layer_types=["full_attention"] * 2
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_every_kind_of_model(name: str, tiny: model.CausalLM) -> None:
    """Entropies by the head are those of the model's own logits, at a temperature too; in float32."""
    torch.manual_seed(0)
    other = transformers.AutoModelForCausalLM.from_config(HEADS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        other.get_output_embeddings().weight.normal_(0, 2)
    lm = model.wrap(other, tiny.tokenizer)
    ids = torch.randint(3, 20, (2, 7))
    with torch.no_grad():
        logits, hidden = other(ids).logits, lm.hidden(ids)
        torch.testing.assert_close(lm.logits(hidden), logits, rtol=1e-4, atol=1e-4)
        expected = torch.distributions.Categorical(logits=logits / 0.7).entropy()
        got = linear_entropy_topk(hidden, **lm.head_at(0.7)).entropy
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_layers_between_the_hidden_states_and_the_head_are_refused(tiny: model.CausalLM) -> None:
    """ModernBERT's decoder: get_decoder() is its output head."""
    settings = transformers.ModernBertDecoderConfig(**SIZES, pad_token_id=0, local_attention=8)
    other = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    with pytest.raises(ModelError, match="ModernBertDecoderForCausalLM: model: expected the logits of"):
        model.wrap(other, tiny.tokenizer)


def test_batches_keep_the_budget_and_every_index() -> None:
    lengths = [5, 9, 1, 9, 3, 40, 2]
    groups = model.batches(lengths, 18)
    assert sorted(i for group in groups for i in group) == list(range(7))
    assert groups[0] == [5]  # longer than the budget: alone
    assert all(len(g) * max(lengths[i] for i in g) <= 18 for g in groups[1:])


def test_padding() -> None:
    ids, mask = model.pad([[1, 2, 3], [4]], torch.device("cpu"), left=True)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert model.pad([[1, 2, 3], [4]], torch.device("cpu"))[0].tolist() == [[1, 2, 3], [4, 0, 0]]
