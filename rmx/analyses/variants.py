"""The variants of a training that ``rmx ablate`` makes: each changes one thing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

OWN = "own"  # the run's settings as they are
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)  # of the tokens, of the curve
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
NO_GATE: dict[str, Any] = {"tau": None, "quantile": None, "budget": None, "gate": "entropy"}


@dataclass(frozen=True)
class Variant:
    changes: dict[str, dict[str, Any]]  # section -> settings
    against: str = OWN  # the variant that it is compared with


def variants(budget: float, quantile: float, epochs: float = 1.0) -> dict[str, Variant]:
    """By name; ``budget`` and ``quantile`` as in the select section.

    ``epochs``: of ``rft``, supervised training on all tokens of the right rollouts: such that it has as many steps as
    the run. Those that end with ``-mass`` have, in each rollout, the gradient mass of the variant ``budget``:
    :func:`rmx.training.select.gradient_mass`.
    """
    share = {**NO_GATE, "budget": budget}
    imitation: dict[str, dict[str, Any]] = {
        "select": {"gate": "all", "right_only": True},
        "train": {"anchor_weight": 0.0, "epochs": epochs},
    }
    return {
        OWN: Variant({}),
        "quantile": Variant({"select": {**NO_GATE, "quantile": quantile}}),
        "budget": Variant({"select": share}),
        "random": Variant({"select": {**share, "gate": "random"}}, "budget"),
        "lowest": Variant({"select": {**share, "gate": "lowest"}}, "budget"),
        "all": Variant({"select": {"gate": "all"}}),
        **{
            f"{gate}-mass": Variant({"select": {**share, "gate": gate, "matched_gradient": True}}, "budget")
            for gate in ("random", "lowest", "all")
        },
        "shuffled": Variant({"select": {"shuffle_advantages": True}}),
        "positives": Variant({"train": {"negative_weight": 0.0}}),
        "rft": Variant(imitation),
        "r8-o": Variant({"lora": {"r": 8, "alpha": 16.0, "targets": ["o_proj"], "start": None}}),
        "r32-qkvo": Variant({"lora": {"r": 32, "alpha": 64.0, "targets": QKVO, "start": None}}),
    }


def curve_variants(shares: Sequence[float]) -> dict[str, Variant]:
    """The entropy gate and the random one at each share of the tokens, named by percent, and ``all``."""
    found = {}
    for share in sorted(set(shares)):
        own, settings = f"entropy-{100 * share:g}", {**NO_GATE, "budget": share}
        found[own] = Variant({"select": settings}, "all")
        found[f"random-{100 * share:g}"] = Variant({"select": {**settings, "gate": "random"}}, own)
    return {**found, "all": Variant({"select": {"gate": "all"}})}
