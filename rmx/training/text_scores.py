"""Scores of given text by a model, with enough of its most probable tokens for a comparison."""

from collections.abc import Sequence
from pathlib import Path

from rmx.config import ScoreConfig
from rmx.errors import AnalysisError
from rmx.models.model import CausalLM
from rmx.progress import progress
from rmx.records import Rollout, Scores
from rmx.training.score import Keep, ScoreStore

TOP = 5  # of the base's most probable tokens: where the other's is among them, it was only put first
RANKS = 20  # of them that are kept


def score_text(
    lm: CausalLM, name: str, mark: str, rollouts: Sequence[Rollout], path: Path, settings: ScoreConfig
) -> list[Scores]:
    """Scores of ``rollouts`` with at least the RANKS most probable tokens, kept in ``path``.

    Killed and started again, it goes on at the shard under way; what is there of the same model and text stays.

    Raises:
        AnalysisError: there is no text, or it is of another model.
    """
    if not any(r.completion_ids for r in rollouts):
        raise AnalysisError("the rollouts contain no completion tokens")
    if (highest := max(max(r.ids) for r in rollouts)) >= lm.weight.shape[0]:
        raise AnalysisError(f"token id {highest} is not in this vocabulary: the rollouts are from another model")
    used = settings.model_copy(update={"top_k": max(min(RANKS, lm.weight.shape[0]), settings.top_k)})
    origin = {
        "model": mark,
        "tokenizer": lm.vocabulary,
        "dtype": str(lm.weight.dtype),
        "score": {key: getattr(used, key) for key in ("top_k", "token_budget")},
        "packing": lm.packing,
    }
    store = ScoreStore(path, rollouts, used.shard_tokens, origin)
    store.discard_others()
    with progress(name, len(rollouts), "rollouts") as update:
        store.fill(lm, used, Keep(), on_done=lambda n, _: update(n, ""))
    return store.scores()
