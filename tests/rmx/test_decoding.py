"""Decoding of every kind of layer by the loop engine: step by step as in whole sequences, or refused by name."""

from typing import Any

import pytest
import torch
import transformers as hf

from rmx.config import PromptConfig, RolloutsConfig
from rmx.models.model import CausalLM, wrap
from rmx.models.prompts import Renderer
from rmx.records import Problem
from rmx.sampling.engines import Decoder, EngineError, check_decoding
from rmx.sampling.rollouts import check_rotation, generate_rollouts

PLAIN: dict[str, Any] = {"vocab_size": 21, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
FULL = {**PLAIN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXED = ["linear_attention", "full_attention"]
SERVED: dict[str, hf.PretrainedConfig] = {
    "Llama": hf.LlamaConfig(**FULL),
    "Gemma 2": hf.Gemma2Config(**FULL, head_dim=8, sliding_window=4),
    "Qwen3-Next": hf.Qwen3NextConfig(
        **FULL, **LINEAR, **EXPERTS, head_dim=8, shared_expert_intermediate_size=16, layer_types=MIXED
    ),
    "Qwen3.5": hf.Qwen3_5TextConfig(**FULL, **LINEAR, head_dim=8, layer_types=MIXED),
    "LFM2": hf.Lfm2Config(**FULL, layer_types=["conv", "full_attention"]),
    "Granite 4": hf.GraniteMoeHybridConfig(
        **FULL, **STATE, layer_types=["mamba", "attention"], num_local_experts=0, shared_intermediate_size=48
    ),
    "Falcon-H1": hf.FalconH1Config(**FULL, **STATE, mamba_d_ssm=64),
    "Mamba": hf.MambaConfig(**PLAIN),
    "Mamba-2": hf.Mamba2Config(**PLAIN, num_heads=8, head_dim=8, state_size=8, n_groups=1),
}
GRIFFIN = {"lru_width": 32, "attention_window_size": 8, "head_dim": 8, "block_types": ["recurrent", "attention"]}
REFUSED: dict[str, tuple[hf.PretrainedConfig, str]] = {
    "RWKV": (hf.RwkvConfig(**PLAIN, attention_hidden_size=32), "does not support its cache"),
    "RecurrentGemma": (hf.RecurrentGemmaConfig(**FULL, **GRIFFIN), "cannot carry its states from token to token"),
}


def made(config: hf.PretrainedConfig, tiny: CausalLM, dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    return wrap(hf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False), tiny.tokenizer)


@pytest.mark.thorough
@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_steps_of_padded_batches_are_whole_sequences(name: str, tiny: CausalLM) -> None:
    lm = made(SERVED[name], tiny)
    prompts, steps = [[5, 6, 7], [8, 9, 10, 11, 12, 13]], [[3, 7], [6, 8]]
    decoder = Decoder(lm, prompts, repeats=2)
    decoder.read(torch.tensor([3, 4, 5, 6]))
    decoder.keep(torch.tensor([0, 3]))
    decoder.read(torch.tensor([7, 8]))
    whole = [lm.hidden(torch.tensor([a + b]), use_cache=False)[0, -1] for a, b in zip(prompts, steps, strict=True)]
    torch.testing.assert_close(decoder.hidden, torch.stack(whole), rtol=1e-4, atol=1e-5)
    for dtype in (torch.float32, torch.bfloat16):
        check_decoding(made(SERVED[name], tiny, dtype), padded=True)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_keep_states_in_another_way_are_refused_by_name(name: str, tiny: CausalLM) -> None:
    config, message = REFUSED[name]
    settings = RolloutsConfig(samples=2, max_new_tokens=3, engine="loop")
    lm = made(config, tiny)
    with pytest.raises(EngineError, match=rf"{type(lm.model).__name__}: engine loop {message}.*use another engine"):
        generate_rollouts(lm, Renderer(lm.tokenizer, PromptConfig()), [Problem("a", "1", "1")], settings, seed=0)


def test_padding_that_reaches_a_state_is_refused_however_little(tiny: CausalLM) -> None:
    """A part in a thousand of the token before: less than bfloat16 shows. Prompts of one length are decoded."""
    lm = made(SERVED["Llama"], tiny, torch.bfloat16)
    lm.model.model.layers[0].register_forward_pre_hook(
        lambda _, args: (args[0] + 1e-3 * args[0].roll(1, 1) * (args[0].shape[1] > 1),)
    )
    with pytest.raises(EngineError, match=r"padding on the left changes the states .*set batch_size to samples"):
        check_decoding(lm, padded=True)
    check_decoding(lm, padded=False)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotation_that_changes_among_the_tokens_is_refused(kind: str, tiny: CausalLM) -> None:
    more = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 16, **more}
    positions = {"max_position_embeddings": 16 if kind == "dynamic" else 64}
    lm = made(hf.LlamaConfig(**FULL, **positions, rope_parameters=rope), tiny)
    check_rotation(lm, 6, 10)
    with pytest.raises(EngineError, match=rf"\({kind}\) changes .* set rollouts.max_new_tokens to at most 10, or"):
        check_rotation(lm, 6, 11, "rollouts.")
