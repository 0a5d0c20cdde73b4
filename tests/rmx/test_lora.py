"""The adapter against real PEFT, on the real model; refusals; round trips."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from rmx.config import LoraConfig, ModelConfig
from rmx.models import lora, lora_layers, model
from rmx.models.lora import AdapterError

IDS = torch.tensor([[1, 5, 6, 7, 8]])
SMALL = LoraConfig(r=2, alpha=6.0, targets=["o_proj", "q_proj"])


def randomise(adapter: lora.Adapter, scale: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter.layers.values():
            layer.lora_B.normal_(0, scale, generator=generator)


def logits_and_gradient(lm: model.CausalLM, adapter: lora.Adapter) -> tuple[torch.Tensor, torch.Tensor]:
    lm.model.zero_grad()
    out = lm.model(IDS, use_cache=False).logits
    out.square().sum().backward()
    return out.detach(), torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@pytest.fixture
def saved(tiny: model.CausalLM, tmp_path: Path) -> Path:
    adapter = lora.attach(tiny.model, SMALL, seed=0)
    randomise(adapter)
    lora.save_adapter(adapter, tmp_path / "adapter", "some/model")
    lora.detach(tiny.model, adapter)
    return tmp_path / "adapter"


@pytest.mark.thorough
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj"], ["mlp.down_proj"]])
@torch.no_grad()
def test_peft_loads_it_and_gives_the_same_logits(demo_lm: model.CausalLM, tmp_path: Path, targets: list[str]) -> None:
    ids = torch.randint(5, 40000, (2, 9), generator=torch.Generator().manual_seed(2))
    base = demo_lm.model(ids).logits
    adapter = lora.attach(demo_lm.model, LoraConfig(r=8, alpha=16, targets=targets), seed=0)
    randomise(adapter, 0.02)
    ours = demo_lm.model(ids).logits
    lora.save_adapter(adapter, tmp_path / "adapter", "HuggingFaceTB/SmolLM2-135M-Instruct")
    lora.detach(demo_lm.model, adapter)
    theirs = PeftModel.from_pretrained(demo_lm.model, str(tmp_path / "adapter"))
    try:
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=1e-5, atol=1e-4)  # logits of 20: 5e-6 of them
    finally:
        theirs.unload()
    assert (ours - base).abs().max() > 0.1
    torch.testing.assert_close(demo_lm.model(ids).logits, base, rtol=0, atol=0)


def test_an_adapter_that_peft_wrote_loads(tiny: model.CausalLM, tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    peft_model = get_peft_model(tiny.model, PeftLoraConfig(r=3, lora_alpha=5, target_modules=["v_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    theirs = peft_model(IDS).logits
    peft_model.save_pretrained(tmp_path)
    peft_model.unload()
    lora.load_adapter(tiny.model, tmp_path)
    torch.testing.assert_close(tiny.model(IDS).logits, theirs, rtol=1e-5, atol=1e-5)


def test_a_fresh_adapter_and_one_that_is_off_change_nothing(tiny: model.CausalLM) -> None:
    base = tiny.model(IDS).logits
    adapter = lora.attach(tiny.model, SMALL, seed=0)
    torch.testing.assert_close(tiny.model(IDS).logits, base, rtol=0, atol=0)
    randomise(adapter)
    assert not torch.equal(tiny.model(IDS).logits, base)
    with adapter.off():
        torch.testing.assert_close(tiny.model(IDS).logits, base, rtol=0, atol=0)
    assert not torch.equal(tiny.model(IDS).logits, base)
    assert adapter.size == 2 * 2 * 2 * (32 + 32)
    assert [p.requires_grad for p in tiny.model.parameters()].count(True) == 8


def test_round_trip_and_format_on_disk(tiny: model.CausalLM, saved: Path) -> None:
    adapter = lora.load_adapter(tiny.model, saved)
    tensors = load_file(saved / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"
    assert torch.equal(tensors[name], adapter.layers["model.layers.1.self_attn.o_proj"].lora_A)
    assert (len(tensors), tensors[name].shape, tensors[name].dtype) == (8, (2, 32), torch.float32)
    description = json.loads((saved / "adapter_config.json").read_text())
    assert description["base_model_name_or_path"] == "some/model"
    assert (description["r"], description["lora_alpha"], description["target_modules"]) == (
        2,
        6.0,
        ["o_proj", "q_proj"],
    )


def test_low_precision_bases_keep_float32_masters(tiny_path: Path) -> None:
    lm = model.load(ModelConfig(name=str(tiny_path), dtype="bfloat16", device="cpu"))
    adapter = lora.attach(lm.model, SMALL, seed=0)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert lm.model(IDS).logits.dtype == torch.bfloat16


def test_an_adapter_that_changes_nothing_is_refused(tiny: model.CausalLM, tmp_path: Path) -> None:
    adapter = lora.attach(tiny.model, SMALL, seed=0)
    with pytest.raises(AdapterError, match="changes nothing"):
        lora.save_adapter(adapter, tmp_path / "adapter", "m")
    with torch.no_grad():
        adapter.layers["model.layers.0.self_attn.q_proj"].lora_B[0, 0] = float("inf")
    with pytest.raises(AdapterError, match=r"layers.0.self_attn.q_proj.lora_B.weight contains values that are"):
        lora.save_adapter(adapter, tmp_path / "adapter", "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["qproj"], "'qproj' matches no layer.*q_proj"), (["norm"], "LlamaRMSNorm"), (["mlp"], "LlamaMLP")],
)
def test_targets_that_do_not_fit_are_named(tiny: model.CausalLM, targets: list[str], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        lora.attach(tiny.model, LoraConfig(targets=targets), seed=0)


def test_an_adapter_for_another_model_is_refused_and_leaves_the_model_alone(
    tiny: model.CausalLM, saved: Path, tmp_path: Path
) -> None:
    from tiny import save_tiny_model

    base = tiny.model(IDS).logits
    other = model.load(ModelConfig(name=str(save_tiny_model(tmp_path / "w", hidden_size=64)), dtype="float32"))
    with pytest.raises(AdapterError, match=r"belongs to another model: .* shape"):
        lora.load_adapter(other.model, saved)
    deeper = model.load(ModelConfig(name=str(save_tiny_model(tmp_path / "d", num_hidden_layers=3)), dtype="float32"))
    with pytest.raises(AdapterError, match=r"only one of adapter and model has .*layers.2"):
        lora.load_adapter(deeper.model, saved)
    assert not any(isinstance(m, lora.LoraLinear) for m in deeper.model.modules())
    torch.testing.assert_close(tiny.model(IDS).logits, base, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "all-linear"),
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(a+)+": 4}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "much"}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("alora_invocation_tokens", [3]),
        ("exclude_modules", ["q_proj"]),
        ("lora_bias", True),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 2]]),
        ("fan_in_fan_out", True),
        ("use_qalora", True),
        ("a_key_of_tomorrow", 1),
        ("layers_to_transform", [0]),
        ("r", None),
    ],
)
def test_other_kinds_of_adapter_are_refused(tiny: model.CausalLM, saved: Path, key: str, value: object) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(AdapterError, match=rf"adapter.*: (1 validation error .*\n)?{key}"):
        lora.load_adapter(tiny.model, saved)
    shutil.rmtree(saved)
    with pytest.raises(AdapterError, match="cannot be read as an adapter"):
        lora.load_adapter(tiny.model, saved)


@pytest.mark.parametrize("kind", ["pissa", "olora", "gaussian", "orthogonal", True])
def test_what_peft_writes_is_loaded_exactly_or_refused(tiny: model.CausalLM, tmp_path: Path, kind: object) -> None:
    """PiSSA and OLoRA change the weights of the base, which the file does not hold."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    config = PeftLoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=kind)
    get_peft_model(copy.deepcopy(tiny.model), config).save_pretrained(tmp_path)
    if kind in ("pissa", "olora"):
        with pytest.raises(AdapterError, match=f"init_lora_weights is '{kind}'; only True"):
            lora.load_adapter(tiny.model, tmp_path)
        return
    theirs = PeftModel.from_pretrained(copy.deepcopy(tiny.model), str(tmp_path))
    lora.load_adapter(tiny.model, tmp_path)
    torch.testing.assert_close(tiny.model(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(tiny: model.CausalLM, saved: Path, value: float) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[name][0, 0] = value
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=f"{name} contains values that are not finite"):
        lora.load_adapter(tiny.model, saved)
    assert not any(isinstance(m, lora.LoraLinear) for m in tiny.model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_merge_and_unmerge_are_exact_to_rounding(tiny_path: Path, dtype: torch.dtype) -> None:
    lm = model.load(ModelConfig(name=str(tiny_path), dtype=str(dtype).removeprefix("torch."), device="cpu"))
    adapter = lora.attach(lm.model, SMALL, seed=0)
    randomise(adapter, 0.3)
    before = {name: layer.base.weight.clone() for name, layer in adapter.layers.items()}
    tuned = lm.model(IDS).logits
    lora.merge(adapter)
    eps = torch.finfo(dtype).eps
    for name, layer in adapter.layers.items():
        exact = before[name].double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        assert (layer.base.weight - exact).abs().max() <= 2 * eps * exact.abs().max()
    error = (lm.model(IDS).logits - tuned).double().norm() / tuned.double().norm()
    assert error < 30 * eps
    lora.unmerge(adapter)
    for name, layer in adapter.layers.items():
        assert (layer.base.weight - before[name]).abs().max() <= 2 * eps * layer.base.weight.abs().max()
        assert layer.enabled


@torch.no_grad()
def test_upper_layers_alone_as_peft_reads_them(tiny: model.CausalLM, tmp_path: Path) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4, first_layer=1), seed=0)
    assert {name.split(".")[2] for name in adapter.layers} == {"1"}
    randomise(adapter, 0.3)
    ours = tiny.model(IDS).logits
    lora.save_adapter(adapter, tmp_path / "adapter", "m")
    lora.detach(tiny.model, adapter)
    theirs = PeftModel.from_pretrained(tiny.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-5, atol=1e-5)
    theirs.unload()
    again = lora.load_adapter(tiny.model, tmp_path / "adapter")
    assert again.config.first_layer == 1
    torch.testing.assert_close(tiny.model(IDS).logits, ours, rtol=0, atol=0)
    lora.detach(tiny.model, again)
    with pytest.raises(AdapterError, match=r"lora.first_layer=2: the model has layers 0 to 1"):
        lora.attach(tiny.model, LoraConfig(first_layer=2), seed=0)


def test_one_product_for_q_k_and_v_and_the_gradients_of_three(tiny: model.CausalLM) -> None:
    """Against each layer on its own: values and gradients; and nothing is left behind for the next pass."""
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4, targets=["q_proj", "k_proj", "v_proj"]), seed=0)
    randomise(adapter, 0.3)

    shared, gradient = logits_and_gradient(tiny, adapter)
    groups = {id(layer.shared): layer.shared for layer in adapter.layers.values()}
    assert len(groups) == 2  # one a decoder layer
    assert all(group is not None and group.x is None and not group.left for group in groups.values())
    for layer in adapter.layers.values():
        layer.shared = None
    alone, expected = logits_and_gradient(tiny, adapter)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_masters_are_the_same_weights_and_gradients_in_one_tensor(tiny: model.CausalLM) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=3, targets=["q_proj", "k_proj", "down_proj"]), seed=0)
    randomise(adapter, 0.3)

    def loss() -> torch.Tensor:
        return tiny.model(IDS, use_cache=False).logits.square().sum()

    first = loss()
    first.backward()
    expected = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
    masters = lora_layers.Masters(adapter)
    assert torch.equal(loss(), first)
    with masters.lent(torch.float32):
        for _ in range(2):  # passes of one step add up
            lent = loss()
            lent.backward(retain_graph=True)
    torch.testing.assert_close(lent, first, rtol=1e-6, atol=0)
    assert masters.flat.grad is not None
    torch.testing.assert_close(masters.flat.grad, 2 * expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert all(layer.lent is None for layer in adapter.layers.values())
    with torch.no_grad():
        masters.flat.zero_()  # the layers' own weights are parts of it
    assert not any(bool(p.any()) for p in adapter.parameters())


def test_dropout_is_for_the_adapter_in_training_alone(tiny: model.CausalLM) -> None:
    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4, dropout=0.5), seed=0)
    randomise(adapter, 0.3)
    tuned = tiny.model(IDS).logits
    with adapter.training():
        torch.manual_seed(0)
        assert not torch.equal(tiny.model(IDS).logits, tuned)
        with adapter.off():
            base = tiny.model(IDS).logits
    assert torch.equal(tiny.model(IDS).logits, tuned)
    lora.detach(tiny.model, adapter)
    assert torch.equal(tiny.model(IDS).logits, base)


@torch.no_grad()
def test_a_rank_stabilised_adapter_is_that_of_peft(tiny: model.CausalLM, tmp_path: Path) -> None:
    """alpha / sqrt(r): saved, loaded by PEFT, and loaded again."""
    config = LoraConfig(r=4, alpha=6, targets=["q_proj", "down_proj"], rslora=True)
    adapter = lora.attach(tiny.model, config, seed=0)
    assert {layer.scaling for layer in adapter.layers.values()} == {3.0}
    randomise(adapter)
    ours = tiny.model(IDS).logits
    lora.save_adapter(adapter, tmp_path / "adapter", "some/model")
    lora.detach(tiny.model, adapter)
    theirs = PeftModel.from_pretrained(tiny.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(IDS).logits, ours, rtol=1e-5, atol=1e-5)
    theirs.unload()
    again = lora.load_adapter(tiny.model, tmp_path / "adapter")
    assert again.config.rslora and torch.equal(tiny.model(IDS).logits, ours)


@torch.no_grad()
def test_all_linear_layers_are_those_of_peft(tiny: model.CausalLM, tmp_path: Path) -> None:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    adapter = lora.attach(tiny.model, LoraConfig(r=2, alpha=4, targets=["all-linear"]), seed=0)
    randomise(adapter)
    ours = tiny.model(IDS).logits
    lora.save_adapter(adapter, tmp_path / "adapter", "some/model")
    lora.detach(tiny.model, adapter)
    peft_model = get_peft_model(tiny.model, PeftLoraConfig(target_modules="all-linear"))
    layers = [name for name, _ in peft_model.named_modules() if name.endswith(".base_layer")]
    theirs = {name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in layers}
    peft_model.unload()
    assert set(adapter.layers) == theirs and len(theirs) == 14
    loaded = PeftModel.from_pretrained(tiny.model, str(tmp_path / "adapter"))
    torch.testing.assert_close(loaded(IDS).logits, ours, rtol=1e-5, atol=1e-5)
    loaded.unload()


@torch.no_grad()
def test_a_training_begins_with_an_adapter(tiny: model.CausalLM, saved: Path) -> None:
    found = lora.begin(tiny.model, SMALL, 0, saved)
    kept = load_file(saved / lora.WEIGHTS)
    for name, layer in found.layers.items():
        assert layer.lora_B.equal(kept[f"base_model.model.{name}.lora_B.weight"])
    lora.detach(tiny.model, found)
    for change, message in (
        ({"r": SMALL.r + 1}, "r is .* there, .* in the configuration"),
        ({"alpha": 1.0}, "alpha is"),
        ({"rslora": True}, "rslora is False there, True"),
        ({"targets": [*SMALL.targets, "down_proj"]}, "down_proj is adapted only by the configuration"),
    ):
        with pytest.raises(lora.AdapterError, match=f"lora.start=.*{message}"):
            lora.begin(tiny.model, SMALL.model_copy(update=change), 0, saved)
        assert not any(isinstance(m, lora_layers.LoraLinear) for m in tiny.model.modules())
