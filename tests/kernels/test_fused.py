"""Element-wise work of a decoder layer in one kernel, by Triton's interpreter or on a GPU."""

from typing import Any

import pytest
import torch
from rounding import assert_as_good, with_gradients
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rmx_kernels.dispatch import INTERPRETED

pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="Triton needs a GPU or TRITON_INTERPRET=1"
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
CONFIGS = {config.__name__.removesuffix("Config"): config for config in (Gemma2Config, LlamaConfig, MistralConfig)}
CONFIGS |= {"Qwen2": Qwen2Config, "Qwen3": Qwen3Config}
NORMS = {"Gemma2": 9, "Llama": 5, "Mistral": 5, "Qwen2": 5, "Qwen3": 9}


@pytest.fixture(autouse=True)
def _the_same_numbers() -> None:
    torch.manual_seed(0)


def functions() -> Any:
    import rmx.fused.layers

    return rmx.fused.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("H", [1, 33, 64])
def test_triton_norm(dtype: torch.dtype, H: int) -> None:
    weight = torch.randn(H, device=DEVICE).to(dtype)
    x = (3 * torch.randn(2, 5, H, device=DEVICE)).to(dtype)

    def eager(x: Tensor) -> Tensor:
        return weight.to(x.dtype) * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())

    # the gradient of a row of one is a difference of terms that are equal but for eps
    assert_as_good(lambda x: functions().RMSNorm.apply(x, weight, 1e-6, 0.0, True), eager, x, least=1.0)

    def transposed(x: Tensor) -> Tensor:
        y: Tensor = functions().RMSNorm.apply(x.transpose(0, 1), weight, 1e-6, 0.0, False)
        return y.transpose(0, 1)

    assert_as_good(transposed, eager, x, least=1.0)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_gated_activation(dtype: torch.dtype, gelu: bool) -> None:
    gate, up = ((4 * torch.randn(3, 50, device=DEVICE)).to(dtype) for _ in range(2))
    gate[0, :4] = torch.tensor([-90.0, 90.0, 0.0, -0.0])

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        act = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
        return act * up

    assert_as_good(lambda gate, up: functions().GatedActivation.apply(gate, up, gelu), eager, gate, up)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("half", [4, 5])
def test_triton_rotation(dtype: torch.dtype, batch: int, half: int) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angle = torch.randn(batch, 5, half, device=DEVICE).repeat(1, 1, 2)
    x = torch.randn(2, 5, 3, 2 * half, device=DEVICE).to(dtype).transpose(1, 2)  # as the projections give it

    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def eager(x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, x, cos.to(x.dtype), sin.to(x.dtype))[0]

    assert_as_good(lambda x: functions().Rotation.apply(x, cos, sin), eager, x)


@pytest.mark.parametrize("name", CONFIGS)
def test_triton_models_run_fused_and_give_the_same(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES)).to(DEVICE).eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.copy_(torch.randn_like(module.weight))
    embedded = torch.randn(2, 7, SIZES["hidden_size"], device=DEVICE)

    def run(embedded: Tensor) -> Tensor:
        return model(inputs_embeds=embedded).logits

    plain = with_gradients(run, embedded)
    with functions().fused(model) as counts:
        assert counts == {"norms": NORMS[name], "feed-forward": 2, "rotations": 1}
        found = with_gradients(run, embedded)
        assert any("RMSNorm" in type(f).__name__ for f in graph(run(embedded.requires_grad_()).grad_fn))
    for own, other in zip(found, plain, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    again = with_gradients(run, embedded)  # outside, the model is as it was
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def graph(node: Any, seen: set[Any] | None = None) -> set[Any]:
    seen = set() if seen is None else seen
    if node is not None and node not in seen:
        seen.add(node)
        for following, _ in node.next_functions:
            graph(following, seen)
    return seen


def test_triton_modules_that_compute_something_else_stay() -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 1.01  # type: ignore[no-any-return]

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(DEVICE).requires_grad_(False)
    model.model.norm = OddRMSNorm(SIZES["hidden_size"]).to(DEVICE).requires_grad_(False)
    with functions().fused(model) as counts:
        assert counts["norms"] == NORMS["Llama"] - 1
        assert "forward" not in vars(model.model.norm)


def test_triton_norms_that_are_trained_stay() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).to(DEVICE)
    with functions().fused(model) as counts:
        assert counts["norms"] == 0
