"""How much of another model's accuracy the base gains from a few of its tokens (arXiv 2605.06241, section 3).

The base model decodes. Where a gate is open, the other model's token is used instead, if it is among the base's top 5:

* ``disagreement``: the two models' most probable tokens differ;
* ``entropy``: the base's entropy is above tau, so that no second model chooses the positions.

Controls: the other's tokens at as many random positions, and random tokens of the base's top 5 wherever the gate is
open. A sample has as many random positions as replaced tokens in its gated completion, drawn from the length of the
base's completion. If the other's token is not among the base's top 5, the next position is used. A completion that ends
early leaves some positions unused, so each arm reports the share of replaced tokens.

All arms are decoded by rmx's own loop, whatever ``evaluate.engine`` says, and every sample keeps its random numbers in
all of them, so that what differs is the intervention.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.table import Table

import rmx_kernels
from rmx.analyses.pair import Pair
from rmx.artefacts import Journal, fingerprint, write_json
from rmx.errors import AnalysisError
from rmx.grading.metrics import bootstrap, pass_rates, share_of_gap
from rmx.progress import console, progress
from rmx.records import Interval, Rollout
from rmx.reports.report import BASE, GATE, TUNED, new_figure, save_png
from rmx.runs.pipeline import Run
from rmx.sampling.batching import settled
from rmx.sampling.engines import Decoder, Picked, Unit, check_decoding, decode, stream_key, unit_uniforms
from rmx.sampling.nucleus import SamplingParams, sample_tokens
from rmx.sampling.rollouts import check_length, check_rotation, cut_units, unit_rollouts
from rmx.tables import new_table
from rmx.training.text_scores import TOP
from rmx_kernels import linear_entropy_topk

Gate = Literal["disagreement", "entropy"]
ARMS = ("base", "gated", "random positions", "random tokens", "other")
Key = tuple[str, int]  # problem_id, sample
POSITIONS, TOKENS = 1_000, 2_000  # added to the seed: streams of the random positions and of the random tokens


@dataclass(frozen=True, slots=True)
class Intervened:
    """One completion, and where its tokens do not come from the base."""

    rollout: Rollout
    taken: list[int]  # completion tokens where the gate was open and the proposed token was among the base's top 5
    changed: list[int]  # of these, where it is not the token that the base would have drawn

    @property
    def key(self) -> Key:
        return self.rollout.problem_id, self.rollout.sample


@dataclass(frozen=True)
class Arm:
    accuracy: Interval  # pass@1
    gain: Interval  # over the base, paired over problems
    recovered: Interval | None  # gain / gap; None where the gap is not clearly different from zero
    behind_gated: Interval | None  # gated - this arm, paired; of the controls
    taken: float  # share of the completion tokens
    changed: float
    tokens: float  # mean completion length


@dataclass(frozen=True)
class Intervention:
    """What :func:`intervene` found; intervals are over problems."""

    gate: Gate
    tau: float | None  # nats, of the entropy gate
    problems: int
    samples: int
    gap: Interval  # other - base
    arms: dict[str, Arm]
    prompt: str  # fingerprint


def intervene(run: Run, pair: Pair, out: Path, gate: Gate = "disagreement", tau: float | None = None) -> Intervention:
    """Decode the run's held-out problems in every arm, as ``rmx evaluate`` samples them, and compare.

    If it was killed, a new start continues at the current unit of completions.

    Raises:
        AnalysisError: an entropy gate without ``tau``, or another one with it.
    """
    if (gate == "entropy") != (tau is not None):
        raise AnalysisError(f"intervene: expected tau (nats) with gate entropy, none with disagreement, got {tau}")
    experiment = _Experiment(run, pair, out, gate, tau)
    problems, sampling = experiment.problems, run.config.evaluate
    found: dict[str, list[Intervened]] = {}
    for name in ARMS:
        control = name == "random positions"
        planned = _random_positions(found["gated"], found["base"], run.config.seed) if control else {}
        found[name] = experiment.arm(name, planned)
    rewards = {}
    for name, arm in found.items():
        verdicts = run.judge(name, problems, [completion.rollout for completion in arm])
        rewards[name] = pass_rates(problems, verdicts)
    judged = [p.problem_id for p in problems if all(p.problem_id in own for own in rewards.values())]
    if not judged:
        raise AnalysisError("intervene: no problem has a judged sample in every arm; raise verify.timeout_s")
    rates = {name: np.array([own[p] for p in judged]) for name, own in rewards.items()}
    return Intervention(
        gate=gate,
        tau=tau,
        problems=len(judged),
        samples=sampling.samples,
        gap=bootstrap(rates["other"] - rates["base"], sampling.bootstrap, run.config.seed),
        arms=summarise(found, rates, sampling.bootstrap, run.config.seed),
        prompt=run.renderer.fingerprint,
    )


def summarise(
    found: dict[str, list[Intervened]], rates: dict[str, np.ndarray], draws: int, seed: int
) -> dict[str, Arm]:
    """Intervals of every arm; rates: pass@1 of each problem, in one order."""
    gap = rates["other"] - rates["base"]
    arms = {}
    for name, completions in found.items():
        gain = rates[name] - rates["base"]
        tokens = sum(len(c.rollout.completion_ids) for c in completions)
        control = name.startswith("random")
        arms[name] = Arm(
            accuracy=bootstrap(rates[name], draws, seed),
            gain=bootstrap(gain, draws, seed),
            recovered=None if name in ("base", "other") else share_of_gap(gain, gap, draws, seed),
            behind_gated=bootstrap(rates["gated"] - rates[name], draws, seed) if control else None,
            taken=sum(len(c.taken) for c in completions) / tokens,
            changed=sum(len(c.changed) for c in completions) / tokens,
            tokens=tokens / len(completions),
        )
    return arms


def _random_positions(gated: Sequence[Intervened], base: Sequence[Intervened], seed: int) -> dict[Key, set[int]]:
    """For each sample as many positions as were taken in its gated completion, anywhere in the base's."""
    found = {}
    for c, plain in zip(gated, base, strict=True):
        draw = np.random.Generator(np.random.Philox(stream_key(seed + POSITIONS, *c.key)))
        length = len(plain.rollout.completion_ids)
        found[c.key] = {int(t) for t in draw.choice(length, min(length, len(c.taken)), replace=False)}
    return found


class _Experiment:
    """What all arms have in common."""

    def __init__(self, run: Run, pair: Pair, out: Path, gate: Gate, tau: float | None) -> None:
        self.pair, self.out, self.gate, self.tau = pair, out, gate, tau
        self.problems, self.sampling, self.seed = run.problems("evaluate"), run.config.evaluate, run.config.seed + 1
        prompts = [run.renderer(p.question) for p in self.problems]
        for lm in (pair.base, pair.other):
            check_length(lm, max(map(len, prompts)), self.sampling.max_new_tokens)
            check_rotation(lm, max(map(len, prompts)), self.sampling.max_new_tokens)
            check_decoding(lm, padded=len(set(map(len, prompts))) > 1)
        both = settled(pair.base, self.sampling, prompts, "evaluate.", models=2)
        self.units = cut_units(self.problems, prompts, both, batched=True)
        self.params = SamplingParams(self.sampling.temperature, self.sampling.top_p, self.sampling.top_k)
        self.origin: dict[str, Any] = {
            "rmx": rmx_kernels.__version__,
            "prompt": run.renderer.fingerprint,
            "model": run.model_settings.model_dump(),
            "weights": run.weights,
            "problems": fingerprint(repr([(p.problem_id, p.question) for p in self.problems]).encode()),
            "sampling": self.sampling.model_dump(exclude={"bootstrap"}),
            "seed": self.seed,
        }

    def arm(self, name: str, planned: dict[Key, set[int]]) -> list[Intervened]:
        """All completions of one arm, by way of a journal that a killed start left."""
        alone = name in ("base", "other")  # the same for every gate
        origin = {
            **self.origin,
            "other": None if name == "base" else self.pair.mark,
            "gate": None if alone else [self.gate, self.tau],
            "planned": fingerprint(repr(sorted((key, sorted(own)) for key, own in planned.items())).encode()),
        }
        path = (self.out if alone else self.out / self.gate) / f"{name.replace(' ', '-')}.jsonl"
        journal, known = Journal.open(path, Intervened, origin)
        done = {c.key: c for c in known}
        samples = range(self.sampling.samples)
        with journal, progress(name, len(self.problems) * len(samples), "rollouts") as update:
            update(len(done), "")
            for unit in self.units:
                if not done.keys() >= set(unit.keys):
                    fresh = self._decode(unit, name, planned)
                    journal.append(fresh)
                    done |= {c.key: c for c in fresh}
                    update(len(done), "")
        return [done[p.problem_id, n] for p in self.problems for n in samples]

    @torch.no_grad()
    def _decode(self, unit: Unit, name: str, planned: dict[Key, set[int]]) -> list[Intervened]:
        pair, count = self.pair, len(unit.keys)
        uniforms = unit_uniforms(unit, self.sampling, self.seed).to(pair.base.device)
        dice = unit_uniforms(unit, self.sampling, self.seed + TOKENS).to(pair.base.device)
        decoders, new = [], self.sampling.max_new_tokens
        if name != "other":
            decoders.append(Decoder(pair.base, unit.prompts, len(unit.samples), pair.as_base, new))
        if name != "base" and not (name == "random tokens" and self.tau is not None):  # which need no other model
            decoders.append(Decoder(pair.other, unit.prompts, len(unit.samples), new=new))
        stops = pair.base.eos_ids | pair.other.eos_ids
        taken: list[list[int]] = [[] for _ in range(count)]
        changed: list[list[int]] = [[] for _ in range(count)]
        places = [planned.get(key, set()) for key in unit.keys]
        owed = [0] * count  # random positions that have come and were not taken yet

        def pick(step: int, rows: list[int]) -> Picked:
            drawn = [sample_tokens(d.lm, d.hidden, uniforms[rows, step], self.params) for d in decoders]
            (tokens, logprobs), (proposed, _) = drawn[0], drawn[-1]
            if name in ("base", "other"):
                return tokens, logprobs
            stats = linear_entropy_topk(decoders[0].hidden, k=TOP, **pair.base.head)
            assert stats.topk_ids is not None
            if name == "random positions":
                for row in rows:
                    owed[row] += step in places[row]
                opened = torch.tensor([owed[row] > 0 for row in rows], device=tokens.device)
            elif self.tau is not None:
                opened = stats.entropy > self.tau
            else:
                theirs = linear_entropy_topk(decoders[1].hidden, k=1, **pair.other.head).topk_ids
                assert theirs is not None
                opened = theirs[:, 0] != stats.topk_ids[:, 0]
            if name == "random tokens":
                die = (dice[rows, step] * TOP).long()
                proposed = stats.topk_ids.gather(1, die[:, None]).squeeze(1)
            take = opened & (stats.topk_ids == proposed[:, None]).any(-1)
            for row, took, differs in zip(rows, take.tolist(), (proposed != tokens).tolist(), strict=True):
                if took:
                    taken[row].append(step)
                    owed[row] -= 1
                    if differs:
                        changed[row].append(step)
            return torch.where(take, proposed, tokens), logprobs

        completions = decode(decoders, pick, count, self.sampling.max_new_tokens, stops)
        rollouts = unit_rollouts(pair.base, unit, [c._replace(logprobs=None) for c in completions], stops)
        return [
            # a finished row may stay in the batch for a while
            Intervened(r, *([t for t in own if t < len(r.completion_ids)] for own in steps))
            for r, *steps in zip(rollouts, taken, changed, strict=True)
        ]


def write(result: Intervention, out: Path) -> None:
    """``intervene.json`` and ``intervene.png`` in the gate's folder of ``out``."""
    folder = out / result.gate
    write_json(folder / "intervene.json", asdict(result))
    plot(result, folder / "intervene.png")
    console.print(f"intervene: written {folder / 'intervene.json'} and intervene.png", markup=False, soft_wrap=True)


def table(result: Intervention) -> Table:
    """Accuracy of each arm, and what it recovers of the gap."""
    gate = result.gate if result.tau is None else f"entropy > {result.tau:.2f} nats"
    title = f"gate {gate}: {result.problems} problems x {result.samples}, gap {result.gap}"
    caption = "share of tokens: taken from the other / of these, changed"
    grid = new_table(("", "pass@1 [95 %]", "of the gap [95 %]", "tokens"), title=title, caption=caption)
    for name, arm in result.arms.items():
        share = "" if name in ("base", "other") else f"{arm.taken:.1%}/{arm.changed:.1%}"
        grid.add_row(name, str(arm.accuracy), "" if arm.recovered is None else _percent(arm.recovered), share)
    return grid


def _percent(interval: Interval) -> str:
    return format(interval, "z.0%")


def verdict(result: Intervention) -> str:
    """The outcome in words, whichever way it came out."""
    gated = result.arms["gated"]
    if gated.recovered is None:
        return f"The gap between the two models, {result.gap}, is not clear: nothing can be said of a share of it."
    words = [
        f"{gated.taken:.1%} of the tokens, taken from the other model, recover {_percent(gated.recovered)} of the gap."
    ]
    for name, arm in result.arms.items():
        behind = arm.behind_gated
        if behind is not None:
            how = "more than" if behind.low > 0 else "less than" if behind.high < 0 else "not clearly more than"
            words.append(f"That is {how} {name} do: {behind}.")
    return " ".join(words)


def plot(result: Intervention, path: Path) -> None:
    """PNG: pass@1 of every arm with its interval, and the share of the gap."""
    figure = new_figure(8, 4.4)
    axes = figure.subplots()
    colours = {"base": BASE, "other": TUNED, "gated": GATE}
    names = [f"{name}\n{arm.taken:.1%} taken" if arm.taken else name for name, arm in result.arms.items()]
    for x, (name, arm) in enumerate(result.arms.items()):
        a = arm.accuracy
        axes.bar(x, a.mean, 0.7, color=colours.get(name, "#c9c9c9"))
        axes.errorbar([x], [a.mean], [[a.mean - a.low], [a.high - a.mean]], color="black", capsize=4, linewidth=1)
        share = "" if arm.recovered is None else f"\n{arm.recovered.mean:z.0%} of the gap"
        axes.annotate(f"{a.mean:.3f}{share}", (x, a.high), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xticks(range(len(names)), names)
    gate = "where the two disagree" if result.tau is None else f"where base entropy > {result.tau:.2f} nats"
    axes.set(title=f"The other model's tokens {gate}", ylabel="held-out pass@1")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.12)
    save_png(figure, path)
