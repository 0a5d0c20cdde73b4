"""What the pages of rmx share: their templates, how numbers are written, and what of a setting may be mailed."""

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

import rmx_kernels
from rmx.artefacts import replacing
from rmx.records import Interval
from rmx.reports.report import COLOURS


def _source(name: str) -> str:
    return resources.files("rmx.reports").joinpath(name).read_text(encoding="utf-8")


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder, in which everything is escaped, and write it whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = {"version": rmx_kernels.__version__, "colours": COLOURS}
    text = environment.get_template(template).render(**known, **values)
    with replacing(path) as aside:  # a lone surrogate in a problem's text has no UTF-8
        aside.write_text(text, encoding="utf-8", errors="replace")


def public(value: Any) -> Any:
    """The same, with the last part alone of paths that do not start at the file's directory."""
    if isinstance(value, dict):
        return {key: public(own) for key, own in value.items()}
    if isinstance(value, list):
        return [public(own) for own in value]
    outside = (
        isinstance(value, str) and "\n" not in value and (value.startswith(("/", "~")) or ".." in Path(value).parts)
    )
    return Path(value).name if outside else value


def signed(value: float, spec: str = ".3f") -> str:
    return f"{value:+{spec}}".replace("-", "−")


def bounds(interval: Interval) -> str:
    return f"[{interval.low:.3f}, {interval.high:.3f}]"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
