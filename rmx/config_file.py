"""The configuration of a run from YAML.

Relative paths in the file start at the directory of the file, those given with ``--set`` at the current directory.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml

from rmx.artefacts import describe
from rmx.config import Config, ConfigError

LARGEST = 100_000  # values of a configuration


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number, as YAML 1.2 does (YAML 1.1: a string); a duplicate key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Read YAML and apply ``key.path=value`` overrides (values are YAML too).

    Relative paths start at the directory of the file, those in overrides at the current one.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type; the message names file and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror}") from fault
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path}: not YAML: {fault}") from fault
    tree = _yaml(text, f"{path}: not YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(tree).__name__}")
    for override in overrides or []:
        _override(tree, override)
    _start_here(tree, [override.partition("=")[0] for override in overrides or []], path.parent)
    try:
        return Config.model_validate(tree).at(path.parent)
    except pydantic.ValidationError as fault:
        raise ConfigError(f"{path}: {describe(fault, Config)}") from fault


def _yaml(text: str, fault_is: str) -> Any:
    """Parse YAML of bounded size. Raises ConfigError; its message begins with ``fault_is``."""
    try:
        value = yaml.load(text, _Loader)
        _check_size(value)
    except RecursionError as fault:
        raise ConfigError(f"{fault_is}: nested too deeply") from fault
    except (yaml.YAMLError, ValueError) as fault:  # ValueError: a number or a date that Python cannot read
        raise ConfigError(f"{fault_is}: {fault}") from fault
    return value


def _check_size(value: Any) -> None:
    """Refuse values that aliases make endless or huge, and text that is not valid Unicode."""
    sizes: dict[int, int] = {}  # of lists and mappings as they are written out, by identity; 0 while inside

    def size(node: Any) -> int:
        if isinstance(node, str):
            node.encode()  # half of a surrogate pair is a UnicodeEncodeError
        if not isinstance(node, dict | list):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 0
            inner = [*node, *node.values()] if isinstance(node, dict) else node
            sizes[id(node)] = 1 + sum(map(size, inner))
        elif not sizes[id(node)]:
            raise ValueError("an alias is inside the value that it stands for")
        if sizes[id(node)] > LARGEST:
            raise ValueError(f"more than {LARGEST:,} values, counting what aliases stand for")
        return sizes[id(node)]

    size(value)


def _start_here(tree: dict[str, Any], keys: list[str], folder: Path) -> None:
    """Resolve relative paths from ``--set`` (under ``keys``) against the current directory."""
    if folder.resolve() == Path.cwd():
        return  # they do, and stay as they are written
    for node, name, slot in _path_slots(tree):
        value = node.get(name)
        if not isinstance(value, str) or not any(f"{slot}.".startswith(f"{key}.") for key in keys):
            continue
        on_hub = name in ("name", "dataset") and not value.startswith(".") and not Path(value).exists()
        if not on_hub:
            node[name] = os.path.abspath(Path(value).expanduser())


def _path_slots(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (section, its key, the full key) for each setting that may be a path."""
    yield tree, "run_dir", "run_dir"
    if isinstance(model := tree.get("model"), dict):
        yield model, "name", "model.name"
    if isinstance(lora := tree.get("lora"), dict):
        yield lora, "start", "lora.start"
    sources = problems.get("sources") if isinstance(problems := tree.get("problems"), dict) else None
    for number, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            yield from ((source, name, f"problems.sources.{number}.{name}") for name in ("jsonl", "dataset"))


def _override(tree: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text}: expected key.path=value")
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            node = node.setdefault(parent, {})
        else:
            raise ConfigError(f"--set {text}: {parent!r} is not a section")
    if not isinstance(node, dict):
        raise ConfigError(f"--set {text}: {last!r} is not inside a section")
    node[last] = _yaml(value, f"--set {text}: not a YAML value")
