"""Tiny random models of transformers, and what eager calls of them give: for token_logprobs and head_of."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import oracles
import pytest
import torch
import transformers as hf
from cases import randint, randn
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rmx_kernels import token_logprobs

V, H = 97, 32
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": H, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1}
LLAMA |= {"eos_token_id": 2, "initializer_range": 0.3}  # wide, so that distributions are far from uniform
GPT = {"vocab_size": V, "n_embd": H, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
OPT = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "init_std": 0.3, "max_position_embeddings": 64}
LLAMA4 = {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "layer_types": ["full_attention"] * 2}
MLLAMA = {"cross_attention_layers": [], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}


def scaled_and_capped() -> Any:
    """Muse Spark's order, in a smaller model: the scale, then the cap."""
    model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0, logit_scale=0.4))
    model.lm_head.register_forward_hook(lambda _, args, logits: 0.4 * logits)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
    "llama, tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LLAMA)),
    "gemma2, softcap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0)),
    "cohere, scale": lambda: hf.CohereForCausalLM(hf.CohereConfig(**LLAMA, logit_scale=0.3)),
    "granite, scale": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**LLAMA, logits_scaling=3.0)),
    "hyperclovax, scale": lambda: hf.HyperCLOVAXForCausalLM(hf.HyperCLOVAXConfig(**LLAMA, logits_scaling=3.0)),
    "llama 4": lambda: hf.Llama4ForCausalLM(hf.Llama4TextConfig(**LLAMA, **LLAMA4)),
    "mllama": lambda: hf.MllamaForCausalLM(hf.models.mllama.MllamaTextConfig(**LLAMA, **MLLAMA)),
    "falcon-h1, scale": lambda: hf.FalconH1ForCausalLM(hf.FalconH1Config(**LLAMA, **MAMBA, lm_head_multiplier=0.3)),
    "scale and softcap": scaled_and_capped,
    "phi, bias": lambda: hf.PhiForCausalLM(hf.PhiConfig(**LLAMA)),
    "gpt-j, bias": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT, rotary_dim=4)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)),
    "opt, projected": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
}
UNDER_THE_INTERPRETER = ("gemma2, softcap", "gpt-j, bias")  # of which each takes seconds there
RTOL, ATOL = 1e-5, 2e-6  # of float32, where a comparison needs no oracle


def but_heavy(values: Iterable[Any], light: Sequence[Any]) -> list[Any]:
    return [value if value in light else pytest.param(value, marks=pytest.mark.heavy) for value in values]


def make(name: str = "llama", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model.to(device, dtype)


def tokens(B: int = 3, L: int = 9, device: str = "cpu") -> Tensor:
    return randint(V - 3, B, L, device=device) + 3


def eager(model: Any, ids: Tensor, topk_ids: Tensor, temperature: float = 1.0, **kwargs: Any) -> Sequence[Tensor]:
    """lse, entropy, logprob, topk_logprobs by way of the model's own logits."""
    logits = model(input_ids=ids, use_cache=False, **kwargs).logits[:, :-1]
    return oracles.vocab_stats(logits, ids[:, 1:], topk_ids, temperature)


def weighted(results: Sequence[Tensor | None]) -> Tensor:
    """A sum with upstream gradients that are neither ones nor alike."""
    real = [x for x in results if x is not None and x.is_floating_point()]
    return sum((x * randn(*x.shape, seed=7 + i).to(x)).sum() for i, x in enumerate(real))


def gradients(model: Any, results: Sequence[Tensor | None]) -> dict[str, Tensor]:
    names, trained = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(weighted(results), trained), strict=True))


def assert_like_eager(model: Any, **kwargs: Any) -> None:
    """Values, and the gradients of all that is trained, in float32."""
    ids = tokens()
    got = token_logprobs(model, ids, k=3, **kwargs)
    expected = eager(model, ids, got.topk_ids)
    torch.testing.assert_close(tuple(got[:4]), tuple(expected), rtol=RTOL, atol=ATOL)
    own, theirs = gradients(model, got), gradients(model, expected)
    assert any(g.any() for g in theirs.values())
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


# ---- models ------------------------------------------------------------------------------------------------------


def adapted(model: Any, *, seed: int = 1, names: Sequence[str] = ("default",), **config: Any) -> Any:
    """With LoRA pairs that move the logits (PEFT starts at B = 0)."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0} | config
    lora = [LoraConfig(task_type="CAUSAL_LM", **options | {"r": 4 - 2 * i}) for i in range(len(names))]
    adapter = get_peft_model(model, lora[0], adapter_name=names[0])
    for name, more in zip(names[1:], lora[1:], strict=True):
        adapter.add_adapter(name, more)
    for i, (name, p) in enumerate(adapter.named_parameters()):
        if "lora_B" in name:
            p.data = (0.3 * randn(*p.shape, seed=seed + i)).to(p)
    return adapter.eval()
