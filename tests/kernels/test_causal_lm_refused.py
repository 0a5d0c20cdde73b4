"""What head_of refuses: heads that are no plain product, and calls that would give wrong numbers."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from cases import randn
from causal_lm_models import (
    ATOL,
    GPT,
    LLAMA,
    LLAMA4,
    RTOL,
    SIZES,
    H,
    V,
    eager,
    make,
    tokens,
)
from torch import Tensor, nn

from rmx_kernels import causal_lm, head_of, token_logprobs


class Sharpened(hf.LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 1.01
        return out


class NormedHead(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, nn.functional.normalize(self.weight))


def with_head(head: nn.Module) -> Any:
    model = make()
    model.lm_head = head
    return model


def with_weight(weight: Tensor) -> Any:
    model = make()
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def twice_scaled(model: Any) -> Any:
    model.lm_head.register_forward_hook(lambda _, args, logits: logits / 9)
    return model


def with_scaled_states(factor: float) -> Any:
    model = make()
    model.lm_head.register_forward_pre_hook(lambda _, args: (factor * args[0],))
    return model


UNSUPPORTED: dict[str, tuple[Callable[[], Any], str]] = {
    "unknown scale": (lambda: Sharpened(hf.LlamaConfig(**LLAMA)), r"got its logits with a difference of 0\.99%"),
    "scale of the wrong way round": (
        lambda: twice_scaled(hf.HyperCLOVAXForCausalLM(hf.HyperCLOVAXConfig(**LLAMA, logits_scaling=3.0))),
        "expected the logits of HyperCLOVAXForCausalLM to be its hidden states times its output head",
    ),
    "states that are scaled": (
        lambda: with_scaled_states(1.01),
        r"got the states that its head reads with a difference of 0\.99%",
    ),
    "layers between hidden states and head": (
        lambda: hf.BertLMHeadModel(hf.BertConfig(**SIZES, intermediate_size=48, is_decoder=True)),
        "expected the logits of BertLMHeadModel",
    ),
    "another forward": (lambda: with_head(NormedHead(H, V)), r"expected torch\.nn\.Linear as its output head"),
    "another module": (
        lambda: with_head(nn.Sequential(nn.Linear(H, V))),
        r"expected torch\.nn\.Linear as its output head, got Sequential",
    ),
    "encoder and decoder": (
        lambda: hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=V, d_model=16, d_ff=16, num_layers=1)),
        "expected a causal LM of transformers, got T5ForConditionalGeneration",
    ),
    "no head": (lambda: make().model, r"expected torch\.nn\.Linear as its output head, got NoneType"),
    "no language model": (lambda: nn.Linear(3, 3), "expected a causal LM of transformers, got Linear"),
    "integer weights": (
        lambda: with_weight(torch.zeros(V, H, dtype=torch.int8)),
        r"expected an output head with a full floating-point weight \[V, H\], got Parameter of torch\.int8",
    ),
    "shard of a weight": (
        lambda: with_weight(torch.zeros(0)),
        r"expected an output head with a full .* and shape \(0,\)",
    ),
    "negative scale": (
        lambda: hf.CohereForCausalLM(hf.CohereConfig(**LLAMA, logit_scale=-1.0)),
        r"expected config\.logit_scale above 0, got -1\.0",
    ),
}


def capped_inside(cls: Any, config: Any) -> Any:
    """A Gemma 2 with a softcap of 3 inside a wrapper that applies none."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = hf.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0)
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(**small, image_size=8, patch_size=4)
    return cls(config(vision_config=vision, text_config=text, image_token_id=96)).eval()


@pytest.mark.parametrize("size", [1e-3, 1.0], ids=["small logits", "large logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_softcap_that_is_not_applied_is_refused(dtype: torch.dtype, size: float) -> None:
    """In every dtype, and where the logits of the 8 tokens are too small to tell."""
    model = capped_inside(hf.LlavaForConditionalGeneration, hf.LlavaConfig).to(dtype)
    model.lm_head.weight.data *= size
    with pytest.raises(ValueError, match=r"^model: expected the logits of LlavaForConditionalGeneration"):
        head_of(model)


@pytest.mark.parametrize("factor", [1.004, 0.996])
def test_small_errors_are_seen_in_bfloat16(factor: float) -> None:
    """Half a percent is less than one rounding of a bfloat16 logit."""
    model = make(dtype=torch.bfloat16)
    model.lm_head.register_forward_hook(lambda _, args, logits: factor * logits)
    with pytest.raises(ValueError, match=r"its logits with a difference of 0\.40%"):
        head_of(model)


def test_images_that_the_decoder_would_not_see_are_refused() -> None:
    """Llama 4 joins text and images outside of what makes the hidden states."""
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "vision_output_dim": 16, "projector_input_dim": 16}
    text = hf.Llama4TextConfig(**LLAMA, **LLAMA4)
    config = hf.Llama4Config(vision_config={**vision, "projector_output_dim": 16}, text_config=text)
    torch.manual_seed(0)
    model, ids = hf.Llama4ForConditionalGeneration(config).eval(), tokens()
    got = token_logprobs(model, ids)
    torch.testing.assert_close(tuple(got[:3]), tuple(eager(model, ids, ids[:, 1:, None])[:3]), rtol=RTOL, atol=ATOL)
    with pytest.raises(ValueError, match=r"^pixel_values: expected only inputs of Llama4TextModel"):
        token_logprobs(model, ids, pixel_values=randn(1, 3, 8, 8))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused(name: str) -> None:
    build, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=f"^model: .*{message}"):
        token_logprobs(build().eval(), tokens())


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got str"):
        head_of("gpt2")  # type: ignore[arg-type]


def test_the_check_runs_once_a_head_and_can_be_skipped() -> None:
    """And leaves every module in its mode."""
    model, ids = make(), tokens()
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    token_logprobs(model, ids, check=False)
    assert not runs
    for _ in range(3):
        token_logprobs(model, ids)
    assert len(runs) == 1
    assert [module.training for module in model.modules()] == modes
    model.lm_head = nn.Linear(H, V, bias=False)
    token_logprobs(model, ids)
    assert len(runs) == 2
    token_logprobs(Sharpened(hf.LlamaConfig(**LLAMA)), ids, check=False)


def test_the_check_knows_dropout() -> None:
    """A model in training mode is not refused for the noise of its dropout."""
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**GPT, resid_pdrop=0.5)).train()
    assert token_logprobs(model, tokens()).logprob.isfinite().all()
    assert all(module.training for module in model.modules())


def test_checked_models_are_not_kept_alive() -> None:
    model = make()
    head_of(model)
    assert model in causal_lm.CHECKED
    before = len(causal_lm.CHECKED)
    del model
    assert len(causal_lm.CHECKED) == before - 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": [[3, 4]]}, r"input_ids: expected a torch\.Tensor, got list"),
        ({"input_ids": torch.ones(2, 3)}, r"input_ids: expected int64 or int32 token ids, got torch\.float32"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"input_ids: expected shape \[B, L\] .* got \(3,\)"),
        (
            {"attention_mask": torch.ones(3, 8)},
            r"attention_mask: expected the shape of input_ids, \(3, 9\), got \(3, 8\)",
        ),
        ({"logits_to_keep": 9}, r"logits_to_keep: expected 1 <= logits_to_keep <= L - 1 = 8, got 9"),
        ({"logits_to_keep": 0}, "logits_to_keep: expected 1 <="),
        ({"logits_to_keep": 1.0}, "logits_to_keep: expected an int or None, got float"),
        ({"past_key_values": object()}, "past_key_values: expected whole sequences without a cache"),
        ({"temperature": 0.0}, r"temperature: expected a finite number above 0, got 0\.0"),
        (
            {"temperature": torch.ones(3, 9)},
            r"temperature: expected one temperature per row, shape \(3, 8\), got \(3, 9\)",
        ),
        ({"temperature": torch.ones(3, 8).long()}, "temperature: expected a number or a floating-point tensor, got "),
        ({"temperature": torch.zeros(3, 8)}, r"temperature: expected finite numbers above 0, got 0\.0"),
        ({"k": 98}, "k: expected 0 <= k <= V = 97, got 98"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + message):
        token_logprobs(make(), **{"input_ids": tokens()} | given)


@pytest.mark.thorough
def test_neither_transformers_nor_peft_is_imported() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = None; from rmx_kernels import token_logprobs"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
