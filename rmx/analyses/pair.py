"""A base model beside another one of the same tokenizer, and what each says of given text."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rmx import lora, model
from rmx.config import ModelConfig, ScoreConfig
from rmx.errors import RmxError
from rmx.lora_layers import Adapter
from rmx.model import CausalLM, ModelError
from rmx.progress import progress
from rmx.records import Rollout, Scores
from rmx.score import Keep, ScoreStore

TOP = 5  # of the base's most probable tokens: where the other's is among them, it was only put first


class AnalysisError(RmxError):
    """The two models, or the text, do not go together."""


@dataclass(frozen=True)
class Pair:
    """Two models; with an adapter they share their weights, and :meth:`as_base` switches it off."""

    base: CausalLM
    other: CausalLM
    mark: str  # tells one other model from the next
    adapter: Adapter | None

    def as_base(self) -> AbstractContextManager[None]:
        """Inside, ``base`` is the base model; outside, ``other`` is the other one."""
        return nullcontext() if self.adapter is None else self.adapter.off()


@contextmanager
def paired(
    base: CausalLM, other: Path | str, settings: ModelConfig, prompt: str, *, trust: bool = False
) -> Iterator[Pair]:
    """``base`` and ``other``, which is a directory with an adapter of ``base``, or the name of a model.

    Args:
        settings: of the base; the other model is loaded by them too, but for trust in its code.
        prompt: the fingerprint of the prompts in use. trust: run code that comes with the other model.

    Raises:
        AnalysisError: there is no such model, or its tokenizer differs. AdapterError: the adapter does not fit the
            base's layers, or learned from other prompts.
    """
    path = Path(other).expanduser()
    if (path / lora.CONFIG).is_file():
        with lora.worn(base.model, path, prompt) as adapter:
            yield Pair(base, base, lora.adapter_mark(path), adapter)
        return
    said = {"name": str(other), "gguf_file": None, "revision": None, "trust_remote_code": trust}
    theirs = settings.model_copy(update=said)
    try:
        second = model.load(theirs)
    except ModelError as fault:
        hint = "; --trust-other-code lets it run its own code" if "trust_remote_code" in str(fault) else ""
        raise AnalysisError(f"{other}: neither a directory with an adapter nor a model: {fault}{hint}") from fault
    if second.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise AnalysisError(f"{other}: has another tokenizer than the base: its token ids mean other text")
    yield Pair(base, second, f"{other} {model.fingerprint(theirs)}", None)


def score_text(
    lm: CausalLM, name: str, mark: str, rollouts: Sequence[Rollout], path: Path, settings: ScoreConfig
) -> list[Scores]:
    """Scores of ``rollouts`` with at least the TOP most probable tokens, kept in ``path``.

    Killed and started again, it goes on at the shard under way; what is there of the same model and text stays.

    Raises:
        AnalysisError: there is no text, or it is of another model.
    """
    if not any(r.completion_ids for r in rollouts):
        raise AnalysisError("the rollouts hold no completion tokens")
    if (highest := max(max(r.ids) for r in rollouts)) >= lm.weight.shape[0]:
        raise AnalysisError(f"token id {highest}: the rollouts are of another model")
    used = settings.model_copy(update={"top_k": max(TOP, settings.top_k)})
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
