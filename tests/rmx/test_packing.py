"""Packed sequences against the same ones alone, per backend and model family; starting at a later layer."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch import compile as functorch_compilers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BloomConfig,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from rmx.attention import grouped as grouped_attention
from rmx.attention import packed as packed_attention
from rmx.attention.packing import Packing, PackingError, pack
from rmx.config import LoraConfig, TrainConfig
from rmx.models import forward, lora, lora_layers
from rmx.models.model import CausalLM

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "max_position_embeddings": 512}
FAMILIES: dict[str, PretrainedConfig] = {
    "mistral-window": MistralConfig(**SMALL, **HEADS, sliding_window=4),
    "qwen3": Qwen3Config(**SMALL, **HEADS),
    "gemma2-softcap-window": Gemma2Config(**SMALL, **HEADS, sliding_window=4, attn_logit_softcapping=5.0),
    "gpt2": GPT2Config(vocab_size=61, n_embd=32, n_layer=4, n_head=4, n_positions=512, initializer_range=0.3),
}
SEQUENCES = [[1, 5, 9, 3, 7, 7, 2, 8, 4, 11, 6], [3], [2, 2, 8], [9, 1, 4, 4, 17, 20, 31, 5, 6, 8, 2]]


def wrapped(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> CausalLM:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    head = model.get_output_embeddings()
    return CausalLM(model, None, head.weight, None, None, 1.0, frozenset())


def alone(lm: CausalLM, sequences: list[list[int]]) -> Tensor:
    """By transformers' own eager attention."""
    return torch.cat([lm.model.get_decoder()(torch.tensor([ids])).last_hidden_state[0] for ids in sequences])


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("short", [0, 256], ids=["sdpa", "explicit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone_forward_and_backward(family: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_attention, "SHORT", short)
    lm = wrapped(FAMILIES[family])
    weights = torch.randn(sum(map(len, SEQUENCES)), 32, generator=torch.Generator().manual_seed(1))
    results = []
    for run in (alone, forward.final_hidden):
        lm.model.zero_grad()
        hidden = run(lm, SEQUENCES)
        (hidden * weights).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in lm.model.parameters() if p.grad is not None])
        results.append((hidden.detach(), gradient))
    (expected, expected_gradient), (got, gradient) = results
    assert error(got, expected) < 1e-5
    assert error(gradient, expected_gradient) < 1e-5
    assert lm.model.config._attn_implementation == "eager"


COMPILED = {  # forms of a layer: with and without a window
    "qwen2": (Qwen2Config(**SMALL, **HEADS), 1),
    "gemma2-softcap-window": (FAMILIES["gemma2-softcap-window"], 2),
}


@pytest.mark.thorough
@pytest.mark.parametrize("family", COMPILED)
def test_a_layer_is_compiled_once_for_all_layers_and_lengths(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph a form, without a break, whatever the number of tokens and sequences; the gradients stay the same."""
    config, forms = COMPILED[family]
    lm = wrapped(config)
    lm.model.requires_grad_(False)
    adapter = lora.attach(lm.model, LoraConfig(r=2, alpha=4), seed=0)
    masters = lora_layers.Masters(adapter)
    with torch.no_grad():
        masters.flat.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    products = []

    def count(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes]
        products.append(sum("mm" in name.split(".")[1] for name in names if name.startswith("aten.")))
        return functorch_compilers.nop(graph, [])

    compile_ = functools.partial(torch.compile, backend=aot_autograd(fw_compiler=count, bw_compiler=count))
    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for sequences in (SEQUENCES, SEQUENCES[:3], [SEQUENCES[3] * 3], SEQUENCES * 2):
        weights = torch.randn(sum(map(len, sequences)), 32, generator=torch.Generator().manual_seed(1))
        results = []
        for compiled in (False, True):
            masters.flat.grad = None
            with forward.layer_options(lm, TrainConfig(compile=compiled)), masters.lent(torch.float32, compiled):
                hidden = forward.final_hidden(lm, sequences)
                (hidden * weights).sum().backward()
            results.append((hidden.detach(), masters.flat.grad))
        assert error(results[1][0], results[0][0]) < 1e-5
        assert error(results[1][1], results[0][1]) < 1e-5
    seen = torch._dynamo.utils.counters
    assert seen["stats"]["unique_graphs"] == seen["frames"]["total"] == forms
    assert not seen["graph_break"]
    # base: q, k, v, o, gate, up, down, and the gradients of their inputs; adapter: A of q, k and v in one product, A of
    # o, four B; backward, the gradients of their inputs and their own
    forward_products, backward_products = products[:2]
    assert (forward_products, backward_products) == (7 + 2 + 4, 7 + 2 * (2 + 4))
    torch._dynamo.reset()


@pytest.mark.parametrize("window", [None, 4])
def test_the_operator_of_compiled_layers(window: int | None) -> None:
    """Its declared shapes and its gradient, by torch's own checks; errors pass through it."""
    ends = Packing((5, 1, 7), torch.device("cpu")).ends
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(13, heads, 8, generator=g, requires_grad=True) for heads in (4, 2, 2))
    torch.library.opcheck(packed_attention._attend, (q, k, v, ends, 0.3, window, None, None, "A"))
    out = packed_attention._attend(q, k, v, ends, 0.3, window, 2.0, None, "A")[0]
    expected = grouped_attention.grouped(q, k, v, Packing((5, 1, 7), q.device), 0.3, window, 2.0)
    weight = torch.randn(out.shape, generator=g)
    torch.testing.assert_close(out, expected)
    both = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(PackingError, match="A hands no packing"):
        packed_attention._attend(q, k, v, ends[:-1], 0.3, window, None, None, "A")
    with pytest.raises(PackingError, match="A does not tell its attention of the window of 6 tokens"):
        packed_attention._attend(q, k, v, ends, 0.3, None, None, 6, "A")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_starting_at_a_later_layer_gives_the_same_bits(family: str, packed: bool) -> None:
    lm = dataclasses.replace(wrapped(FAMILIES[family]), packing=packed)
    hidden, entry = forward.all_states(lm, SEQUENCES, 2)
    assert entry is not None
    visited = []
    layers = forward.decoder_layers(lm.model)[1]
    handles = [layer.register_forward_hook(lambda m, *_: visited.append(m)) for layer in layers]
    torch.testing.assert_close(forward.final_hidden(lm, SEQUENCES, 2, entry), hidden, rtol=0, atol=0)
    for handle in handles:
        handle.remove()
    assert visited == list(layers[2:])
    assert error(hidden, alone(lm, SEQUENCES)) < 1e-5
    forward.check(lm, 2)


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
        PackingError, match=rf"sequences give .*(neighbours \(.*{what}|differ).*set model.packing=false"
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
    with pytest.raises(PackingError, match=r"its layers hand on more than hidden states; set lora.first_layer=0"):
        forward.check(lm, 1)


def test_what_packing_cannot_do_is_refused_by_name() -> None:
    sinks = GptOssConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    with pytest.raises(PackingError, match=r"GptOssAttention asks its attention for s_aux; set model.packing=false"):
        forward.check(wrapped(sinks))
    hidden_window = PhimoeConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1, sliding_window=4)
    with pytest.raises(PackingError, match=r"PhimoeAttention does not tell its attention of the window of 4 tokens"):
        forward.check(wrapped(hidden_window))
    state = MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, initializer_range=0.3)
    with pytest.raises(PackingError, match=r"MambaForCausalLM: packed sequences give"):
        forward.check(wrapped(state))


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rotation_that_follows_the_longest_sequence_is_refused_where_it_would(kind: str) -> None:
    """A neighbour longer than the limit would change a short sequence's states; alone, or below it, nothing does."""
    more = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {"factor": 4.0}
    rope = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 8, **more}
    sizes = {**HEADS, "max_position_embeddings": 8 if kind == "dynamic" else 512}
    lm = wrapped(Qwen3Config(**SMALL, **sizes, rope_parameters=rope))
    short, long = [3, 4, 5], list(range(1, 13))
    assert error(forward.final_hidden(lm, [short, short]), alone(lm, [short, short])) < 1e-5
    assert error(forward.final_hidden(lm, [long]), alone(lm, [long])) < 1e-5
    with pytest.raises(
        PackingError, match=rf"rotary embedding \({kind}\) changes .* 12 tokens, more than 8: set score"
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


def test_activation_checkpointing_leaves_the_dropout_of_layers_off() -> None:
    """OPT's layers drop out where they are in training mode, which checkpointing sets."""
    small = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    lm = wrapped(OPTConfig(**small, word_embed_proj_dim=32, dropout=0.5, max_position_embeddings=64))
    expected = alone(lm, SEQUENCES).detach()
    with forward.layer_options(lm, TrainConfig(activation_checkpointing=True)):
        hidden = forward.final_hidden(lm, SEQUENCES)
        hidden.sum().backward()
    assert error(hidden.detach(), expected) < 1e-5
    assert [layer.dropout for layer in forward.decoder_layers(lm.model)[1]] == [0.5, 0.5]


@pytest.mark.thorough
def test_the_real_model_packed_and_from_the_middle(demo_lm: CausalLM) -> None:
    forward.check(demo_lm, 15)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 3, 64]),
    cap=st.sampled_from([None, 2.0]),
    short=st.sampled_from([0, 16, 256]),
)
def test_grouped_attention_of_any_lengths(
    lengths: list[int], heads: tuple[int, int], window: int | None, cap: float | None, short: int
) -> None:
    """Against softmax in float64, one sequence at a time; output and gradients."""
    g = torch.Generator().manual_seed(sum(lengths))
    T, D = sum(lengths), 4
    q, k, v = (torch.randn(T, h, D, generator=g, dtype=torch.float64) for h in (heads[0], heads[1], heads[1]))
    weight = torch.randn(T, heads[0], D, generator=g, dtype=torch.float64)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for qs, ks, vs in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            ks, vs = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (ks, vs))
            scores = torch.einsum("ihd,jhd->hij", qs, ks) * 0.7
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            i, j = torch.arange(len(qs))[:, None], torch.arange(len(qs))
            hidden = (j > i) | ((i - j) >= (window or 1000))
            outs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vs))
        return torch.cat(outs)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouped_attention.grouped(q, k, v, Packing(tuple(lengths), q.device), 0.7, window, cap)

    before = grouped_attention.SHORT
    grouped_attention.SHORT = short
    try:
        results = []
        for function in (naive, ours):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out = function(*leaves)
            results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    finally:
        grouped_attention.SHORT = before
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_low_precision_errs_no_more_than_twice_what_sdpa_does() -> None:
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(90, h, 64, generator=g).bfloat16().double() for h in (9, 3, 3)]
    weight = torch.randn(90, 9, 64, generator=g).bfloat16().double()

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        out = function(*leaves)
        return [out.double(), *(x.double() for x in torch.autograd.grad((out * weight.to(dtype)).sum(), leaves))]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)[0].transpose(0, 1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return grouped_attention.grouped(q, k, v, Packing((90,), q.device), 0.125, None, None)

    true = gradients(sdpa, torch.float64)
    for t, theirs, mine in zip(true, gradients(sdpa, torch.bfloat16), gradients(ours, torch.bfloat16), strict=True):
        assert (mine - t).norm() <= 2 * (theirs - t).norm()


@pytest.mark.parametrize("window", [None, 2])
def test_torch_flash_is_called_as_this_version_asks(window: int | None) -> None:
    """Its operators check their arguments on tensors without values too."""
    q, k, v = (torch.empty(9, h, 4, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (4, 2, 2))
    out = packed_attention.torch_flash(q, k, v, Packing((5, 4), torch.device("meta")), 0.5, window, None)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    gradients = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [g.shape for g in gradients] == [x.shape for x in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["flash", "torch_flash", "grouped", "compiled"])
@pytest.mark.parametrize("window", [None, 7])
def test_backends_agree_on_a_gpu(name: str, window: int | None) -> None:
    """flash_attn, torch's own kernel and the operator of compiled layers against float64, forward and backward."""
    if name == "flash" and packed_attention._flash_attn() is None:
        pytest.skip("flash_attn is not installed")
    g = torch.Generator().manual_seed(0)
    lengths = (33, 1, 100, 64)
    exact = [torch.randn(sum(lengths), h, 64, generator=g).bfloat16().double().cuda() for h in (8, 2, 2)]
    p = Packing(lengths, exact[0].device)

    def gradients(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in exact]
        out = function(*leaves, p, 0.125, window, None)
        return [out.double(), *(x.double() for x in torch.autograd.grad(out.sum(), leaves))]

    def compiled(q: Tensor, k: Tensor, v: Tensor, p: Packing, scale: float, window: int | None, cap: None) -> Tensor:
        return packed_attention._attend(q, k, v, p.ends, scale, window, cap, None, "")[0]

    function = compiled if name == "compiled" else getattr(packed_attention, name)
    true, theirs = (
        gradients(grouped_attention.grouped, torch.float64),
        gradients(grouped_attention.grouped, torch.bfloat16),
    )
    for t, reference, mine in zip(true, theirs, gradients(function, torch.bfloat16), strict=True):
        assert (mine - t).norm() <= 2 * (reference - t).norm() + 1e-3 * t.norm()


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 80))
def test_packs_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert sum(lengths[i] for i in group) <= budget or len(group) == 1
    # best fit: no two packs could be one
    sums = sorted(sum(lengths[i] for i in group) for group in groups)
    assert len(sums) < 2 or sums[0] + sums[1] > budget


def test_training_and_scoring_take_the_check(tiny_path: Path) -> None:
    from rmx.config import ModelConfig
    from rmx.models import model

    lm = model.load(ModelConfig(name=str(tiny_path), dtype="float32", device="cpu", packing=False))
    assert lm.packing is False
    assert error(forward.final_hidden(lm, SEQUENCES[:1]), alone(lm, SEQUENCES[:1])) < 1e-5
