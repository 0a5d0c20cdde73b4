"""`make docs` writes site/: the reference from the docstrings, and the Markdown files here and in docs/ as pages.

The pages need no network: equations become MathML, which browsers draw themselves. A warning of pdoc is an error.
"""

import re
import shutil
import types
import warnings
from pathlib import Path

import jinja2
import pdoc.doc
import pdoc.extract
import pdoc.render
from latex2mathml.converter import convert
from pdoc.render_helpers import to_markdown_with_context

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
PACKAGES = ("rmx_kernels", "rmx")
PAGES = (
    *sorted(ROOT.glob("docs/*.md")),
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
)


def displayed(equation: re.Match[str]) -> str:
    """$$...$$ in Markdown; an empty line begins the next equation."""
    return "\n\n".join(convert(part, display="block") for part in re.split(r"\n\s*\n", equation[1]))


@jinja2.pass_context
def to_markdown(context: jinja2.runtime.Context, docstring: str) -> str:
    """pdoc's own filter, and its equations as MathML before Markdown can read their backslashes and braces."""
    markdown = re.sub(r"\$\$(.+?)\$\$", displayed, to_markdown_with_context(context, docstring), flags=re.DOTALL)
    return re.sub(r"\\\\\( (.+?) \\\\\)", lambda equation: convert(equation[1]), markdown)


def page(path: Path) -> pdoc.doc.Module:
    """A Markdown file as the docstring of a module without members."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    module = types.ModuleType(name, re.sub(r"(\]\([\w./-]+)\.md\)", r"\1.html)", path.read_text()))
    module.__docformat__ = "markdown"
    described = pdoc.doc.Module(module)
    described.source_file = path  # to which the paths of its pictures are relative
    return described


def main() -> None:
    pdoc.render.configure(docformat="google", template_directory=ROOT / "docs")  # custom.css
    pdoc.render.env.filters["to_markdown"] = to_markdown
    described = {module.fullname: module for module in map(page, PAGES)}
    described |= {name: pdoc.doc.Module.from_name(name) for name in pdoc.extract.walk_specs(PACKAGES)}
    shutil.rmtree(SITE, ignore_errors=True)
    for name, module in described.items():
        path = SITE / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(module, described))
    shutil.copytree(ROOT / "docs" / "notebooks", SITE / "docs" / "notebooks")
    listed = {name: module for name, module in described.items() if name.split(".")[0] not in PACKAGES}
    listed |= {name: described[name] for name in PACKAGES}
    (SITE / "index.html").write_text(pdoc.render.html_index(listed))
    (SITE / "search.js").write_text(pdoc.render.search_index(described))
    print(f"{SITE / 'index.html'}: {len(described)} pages")


if __name__ == "__main__":
    warnings.simplefilter("error", UserWarning)  # of which pdoc's are
    main()
