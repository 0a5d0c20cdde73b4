"""How many decision points of a large sample of rollouts are already in a small set of them.

A *decision point* is a completion token whose predicting position has a base entropy above tau. Its kind is a key, of
which there are three, from fine to coarse:

* ``context``: the two token ids before it and the base's most probable token,
* ``candidates``: the base's two most probable tokens, in either order,
* ``token``: the base's most probable token.

A small set of rollouts *covers* a decision point of the rest if the set has a decision point with the same key.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from rmx.artefacts import write_json
from rmx.errors import AnalysisError
from rmx.progress import console
from rmx.records import Interval, Rollout, Scores
from rmx.reports.report import BASE, GATE, TUNED, new_figure, save_png
from rmx.runs.rundir import RunDirectory, RunError
from rmx.tables import new_table

KEYS = ("context", "candidates", "token")
DRAWS = ("rollouts", "problems")  # what is drawn at random
SMALLEST = 25  # rollouts in the smallest set; each next one has twice as many


@dataclass(frozen=True)
class Share:
    """What small sets of one size cover of the rest; mean and central 95 % of the random draws."""

    units: int  # rollouts or whole problems in the set
    rollouts: float  # in the set, on average
    points: Interval  # of the rest's decision points
    keys: Interval  # of the rest's distinct keys


@dataclass(frozen=True)
class Curve:
    """Shares by the size of the small set."""

    draw: str  # of DRAWS
    key: str  # of KEYS
    control: bool  # of positions of low entropy instead of decision points
    shares: list[Share]


@dataclass(frozen=True)
class Training:
    """What the training set covers of the decision points in rollouts of other problems: (of points, of keys)."""

    rollouts: int
    problems: int
    other_rollouts: int
    decisions: dict[str, tuple[float, float]]  # by key
    control: dict[str, tuple[float, float]]  # by key; empty where either side has no such position


@dataclass(frozen=True)
class Coverage:
    """What :func:`cover` found."""

    tau: float  # nats
    seed: int
    draws: int
    rollouts: int
    problems: int
    tokens: int  # of completions
    decisions: int  # decision points
    control: int  # positions of low entropy that they are held against
    distinct: dict[str, int]  # keys of the decision points
    control_distinct: dict[str, int]
    curves: list[Curve]
    training: Training | None  # None: no training set, or none of the other problems has a decision point


@dataclass(frozen=True)
class _Positions:
    """N positions: where they are, and of which kind, both as small integers."""

    rollout: np.ndarray  # [N]
    problem: np.ndarray  # [N]
    keys: dict[str, np.ndarray]  # of KEYS -> [N]


def cover(
    rollouts: Sequence[Rollout],
    scores: Sequence[Scores],
    tau: float,
    *,
    trained: Collection[tuple[str, int]] = (),
    draws: int = 200,
    seed: int = 0,
) -> Coverage:
    r"""Coverage of the rest of the sample by small sets of its rollouts (the question of arXiv 2605.06241).

    With the decision points D, of keys k(d), and a small set S of the rollouts,

    .. math:: \mathrm{points}(S) = \frac{|\{d \in D \setminus D_S : k(d) \in k(D_S)\}|}{|D \setminus D_S|}, \qquad
              \mathrm{keys}(S) = \frac{|k(D \setminus D_S) \cap k(D_S)|}{|k(D \setminus D_S)|}

    for sets of 25, 50, 100, ... rollouts, drawn in two ways: *rollouts* at random, so that the rest holds other
    rollouts of the same problems; or whole *problems* at random, as many as have that number of rollouts between them
    and no more, so that the rest is of other problems, as it is for a model that has to generalise.

    An interval is the central 95 % of ``draws`` small sets, the same ones for every key and for the control. It says
    how much depends on which rollouts are taken from this sample, not how far another sample would differ.

    The control does the same for as many random positions with an entropy of at most tau (all of them if there are
    fewer). It shows which share is covered only because the text of the sample repeats itself. Decisions with less
    coverage than the control are more varied than the rest of the text. A high coverage of decisions alone does not
    show that there are few decisions. ``candidates`` of a low-entropy position include a second token that hardly
    matters, so there the control is hard to cover.

    Args:
        rollouts: the large sample. scores: of the base model, of each of them, in order, with top-k, k >= 2.
        tau: nats. trained: (problem, sample) of the rollouts in a training set. seed: of the draws.

    Raises:
        AnalysisError: no decision points, too few problems or rollouts, or no draws.
    """
    problems = sorted({r.problem_id for r in rollouts})
    if len(problems) < 2:
        raise AnalysisError(f"rollouts: expected at least 2 problems, got {len(problems)}")
    if len(rollouts) <= SMALLEST:
        raise AnalysisError(f"rollouts: expected more than {SMALLEST}, got {len(rollouts)}")
    if draws < 1:
        raise AnalysisError(f"draws: expected at least 1, got {draws}")
    entropy = np.concatenate([s.entropy.numpy() for s in scores])
    above = np.flatnonzero(entropy > tau)
    if not above.size:
        raise AnalysisError(
            f"tau={tau:g}: no decision points: the largest entropy of the {entropy.size} tokens is "
            f"{entropy.max(initial=0):.3f} nats; give a lower --tau"
        )
    below = np.flatnonzero(entropy <= tau)
    low = np.sort(np.random.default_rng(seed).choice(below, min(above.size, below.size), replace=False))
    positions = _positions(rollouts, scores, problems)
    kinds = {False: _chosen(positions, above)} | ({True: _chosen(positions, low)} if low.size else {})

    n, p = len(rollouts), len(problems)
    sizes = [SMALLEST << i for i in range(n.bit_length()) if SMALLEST << i < n]
    cuts = {"rollouts": sizes, "problems": [size * p // n for size in sizes if size * p >= n]}
    curves = []
    for draw, units in (("rollouts", n), ("problems", p)):
        for control, chosen in kinds.items():
            unit = chosen.rollout if draw == "rollouts" else chosen.problem
            for key in KEYS:
                found = _drawn(chosen.keys[key], unit, units, np.array(cuts[draw]), draws, seed)
                shares = [
                    Share(cut, cut * n / units, _interval(points), _interval(keys))
                    for cut, points, keys in zip(cuts[draw], *found, strict=True)
                    if not np.isnan(points).all()
                ]
                curves.append(Curve(draw, key, control, shares))
    return Coverage(
        tau=tau,
        seed=seed,
        draws=draws,
        rollouts=n,
        problems=p,
        tokens=entropy.size,
        decisions=above.size,
        control=low.size,
        distinct={key: np.unique(kinds[False].keys[key]).size for key in KEYS},
        control_distinct={key: np.unique(kinds[True].keys[key]).size if low.size else 0 for key in KEYS},
        curves=curves,
        training=_training(rollouts, kinds, set(trained)),
    )


def _positions(rollouts: Sequence[Rollout], scores: Sequence[Scores], problems: list[str]) -> _Positions:
    """Every completion token of ``rollouts``."""
    lengths = [len(r.completion_ids) for r in rollouts]
    number = {problem_id: i for i, problem_id in enumerate(problems)}
    best = np.concatenate([s.topk_ids[:, :2].numpy() for s in scores])
    # The two tokens before completion token t; -1 stands before the first token of all.
    before = np.concatenate(
        [
            np.lib.stride_tricks.sliding_window_view([-1, -1, *r.ids][len(r.prompt_ids) : -1], 2)
            for r in rollouts
            if r.completion_ids
        ]
    )
    columns = {
        "context": np.column_stack([before, best[:, 0]]),
        "candidates": np.sort(best, axis=1),
        "token": best[:, :1],
    }
    return _Positions(
        rollout=np.repeat(np.arange(len(rollouts)), lengths),
        problem=np.repeat([number[r.problem_id] for r in rollouts], lengths),
        keys={key: np.unique(rows, axis=0, return_inverse=True)[1].ravel() for key, rows in columns.items()},
    )


def _chosen(positions: _Positions, which: np.ndarray) -> _Positions:
    keys = {key: numbers[which] for key, numbers in positions.keys.items()}
    return _Positions(positions.rollout[which], positions.problem[which], keys)


def _drawn(
    key: np.ndarray, unit: np.ndarray, units: int, cuts: np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shares covered, of points and of keys, each [cuts, draws]; NaN where the rest holds no point.

    The set of size c is the first c units of a random order. A key is new to the rest where its first unit in that
    order is not among them, and is in the rest where its last one is not.

    Args:
        key: [N] of each point. unit: [N] the rollout or problem that it is in, of 0 .. units - 1. cuts: sizes.
    """
    random = np.random.default_rng(seed)
    numbers, key, points_of_key = np.unique(key, return_inverse=True, return_counts=True)
    pairs = np.unique(key * units + unit)  # a key in a unit, once
    starts = np.searchsorted(pairs, np.arange(len(numbers)) * units)
    unit_of_pair = pairs % units
    points_of_unit = np.bincount(unit, minlength=units)
    points, keys = np.empty((2, len(cuts), draws))
    for n in range(draws):
        place = random.permutation(units)
        at = place[unit_of_pair]
        new = np.minimum.reduceat(at, starts) >= cuts[:, None]
        rest = np.maximum.reduceat(at, starts) >= cuts[:, None]
        with np.errstate(invalid="ignore"):
            points[:, n] = 1 - new @ points_of_key / ((place >= cuts[:, None]) @ points_of_unit)
            keys[:, n] = 1 - new.sum(1) / rest.sum(1)
    return points, keys


def _interval(shares: np.ndarray) -> Interval:
    low, high = np.nanquantile(shares, [0.025, 0.975])
    return Interval(float(np.nanmean(shares)), float(low), float(high))


def _training(
    rollouts: Sequence[Rollout], kinds: dict[bool, _Positions], trained: set[tuple[str, int]]
) -> Training | None:
    own = np.array([(r.problem_id, r.sample) in trained for r in rollouts])
    problems = {problem_id for problem_id, _ in trained}
    other = np.array([r.problem_id not in problems for r in rollouts])
    found: dict[bool, dict[str, tuple[float, float]]] = {False: {}, True: {}}
    for control, chosen in kinds.items():
        for key, numbers in chosen.keys.items():
            ours, theirs = numbers[own[chosen.rollout]], numbers[other[chosen.rollout]]
            if ours.size and theirs.size:
                points = np.isin(theirs, ours).mean()
                found[control][key] = float(points), float(np.isin(np.unique(theirs), ours).mean())
    if not found[False]:
        return None
    return Training(int(own.sum()), len(problems), int(other.sum()), found[False], found[True])


def cover_run(run: RunDirectory, tau: float | None = None, draws: int = 200) -> Coverage:
    """:func:`cover` of a run's rollouts, which are scored if they are not yet, and of its training set if it has one.

    Args:
        tau: nats; default: the run's own where its select stage is done, else the configured one.

    Raises:
        RunError: there are no rollouts, no tau, or one of the two stages was run with other settings.
        AnalysisError: as in :func:`cover`.
    """
    run.need("rollouts")
    selected = run.is_done("select")
    if tau is None:
        tau = run.tau() if selected else run.config.select.tau
    if tau is None:
        raise RunError("tau: not known before the select stage: run `rmx select` or give --tau")
    trained = {(s.problem_id, s.sample) for s in run.training_set()} if selected else set()
    return cover(run.rollouts(), run.base_scores(), tau, trained=trained, draws=draws, seed=run.config.seed)


def write(result: Coverage, out: Path, meta: dict[str, Any]) -> None:
    """``coverage.json``, with ``meta`` on top, and ``coverage.png``."""
    write_json(out / "coverage.json", {**meta, **asdict(result)})
    plot(result, out / "coverage.png")
    console.print(f"coverage: written {out / 'coverage.json'} and coverage.png", markup=False, soft_wrap=True)


def table(result: Coverage) -> Table:
    """Shares of the rest's decision points by draw and size; for whole problems also the control and distinct keys."""
    title = f"{result.decisions:,} of {result.tokens:,} tokens above {result.tau:.3g} nats"
    caption = (
        f"% of the rest covered [95 % of {result.draws} draws]; {result.rollouts:,} rollouts of {result.problems} "
        f"problems; control: {result.control:,} tokens of lower entropy"
    )
    grid = new_table(("rollouts", *KEYS), title=title, caption=caption, padding=(0, 0, 0, 1))
    for label, draw, control, field in (
        ("rollouts at random", "rollouts", False, "points"),
        ("problems at random", "problems", False, "points"),
        ("- control", "problems", True, "points"),
        ("- distinct keys", "problems", False, "keys"),
    ):
        rows: dict[float, list[str]] = {}
        for curve in result.curves:
            if (curve.draw, curve.control) == (draw, control):
                for share in curve.shares:
                    i: Interval = getattr(share, field)
                    cell = f"{100 * i.mean:.1f} [{100 * i.low:.1f}, {100 * i.high:.1f}]"
                    rows.setdefault(share.rollouts, []).append(cell)
        if rows:
            grid.add_section()
            grid.add_row(f"[bold]{label}[/]")
        for size, cells in rows.items():
            grid.add_row(f"  {size:.0f}", *cells)
    if (t := result.training) is not None:
        grid.add_section()
        grid.add_row("[bold]training set[/]")
        for label, shares, n in (
            (f"  {t.rollouts}", t.decisions, 0),
            ("  - control", t.control, 0),
            ("  - distinct keys", t.decisions, 1),
        ):
            if shares:
                grid.add_row(label, *(f"{100 * shares[key][n]:.1f}" for key in KEYS))
    return grid


def plot(result: Coverage, path: Path) -> None:
    """PNG of a panel for each key: points covered (top) and distinct keys covered (bottom) by number of rollouts."""
    figure = new_figure(15, 8.4)
    grid = figure.subplots(2, len(KEYS), sharex=True, sharey=True, squeeze=False)
    for column, key in enumerate(KEYS):
        for row, field in enumerate(("points", "keys")):
            _plot_shares(grid[row, column], result, key, field)
        grid[0, column].set(title=f"{key}: {result.distinct[key]:,} kinds of {result.decisions:,} decision points")
        grid[1, column].set(xlabel="rollouts in the small set")
    grid[0, 0].set(ylabel="share of the rest's decision points covered", ylim=(0, 1.02))
    grid[1, 0].set(ylabel="share of the rest's distinct keys covered")
    sizes = [share.units for share in result.curves[0].shares]
    grid[0, 0].set_xticks(sizes, [str(size) for size in sizes])
    grid[0, 0].minorticks_off()
    grid[0, -1].legend(title=f"bands: 95 % of {result.draws} draws", frameon=False, loc="lower right")
    save_png(figure, path)


def _plot_shares(axes: Axes, result: Coverage, key: str, field: str) -> None:
    axes.set_xscale("log")
    for curve in result.curves:
        if curve.key != key or not curve.shares:
            continue
        colour = BASE if curve.draw == "rollouts" else TUNED
        sizes = [share.rollouts for share in curve.shares]
        shares: list[Interval] = [getattr(share, field) for share in curve.shares]
        what = "low entropy (control)" if curve.control else "decision points"
        style = "--" if curve.control else "-"
        label = f"{what}, {curve.draw} at random"
        axes.plot(sizes, [s.mean for s in shares], style, color=colour, marker=".", label=label)
        if not curve.control:
            axes.fill_between(sizes, [s.low for s in shares], [s.high for s in shares], color=colour, alpha=0.2)
    if (t := result.training) is not None:
        n = ("points", "keys").index(field)
        at, label = [t.rollouts], "the run's training set, other problems"
        axes.scatter(at, [t.decisions[key][n]], s=120, c=GATE, marker="*", edgecolors="black", zorder=3, label=label)
