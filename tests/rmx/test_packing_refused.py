"""Models that cannot be packed are refused by name, however little one sequence would change its neighbour."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_packing import FAMILIES, HEADS, SEQUENCES, SMALL, alone, error, wrapped
from torch import Tensor
from transformers import (
    BartConfig,
    BloomConfig,
    DeepseekV3Config,
    GptOssConfig,
    Lfm2Config,
    MambaConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from rmx.attention import grouped as grouped_attention
from rmx.attention import packed as packed_attention
from rmx.attention.packing import Packing, PackingError
from rmx.models import forward


def test_a_model_that_mixes_sequences_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that forgets the borders: the check must see it, as nothing else would."""
    lm = wrapped(FAMILIES["qwen3"])

    def leaking(q: Tensor, k: Tensor, v: Tensor, p: Packing, scale: float, *rest: Any) -> Tensor:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, is_causal=True, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    with monkeypatch.context() as patch:
        patch.setattr(packed_attention, "backend", lambda *_: leaking)
        with pytest.raises(PackingError, match=r"Qwen3ForCausalLM: packed sequences give hidden states that differ"):
            forward.check(lm)
    forward.check(lm)


LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PLAIN = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FULL = {**PLAIN, "intermediate_size": 48}
STATEFUL: dict[str, tuple[PretrainedConfig, str]] = {
    "Qwen3-Next": (
        Qwen3NextConfig(
            **FULL, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16, layer_types=["linear_attention"] * 2
        ),
        "linear_attention",
    ),
    "Qwen3.5": (Qwen3_5TextConfig(**FULL, **LINEAR, layer_types=["linear_attention"] * 2), "linear_attention"),
    "LFM2": (Lfm2Config(**FULL, layer_types=["conv", "full_attention"]), "conv"),
    "Bloom": (BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "attention of its own"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_over_the_whole_row_is_refused_however_small(name: str, dtype: torch.dtype) -> None:
    """Freshly made weights and bfloat16 leave less than 5 % of a leak; padded, all of them run."""
    config, what = STATEFUL[name]
    lm = wrapped(config, dtype)
    lm.model.get_input_embeddings().weight.data *= 0.1
    with pytest.raises(
        PackingError, match=rf"sequences give .*(other sequences .*\(.*{what}|differ).*set model.packing=false"
    ):
        forward.check(lm)
    forward.check(dataclasses.replace(lm, packing=False))


def test_positions_through_the_row_are_refused_however_small() -> None:
    """Bart's decoder takes no position_ids; its learnt positions hardly matter at this size."""
    config = BartConfig(vocab_size=61, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48)
    lm = wrapped(config, torch.bfloat16)
    lm.model.get_decoder().embed_positions.weight.data *= 1e-3
    with pytest.raises(PackingError, match=r"BartForCausalLM takes no position_ids, .*set model.packing=false"):
        forward.check(lm)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_later_first_layer_of_experts(packed: bool, dtype: torch.dtype) -> None:
    """The experts see other padding, which moves the last bits and is no fault; the states stay the same."""
    config = Qwen3MoeConfig(**FULL, head_dim=8, **EXPERTS, initializer_range=0.3)
    lm = dataclasses.replace(wrapped(config, dtype), packing=packed)
    forward.check(lm, 1)
    with torch.no_grad():
        hidden, entry = forward.all_states(lm, SEQUENCES, 1)
        assert entry is not None
        again = forward.final_hidden(lm, SEQUENCES, 1, entry)
    assert error(again, hidden) < 4 * torch.finfo(dtype).eps


def test_layers_that_hand_on_more_than_states_are_refused_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one part in a thousand, below the rounding of a layer."""
    lm = wrapped(FAMILIES["qwen3"], torch.bfloat16)
    layers, kept = forward.decoder_layers(lm.model)[1], []
    layers[0].register_forward_hook(lambda _, args, out: kept.append(out))
    layers[2].register_forward_pre_hook(lambda _, args: (args[0] + 1e-2 * kept.pop(),) if kept else None)
    with pytest.raises(PackingError, match=r"its layers pass on more than hidden states; set lora.first_layer=0"):
        forward.check(lm, 1)


def test_what_packing_cannot_do_is_refused_by_name() -> None:
    sinks = GptOssConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    with pytest.raises(
        PackingError,
        match=r"GptOssAttention asks its attention for s_aux, .*; set model.packing=false",
    ):
        forward.check(wrapped(sinks))
    hidden_window = PhimoeConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    with pytest.raises(PackingError, match=r"PhimoeAttention does not pass the window of 4 tokens"):
        forward.check(wrapped(hidden_window))
    state = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    with pytest.raises(PackingError, match=r"MambaForCausalLM: packed sequences give"):
        forward.check(wrapped(state))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotation_that_follows_the_longest_sequence_is_refused_where_it_would(kind: str) -> None:
    """A neighbour longer than the limit would change a short sequence's states; alone, or below it, nothing does."""
    more = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 8, **more}
    sizes = {**HEADS, "max_position_embeddings": 8 if kind == "dynamic" else 512}
    lm = wrapped(Qwen3Config(**SMALL, **sizes, rope_parameters=rope))
    short, long = [3, 4, 5], list(range(1, 13))
    assert error(forward.final_hidden(lm, [short, short]), alone(lm, [short, short])) < 1e-5
    assert error(forward.final_hidden(lm, [long]), alone(lm, [long])) < 1e-5
    with pytest.raises(
        PackingError, match=rf"rotary embedding \({kind}\) changes .* more than 8 tokens, and one has 12: set score"
    ):
        forward.final_hidden(lm, [short, long])


def test_heads_of_two_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multi-head latent attention: keys are wider than values."""
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    sizes = {k: v for k, v in SMALL.items() if k != "head_dim"}
    few = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    config = DeepseekV3Config(**sizes, **{**HEADS, "num_key_value_heads": 4}, **heads, **few, first_k_dense_replace=2)
    lm = wrapped(config)
    for short in (0, 256):
        monkeypatch.setattr(grouped_attention, "SHORT", short)
        assert error(forward.final_hidden(lm, SEQUENCES), alone(lm, SEQUENCES)) < 1e-5
