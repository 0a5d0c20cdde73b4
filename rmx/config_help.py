"""The JSON schema for editors and a first configuration, with the comments of :mod:`rmx.config` as descriptions."""

import ast
import functools
import inspect
import io
import json
import tokenize
from collections.abc import Iterator
from typing import Any

import yaml

from rmx import config
from rmx.config import Config, ProblemSource

# What a first configuration shows, beside the model and a source of problems; the rest has the published value.
SHOWN = {
    "prompt": ("style",),
    "rollouts": ("samples", "temperature", "max_new_tokens", "batch_size"),
    "verify": ("reward",),
    "select": ("max_problems", "tau"),
    "lora": ("r", "alpha", "targets", "first_layer"),
    "train": ("epochs", "sequences_per_step", "learning_rate", "warmup_steps", "anchor_weight", "token_budget"),
    "evaluate": ("samples",),
}
FIRST = {("select", "tau"): 1.4}  # the published gate, where no other is given
WIDTH = 46  # columns of a setting, before its comment


@functools.cache
def meanings() -> dict[str, dict[str, str]]:
    """Comments by class and field: those on the lines above a field and on its own lines."""
    source = inspect.getsource(config)
    comments = {
        token.start[0]: (token.start[1], token.string.lstrip("# "))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines = source.splitlines()
    found: dict[str, dict[str, str]] = {}
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for owner, field in [(cls, field) for cls in classes for field in cls.body]:
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        first = field.lineno - 1
        while first in comments and lines[first - 1].lstrip().startswith("#"):
            first -= 1
        own = range(first + 1, (field.end_lineno or field.lineno) + 1)
        if said := [comments[number][1] for number in own if number in comments]:
            found.setdefault(owner.name, {})[field.target.id] = " ".join(said)
    return found


def schema() -> dict[str, Any]:
    """JSON schema of the configuration, with the meaning of each setting."""
    made: dict[str, Any] = Config.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    for name, part in (("Config", made), *made["$defs"].items()):
        for field, described in part.get("properties", {}).items():
            if meaning := _meaning(getattr(config, name), field):
                described["description"] = meaning
    return made


def _meaning(section: type, field: str) -> str:
    for cls in section.__mro__:  # evaluate and rollouts share the settings of Sampling
        if field in meanings().get(cls.__name__, {}):
            return meanings()[cls.__name__][field]
    return ""


def first_config(run_dir: str, model: str, source: ProblemSource) -> str:
    """A commented configuration with these values, and the most often changed settings with their defaults."""
    lines = [
        "# Settings not in this file have the published values (arXiv 2605.06241); `rmx schema` prints all settings.",
        *_line(0, "run_dir", run_dir, "directory for all files of the run; relative to this file"),
        *_line(0, "seed", 0, _meaning(Config, "seed")),
        "model:",
        *_line(2, "name", model, _meaning(config.ModelConfig, "name")),
        *_line(2, "dtype", "auto", _meaning(config.ModelConfig, "dtype")),
        "problems:",
        *_line(2, "train_count", 200, "number of problems to sample completions for"),
        *_line(2, "evaluate_count", 200, "number of held-out problems, which measure the gain"),
        "  sources:",
        f"    - {_flow(source.model_dump(exclude_none=True, exclude_defaults=True))}",
    ]
    for section, names in SHOWN.items():
        own = Config.model_fields[section]
        kind: Any = own.annotation
        values = {name: FIRST.get((section, name), kind.model_fields[name].get_default()) for name in names}
        lines.append(f"{section}:" if any(value is not None for value in values.values()) else f"# {section}:")
        for name, value in values.items():
            lines += _line(2, name, value, _meaning(kind, name))
    return "\n".join(lines) + "\n"


def _line(indent: int, name: str, value: Any, comment: str) -> Iterator[str]:
    """A line of YAML; a setting without a value becomes a comment."""
    text = f"{' ' * indent}{'# ' if value is None else ''}{name}: {'' if value is None else _flow(value)}".rstrip()
    yield f"{text:<{WIDTH}} # {comment}" if comment else text


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("\n...").strip()


def schema_text() -> str:
    return json.dumps(schema(), indent=2)
