"""How far an adapter moves the model on text unrelated to its training: KL and perplexity.

Both models read the same windows of a text, teacher-forced, with the linear operators: no logits are stored.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from rmx.artefacts import fingerprint, write_json
from rmx.errors import AnalysisError
from rmx.grading.metrics import bootstrap
from rmx.models import lora
from rmx.models.forward import final_hidden, passes
from rmx.models.lora_layers import Adapter
from rmx.models.model import CausalLM
from rmx.progress import console, progress
from rmx.records import Interval
from rmx.reports.report import TUNED, new_figure, save_png
from rmx.runs.pipeline import Run
from rmx.tables import new_table
from rmx_kernels import linear_entropy_topk, linear_logprob_kl

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Drift:
    """What :func:`drift` found. Intervals are over windows, which are taken to be independent."""

    text: str  # fingerprint
    windows: int
    tokens: int  # that were predicted
    kl: Interval  # mean KL(base || tuned) of a token, nats
    kl_quantiles: dict[float, float]  # of single tokens: share -> nats
    base_perplexity: Interval  # exp of the mean of -log p
    tuned_perplexity: Interval
    ratio: Interval  # tuned / base, paired


def cut(lm: CausalLM, text: str, window: int) -> list[list[int]]:
    """Token ids of the windows of ``window`` tokens, each after the token that begins a text, if there is one.

    Raises:
        AnalysisError: there is nothing to predict, or a window is longer than the model can read.
    """
    known = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if window < 2 or (known and window + 1 > known):
        most = f" and less than the model's {known} positions" if known else ""
        raise AnalysisError(f"drift: --window: expected at least 2{most}, got {window}")
    start = [i for i in lm.tokenizer("")["input_ids"][:1] if i == lm.tokenizer.bos_token_id]
    ids = list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    found = [start + ids[i : i + window] for i in range(0, len(ids), window)]
    found = [own for own in found if len(own) > 1]
    if not found:
        raise AnalysisError("drift: the text has no token to predict")
    return found


@torch.no_grad()
def measure(
    lm: CausalLM, adapter: Adapter, windows: Sequence[Sequence[int]], token_budget: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(KL(base || tuned), log p of the base, log p of the tuned model) of the L - 1 predicted tokens of each window."""
    found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with progress("drift", len(windows), "windows") as update:
        for group in passes(lm, [len(own) for own in windows], token_budget):
            ids = [list(windows[i]) for i in group]
            keep = torch.cat([torch.arange(len(own)) < len(own) - 1 for own in ids]).to(lm.device)
            target = torch.tensor([t for own in ids for t in own[1:]], device=lm.device)
            with adapter.off():
                base = final_hidden(lm, ids)[keep]
            tuned = final_hidden(lm, ids)[keep]
            before = linear_entropy_topk(base, target=target, **lm.head).logprob
            assert before is not None
            after, kl = linear_logprob_kl(tuned, base, target=target, **lm.head)
            lengths = [len(own) - 1 for own in ids]
            columns = (x.double().cpu().split(lengths) for x in (kl, before, after))
            found |= dict(zip(group, zip(*columns, strict=True), strict=True))
            update(len(found), "")
    return [found[i] for i in range(len(windows))]


def drift(run: Run, text: str, adapter: Path | None = None, window: int = 512) -> Drift:
    """Compare the base with the run's own adapter, or with the one in ``adapter``, on windows of ``text``.

    Raises:
        AnalysisError: see :func:`cut`. RunError: the run has no finished adapter. AdapterError: it is of another model.
    """
    if adapter is None:
        run.check_adapter()
    windows = cut(run.lm, text, window)
    with lora.worn(run.lm.model, adapter or run.path("adapter")) as worn:
        found = measure(run.lm, worn, windows, run.config.score.token_budget)
    return summarise(found, fingerprint(text.encode()), run.config.evaluate.bootstrap, run.config.seed)


def summarise(found: Sequence[tuple[Tensor, Tensor, Tensor]], text: str, draws: int, seed: int) -> Drift:
    """Means over tokens of what :func:`measure` returns, with intervals."""
    kl, before, after = ([own[n].numpy() for own in found] for n in range(3))
    counts = np.array([len(own) for own in kl])

    def mean(parts: Sequence[np.ndarray]) -> Interval:
        return bootstrap(np.array([own.sum() for own in parts]), draws, seed, per=counts)

    def exp(interval: Interval) -> Interval:
        return Interval(*(float(np.exp(getattr(interval, key))) for key in ("mean", "low", "high")))

    whole = np.concatenate(kl)
    return Drift(
        text=text,
        windows=len(found),
        tokens=len(whole),
        kl=mean(kl),
        kl_quantiles={q: float(np.quantile(whole, q)) for q in QUANTILES},
        base_perplexity=exp(mean([-own for own in before])),
        tuned_perplexity=exp(mean([-own for own in after])),
        ratio=exp(mean([b - a for b, a in zip(before, after, strict=True)])),
    )


def write(result: Drift, out: Path, meta: dict[str, Any]) -> None:
    """``drift.json``, with ``meta``, and ``drift.png``."""
    write_json(out / "drift.json", {**meta, **asdict(result)})
    plot(result, out / "drift.png")
    console.print(f"drift: written {out / 'drift.json'} and drift.png", markup=False, soft_wrap=True)


def table(result: Drift) -> Table:
    """Mean KL, and perplexities of both."""
    title = f"{result.tokens:,} tokens in {result.windows} windows"
    grid = new_table(("", "[95 % over windows]"), title=title)
    grid.add_row("KL(base || tuned), nats a token", f"{result.kl:.5f}")
    for name in ("base", "tuned"):
        grid.add_row(f"perplexity, {name}", str(getattr(result, f"{name}_perplexity")))
    grid.add_row("perplexity, tuned / base", f"{result.ratio:.4f}")
    return grid


def plot(result: Drift, path: Path) -> None:
    """PNG: quantiles of the tokens' KL."""
    figure = new_figure(6, 3.6)
    axes = figure.subplots()
    names = [f"{100 * q:g} %" for q in result.kl_quantiles]
    axes.bar(names, list(result.kl_quantiles.values()), 0.6, color=TUNED)
    axes.axhline(result.kl.mean, color="black", linewidth=1, linestyle="--", label=f"mean {result.kl.mean:.4f}")
    axes.set(title="KL(base || tuned) on the text", xlabel="of the tokens, below", ylabel="nats")
    axes.legend(frameon=False)
    save_png(figure, path)
