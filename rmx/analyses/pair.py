"""A base model beside another one of the same tokenizer."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rmx.config import ModelConfig
from rmx.errors import AnalysisError
from rmx.models import lora, model
from rmx.models.lora_layers import Adapter
from rmx.models.model import CausalLM, ModelError


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
            yield Pair(replace(base, adapted=False), base, lora.adapter_mark(path), adapter)
        return
    said = {"name": str(other), "gguf_file": None, "revision": None, "trust_remote_code": trust}
    theirs = settings.model_copy(update=said)
    try:
        second = model.load(theirs)
    except ModelError as fault:
        hint = "; --trust-other-code lets it run its own code" if "trust_remote_code" in str(fault) else ""
        raise AnalysisError(f"{other}: neither a directory with an adapter nor a model: {fault}{hint}") from fault
    if second.tokenizer.get_vocab() != base.tokenizer.get_vocab():
        raise AnalysisError(f"{other}: its tokenizer differs from the base's, so the same token ids mean other text")
    yield Pair(base, second, f"{other} {model.fingerprint(theirs)}", None)
