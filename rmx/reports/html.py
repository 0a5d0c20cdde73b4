"""One self-contained HTML page of a run: outcome, gate, rollouts token by token, training curves, cost.

It has no scripts and asks nothing of the network; its own content security policy forbids both.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import rmx_kernels
from rmx import cost
from rmx.config import Config
from rmx.errors import CONTROL
from rmx.records import Evaluation, Interval, Problem, Rollout, Scores, StepMetrics, TrainingSequence, Verdict
from rmx.reports import report
from rmx.reports.charts import curves, histogram, percent, placed
from rmx.reports.pages import bounds, duration, public, signed, write_page
from rmx.training.select import gated_share

PROBLEMS = 3  # whose rollouts are shown
SHOWN = 500  # tokens of a completion that are shown: about 100 kB of page
RULE = f"The first right and the first wrong rollout of each of the first {PROBLEMS} problems of the training set."

INLINE = {**CONTROL, ord("\n"): "↵", ord("\t"): "⇥"}  # controls as characters that can be seen
BLOCK = {**INLINE, ord("\n"): "↵\n", ord("\t"): "⇥\t"}

Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Example:
    """A rollout that was trained on, with all that is known of it."""

    problem: Problem
    rollout: Rollout
    verdict: Verdict
    scores: Scores
    sequence: TrainingSequence


@dataclass(frozen=True)
class Page:
    """All that the page says."""

    config: Config
    evaluation: Evaluation
    entropies: np.ndarray  # of all scored tokens, nats
    tau: float  # nats
    training_set: Sequence[TrainingSequence]
    history: Sequence[StepMetrics]
    examples: Sequence[Example]
    style: str  # of the prompts, never "auto"
    prompt: str  # the prompts' fingerprint
    costs: Sequence[cost.StageCost] = ()
    dates: tuple[datetime, datetime] | None = None  # of the first and the last stage
    notes: Mapping[str, str] = field(default_factory=dict)  # further lines of the settings: label -> text


def pick_examples(
    problems: Iterable[Problem],
    rollouts: Iterable[Rollout],
    verdicts: Iterable[Verdict],
    scores: Iterable[Scores],
    training_set: Sequence[TrainingSequence],
) -> list[Example]:
    """The examples that ``RULE`` describes, right before wrong; each argument may hold more than is needed."""
    first: dict[tuple[str, float], TrainingSequence] = {}
    for sequence in training_set:
        first.setdefault((sequence.problem_id, sequence.reward), sequence)
    shown = list(dict.fromkeys(s.problem_id for s in training_set))[:PROBLEMS]
    found = [first[p, reward] for p in shown for reward in (1.0, 0.0) if (p, reward) in first]
    problem = {p.problem_id: p for p in problems}
    rollout = {(r.problem_id, r.sample): r for r in rollouts}
    verdict = {(v.problem_id, v.sample): v for v in verdicts}
    score = {(s.problem_id, s.sample): s for s in scores}
    keys = [(s.problem_id, s.sample) for s in found]
    return [
        Example(problem[key[0]], rollout[key], verdict[key], score[key], s) for key, s in zip(keys, found, strict=True)
    ]


def write_html(path: Path, page: Page, decode: Decode) -> None:
    """Write the page.

    Args:
        decode: text of token ids, special tokens included and white space as it is.
    """
    gain = str(page.evaluation.gain)
    top = max(float(page.entropies.max(initial=0)), 1e-6)
    write_page(
        path,
        "report.html.j2",
        page=page,
        verdict=report.verdict(page.evaluation).replace(gain, gain.replace(" ", "\u00a0")),  # never broken in two
        facts=_facts(page),
        run=public(page.config.run_dir),
        configuration=yaml.safe_dump(_settings(page.config), sort_keys=False, allow_unicode=True),
        accuracy=_accuracy_rows(page.evaluation),
        dots=_dots(page.evaluation),
        gate=histogram(page.entropies, page.tau),
        gain=signed(page.evaluation.gain.mean),
        bounds=bounds(page.evaluation.gain),
        share=percent(gated_share(page.training_set)),
        top=top,
        rule=RULE,
        shown=SHOWN,
        groups=_example_groups(page.examples, decode, top),
        curves=curves(page.history) if page.history else [],
        window=report.WINDOW,
        costs=_cost_rows(page.costs),
        priced=any(c.price is not None for c in page.costs),
    )


def split_tokens(decode: Decode, prompt_ids: list[int], completion_ids: list[int]) -> list[tuple[range, str]]:
    """(tokens, text) from a completion's start to its end; tokens that hold parts of one character are together."""
    found = []
    start, before = 0, prompt_ids[-1:]
    for end in range(1, len(completion_ids) + 1):
        text = _continuation(decode, before, completion_ids[start:end])
        # a character has at most 4 bytes, and thus tokens; beyond that the model wrote no character
        if text.endswith("\ufffd") and end - start < 4 and end < len(completion_ids):
            continue
        found.append((range(start, end), text))
        start, before = end, completion_ids[start:end]
    return found


def _continuation(decode: Decode, before: list[int], ids: list[int]) -> str:
    """Text of ``ids`` after ``before``: alone, some tokenizers would drop its leading space."""
    known, both = decode(before) if before else "", decode(before + ids)
    return both.removeprefix(known) if both.startswith(known) else decode(ids)


def _facts(page: Page) -> list[tuple[str, str]]:
    """What was run, as (label, text)."""
    c, result = page.config, page.evaluation
    problems = len({s.problem_id for s in page.training_set})
    tokens = sum(len(s.completion_ids) for s in page.training_set)
    targets = ", ".join(c.lora.targets) + (f", from layer {c.lora.first_layer}" if c.lora.first_layer else "")
    sampling = f"{c.rollouts.samples} samples a problem, T = {c.rollouts.temperature:g}, top-p = {c.rollouts.top_p:g}"
    train = f"learning rate {c.train.learning_rate:g}, {len(page.history)} steps of {c.train.sequences_per_step}"
    facts = {
        "Model": public(c.model.name),
        "Prompt": f"style {page.style}{' (auto)' if c.prompt.style == 'auto' else ''}, fingerprint {page.prompt}",
        "Rollouts": f"{c.problems.train_count} problems, {sampling}, at most {c.rollouts.max_new_tokens:,} tokens",
        "Training set": f"{problems} problems of mixed outcome, {len(page.training_set)} rollouts, {tokens:,} tokens",
        "Gate": f"{_gate(page)}; {percent(gated_share(page.training_set))} of the training set's tokens are gated",
        "Adapter": f"LoRA r = {c.lora.r}, alpha = {c.lora.alpha:g} on {targets}",
        "Training": f"{train} rollouts, anchor weight {c.train.anchor_weight:g}",
        "Evaluation": f"{result.problems} held-out problems, {result.samples} samples each",
        "Software": f"rmx {rmx_kernels.__version__}",
    }
    if page.dates:
        first, last = page.dates
        end = f"{last:%H:%M}" if last.date() == first.date() else f"{last:%Y-%m-%d %H:%M}"
        facts["Date"] = f"{first:%Y-%m-%d %H:%M} to {end}"
    return list({**facts, **page.notes}.items())


def _settings(config: Config) -> dict[str, Any]:
    """All settings, without what only this machine and its network know: the page can be mailed."""
    tree: dict[str, Any] = public(config.model_dump(mode="json"))
    for section in ("rollouts", "evaluate"):
        if tree[section]["base_url"]:
            tree[section]["base_url"] = "a server"
    return tree


def _gate(page: Page) -> str:
    """tau, and how it came about."""
    settings = page.config.select
    said = f"tau = {page.tau:.3g} nats, fixed"
    if settings.quantile is not None:
        said = f"tau = {page.tau:.3g} nats, the {settings.quantile:g} quantile of all scored tokens"
    elif settings.budget is not None:
        said = f"tau = {page.tau:.3g} nats, for a budget of {percent(settings.budget)} of the training set's tokens"
    control = {"random": "as many tokens at random", "lowest": "as many tokens of lowest entropy", "all": "every token"}
    said += f"; control: {control[settings.gate]}" if settings.gate != "entropy" else ""
    said += ", weighted to the gradient of the entropy gate's tokens" if settings.matched_gradient else ""
    said += "; control: right rollouts alone, all with the advantage 1" if settings.right_only else ""
    return said + ("; control: advantages shuffled" if settings.shuffle_advantages else "")


# Accuracy
def _accuracy_rows(result: Evaluation) -> list[list[tuple[str, ...]]]:
    """Groups of (label, base, its interval, tuned, its interval, change, its interval)."""
    base, tuned = result.base, result.tuned

    def plain(label: str, before: float, after: float, spec: str = ".3f") -> tuple[str, ...]:
        return label, f"{before:{spec}}", "", f"{after:{spec}}", "", signed(after - before, spec), ""

    def shares(label: str, before: float, after: float) -> tuple[str, ...]:
        return label, percent(before), "", percent(after), "", signed(100 * (after - before), ".1f") + " pt", ""

    def interval(label: str, before: Interval, after: Interval) -> tuple[str, ...]:
        row = plain(label, before.mean, after.mean)
        return *row[:2], bounds(before), row[3], bounds(after), row[5], ""

    first = interval("pass@1", base.pass_at_1, tuned.pass_at_1)
    whole = [(*first[:5], signed(result.gain.mean), bounds(result.gain))]
    whole += [interval(*row) for row in _at_k(result)]
    if base.standard_error is not None and tuned.standard_error is not None:
        whole.append(plain("standard error", base.standard_error, tuned.standard_error))
    categories = [plain(_short(name), *rates) for name, rates in result.categories.items()]
    other = [
        plain("mean tokens", base.tokens, tuned.tokens, ".1f"),
        shares("truncated", base.truncated, tuned.truncated),
        shares("boxed answer", base.boxed, tuned.boxed),
    ]
    if base.unverified or tuned.unverified:
        other.append(("not verified", str(base.unverified), "", str(tuned.unverified), "", "", ""))
    return [whole, categories, other]


def _at_k(result: Evaluation) -> list[tuple[str, Interval, Interval]]:
    """pass@k and maj@k for k > 1."""
    sides = (
        ("pass", result.base.pass_at_k, result.tuned.pass_at_k),
        ("maj", result.base.maj_at_k, result.tuned.maj_at_k),
    )
    return [(f"{name}@{k}", b[k], t[k]) for name, b, t in sides for k in sorted(b) if k > 1 and k in t]


def _short(category: str) -> str:
    return category.removeprefix("reasoning_gym:").translate(INLINE) or "no category"


def _dots(result: Evaluation) -> dict[str, Any]:
    """Base and tuned as dots, with intervals where there are some, all samples at k; x in percent of the width."""
    whole = [("pass@1", result.base.pass_at_1, result.tuned.pass_at_1)]
    whole += [row for row in _at_k(result) if row[0].endswith(f"@{result.samples}")]
    points = {name: [Interval(rate, rate, rate) for rate in rates] for name, rates in result.categories.items()}
    rows = [*whole, *((_short(name), before, after) for name, (before, after) in points.items())]
    return placed(rows, ("base", "tuned")) | {"whole": len(whole)}


# Rollouts
def _example_groups(examples: Sequence[Example], decode: Decode, top: float) -> list[dict[str, Any]]:
    """Examples by problem, with their tokens ready for the page."""
    groups: dict[str, dict[str, Any]] = {}
    for e in examples:
        prompt = decode(e.sequence.prompt_ids).translate({**CONTROL, ord("\n"): "\n", ord("\t"): "\t"})
        group = groups.setdefault(e.problem.problem_id, {"problem": e.problem, "prompt": prompt, "rollouts": []})
        group["rollouts"].append({"example": e, "tokens": _tokens(e, decode, top), "total": len(e.scores.entropy)})
    return list(groups.values())


def _tokens(example: Example, decode: Decode, top: float) -> list[dict[str, Any]]:
    sequence, entropy = example.sequence, example.scores.entropy.tolist()
    gated = set(sequence.decision_tokens)
    return [
        {
            "text": text.translate(BLOCK) or "∅",
            "heat": f"{min(max(entropy[t] for t in own) / top, 1):.2f}",
            "gated": not gated.isdisjoint(own),
            "title": "\n\n".join(_about(example, t, t in gated, decode) for t in own),
        }
        for own, text in split_tokens(decode, sequence.prompt_ids, sequence.completion_ids[:SHOWN])
    ]


def _about(example: Example, t: int, gated: bool, decode: Decode) -> str:
    """What the base model thought of completion token t."""
    scores, ids = example.scores, example.sequence.ids
    at = len(example.sequence.prompt_ids) + t
    logprob = float(scores.logprob[t])
    best = zip(scores.topk_ids[t, :3].tolist(), scores.topk_logprobs[t, :3].exp().tolist(), strict=True)
    others = [f"“{_continuation(decode, ids[at - 1 : at], [i]).translate(INLINE)}” {percent(p)}" for i, p in best]
    lines = [
        f"entropy {float(scores.entropy[t]):.2f} nats" + (", decision token" if gated else ""),
        f"log-prob {logprob:.2f} ({percent(math.exp(logprob))})",
    ]
    return "\n".join([*lines, f"top {len(others)}: {'  '.join(others)}"] if others else lines)


# Cost
def _cost_rows(costs: Sequence[cost.StageCost]) -> list[tuple[str, ...]]:
    """(stage, time, tokens read, tokens generated, peak memory in GiB, price) and their totals."""

    def known(value: float | None, spec: str) -> str:
        return "–" if value is None else f"{value:{spec}}"

    return [
        (
            row.stage,
            duration(row.seconds),
            known(row.tokens_read, ","),
            known(row.tokens_generated, ","),
            known(row.peak_gib, ".2f"),
            known(row.price, ".4f"),
        )
        for row in ([*costs, cost.total(costs)] if costs else [])
    ]
