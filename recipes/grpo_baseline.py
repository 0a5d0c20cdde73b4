"""GRPO by TRL on a run's own training problems, verifier, prompts and LoRA layers: what it gains, and what it costs.

Writes an adapter in PEFT's format and cost.json (generated tokens, seconds, mean reward of each step). It is judged on
the run's held-out problems by `rmx benchmark CONFIG held-out --adapter OUT`.
"""

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig
from trl_grpo import NoLogitsGRPOTrainer

from rmx.config_file import load_config
from rmx.errors import RmxError
from rmx.records import Rollout
from rmx.runs.pipeline import Run


class Verifier:
    """The run's verdicts as a reward of TRL's, which counts what was generated."""

    __name__ = "verifier"  # TRL logs it

    def __init__(self, run):
        self.run, self.problems = run, run.problems("train")
        self.tokens, self.rewards = 0, []

    def __call__(self, completions, completion_ids, problem_id, **_):
        self.tokens += sum(map(len, completion_ids))
        texts = zip(problem_id, completions, completion_ids, strict=True)
        found = [Rollout(p, n, [], list(ids), "stop", text) for n, (p, text, ids) in enumerate(texts)]
        rewards = [verdict.reward or 0.0 for verdict in self.run.judge("grpo", self.problems, found)]
        self.rewards.append(sum(rewards) / len(rewards))
        return rewards


def prompts(run):
    """The run's prompts as texts that TRL's tokenisation takes to the same ids."""
    rows, tokenizer = [], run.lm.tokenizer
    for problem in run.problems("train"):
        text = run.renderer.text(problem.question)
        if list(tokenizer(text)["input_ids"]) != run.renderer(problem.question):
            raise RmxError(
                f"grpo: {problem.problem_id}: TRL would tokenise this prompt in another way than the run does"
            )
        rows.append({"prompt": text, "problem_id": problem.problem_id})
    return Dataset.from_list(rows)


def train(run, out, steps, generations, learning_rate):
    lora, sampling, data = run.config.lora, run.config.rollouts, prompts(run)
    targets = "all-linear" if lora.targets == ["all-linear"] else list(lora.targets)
    pairs = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, target_modules=targets, use_rslora=bool(lora.rslora)
    )
    tokenizer = run.lm.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = GRPOConfig(
        str(out / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=generations,
        num_generations=generations,
        max_completion_length=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        learning_rate=learning_rate,
        seed=run.config.train_seed,
        use_cpu=run.lm.device.type == "cpu",
        bf16=False,  # no autocast: the model has its dtype
        report_to="none",
        save_strategy="no",
    )
    verifier = Verifier(run)
    trainer = NoLogitsGRPOTrainer(
        get_peft_model(run.lm.model, pairs), verifier, args=config, train_dataset=data, processing_class=tokenizer
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.save_pretrained(str(out))
    cost = {"steps": steps, "generated_tokens": verifier.tokens, "seconds": seconds, "rewards": verifier.rewards}
    (out / "cost.json").write_text(json.dumps(cost))
    return cost


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="YAML file of a run whose problems are there")
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--generations", type=int, default=8, help="completions of the one problem of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    args = parser.parse_args(argv)
    run = Run(load_config(Path(args.config)))
    run.need("problems")
    cost = train(run, args.out, args.steps, args.generations, args.learning_rate)
    print(f"grpo: {cost['generated_tokens']:,} tokens generated in {cost['seconds']:.0f} s")
    return cost


if __name__ == "__main__":
    main()
