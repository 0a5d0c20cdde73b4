"""The model card of an adapter, with the numbers of its run, and the files that go to the hub."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined

from rmx.artefacts import replacing
from rmx.config import Config
from rmx.errors import RmxError
from rmx.records import Evaluation
from rmx.reports.report import verdict

FILES = ("adapter_config.json", "adapter_model.safetensors", "rmx.json")


class PushError(RmxError):
    """The hub did not take the files."""


@dataclass(frozen=True)
class Told:
    """What the card says of a run."""

    config: Config
    evaluation: Evaluation
    tau: float
    steps: int
    repo: str  # on the hub


def model_card(told: Told) -> str:
    """README.md of the adapter's repository: metadata, results, settings, how to use it."""
    return f"---\n{yaml.safe_dump(_metadata(told), sort_keys=False, allow_unicode=True)}---\n\n{_body(told)}"


def _metadata(told: Told) -> dict[str, Any]:
    base, found = told.config.model.name, told.evaluation
    metric = {"type": "pass@1", "name": "pass@1", "value": round(found.tuned.pass_at_1.mean, 4)}
    results = {
        "task": {"type": "text-generation", "name": "held-out problems of the run"},
        "dataset": {"type": "problems", "name": ", ".join(_sources(told.config))},
        "metrics": [metric],
    }
    return {
        **({} if _local(base) else {"base_model": base}),
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "reasonmaxxer", "rmx"],
        "model-index": [{"name": told.repo.rpartition("/")[2], "results": [results]}],
    }


def _body(told: Told) -> str:
    config, found = told.config, told.evaluation
    rows = [("pass@1", found.base.pass_at_1, found.tuned.pass_at_1)]
    if k := max((k for k in found.base.pass_at_k.keys() & found.tuned.pass_at_k.keys() if k > 1), default=None):
        rows += [(f"pass@{k}", found.base.pass_at_k[k], found.tuned.pass_at_k[k])]
        rows += [(f"maj@{k}", found.base.maj_at_k[k], found.tuned.maj_at_k[k])]
    source = resources.files("rmx.reports").joinpath("card.md.j2").read_text(encoding="utf-8")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(source)
    # a path of this machine is nobody else's base, and nobody's business
    base = "BASE" if _local(config.model.name) else config.model.name
    return template.render(
        name=told.repo.rpartition("/")[2],
        base=base,
        local=_local(config.model.name),
        repo=told.repo,
        tau=told.tau,
        steps=told.steps,
        rows=rows,
        found=found,
        config=config,
        verdict=verdict(found),
        sources=", ".join(_sources(config)),
    )


def _local(name: str) -> bool:
    return name.startswith(("package:", ".", "/", "~")) or Path(name).expanduser().exists()


def _sources(config: Config) -> list[str]:
    return [str(s.dataset or s.task or Path(s.jsonl or "").name) for s in config.problems.sources]


def staged(told: Told, adapter: Path, picture: Path, folder: Path) -> list[Path]:
    """Copy what goes to the hub into ``folder``: the adapter, its card and the picture of the run."""
    with replacing(folder) as aside:
        aside.mkdir(parents=True)
        for path in [*(adapter / name for name in FILES), picture]:
            if path.exists():
                shutil.copyfile(path, aside / path.name)
        (aside / "README.md").write_text(model_card(told), encoding="utf-8")
    return sorted(folder.iterdir())


def upload(files: Sequence[Path], repo: str, *, private: bool) -> str:
    """Put the folder of ``files`` into the repository, made if it is not there; returns its address.

    Raises:
        PushError: no token, no network, or the hub refused.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    hub = HfApi()
    try:
        address = str(hub.create_repo(repo, private=private, exist_ok=True))
        hub.upload_folder(repo_id=repo, folder_path=files[0].parent, commit_message="Adapter trained by rmx")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as fault:
        first = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise PushError(f"push: {repo}: {first}; `hf auth login` stores a token") from fault
    return address
