"""Adapters on layers of many architectures: adapted as PEFT adapts them, or refused by name."""

from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from test_lora import IDS, randomise

from rmx.config import LoraConfig
from rmx.models import lora
from rmx.models.lora import AdapterError

PLAIN = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
STATE = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
JAMBA = {"num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
GLM_MOE = {"num_key_value_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
UNFIT: dict[str, tuple[transformers.PretrainedConfig, str, str]] = {
    "fused experts": (
        transformers.Glm4MoeConfig(**PLAIN, **GLM_MOE, n_group=1, topk_group=1),
        "down_proj",
        "has the name of an expert layer",
    ),
    "Mamba's weight": (transformers.MambaConfig(**STATE), "x_proj", "is not called by MambaMixer"),
    "Mamba's weight, too": (transformers.MambaConfig(**STATE), "dt_proj", "is not called by MambaMixer"),
    "Jamba's weight": (transformers.JambaConfig(**PLAIN, **JAMBA), "dt_proj", "is not called by JambaMambaMixer"),
    "PEFT's own rule": (
        transformers.Mamba2Config(**STATE, num_heads=8, head_dim=8, state_size=8, n_groups=1),
        "out_proj",
        "is a layer that PEFT does not adapt in models of type mamba2",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_layers_on_which_an_adapter_would_not_be_what_peft_loads(name: str) -> None:
    config, target, message = UNFIT[name]
    other = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(AdapterError, match=rf"lora.targets: .*\.{target} {message}.*leave it out of the targets"):
        lora.attach(other, LoraConfig(r=2, targets=[target]), seed=0)


SAME: dict[str, tuple[transformers.PretrainedConfig, list[str], int]] = {
    "outside of the layers": (
        transformers.OPTConfig(**STATE, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=16, init_std=0.3),
        ["project_out", "q_proj"],
        1,
    ),
    "asks a layer for its dtype": (
        transformers.GPTJConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        ["q_proj", "fc_in"],
        0,
    ),
    "attention of fused experts": (
        transformers.Glm4MoeConfig(**PLAIN, **GLM_MOE, n_group=1, topk_group=1, first_k_dense_replace=1),
        ["q_proj", "o_proj"],
        1,
    ),
    "Mamba": (transformers.MambaConfig(**STATE), ["in_proj"], 0),
    "two decoders of one name": (
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(
                **{k: v for k, v in PLAIN.items() if k != "vocab_size"}, image_size=8, patch_size=4
            ),
            text_config=transformers.LlamaConfig(**PLAIN),
        ),
        ["q_proj", "v_proj"],
        1,
    ),
}


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_peft_adapts_the_same_layers(name: str, tmp_path: Path) -> None:
    config, targets, first = SAME[name]
    torch.manual_seed(0)
    kind = transformers.AutoModelForImageTextToText if "vision" in str(config) else transformers.AutoModelForCausalLM
    other = kind.from_config(config, dtype=torch.float32).eval()
    base = other(IDS, use_cache=False).logits
    adapter = lora.attach(other, LoraConfig(r=2, alpha=4, targets=targets, first_layer=first), seed=0)
    randomise(adapter, 0.3)
    ours, layers = other(IDS, use_cache=False).logits, set(adapter.layers)
    lora.save_adapter(adapter, tmp_path / "adapter", "m")
    lora.detach(other, adapter)
    theirs = PeftModel.from_pretrained(other, str(tmp_path / "adapter"))
    torch.testing.assert_close(theirs(IDS, use_cache=False).logits, ours, rtol=1e-5, atol=1e-5)
    theirs.unload()
    assert set(lora.load_adapter(other, tmp_path / "adapter").layers) == layers
    torch.testing.assert_close(other(IDS, use_cache=False).logits, ours, rtol=0, atol=0)
    assert not torch.allclose(ours, base, rtol=1e-3)
