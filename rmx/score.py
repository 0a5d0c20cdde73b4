"""The frozen base model's entropy, log-prob and top-k at every completion token, in one teacher-forced pass."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rmx.artefacts import ArtefactError, replacing
from rmx.model import CausalLM, ModelError, batches, pad
from rmx.records import Rollout, Scores
from rmx_kernels import linear_entropy_topk

FIELDS = ("entropy", "logprob", "lse", "topk_ids", "topk_logprobs")


def predicting(hidden: Tensor, prompt_length: int, completion_length: int) -> Tensor:
    """Hidden states [T, H] from which the completion tokens of one right-padded row [L, H] are predicted."""
    return hidden[prompt_length - 1 : prompt_length - 1 + completion_length]


@torch.no_grad()
def score_rollouts(
    lm: CausalLM,
    rollouts: Sequence[Rollout],
    *,
    top_k: int = 8,
    token_budget: int = 16384,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[Scores]:
    """Scores of each rollout, in order, on the CPU in float32. No [tokens, V] logits are made.

    Args:
        token_budget: padded tokens a forward pass.
    """
    scored: dict[int, Scores] = {}
    for group in batches([len(r.prompt_ids) + len(r.completion_ids) for r in rollouts], token_budget):
        ids, mask = pad([rollouts[i].prompt_ids + rollouts[i].completion_ids for i in group], lm.device)
        hidden = lm.hidden(ids, mask, use_cache=False)
        rows = torch.cat(
            [
                predicting(hidden[n], len(rollouts[i].prompt_ids), len(rollouts[i].completion_ids))
                for n, i in enumerate(group)
            ]
        )
        target = torch.tensor([token for i in group for token in rollouts[i].completion_ids], device=lm.device)
        stats = linear_entropy_topk(rows, target=target, k=top_k, **lm.head)
        assert stats.logprob is not None
        none = torch.empty(len(target), 0)
        columns = {
            "entropy": stats.entropy,
            "logprob": stats.logprob,
            "lse": stats.lse,
            "topk_ids": none if stats.topk_ids is None else stats.topk_ids,
            "topk_logprobs": none if stats.topk_logprobs is None else stats.topk_logprobs,
        }
        if not bool(torch.isfinite(stats.entropy).all()):
            raise ModelError("score: the base model gave logits that are not finite")
        lengths = [len(rollouts[i].completion_ids) for i in group]
        parts = {name: value.cpu().split(lengths) for name, value in columns.items()}
        for n, i in enumerate(group):
            own = {name: parts[name][n] for name in FIELDS}
            own["topk_ids"] = own["topk_ids"].int()
            scored[i] = Scores(rollouts[i].problem_id, rollouts[i].sample, **own)
        on_done(len(scored))
    return [scored[i] for i in range(len(rollouts))]


def write_scores(path: Path, scores: Sequence[Scores], meta: dict[str, str]) -> None:
    """One safetensors file: the rollouts' columns end to end, and ``lengths`` [rollouts] to cut them by."""
    empty = Scores("", 0, *(torch.empty(0) for _ in FIELDS))
    tensors = {name: torch.cat([getattr(s, name) for s in scores or [empty]]).contiguous() for name in FIELDS}
    tensors["lengths"] = torch.tensor([s.entropy.shape[0] for s in scores])
    with replacing(path) as aside:
        safetensors.torch.save_file(tensors, aside, metadata=meta)


def read_scores(path: Path, rollouts: Sequence[Rollout]) -> tuple[dict[str, Any], list[Scores]]:
    """(meta, scores of exactly these rollouts).

    Raises:
        ArtefactError: no such file, a torn file, or one that belongs to other rollouts.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in (*FIELDS, "lengths")}
    except (OSError, safetensors.SafetensorError) as fault:
        raise ArtefactError(f"{path}: cannot be read: {fault}") from fault
    lengths = tensors.pop("lengths").tolist()
    if lengths != [len(rollout.completion_ids) for rollout in rollouts]:
        raise ArtefactError(f"{path}: holds the scores of other rollouts")
    columns: Iterator[tuple[Tensor, ...]] = zip(*(tensors[name].split(lengths) for name in FIELDS), strict=True)
    return meta, [Scores(r.problem_id, r.sample, *column) for r, column in zip(rollouts, columns, strict=True)]


def entropies(scores: Sequence[Scores]) -> np.ndarray:
    """All completion tokens' base entropies, end to end."""
    return torch.cat([s.entropy for s in scores]).numpy()
