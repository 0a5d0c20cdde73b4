"""A decoder layer's element-wise work and its products by the native kernels of a CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from rmx import forward, fused, fused_cpu
from rmx.config import LoraConfig, ModelConfig, TrainConfig
from rmx.fused import GatedActivation, RMSNorm, Rotation
from rmx.lora import attach
from rmx.model import load
from rmx_kernels import native
from rmx_kernels.registration import INTERPRETED

pytestmark = pytest.mark.skipif(bool(native.missing()) or INTERPRETED, reason="the native kernels were not built")
needs_product = pytest.mark.skipif(native.product() == 0, reason="the native product is for AVX2")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0}


def with_gradients(call: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = call(*inputs)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, g)]


def assert_as_good(call: Callable[..., Tensor], eager: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Against float64, at most twice the error of eager PyTorch in the same precision."""
    found, plain = with_gradients(call, *inputs), with_gradients(eager, *inputs)
    oracle = with_gradients(eager, *(x.double() for x in inputs))
    for own, other, exact in zip(found, plain, oracle, strict=True):
        assert own.dtype == other.dtype and own.shape == other.shape
        steps = 16 if own.dtype == torch.float64 else 4  # the oracle itself is rounded to float64
        slack = steps * torch.finfo(own.dtype).eps * exact.abs().max().clamp(min=1)  # of what may cancel
        assert (own.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max() + slack


def norm_of(weight: Tensor, offset: float = 0.0) -> Callable[[Tensor], Tensor]:
    def eager(x: Tensor) -> Tensor:
        return (weight.to(x.dtype) + offset) * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())

    return eager


@settings(max_examples=20, deadline=None)
@given(dtype=st.sampled_from(DTYPES), H=st.integers(1, 70), rows=st.integers(1, 5), offset=st.sampled_from([0.0, 1.0]))
def test_norms(dtype: torch.dtype, H: int, rows: int, offset: float) -> None:
    torch.manual_seed(H)
    weight = torch.randn(H).to(dtype)
    x = (3 * torch.randn(rows, 2, H)).to(dtype)
    rounded = offset == 0.0
    assert_as_good(lambda x: RMSNorm.apply(x, weight, 1e-6, offset, rounded), norm_of(weight, offset), x)
    across = x.transpose(0, 1)  # not contiguous
    assert_as_good(lambda x: RMSNorm.apply(x, weight, 1e-6, offset, rounded), norm_of(weight, offset), across)


@settings(max_examples=20, deadline=None)
@given(dtype=st.sampled_from(DTYPES), size=st.integers(4, 2100), gelu=st.booleans())
def test_gated_activations(dtype: torch.dtype, size: int, gelu: bool) -> None:
    torch.manual_seed(size)
    gate, up = ((4 * torch.randn(size)).to(dtype) for _ in range(2))
    gate[:4] = torch.tensor([-90.0, 90.0, 0.0, -0.0])

    def eager(gate: Tensor, up: Tensor) -> Tensor:
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    assert_as_good(lambda gate, up: GatedActivation.apply(gate, up, gelu), eager, gate, up)


@settings(max_examples=20, deadline=None)
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


@needs_product
@settings(max_examples=30, deadline=None)
@given(M=st.integers(0, 400), K=st.integers(1, 700), panels=st.integers(1, 5), turned=st.booleans())
def test_products(M: int, K: int, panels: int, turned: bool) -> None:
    generator = torch.Generator().manual_seed(M + K)
    N = 16 * panels
    a = torch.randn(M, K + 3, generator=generator)[:, :K]  # rows that are apart
    w = torch.randn(N, K, generator=generator).T if turned else torch.randn(K, N, generator=generator)
    before = torch.randn(M, N, generator=generator)
    exact, size = a.double() @ w.double(), (a.double().abs() @ w.double().abs()).float()
    got = fused_cpu.product(a, w)
    assert ((got - exact).abs() <= 3e-7 * K**0.5 * size + 1e-6).all()
    added = fused_cpu.product(a, w, before.clone())
    assert ((added - (before.double() + exact)).abs() <= 3e-7 * K**0.5 * size + 1e-6).all()


@needs_product
def test_every_number_of_a_product_is_written_and_a_row_depends_on_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    a, w = torch.randn(401, 330, generator=generator), torch.randn(330, 48, generator=generator)
    out, packed = (torch.full((size,), float("nan")) for size in (401 * 48, 330 * 48))
    pointers = [x.data_ptr() for x in (a, w, packed, out)]
    native.call("rmx_product_f32", native.Product(*pointers, 330, 48, 1, 48, 401, 48, 330, 0))
    whole = fused_cpu.product(a, w)
    assert torch.equal(out.view(401, 48), whole)
    torch.set_num_threads(2)
    try:
        assert torch.equal(fused_cpu.product(a, w), whole)
    finally:
        torch.set_num_threads(1)
    for row in (0, 5, 191, 192, 400):
        assert torch.equal(fused_cpu.product(a[row : row + 1], w)[0], whole[row])


@needs_product
def test_the_gradient_of_a_product_is_one() -> None:
    weight = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    assert_as_good(lambda x: fused_cpu.Product.apply(x, weight), lambda x: x @ weight.to(x.dtype).T, x)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(17, 16), torch.zeros(16, 17), torch.zeros(0, 16), torch.zeros(16, 32).T, torch.zeros(16, 16).double()],
)
def test_other_weights_are_left_to_torch(weight: Tensor) -> None:
    assert not fused_cpu.fits(weight)


@needs_product
def test_a_width_that_the_product_does_not_take_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"^rmx_product_f32: a width that it does not know$"):
        fused_cpu.product(torch.zeros(2, 16), torch.zeros(16, 17))


def test_which_product_is_a_question_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.zeros(16, 32)
    for kind, expected in ((0, False), (1, False), (2, True)):
        monkeypatch.setattr(native, "product", lambda kind=kind: kind)
        assert fused_cpu.pays(weight) is expected
    assert not fused_cpu.pays(weight.requires_grad_())


@pytest.mark.parametrize("config", [Gemma2Config, LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("product", [False, True])
def test_models_run_fused_and_give_the_same(config: Any, product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if product and native.product() == 0:
        pytest.skip("the native product is for AVX2")
    monkeypatch.setattr(native, "product", lambda: 2 * product)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES)).eval().requires_grad_(False)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.copy_(torch.randn_like(module.weight))
    embedded = torch.randn(2, 7, SIZES["hidden_size"])

    def run(embedded: Tensor) -> Tensor:
        states: Tensor = model.model(inputs_embeds=embedded).last_hidden_state
        return states

    plain = with_gradients(run, embedded)
    with fused.fused(model) as counts:
        norms = sum(type(module).__name__.endswith("RMSNorm") for module in model.modules())
        assert counts == {"norms": norms, "feed-forward": 2, "products": 14 * product, "rotations": 1}
        found = with_gradients(run, embedded)
    for own, other in zip(found, plain, strict=True):
        assert torch.allclose(own, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(run, embedded), plain, strict=True))
    assert not any("forward" in vars(module) for module in model.modules())


def test_modules_that_compute_something_else_stay() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) * 1.01  # type: ignore[no-any-return]

    class OddLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).requires_grad_(False)
    model.model.norm = OddRMSNorm(32).requires_grad_(False)
    model.model.layers[0].self_attn.o_proj = OddLinear(32, 32, bias=False).requires_grad_(False)
    with fused.fused(model) as counts:
        assert counts["norms"] == 4 and counts["products"] in (0, 13)
        assert "forward" not in vars(model.model.norm) and "forward" not in vars(model.model.layers[0].self_attn.o_proj)


def test_training_runs_fused_on_a_cpu_in_float32_alone(tmp_path: Path) -> None:
    lm = load(ModelConfig(name=str(save_tiny_model(tmp_path / "tiny")), dtype="float32", device="cpu"))
    attach(lm.model, LoraConfig(first_layer=0), seed=0)
    norm = next(m for m in lm.model.modules() if type(m).__name__.endswith("RMSNorm"))
    with forward.layer_options(lm, TrainConfig()):
        assert "forward" in vars(norm)
    lm.model.bfloat16()
    with forward.layer_options(lm, TrainConfig()):
        assert "forward" not in vars(norm)
