"""One spelling of what LaTeX, Unicode and habit write in many ways."""

import re

from rmx.grading.numerals import plain

EDGE = " \n*$`\"'"
# docs/answers.md says which rules stand on this.
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"–", "-"),
        (r"÷", r"\\div "),
        (r"[×]", r"\\times "),
        (r"[·⋅]", r"\\cdot "),
        (r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"∪", r"\\cup "),
        (r"∅|\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"±", r"\\pm "),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", "°"),
        (r"√\s*(\w+|\{[^{}]*\})", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\{\{([^{}]*)\}\}", r"\\sqrt{\1}"),
        (r"\\(?:left|right)(?![a-zA-Z])\.?", ""),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"(?<!\\)\\[,;:!]|\\displaystyle(?![a-zA-Z])|\\?\$|(?<!\\)\\[()\[\]]", ""),
        (r"\*\*", "^"),
        (r"(?<!\\)\\ |~|\\q?quad(?![a-zA-Z])", " "),
        (r"\{([,:])\}", r"\1"),
        (r"^[a-zA-Z]\s*\\in(?![a-zA-Z])|^\s*(?:\\approx(?![a-zA-Z])|≈)|(?:\\\\)+$", ""),
    ]
]
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol)\s*\{([^{}]*)\}")
MONEY = re.compile(r"^\s*([-+]?)\s*(?:(?:US)?\\?\$|(?P<other>[€£¥₹]))\s*([-+]?)\s*(?=[\d.])([^$]*)$")


def spelled(text: str) -> str:
    text = plain(text)
    text = MONEY.sub(lambda m: f"{m[1] or m[3]}{m[4].strip()} {m['other'] or 'dollars'}", text).strip(EDGE)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return _trimmed(text)


def _trimmed(text: str) -> str:
    return text.lstrip(" \n,;:\"'`*").rstrip(" \n.,;:\"'`*")  # .5 keeps its point


def unwrapped(text: str) -> str:
    """Without \\text{} and its kin around words."""
    while (inner := TEXT.sub(r" \1 ", text)) != text:
        text = inner
    text = re.sub(r"^\(([\dA-F]+)\)\s*(?=_)", r"\1", _trimmed(re.sub(r"\s+(?=_)|(?<=\s)\s+", "", text)))
    return re.sub(r"^\(?([\dA-Fa-f]+)\)?\s?\(?\s?(?:in )?base (\w+)\)?$", r"\1_{\2}", text)
