"""One pass of the frozen base model: entropy, log-prob and top-k of every completion token, and states for training.

The teacher-forced pass over packed sequences is stored in safetensors shards of whole rollouts. A shard is written
completely or not at all and depends only on its own rollouts, so a killed stage continues at the current shard and ends
with the same bits. Training reads the states through memory maps and needs no pass of the base model.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from rmx.artefacts import ArtefactError, fingerprint, replacing
from rmx.config import ScoreConfig
from rmx.models.forward import all_states, passes
from rmx.models.model import CausalLM, ModelError
from rmx.records import BaseStates, Rollout, Scores
from rmx.training.allocator import keeping_freed_memory
from rmx_kernels import linear_entropy_topk

FIELDS = ("entropy", "logprob", "lse", "topk_ids", "topk_logprobs")


@dataclass(frozen=True)
class Keep:
    """Which base states are kept beside the scores."""

    rows: Literal["none", "completion", "all"] = "none"  # predicting positions whose final states are kept
    layer: int = 0  # states that enter this layer are kept, of all tokens; 0: none

    def covers(self, wanted: "Keep") -> bool:
        """Whether this includes everything in ``wanted``."""
        rows = ("none", "completion", "all")
        return rows.index(self.rows) >= rows.index(wanted.rows) and wanted.layer in (0, self.layer)

    def count(self, rollout: Rollout) -> int:
        P, T = len(rollout.prompt_ids), len(rollout.completion_ids)
        return {"none": 0, "completion": T, "all": P + T - 1}[self.rows]

    def bytes(self, rollouts: Sequence[Rollout], width: int, dtype: torch.dtype) -> int:
        """Size of the kept states of ``rollouts``, hidden size ``width``."""
        rows = sum(self.count(r) for r in rollouts)
        entry = sum(len(r.ids) for r in rollouts) if self.layer else 0
        return (rows + entry) * width * dtype.itemsize


@torch.no_grad()
def score_rollouts(
    lm: CausalLM, rollouts: Sequence[Rollout], *, top_k: int = 8, token_budget: int = 16384, keep: Keep = Keep()
) -> list[tuple[Scores, BaseStates]]:
    """Scores and kept states of each rollout, in order, on the CPU; scores in float32. It stores no [tokens, V] logits.

    Args:
        token_budget: tokens in one forward pass.

    Raises:
        ModelError: logits are not finite.
    """
    found: dict[int, tuple[Scores, BaseStates]] = {}
    for group in passes(lm, [len(r.ids) for r in rollouts], token_budget):
        own = [rollouts[i] for i in group]
        ids = [r.ids for r in own]
        hidden, entry = all_states(lm, ids, keep.layer)
        lengths = [len(row) for row in ids]
        finals = hidden.split(lengths)
        completions = [len(r.completion_ids) for r in own]
        rows = torch.cat([part[-T - 1 : -1] for part, T in zip(finals, completions, strict=True)])
        target = torch.tensor([t for r in own for t in r.completion_ids], dtype=torch.int64, device=lm.device)
        stats = linear_entropy_topk(rows, target=target, k=top_k, **lm.head)
        if not bool(torch.isfinite(stats.entropy).all()):
            raise ModelError("score: the base model gave logits that are not finite")
        none = torch.empty(len(target), 0)
        best = none.int() if stats.topk_ids is None else stats.topk_ids.int()
        values = none if stats.topk_logprobs is None else stats.topk_logprobs
        assert stats.logprob is not None
        columns = (stats.entropy, stats.logprob, stats.lse, best, values)
        parts: Iterator[tuple[Tensor, ...]] = zip(*(c.cpu().split(completions) for c in columns), strict=True)
        entries: Sequence[Tensor | None] = [None] * len(own) if entry is None else entry.cpu().split(lengths)
        for i, r, part, final, enters in zip(group, own, parts, finals, entries, strict=True):
            kept = final[-keep.count(r) - 1 : -1].cpu()
            found[i] = Scores(r.problem_id, r.sample, *part), BaseStates(kept, enters)
    return [found[i] for i in range(len(rollouts))]


class ScoreStore:
    """A directory of shards for given rollouts, under a fingerprint of all that their content depends on."""

    def __init__(self, path: Path, rollouts: Sequence[Rollout], shard_tokens: int, origin: dict[str, Any]) -> None:
        self.path, self.rollouts = path, rollouts
        tokens = [(r.problem_id, r.sample, r.prompt_ids, r.completion_ids) for r in rollouts]
        self.origin = {**origin, "rollouts": fingerprint(json.dumps(tokens).encode()), "shard_tokens": shard_tokens}
        self.shards: list[range] = []
        start = total = 0
        for i, (_, _, prompt, completion) in enumerate(tokens):
            total += len(prompt) + len(completion)
            if i > start and total > shard_tokens:
                self.shards.append(range(start, i))
                start, total = i, len(prompt) + len(completion)
        self.shards.append(range(start, len(tokens)))
        self.place = {(r.problem_id, r.sample): i for i, r in enumerate(rollouts)}
        self.shard_of = [number for number, members in enumerate(self.shards) for _ in members]
        self._open: dict[int, dict[str, Tensor]] = {}

    def file(self, number: int) -> Path:
        return self.path / f"shard-{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Shards that are missing or incomplete.

        Raises:
            ArtefactError: a shard was made from something else; says from what.
        """
        absent = []
        for number in range(len(self.shards)):
            try:
                self._columns(number)
            except (FileNotFoundError, safetensors.SafetensorError):
                absent.append(number)
        return absent

    def discard_others(self) -> None:
        """Delete shards that were made from something else, and partly written ones."""
        for path in self.path.glob(".shard-*.partial"):
            path.unlink()
        for path in sorted(self.path.glob("shard-*.safetensors")):
            number = int(path.stem.removeprefix("shard-"))
            try:
                if number < len(self.shards):
                    self._columns(number)
                    continue
            except safetensors.SafetensorError:
                continue  # torn: it will be made again
            except ArtefactError:
                pass
            path.unlink()

    def fill(
        self, lm: CausalLM, settings: ScoreConfig, keep: Keep, on_done: Callable[[int, int], None] = lambda *_: None
    ) -> int:
        """Make the missing shards; returns how many were made.

        Args:
            on_done: called with the number of finished rollouts and of tokens that this call has read so far.
        """
        missing = self.missing()
        done = len(self.rollouts) - sum(len(self.shards[number]) for number in missing)
        read = 0
        on_done(done, read)
        for number in missing:
            members = [self.rollouts[i] for i in self.shards[number]]
            with keeping_freed_memory() if lm.device.type == "cpu" else nullcontext():
                found = score_rollouts(lm, members, top_k=settings.top_k, token_budget=settings.token_budget, keep=keep)
            self._write(number, found)
            done += len(members)
            read += sum(len(r.ids) for r in members)
            on_done(done, read)
        return len(missing)

    def _write(self, number: int, found: list[tuple[Scores, BaseStates]]) -> None:
        empty = torch.empty(0)
        columns = {name: [getattr(scores, name) for scores, _ in found] or [empty] for name in FIELDS}
        columns["hidden"] = [base.hidden for _, base in found] or [empty]
        if any(base.entry is not None for _, base in found):
            columns["entry"] = [base.entry for _, base in found if base.entry is not None]
        tensors = {name: torch.cat(parts).contiguous() for name, parts in columns.items()}
        with replacing(self.file(number)) as aside:
            meta = {key: json.dumps(value) for key, value in self.origin.items()}
            safetensors.torch.save_file(tensors, aside, metadata=meta)

    def _columns(self, number: int) -> dict[str, Tensor]:
        """The shard's tensors, mapped from its file."""
        if number not in self._open:
            path = self.file(number)
            with safetensors.safe_open(path, framework="pt") as file:
                made = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            for key in sorted(made.keys() | self.origin.keys()):
                if made.get(key) != self.origin.get(key):
                    raise ArtefactError(
                        f"{path}: belongs to another {key}: {made.get(key)!r}, not {self.origin.get(key)!r}; "
                        "run `rmx score` with --again"
                    )
            self._open[number] = tensors
        return self._open[number]

    def _read(self, number: int) -> dict[str, Tensor]:
        try:
            return self._columns(number)
        except (FileNotFoundError, safetensors.SafetensorError) as fault:
            raise ArtefactError(f"{self.file(number)}: cannot be read: {fault}") from fault

    def scores(self) -> list[Scores]:
        """Of all rollouts, in order.

        Raises:
            ArtefactError: a shard is missing, incomplete or made from something else.
        """
        found = []
        for number, members in enumerate(self.shards):
            columns, own = self._read(number), [self.rollouts[i] for i in members]
            lengths = [len(r.completion_ids) for r in own]
            pieces: Iterator[tuple[Tensor, ...]] = zip(*(columns[name].split(lengths) for name in FIELDS), strict=True)
            found += [Scores(r.problem_id, r.sample, *piece) for r, piece in zip(own, pieces, strict=True)]
        return found

    def states(self, problem_id: str, sample: int, keep: Keep) -> BaseStates:
        """Base states of one rollout, views of the mapped file."""
        i = self.place[problem_id, sample]
        number, own = self.shard_of[i], self.rollouts[i]
        columns, before = self._read(number), [self.rollouts[j] for j in range(self.shards[number].start, i)]
        rows = sum(keep.count(r) for r in before)
        entry = None
        if keep.layer:
            start = sum(len(r.ids) for r in before)
            entry = columns["entry"][start : start + len(own.ids)]
        stop = rows + keep.count(own)
        return BaseStates(columns["hidden"][rows:stop], entry)


def affordable(
    keep: Keep, rollouts: Sequence[Rollout], lm: CausalLM, settings: ScoreConfig, path: Path
) -> tuple[Keep, str]:
    """(what to keep, a sentence about its size): all states, or none if they exceed the budget or the free disk."""
    need = keep.bytes(rollouts, lm.weight.shape[1], lm.weight.dtype)
    path.mkdir(parents=True, exist_ok=True)
    held = sum(shard.stat().st_size for shard in path.glob("shard-*.safetensors"))  # by a start that was killed
    free = shutil.disk_usage(path).free + held
    size = f"base states of {len(rollouts)} rollouts: {need / 2**30:.2f} GiB"
    if need > settings.cache_gib * 2**30:
        return Keep(), f"{size}, over score.cache_gib={settings.cache_gib:g}: training will compute them anew"
    if need > 0.9 * free:
        return Keep(), f"{size}, but the disk has {free / 2**30:.2f} GiB left: training will compute them anew"
    return keep, f"{size}, kept in {path}"


def entropies(scores: Sequence[Scores]) -> np.ndarray:
    """All completion tokens' base entropies, end to end."""
    return torch.cat([s.entropy for s in scores]).numpy()
