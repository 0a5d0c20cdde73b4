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
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rmx.attention import grouped as grouped_attention
from rmx.attention import native as native_attention
from rmx.attention import packed as packed_attention
from rmx.attention.packing import Packing, PackingError, pack
from rmx.config import LoraConfig, TrainConfig
from rmx.models import forward, lora, lora_layers
from rmx.models.model import CausalLM

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 16}
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


@pytest.mark.parametrize("way", ["sdpa", "explicit", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone_forward_and_backward(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "native":
        monkeypatch.setattr(native_attention, "fits", lambda *_: False)
        monkeypatch.setattr(grouped_attention, "SHORT", 0 if way == "sdpa" else 256)
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


@pytest.mark.parametrize("width", [8, 16], ids=["grouped", "native"])
@pytest.mark.parametrize("window", [None, 4])
def test_the_operator_of_compiled_layers(window: int | None, width: int) -> None:
    """Its declared shapes and its gradient, by torch's own checks; errors pass through it."""
    ends = Packing((5, 1, 7), torch.device("cpu")).ends
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(13, heads, width, generator=g, requires_grad=True) for heads in (4, 2, 2))
    torch.library.opcheck(packed_attention._attend, (q, k, v, ends, 0.3, window, None, None, "A"))
    cap = 2.0 if width == 8 else None
    out = packed_attention._attend(q, k, v, ends, 0.3, window, cap, None, "A")[0]
    expected = grouped_attention.grouped(q, k, v, Packing((5, 1, 7), q.device), 0.3, window, cap)
    weight = torch.randn(out.shape, generator=g)
    torch.testing.assert_close(out, expected)
    both = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(PackingError, match="A does not pass the packing"):
        packed_attention._attend(q, k, v, ends[:-1], 0.3, window, None, None, "A")
    with pytest.raises(PackingError, match="A does not pass the window of 6 tokens"):
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
