"""Where another model moves away from its base, over the same text (arXiv 2605.06241, section 2).

Both are teacher-forced over the same rollouts. A position is *unshifted* where both have the same most probable token,
*reranked* where the other's is among the base's top 5, and *shifted* elsewhere.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from rmx.analyses.pair import Pair
from rmx.artefacts import write_json
from rmx.config import Config
from rmx.grading.metrics import bootstrap
from rmx.models.model import CausalLM
from rmx.progress import console
from rmx.records import Interval, Rollout, Scores
from rmx.reports.report import BASE, GATE, TUNED, new_figure, save_png
from rmx.tables import new_table
from rmx.training.text_scores import RANKS, TOP, score_text

KINDS = ("unshifted", "reranked", "shifted")
SHOWN = (1, 2, 3, 5, 10, 20)  # of the k of outside_top, in the table
BINS = 10  # of the position in the completion
ENTROPY_BINS = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, np.inf)  # nats


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found. Shares are of all completion tokens; intervals are over problems."""

    problems: int
    tokens: int
    counts: dict[str, int]  # of each of KINDS
    reranked: Interval  # share
    shifted: Interval  # share
    mean_rank: float | None  # in the base, of the other's token where reranked (2 is the best possible); None: nowhere
    rank_counts: dict[int, int]  # 2 .. TOP
    outside_top: dict[int, Interval]  # k = 1 .. RANKS: share where the other's token is not among the base's top k
    entropy: dict[str, float | None]  # mean base entropy of each of KINDS, nats
    logprob_change: dict[str, float | None]  # mean change of the sampled token's log-prob, nats
    changed_by_position: list[float]  # share reranked or shifted in each tenth of the completion
    changed_by_entropy: list[tuple[float, int, float]]  # (lower edge in nats, tokens, share changed)
    common: list[tuple[str, str, int]]  # (base's token, other's token, count), most frequent first


def compare(
    lm: CausalLM,
    rollouts: Sequence[Rollout],
    base: Sequence[Scores],
    other: Sequence[Scores],
    draws: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Join the scores of the same rollouts under two models: of the base with top-k, k >= TOP, of the other k >= 1.

    ``outside_top`` ends at the base's k, if that is below RANKS.
    """
    problems = sorted({r.problem_id for r in rollouts if r.completion_ids})
    per_problem = {p: np.zeros(3) for p in problems}
    outside = {p: np.zeros(min(RANKS, base[0].topk_ids.shape[1])) for p in problems}
    kinds, ranks, entropies, changes, places = [], [], [], [], []
    pairs: Counter[tuple[int, int]] = Counter()
    for r, b, o in zip(rollouts, base, other, strict=True):
        if not r.completion_ids:
            continue
        ids, best = b.topk_ids.numpy(), o.topk_ids[:, 0].numpy()
        same = ids == best[:, None]
        rank = np.where(same.any(1), same.argmax(1) + 1, ids.shape[1] + 1)
        kind = np.where(rank == 1, 0, np.where(rank <= TOP, 1, 2))
        per_problem[r.problem_id] += np.bincount(kind, minlength=3)
        k = np.arange(1, len(outside[r.problem_id]) + 1)
        outside[r.problem_id] += (rank[:, None] > k).sum(0)
        kinds.append(kind)
        ranks.append(rank)
        entropies.append(b.entropy.numpy())
        changes.append((o.logprob - b.logprob).numpy())
        places.append(np.arange(len(kind)) * BINS // max(1, len(kind)))
        pairs.update(zip(ids[kind > 0, 0].tolist(), best[kind > 0].tolist(), strict=True))
    kind, rank, entropy, change, place = (np.concatenate(x) for x in (kinds, ranks, entropies, changes, places))
    counts = np.stack([per_problem[p] for p in problems])
    beyond = np.stack([outside[p] for p in problems])

    def mean(values: np.ndarray, which: np.ndarray) -> float | None:
        return float(values[which].mean()) if which.any() else None

    edge = np.searchsorted(ENTROPY_BINS, entropy, side="right") - 1
    decode = lm.tokenizer.decode
    return Comparison(
        problems=len(problems),
        tokens=len(kind),
        counts={name: int((kind == n).sum()) for n, name in enumerate(KINDS)},
        reranked=bootstrap(counts[:, 1], draws, seed, per=counts.sum(1)),
        shifted=bootstrap(counts[:, 2], draws, seed, per=counts.sum(1)),
        mean_rank=mean(rank, kind == 1),
        rank_counts={n: int((rank == n).sum()) for n in range(2, TOP + 1)},
        outside_top={n + 1: bootstrap(beyond[:, n], draws, seed, per=counts.sum(1)) for n in range(beyond.shape[1])},
        entropy={name: mean(entropy, kind == n) for n, name in enumerate(KINDS)},
        logprob_change={name: mean(change, kind == n) for n, name in enumerate(KINDS)},
        changed_by_position=[mean(kind > 0, place == n) or 0.0 for n in range(BINS)],
        changed_by_entropy=[
            (float(ENTROPY_BINS[n]), int((edge == n).sum()), mean(kind > 0, edge == n) or 0.0)
            for n in range(len(ENTROPY_BINS) - 1)
        ],
        common=[(decode([b]), decode([o]), count) for (b, o), count in pairs.most_common(20)],
    )


def compare_models(
    pair: Pair, base: Sequence[Scores], rollouts: Sequence[Rollout], out: Path, config: Config
) -> Comparison:
    """Score ``rollouts`` under the other model into ``out``/other, and join that with the scores of the base.

    Raises:
        AnalysisError: there is no text, or it is of another model.
    """
    other = score_text(pair.other, "other", pair.mark, rollouts, out / "other", config.score)
    return compare(pair.base, rollouts, base, other, config.evaluate.bootstrap, config.seed)


def write(result: Comparison, out: Path, meta: dict[str, Any]) -> None:
    """``compare.json``, with ``meta``, and ``compare.png``."""
    write_json(out / "compare.json", {**meta, **asdict(result)})
    plot(result, out / "compare.png")
    console.print(f"compare: written {out / 'compare.json'} and compare.png", markup=False, soft_wrap=True)


def table(result: Comparison) -> Table:
    """Share, entropy and change of log-prob of each kind of position."""
    title = f"{result.tokens:,} tokens of {result.problems} problems [95 % interval]"
    caption = "nats; log-prob: its change at the sampled token"
    grid = new_table(("", "% of tokens", "base entropy", "log-prob"), title=title, caption=caption)

    def number(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    for kind in KINDS:
        interval = {"reranked": result.reranked, "shifted": result.shifted}.get(kind)
        share = f"{100 * result.counts[kind] / result.tokens:.2f}"
        share += f" [{100 * interval.low:.2f}, {100 * interval.high:.2f}]" if interval else ""
        grid.add_row(kind, share, number(result.entropy[kind]), number(result.logprob_change[kind], "+.3f"))
    grid.add_section()
    grid.add_row("mean rank where reranked", number(result.mean_rank, ".2f"))
    for k in (k for k in SHOWN if k in result.outside_top):
        own = result.outside_top[k]
        grid.add_row(f"outside the top {k}", f"{100 * own.mean:.2f} [{100 * own.low:.2f}, {100 * own.high:.2f}]")
    return grid


def plot(result: Comparison, path: Path) -> None:
    """PNG of three panels: share changed by base entropy, by position in the completion, and ranks."""
    figure = new_figure(15, 4.4)
    by_entropy, by_position, ranks = figure.subplots(1, 3)
    edges = [f"{low:g}" for low, _, _ in result.changed_by_entropy]
    labels = [f"{a}-{b}" for a, b in zip(edges, [*edges[1:], "inf"], strict=True)]
    shares = [share for _, _, share in result.changed_by_entropy]
    by_entropy.bar(labels, shares, color=GATE)
    for x, (_, count, share) in enumerate(result.changed_by_entropy):
        by_entropy.annotate(f"{count:,}", (x, share), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    by_entropy.set(
        title="Changed argmax by base entropy (tokens)", xlabel="base entropy (nats)", ylabel="share changed"
    )
    by_entropy.tick_params(axis="x", rotation=45)
    tenths = [(n + 0.5) / BINS for n in range(BINS)]
    by_position.bar(tenths, result.changed_by_position, 0.9 / BINS, color=TUNED)
    by_position.set(title="... by position in the completion", xlabel="share of the completion", ylabel="share changed")
    names = [*(str(rank) for rank in result.rank_counts), f"> {TOP}"]
    counts = [*result.rank_counts.values(), result.counts["shifted"]]
    ranks.bar(names, counts, color=BASE)
    ranks.set(title="Rank in the base of the other's token", xlabel="rank", ylabel="changed tokens")
    for axes in (by_entropy, by_position, ranks):
        axes.set_ylim(0, max(1e-9, axes.get_ylim()[1] * 1.08))
    save_png(figure, path)
