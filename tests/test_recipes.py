"""The recipes, each trained or run on a tiny random model: their numbers against those of full logits."""

import copy
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import distillation
import eval_entropy
import on_policy_distillation
import peft
import pytest
import reasonmaxxer_trainer
import torch
import trl
import trl_dpo
import trl_grpo
import trl_grpo_sampled
from tiny import save_tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TopKLogitsWarper, TopPLogitsWarper, TrainingArguments

from rmx.models.model import pad

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32
LENGTHS = (9, 6, 4, 9)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError(f"a recipe reached for the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("recipes") / "tiny")


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def batch(left: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, 21, (n,), generator=generator).tolist() for n in LENGTHS]
    return pad(rows, torch.device("cpu"), left)


def with_lora(model: Any, **config: Any) -> Any:
    """LoRA pairs that move the logits: PEFT starts at B = 0."""
    torch.manual_seed(2)
    config = {"r": 4, "target_modules": ["q_proj", "v_proj"]} | config
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **config))


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@contextmanager
def no_logits(model: Any) -> Iterator[None]:
    """The head itself never runs, but for the 8 tokens by which it is checked."""

    def few(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert inputs[0].shape[:-1].numel() <= 8, "logits were made"

    hook = model.get_output_embeddings().register_forward_pre_hook(few)
    try:
        yield
    finally:
        hook.remove()


# ---- ReasonMaxxer in a Trainer -----------------------------------------------------------------------------------


def test_reasonmaxxer_loss(path: Path, tmp_path: Path) -> None:
    """Value and gradient, sequence by sequence from full logits, with LoRA on the head as well."""
    model = with_lora(load(path), target_modules=["q_proj", "lm_head"])
    ids, mask = batch()
    rollouts = [
        {"input_ids": ids[i, :n].tolist(), "prompt_length": 2 + i, "advantage": a}
        for i, (n, a) in enumerate(zip(LENGTHS[:2], (1.5, -0.5), strict=True))
    ]
    inputs = reasonmaxxer_trainer.collate(rollouts)
    assert inputs["attention_mask"].equal(mask[:2])
    settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    trainer = reasonmaxxer_trainer.ReasonMaxxerTrainer(model, settings, tau=1.6, anchor=0.2)
    with no_logits(model):
        loss = trainer.compute_loss(model, inputs)

    expected, gated = torch.zeros(()), []
    for rollout in rollouts:
        one, start = torch.tensor([rollout["input_ids"]]), rollout["prompt_length"] - 1
        with torch.no_grad(), model.disable_adapter():
            base = model(one).logits[0, start:-1].log_softmax(-1)
        student, target = model(one).logits[0, start:-1].log_softmax(-1), one[0, start + 1 :]
        gate = -(base.exp() * base).sum(-1) > 1.6
        gated += gate.tolist()
        ce = -student.gather(1, target[:, None])[:, 0]
        kl = (base.exp() * (base - student)).sum(-1)
        expected = expected + rollout["advantage"] * (ce * gate).sum() / max(1, gate.sum()) / 2
        expected = expected + 0.2 * (kl * ~gate).sum() / max(1, (~gate).sum()) / 2
    assert True in gated and False in gated
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), **CLOSE)


def test_advantages() -> None:
    got = reasonmaxxer_trainer.advantages(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]]))
    torch.testing.assert_close(got, torch.tensor([[3**0.5, *3 * [-(3**-0.5)]], [0, 0, 0, 0]]))


def test_recipes_in_distributed_data_parallel(path: Path, tmp_path: Path) -> None:
    """Both trainers' losses by the wrapper, as several processes have them: the gradients without it."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        ids, mask = batch()
        rollouts = [{"input_ids": ids[0].tolist(), "prompt_length": 2, "advantage": 1.5}]
        inputs = reasonmaxxer_trainer.collate(rollouts)
        settings = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
        model = with_lora(load(path))
        trainer = reasonmaxxer_trainer.ReasonMaxxerTrainer(model, settings, tau=1.6, anchor=0.2)
        wrapped = nn.parallel.DistributedDataParallel(model)
        own, other = (gradients(model, trainer.compute_loss(m, inputs)) for m in (model, wrapped))
        torch.testing.assert_close(own, other, **CLOSE)
        tokenizer = AutoTokenizer.from_pretrained(path)
        grpo = trl_grpo.make_trainer(load(path), tokenizer, str(tmp_path), 2, bf16=False, use_cpu=True)
        wrapped = nn.parallel.DistributedDataParallel(grpo.model)
        call = {"logits_to_keep": 4, "batch_size": 3, "compute_entropy": True}
        results = [grpo._get_per_token_logps_and_entropies(m, ids, mask, **call)[:2] for m in (grpo.model, wrapped)]
        own, other = (gradients(grpo.model, torch.stack(tuple(x)).sum()) for x in results)
        torch.testing.assert_close(own, other, **CLOSE)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.thorough
def test_reasonmaxxer_trains(path: Path) -> None:
    trainer = reasonmaxxer_trainer.main(["--model", str(path), "--steps", "2"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)
    assert any(p.any() for n, p in trainer.model.named_parameters() if "lora_B" in n)  # which started at zero


# ---- GRPO of TRL -------------------------------------------------------------------------------------------------


def test_grpo_numbers_are_those_of_trl(path: Path, tmp_path: Path) -> None:
    """On one trainer: log-probs, entropies, the gradient of both, and the loss of a whole batch."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    settings = {"bf16": False, "use_cpu": True, "temperature": 0.7}
    trainer = trl_grpo.make_trainer(load(path), tokenizer, str(tmp_path), 2, **settings)
    model = trainer.model
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    ids, mask = batch()
    ids, mask = torch.cat([batch(left=True)[0], ids], 1), torch.cat([batch(left=True)[1], mask], 1)
    keep = max(LENGTHS)
    for size in (None, 3):
        call = {"logits_to_keep": keep, "batch_size": size, "compute_entropy": True}
        theirs = trl.GRPOTrainer._get_per_token_logps_and_entropies(trainer, model, ids, mask, **call)
        with no_logits(model):
            ours = trainer._get_per_token_logps_and_entropies(model, ids, mask, **call)
        assert ours[0].shape == ours[1].shape == (len(LENGTHS), keep) and ours[2] is None
        torch.testing.assert_close(ours[:2], theirs[:2], **CLOSE)
        weights = torch.randn(2, *ours[0].shape)
        own, other = (gradients(model, (weights * torch.stack(x[:2])).sum()) for x in (ours, theirs))
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    inputs = {
        "prompt_ids": ids[:, :keep],
        "prompt_mask": mask[:, :keep],
        "completion_ids": ids[:, keep:],
        "completion_mask": mask[:, keep:],
        "advantages": torch.tensor([1.0, -1, 0.5, -0.5]),
        "ref_per_token_logps": ours[0].detach() - 0.1,
        "num_items_in_batch": torch.tensor(sum(LENGTHS)),
    }
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(model, dict(inputs))
    method = trl.GRPOTrainer._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = method.__get__(trainer)
    torch.testing.assert_close(loss, trainer._compute_loss(model, dict(inputs)), **CLOSE)


@pytest.mark.thorough
def test_grpo_trains(path: Path) -> None:
    trainer = trl_grpo.main(["--model", str(path), "--steps", "2"])
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    assert len(logs) == 2 and all(0 < entry["entropy"] < math.log(21) + 0.01 for entry in logs)
    assert any(p.any() for n, p in trainer.model.named_parameters() if "lora_B" in n)


def test_grpo_refuses_images(path: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = trl_grpo.make_trainer(load(path), tokenizer, str(tmp_path), 1, use_cpu=True)
    with pytest.raises(ValueError, match="expected a text model"):
        trainer._get_per_token_logps_and_entropies(trainer.model, *batch(), 3, pixel_values=torch.zeros(1))


# ---- distillation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["pruned", "LoRA, on the head too", "another width, LoRA on the head", "trained"])
def test_distillation_loss(path: Path, tmp_path: Path, student: str) -> None:
    teacher, (ids, mask) = load(path).requires_grad_(False), batch()
    if student == "pruned":
        model, _ = distillation.pruned(teacher, 1)
        assert model.lm_head.weight is teacher.lm_head.weight and not model.lm_head.weight.requires_grad
    elif student.startswith("LoRA"):
        model = copy.deepcopy(teacher, {id(teacher.lm_head.weight): teacher.lm_head.weight})
        model = with_lora(model, target_modules=["q_proj", "lm_head"])
    else:
        model = load(save_tiny_model(tmp_path / "small", hidden_size=16))
        if "LoRA" in student:
            model = with_lora(model, target_modules=["q_proj", "lm_head"])
    with no_logits(model), no_logits(teacher):
        loss = distillation.distillation_loss(model, teacher, ids, mask, temperature=2.0)
    own, other = ((m(ids, attention_mask=mask).logits[:, :-1] / 2).log_softmax(-1) for m in (model, teacher))
    live = (mask[:, 1:] * mask[:, :-1]).bool()
    expected = nn.functional.kl_div(own, other, reduction="none", log_target=True).sum(-1)[live].mean()
    assert loss > 0.01
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradients(model, loss), gradients(model, expected), **CLOSE)


def test_distillation_refuses_other_heads(path: Path, tmp_path: Path) -> None:
    teacher, (ids, mask) = load(path), batch()
    with pytest.raises(ValueError, match=r"^teacher_weight: expected the vocabulary of weight, 30 tokens, got 21"):
        distillation.distillation_loss(load(save_tiny_model(tmp_path / "v", vocab_size=30)), teacher, ids, mask)
    with pytest.raises(ValueError, match=r"^teacher: expected no adapter on its output head"):
        distillation.distillation_loss(load(path), with_lora(teacher, target_modules=["lm_head"]), ids, mask)


def test_distillation_trains(path: Path) -> None:
    losses = distillation.main(["--model", str(path), "--steps", "2"])
    assert 0 < losses[1] < losses[0]


def test_on_policy_distillation(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reverse KL of the sampled tokens alone, of rollouts of unequal lengths, from full logits."""
    teacher, tokenizer = load(path).requires_grad_(False), AutoTokenizer.from_pretrained(path)
    student, trained = distillation.pruned(teacher, 1)
    torch.manual_seed(0)
    call = {"count": 6, "length": 8, "temperature": 2.0}
    ids, mask, scored = on_policy_distillation.completions(student, tokenizer, ["sum of 1", "sum of 2 and 3"], **call)
    starts = [len(tokenizer(text).input_ids) for text in ("sum of 1", "sum of 2 and 3") for _ in range(6)]
    lengths = mask.sum(1).tolist()
    assert scored.sum(1).tolist() == [n - start for n, start in zip(lengths, starts, strict=True)]
    assert len(set(lengths)) > 1 and mask.equal(mask.cummin(1).values)
    ended = [row[n - 1] == tokenizer.eos_token_id for row, n in zip(ids.tolist(), lengths, strict=True)]
    full = [n - start == 8 for n, start in zip(lengths, starts, strict=True)]
    assert all(e or f for e, f in zip(ended, full, strict=True))
    with no_logits(teacher):
        loss = distillation.distillation_loss(student, teacher, ids, mask, scored, kind="reverse_kl")
    own, other = (m(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1) for m in (student, teacher))
    expected = (own.exp() * (own - other)).sum(-1)[scored[:, 1:].bool()].mean()
    torch.testing.assert_close(loss, expected, **CLOSE)
    got, wanted = (torch.autograd.grad(x, trained, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(got, wanted, **CLOSE)
    losses = on_policy_distillation.main(["--model", str(path), "--steps", "2"])
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


# ---- DPO of TRL --------------------------------------------------------------------------------------------------


def test_dpo_numbers_are_those_of_trl(path: Path, tmp_path: Path) -> None:
    """Loss, gradient and metrics of a batch of the trainer's own collator."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = trl_dpo.make_trainer(load(path), tokenizer, str(tmp_path), 1, use_cpu=True, beta=0.3)
    for name, p in trainer.model.named_parameters():
        if "lora_B.default" in name:  # not TRL's copy of the adapter at the start, "ref"
            nn.init.normal_(p, std=0.3)
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with no_logits(trainer.model):
        loss = trainer._compute_loss(trainer.model, dict(inputs), return_outputs=False)
    own = gradients(trainer.model, loss)
    expected = trl.DPOTrainer._compute_loss(trainer, trainer.model, dict(inputs), return_outputs=False)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(own, gradients(trainer.model, expected), rtol=1e-3, atol=1e-5)
    for name in ("rewards/margins", "rewards/accuracies"):
        ours, theirs = trainer._metrics["train"][name]
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert abs(trainer._metrics["train"]["rewards/margins"][0]) > 0.01
    with pytest.raises(ValueError, match="expected the plain sigmoid loss"):
        trainer._compute_loss(trainer.model, dict(inputs), return_outputs=True)


@pytest.mark.thorough
def test_dpo_trains(path: Path) -> None:
    trainer = trl_dpo.main(["--model", str(path), "--steps", "4"])
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0]


# ---- GRPO over the sampled distribution --------------------------------------------------------------------------


def sampled_trainer(path: Path, folder: Path, **settings: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"use_cpu": True, "top_k": 6, "top_p": 0.8, "temperature": 0.7, "num_iterations": 2} | settings
    kind = trl_grpo_sampled.SampledGRPOTrainer
    trainer = trl_grpo.make_trainer(load(path), tokenizer, str(folder), 2, kind, **options)
    for name, p in trainer.model.named_parameters():
        if "lora_B.default" in name:  # not TRL's copy of the adapter at the start, "ref"
            nn.init.normal_(p, std=0.3)
    return trainer


def renormalised(logits: Tensor, kept: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    allowed = torch.zeros_like(logits, dtype=torch.bool)
    for position in zip(*(x.tolist() for x in torch.where(kept >= 0)), strict=True):
        allowed[(*position[:2], int(kept[position]))] = True
    q = logits.masked_fill(~allowed, -math.inf).log_softmax(-1)
    return q.gather(-1, target[..., None])[..., 0], -(q.exp() * q.masked_fill(~allowed, 0)).sum(-1)


def test_grpo_over_the_sampled_distribution(path: Path, tmp_path: Path) -> None:
    """Rollouts, sets, old and reference log-probs of TRL's own step, from full logits and transformers' own filters."""
    trainer = sampled_trainer(path, tmp_path)
    trainer.model.train()
    rows = [trainer.train_dataset[0]] * 8
    batch = trainer._generate_and_score_completions(rows)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    n, kept, live = batch["completion_ids"].shape[1], batch["kept"], batch["completion_mask"].bool()
    logits = trainer.model(ids, attention_mask=mask).logits[:, -n - 1 : -1] / 0.7
    for b, t in live.nonzero().tolist():
        filtered = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(6)(None, logits[b, t][None].detach()))[0]
        expected = set(torch.where(filtered > -math.inf)[0].tolist())
        assert int(batch["completion_ids"][b, t]) in expected  # it was sampled
        assert set(kept[b, t].tolist()) - {-1} == expected
    expected = renormalised(logits, kept, batch["completion_ids"])
    torch.testing.assert_close(batch["old_per_token_logps"][live], expected[0][live].detach(), **CLOSE)
    with trainer.model.disable_adapter():
        base = trainer.model(ids, attention_mask=mask).logits[:, -n - 1 : -1] / 0.7
    reference = renormalised(base, kept, batch["completion_ids"])[0]
    torch.testing.assert_close(batch["ref_per_token_logps"][live], reference[live].detach(), **CLOSE)

    trainer.kept = batch["kept"]
    got = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, n, compute_entropy=True)[:2]
    weights = torch.randn(2, *live.shape) * live
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[live], y[live], **CLOSE)
    own, other = (gradients(trainer.model, (weights * torch.stack(tuple(x))).sum()) for x in (got, expected))
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
def test_grpo_over_the_sampled_distribution_trains(path: Path, tmp_path: Path) -> None:
    trainer = trl_grpo_sampled.main(["--model", str(path), "--steps", "2"])
    assert len([entry for entry in trainer.state.log_history if "entropy" in entry]) == 2
    assert any(p.any() for n, p in trainer.model.named_parameters() if "lora_B" in n)
    for settings, message in (({"num_iterations": 1}, r"^beta: expected 0"), ({"top_k": 0}, "and a top_k")):
        other = sampled_trainer(path, tmp_path, **settings)
        with pytest.raises(ValueError, match=message):
            other._generate_and_score_completions([other.train_dataset[0]] * 8)


# ---- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation(path: Path) -> None:
    """Two batches of their own lengths; the mean is over tokens, and padding counts nowhere."""
    model, (ids, mask) = load(path), batch()
    with no_logits(model):
        got = eval_entropy.evaluate(model, [(ids[:3], mask[:3]), (ids[3:], mask[3:])], k=3)
    logps = model(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    live, target = mask[:, 1:] == 1, ids[:, 1:, None]
    hits = (logps.topk(3).indices == target)[live].float()
    expected = {
        "tokens": sum(LENGTHS) - len(LENGTHS),
        "perplexity": (-logps.gather(-1, target)[..., 0][live].mean()).exp().item(),
        "entropy": -(logps.exp() * logps).sum(-1)[live].mean().item(),
        "top1": hits[:, 0].mean().item(),
        "top3": hits.sum(-1).mean().item(),
    }
    assert got == pytest.approx(expected, rel=1e-4)


def test_evaluation_runs(path: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("sum of 1 and 2 is 3\nQuestion: 4\n\nAnswer: 5\n")
    got = eval_entropy.main(["--model", str(path), "--steps", "2", "--text", str(text)])
    assert got["tokens"] == 8 and 1 < got["perplexity"] < 1e9
