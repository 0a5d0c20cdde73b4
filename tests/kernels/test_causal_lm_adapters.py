"""token_logprobs and head_of with PEFT's adapters, in torch.distributed's wrappers and under torch.compile."""

import copy
from collections.abc import Iterator
from typing import Any

import oracles
import peft
import pytest
import torch
from cases import randn
from causal_lm_models import (
    ATOL,
    RTOL,
    H,
    V,
    adapted,
    assert_like_eager,
    eager,
    gradients,
    make,
    tokens,
    weighted,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.checkpoint import checkpoint

from rmx_kernels import head_of, in_forward, linear_gated_contrastive_loss, linear_logprob_kl, token_logprobs


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


@pytest.mark.thorough
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
        with pytest.raises(ValueError, match=r"^model: expected a module with full weights, got FullyShardedData"):
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
