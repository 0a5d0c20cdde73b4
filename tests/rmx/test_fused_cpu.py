"""A decoder layer's element-wise work by the native kernels of a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rounding
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rmx.config import LoraConfig, ModelConfig, TrainConfig
from rmx.fused import layers as fused
from rmx.fused.layers import GatedActivation, RMSNorm, Rotation, TwoProducts
from rmx.models import forward
from rmx.models.lora import attach
from rmx.models.model import load
from rmx_kernels import native
from rmx_kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(bool(native.missing()) or INTERPRETED, reason="the native kernels were not built")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}


def assert_as_good(call: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Tensor) -> None:
    """With the slack of terms that may cancel, and in float64 of an oracle that is rounded itself."""
    steps = 32 if inputs[0].dtype == torch.float64 else 4
    rounding.assert_as_good(call, eager, *inputs, steps=steps, least=1.0)


def norm_of(weight: Tensor, offset: float = 0.0) -> Callable[[Tensor], Tensor]:
    def eager(x: Tensor) -> Tensor:
        return (weight.to(x.dtype) + offset) * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())

    return eager


@settings(max_examples=20, deadline=None, derandomize=True)
@given(dtype=st.sampled_from(DTYPES), H=st.integers(1, 70), rows=st.integers(1, 5), offset=st.sampled_from([0.0, 1.0]))
def test_norms(dtype: torch.dtype, H: int, rows: int, offset: float) -> None:
    torch.manual_seed(H)
    weight = torch.randn(H).to(dtype)
    x = (3 * torch.randn(rows, 2, H)).to(dtype)
    rounded = offset == 0.0
    assert_as_good(lambda x: RMSNorm.apply(x, weight, 1e-6, offset, rounded), norm_of(weight, offset), x)
    across = x.transpose(0, 1)  # not contiguous
    assert_as_good(lambda x: RMSNorm.apply(x, weight, 1e-6, offset, rounded), norm_of(weight, offset), across)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(dtype=st.sampled_from(DTYPES), size=st.integers(4, 2100), gelu=st.booleans())
def test_gated_activations(dtype: torch.dtype, size: int, gelu: bool) -> None:
    torch.manual_seed(size)
    gate, up = ((4 * torch.randn(size)).to(dtype) for _ in range(2))
    gate[:4] = torch.tensor([-90.0, 90.0, 0.0, -0.0])

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    assert_as_good(lambda gate, up: GatedActivation.apply(gate, up, gelu), eager, gate, up)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(dtype=st.sampled_from(DTYPES), batch=st.integers(1, 2), heads=st.integers(1, 3), half=st.integers(1, 20))
def test_rotations(dtype: torch.dtype, batch: int, heads: int, half: int) -> None:
    torch.manual_seed(half)
    angle = torch.randn(batch, 5, half).repeat(1, 1, 2)
    x = torch.randn(2, 5, heads, 2 * half).to(dtype).transpose(1, 2)  # as the projections give it
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def eager(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, x, cos.to(x.dtype), sin.to(x.dtype))[0]

    assert_as_good(lambda x: Rotation.apply(x, cos, sin), eager, x)


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(3, 33, generator=generator).double().requires_grad_() for _ in range(3))
    weight = torch.randn(33, generator=generator).double()
    assert torch.autograd.gradcheck(lambda x: RMSNorm.apply(x, weight, 1e-6, 1.0, False), x)
    for gelu in (False, True):
        assert torch.autograd.gradcheck(GatedActivation.apply, (gate, up, gelu))
    heads = torch.randn(2, 3, 2, 8, generator=generator).double().requires_grad_()
    angle = torch.randn(1, 2, 8, generator=generator).double()
    assert torch.autograd.gradcheck(lambda x: Rotation.apply(x, angle.cos(), angle.sin()), heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_products_of_frozen_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, V, W = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 24), (40, 24), (40, 24)))

    def eager(x: Tensor) -> Tensor:
        return F.linear(x, V.to(x)) * F.linear(x, W.to(x))

    def ours(x: Tensor) -> Tensor:
        y, z = TwoProducts.apply(x, V.to(x), W.to(x))
        return y * z

    V, W = V.to(dtype), W.to(dtype)
    assert_as_good(ours, eager, x.to(dtype))
    assert torch.autograd.gradcheck(lambda x: TwoProducts.apply(x, V.double(), W.double()), x.double().requires_grad_())


def test_the_gradients_of_gate_and_up_are_added_inside_a_product() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval().requires_grad_(False)
    embedded = torch.randn(1, 7, SIZES["hidden_size"])

    def additions() -> int:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            rounding.with_gradients(lambda x: model.model(inputs_embeds=x).last_hidden_state, embedded)
        return sum(
            event.count for event in seen.key_averages() if event.key == "aten::add_" or event.key == "aten::add"
        )

    with fused.fused(model):
        ours = additions()
        layers = [layer.mlp for layer in model.model.layers]
        for mlp in layers:
            mlp.gate_proj.bias = nn.Parameter(torch.zeros(48), requires_grad=False)  # then each is a product alone
        assert additions() == ours + len(layers)


@pytest.mark.parametrize("config", [Gemma2Config, LlamaConfig, Qwen3Config])
def test_models_run_fused_and_give_the_same(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES)).eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.copy_(torch.randn_like(module.weight))
    embedded = torch.randn(2, 7, SIZES["hidden_size"])

    def run(embedded: Tensor) -> Tensor:
        states: Tensor = model.model(inputs_embeds=embedded).last_hidden_state
        return states

    plain = rounding.with_gradients(run, embedded)
    with fused.fused(model) as counts:
        norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
        assert counts == {"norms": norms, "feed-forward": 2, "rotations": 1}
        found = rounding.with_gradients(run, embedded)
    for own, other in zip(found, plain, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert all(torch.equal(a, b) for a, b in zip(rounding.with_gradients(run, embedded), plain, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_modules_that_compute_something_else_stay() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 1.01  # type: ignore[no-any-return]

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).requires_grad_(False)
    model.model.norm = OddRMSNorm(32).requires_grad_(False)
    with fused.fused(model) as counts:
        assert counts["norms"] == 4
        assert "forward" not in vars(model.model.norm)


def test_training_runs_fused_on_a_cpu_in_float32_alone(tmp_path: Path) -> None:
    lm = load(ModelConfig(name=str(save_tiny_model(tmp_path / "tiny")), dtype="float32", device="cpu"))
    attach(lm.model, LoraConfig(first_layer=0), seed=0)
    norm = next(m for m in lm.model.modules() if type(m).__name__.endswith("RMSNorm"))
    with forward.layer_options(lm, TrainConfig()):
        assert "forward" in vars(norm)
    lm.model.bfloat16()
    with forward.layer_options(lm, TrainConfig()):
        assert "forward" not in vars(norm)
