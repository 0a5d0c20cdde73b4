"""Answers: what a completion says, and whether it is the same as the truth. Workers import this, so it needs no torch.

docs/answers.md has the rules, and what math-verify alone makes of the table that they are tested on.
"""

import calendar
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

NUMERIC = r"(?:(?<![\d)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?%?"
NUMBER = re.compile(rf"\b\d+(?::\d+)+(?:\s?[ap]\.?m\b)?|{NUMERIC}", re.IGNORECASE)  # 3:30 pm and 3:4 are one answer
BRACE = re.compile(r"(\\(?:boxed|fbox)\s*)\{|(?:\\\\)+(?=[{}])|\\[{}]|[{}]")  # a backslash before a brace makes it text
BOX_JOINT = re.compile(r"[\s$]*(?:[,;]|(?:,\s*)?(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$]*(?:[a-zA-Z]\s*=\s*)?")
HASHES = re.compile(rf"^\s*####\s*({NUMERIC})[ .]*$", re.MULTILINE)  # GSM8K; a heading of Markdown holds words
BOLD = re.compile(rf"(?<=\S )\*\*({NUMERIC})(?: [a-zA-Z]+)?\*\*")  # not at the start of a line, where steps are counted
# The lookahead leaves the rest of the line to be searched: the last phrase of a line counts, not the first.
PHRASE = re.compile(
    r"\b(?:answer|correct (?:option|choice))\b[^.:=\n]{0,80}?(?:\bis\b|:|=)[:\s]*(?:(?:\\\[|\$\$)\s*)?(?=(.+))",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"[.!?](?:\s|$)|,?\s(?:because|since|but)\b")
INLINE = re.compile(r"\$(?=\S)([^$\n]*[^$\s])\$(?!\d)|\\\((.+?)\\\)")
FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|sqrt|pi|infinity|inf"
EXPRESSION = re.compile(
    rf"(?:[-+*/^=(),\[\]{{}}<>|!√π∞×·−°²³\d.\s]|(?<![a-zA-Z])(?:[a-zA-Z]|{FUNCTIONS}|and|or)(?![a-zA-Z]))+"
)
ALONE = re.compile(r"\(?[a-zA-Z]\)?|[a-zA-Z]\(.*\)")  # x or f(x), left of an equals sign
CHOICE = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|([A-J])(?:[.:),]|\s*$))", re.IGNORECASE)
YES_NO = re.compile(r"(?:yes|no|true|false)\b(?=\s*(?:[,;.*]|$))", re.IGNORECASE)
EDGE = " \n*$`\"'"


def extract_answer(text: str) -> str | None:
    """The last box, else "#### 42", else what follows the last "answer is", else the last number; None without any."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    if marked := HASHES.findall(text):
        return _bare(marked[-1])
    said = [SENTENCE_END.split(phrase)[0] for phrase in reversed(PHRASE.findall(text))]
    for sentence in said:
        if (found := _stated(sentence)) is not None:
            return found
    if words := said[0].strip(EDGE) if said else "":
        return words
    whole = text.strip(EDGE + ".")
    if "\n" not in whole and ((found := _expression(whole)) or CHOICE.fullmatch(whole)):
        return found or whole
    if bold := BOLD.findall(text):
        return _bare(bold[-1])
    return _last_number(text) or (whole if whole and not re.search(r"\s", whole) else None)


def _stated(sentence: str) -> str | None:
    """The answer in what follows the phrase; None where there are only words."""
    if spans := INLINE.findall(sentence):
        whole = re.fullmatch(r"(?:[\s,.*]|and|or)*", INLINE.sub("", sentence)) is not None
        return ", ".join(a or b for a, b in spans) if whole else spans[-1][0] or spans[-1][1]
    words = re.sub(r"^[Aa]n? (?=[\d$])", "", sentence.strip(EDGE))
    if "\\" in words:
        return words.removesuffix("\\]").strip(EDGE)
    if (found := _expression(words)) is not None:
        return found
    if (choice := CHOICE.match(words)) or (choice := YES_NO.match(words)):
        return choice[0].strip(" .:,")
    if money := re.match(rf"\s*({NUMERIC}) (?:for|per|in|to|each|a)\b", sentence) if "$" in sentence else None:
        return _bare(money[1])
    return _last_number(sentence)


def _expression(words: str) -> str | None:
    """The words where they are one formula that a number alone would not stand for, without "x =" before it."""
    product = re.sub(r"(?<=\d)\s*[x×]\s*(?=\d)", " * ", words)
    left, _, right = product.rpartition("=")
    if right and (not re.search("[a-zA-Z]", left) or ALONE.fullmatch(left.strip())):
        product = right.strip()
    if not EXPRESSION.fullmatch(product) or re.fullmatch(rf"[-+*/=<>.\d\s]*|{NUMERIC}", product):
        return None
    return product.strip()


def _bare(number: str) -> str:
    return number.replace("$", "").replace(",", "")


def _last_number(text: str) -> str | None:
    numbers = NUMBER.findall(text)
    return _bare(numbers[-1]) if numbers else None


def _last_boxed(text: str) -> str | None:
    """What the last box holds; boxes joined by a comma, "and" or "or" are one list; "" where the last is cut off."""
    boxes: list[list[int]] = []  # [begin, end] in the order of their opening; end 0 while open
    opened: list[list[int]] = []
    for token in BRACE.finditer(text):
        if token[1] or token[0] == "{":
            opened.append([token.end(), 0])
            boxes += opened[-1:] if token[1] else []
        elif token[0] == "}" and opened:
            opened.pop()[1] = token.start()
    if not boxes or not boxes[-1][1]:
        return "" if boxes else None
    answers: list[str] = []
    last = 0
    for begin, end in boxes:
        if not end:
            answers = []
        elif begin < last:  # a box in a box
            answers[-1] = text[begin:end]
        else:
            joint = BOX_JOINT.fullmatch(text, last, text.rindex("\\", 0, begin)) if answers else None
            answers = [*(answers if joint else []), text[begin:end]]
            last = end + 1
    return ", ".join(answers)


# What LaTeX, Unicode and habit write in many ways, in one way. docs/answers.md says which rules stand on this.
SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[−–]", "-"),
        (r"[×]", r"\\times "),
        (r"[·⋅]", r"\\cdot "),
        (r"π|(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"∞", r"\\infty "),
        (r"∪", r"\\cup "),
        (r"∅|\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"≤", r"\\le "),
        (r"≥", r"\\ge "),
        (r"±", r"\\pm "),
        (r"²", "^2"),
        (r"³", "^3"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![a-zA-Z])", "°"),
        (r"√\s*(\w+|\{[^{}]*\})", r"\\sqrt{\1}"),
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\\sqrt\{\{([^{}]*)\}\}", r"\\sqrt{\1}"),
        (r"\\(?:left|right)(?![a-zA-Z])\.?", ""),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"^\\\$\s*([\d.,{}]+)$", r"\1 dollars"),
        (r"(?<!\\)\\[,;:!]|\\displaystyle(?![a-zA-Z])|\\?\$|(?<!\\)\\[()\[\]]", ""),
        (r"\*\*", "^"),
        (r"(?<!\\)\\ |~|\\q?quad(?![a-zA-Z])", " "),
        (r"\{([,:])\}", r"\1"),
        (r"^[a-zA-Z]\s*\\in(?![a-zA-Z])|^\s*(?:\\approx(?![a-zA-Z])|≈)|(?:\\\\)+$", ""),
        (r"^([-+]?)10\s*\^\s*(\{?\s*[-+]?\d)", r"\g<1>1\\cdot 10^\2"),
    ]
]
TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boldsymbol)\s*\{([^{}]*)\}")
UNIT_BEHIND = re.compile(r"(?<=\S)\s*(?:\\(?:text|mathrm|mbox)\s*\{[a-zA-Z^/\d. ]*\}\s*(?:\^\s*\{?\d\}?)?|°)$")
NUMERAL = re.compile(
    r"""(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s+(?=\d+\s*/)|\s*(?=\\frac)))?
    (?:\\frac\s*\{\s*(?P<top>-?\d+)\s*\}\s*\{\s*(?P<bottom>\d+)\s*\}|(?P<over>\d+)\s*/\s*(?P<under>\d+)
      |(?P<decimal>(?:\d{1,3}(?:[, ]\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:\\overline\s*\{(?P<repeat>\d+)\})?
       (?:[eE](?P<e>[-+]?\d+)|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*(?P<power>[-+]?\d+)\s*\}?)?)
    \s*(?P<scale>thousand|million|billion|trillion)?
    \s*(?P<percent>\\?%|percent(?:age)?\b|pct\b)?
    \s*(?P<unit>(?:(?<=[\s%])|(?![a-zA-Z]\b))[a-zA-Z°][a-zA-Z°/^{}\d .-]*)?""",
    re.VERBOSE,
)
SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
UNIT_NAMES = """
    $ dollar usd buck; cent; euro eur; mm millimeter millimetre; cm centimeter centimetre; m meter metre; km kilometer
    kilometre; inch inche in; ft foot feet; yd yard; mi mile; mg milligram; g gram; kg kilogram; lb pound; ml milliliter
    millilitre; l liter litre; s sec second; min minute; h hr hour; day; week; month; year yr; ° degree deg; rad radian;
    N newton; J joule; W watt; V volt; A amp ampere; K kelvin; Hz hertz; Pa pascal; C celsius; F fahrenheit
"""
UNITS = {name: names.split()[0] for names in UNIT_NAMES.split(";") for name in names.split()}
FORMULA_WORDS = set(f"{FUNCTIONS}|squared|cubed|factorial|times|plus|minus|over|mod|and|or|max|min".split("|"))
ROUNDED_TRUTH, ROUNDED_ANSWER, FLOAT = 3, 6, 15  # significant digits: docs/answers.md
HUGE = 400  # powers of ten, and characters of a number: beyond any float's
TIME = re.compile(r"(\d{1,2}):([0-5]\d)(?::([0-5]\d))?\s*(?:([ap])\.?\s*m\b\.?)?", re.IGNORECASE)
MONTHS = [month.lower() for month in calendar.month_name[1:]]


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    last_place: Fraction | None = None  # of a decimal point's last digit; None: exact
    digits: int = 0  # significant, where there is a decimal point
    percent: bool = False
    unit: tuple[tuple[str, int], ...] = ()  # and its power; () where it has none that is known


def same_answer(truth: str, answer: str) -> bool:
    """Whether the answer says what the truth says; the truth decides which rule applies. May take for ever."""
    truth, answer = _spelled(truth), _spelled(answer)
    if truth == answer:
        return True
    said, true = _unwrapped(answer), _unwrapped(truth)
    if (choice := CHOICE.fullmatch(true)) and (found := CHOICE.match(said)):
        return (found[1] or found[2]).lower() == (choice[1] or choice[2]).lower()
    if (time := TIME.fullmatch(true)) and (found := TIME.fullmatch(said)):
        return _same_time(time, found)
    if YES_NO.fullmatch(true):
        return (YES_NO.match(said) or [""])[0].lower() == true.lower()
    a, b = _number(true), _number(said if "=" in true else _assigned(said))
    if a is not None and b is not None:
        return _same_number(a, b)
    several, listed = _elements(true), _elements(said)
    if several is not None and listed is not None:
        return _same_elements(*several, *listed)
    if a is None and _is_text(true):
        return _words(true) == _words(said)
    return _same_formula(truth, answer, a, b)


def _spelled(text: str) -> str:
    text = text.strip(EDGE)
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    return _trimmed(text)


def _trimmed(text: str) -> str:
    return text.lstrip(" \n,;:\"'`*").rstrip(" \n.,;:\"'`*")  # .5 keeps its point


def _unwrapped(text: str) -> str:
    """Without \\text{} and its kin around words."""
    while (inner := TEXT.sub(r" \1 ", text)) != text:
        text = inner
    return _trimmed(re.sub(r"\s+", " ", text))


def _assigned(text: str) -> str:
    return re.sub(r"^(?:[a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\s*=\s*", "", text)


def _number(text: str) -> Number | None:
    found = NUMERAL.fullmatch(text) if len(text) <= HUGE else None
    if found is None:
        return None
    unit = _unit(found["unit"] or "")
    power = int(found["e"] or found["power"] or 0)
    if unit is None or abs(power) > HUGE or not int(found["bottom"] or found["under"] or 1):
        return None
    scale = Fraction(10) ** (power + SCALES.get(found["scale"] or "", 0)) * (-1 if found["sign"] == "-" else 1)
    percent = found["percent"] is not None
    if found["decimal"] is None:
        part = Fraction(int(found["top"] or found["over"]), int(found["bottom"] or found["under"]))
        return Number((int(found["whole"] or 0) + part) * scale, percent=percent, unit=unit)
    plain = re.sub("[, ]", "", found["decimal"])
    places = len(plain.partition(".")[2])
    value, last = Fraction(plain + "0" if plain[-1] == "." else plain), Fraction(1, 10**places)
    if found["repeat"]:
        value, places = value + last * Fraction(int(found["repeat"]), 10 ** len(found["repeat"]) - 1), 0
    digits = len(plain.replace(".", "").lstrip("0")) if places else 0
    return Number(value * scale, abs(last * scale) if places else None, digits, percent, unit)


def _unit(text: str) -> tuple[tuple[str, int], ...] | None:
    """Known units and their powers; () for other words, which are taken for what was counted; None: a formula."""
    text = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", text.replace("per ", "/ ")))
    parts = re.findall(r"[a-zA-Z]+|°|\^-?\d+|/", re.sub("[{}]", "", text))
    powers: dict[str, int] = {}
    sign, last = 1, ""
    for part in parts:
        if part == "/":
            sign = -1
        elif part[0] == "^":
            powers[last] = powers[last] * int(part[1:]) if last else 0
        elif name := next((n for n in (part, part.lower(), part.lower().removesuffix("s")) if n in UNITS), None):
            last = UNITS[name]
            powers[last] = powers.get(last, 0) + sign
        else:
            words = [word.lower() for word in parts if word.isalpha()]
            formula = FORMULA_WORDS.intersection(words) or all(len(word) < 3 for word in words)
            return None if formula or re.search(r"[\d^]", text) else ()
    return tuple(sorted(powers.items()))


def _same_number(truth: Number, answer: Number) -> bool:
    if truth.unit and answer.unit and truth.unit != answer.unit:
        return False
    if truth.percent == answer.percent:
        return _close(truth, answer)
    # "50 %" stands for 0.5, and for 50 where the question asks for percents; "0.5 %" stands for 0.005 alone.
    marked = truth if truth.percent else answer
    share = Fraction(1, 100)
    last = marked.last_place and marked.last_place * share
    readings = [replace(marked, value=marked.value * share, last_place=last)]
    readings += [marked] if abs(marked.value) >= 1 else []
    return any(_close(reading, answer) if truth.percent else _close(truth, reading) for reading in readings)


def _close(truth: Number, answer: Number) -> bool:
    """Equal; or one is exact and the other its value rounded to enough digits."""
    apart = abs(truth.value - answer.value)
    if not apart:
        return True
    if truth.last_place and answer.last_place:
        return answer.digits > FLOAT and apart <= abs(truth.value) / 10**FLOAT
    if answer.last_place:
        return answer.digits >= ROUNDED_ANSWER and apart <= answer.last_place / 2
    return truth.last_place is not None and truth.digits >= ROUNDED_TRUTH and apart <= truth.last_place / 2


def _same_time(truth: re.Match[str], answer: re.Match[str]) -> bool:
    def read(time: re.Match[str]) -> tuple[int, int, int]:
        return int(time[1]), int(time[2]), int(time[3] or 0)

    def whole(time: re.Match[str]) -> tuple[int, int, int]:  # of 24 hours
        hour, minute, second = read(time)
        return (hour % 12 + 12 * (time[4] in "pP") if time[4] else hour), minute, second

    if truth[4] and answer[4]:
        return whole(truth) == whole(answer)
    return read(truth) == read(answer) or whole(truth) == whole(answer)


def _is_text(text: str) -> bool:
    words = re.findall(r"[^\W\d_]{3,}", text)
    return bool(words) and not re.search(r"[\\^_=+*/<>|&]", text) and not FORMULA_WORDS & {w.lower() for w in words}


def _words(text: str) -> list[str]:
    """Case, articles and punctuation do not count; nor does the order in a date."""
    text = re.sub(r"\b(\d{4})-(0[1-9]|1[0-2])-(\d\d)\b", lambda d: f"{MONTHS[int(d[2]) - 1]} {d[3]} {d[1]}", text)
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in ("a", "an", "the")]
    date = [re.sub(r"^0*(\d+)(?:st|nd|rd|th)?$", r"\1", word) for word in words if word != "of"]
    months = [next((month for month in MONTHS if len(word) > 2 and month.startswith(word)), None) for word in date]
    is_date = (
        len(date) in (2, 3) and any(months) and all(m or word.isdigit() for m, word in zip(months, date, strict=True))
    )
    return sorted(month or word for month, word in zip(months, date, strict=True)) if is_date else words


def _elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets ("" without) and elements of a list, set, tuple or interval; None where it is something else."""
    if "\\begin" in text:
        return None
    text = re.sub(r"\\([{}])", r"\1", text)
    brackets = ""
    if text[:1] in "([{" and text[-1:] in ")]}" and text and _depths(text)[:-1].count(0) == 0:
        brackets, text = text[0] + text[-1], text[1:-1]
    else:
        text = re.sub(r",?\s*\b(?:and|or)\b", ", ", text)
    depths = _depths(text)
    thousands = {m.start() for m in re.finditer(r"(?<=\d),(?=\d{3}(?!\d))", text)} if not brackets else set()
    cuts = [i for i, char in enumerate(text) if char in ",;" and depths[i] == 0 and i not in thousands]
    parts = [text[a:b].strip() for a, b in zip([0, *(i + 1 for i in cuts)], [*cuts, len(text)], strict=True)]
    spread: list[str] = []
    for part in parts:
        signs = [("+", "-"), ("-", "+")] if "\\pm" in part else [("", "")]
        spread += [part.replace("\\pm", plus).replace("\\mp", minus) if plus else part for plus, minus in signs]
    return (brackets, spread) if len(spread) > 1 or brackets == "{}" else None


def _depths(text: str) -> list[int]:
    depth, depths = 0, []
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        depths.append(depth)
    return depths


def _same_elements(kind: str, truth: list[str], answer_kind: str, answer: list[str]) -> bool:
    """Order counts in tuples and intervals, whose brackets must agree; an answer may leave a tuple's away."""
    kinds = {kind, answer_kind}
    if len(kinds) == 2 and kinds not in ({"", "{}"}, {"", "()"}):
        return False
    if not kinds <= {"", "{}"}:
        return len(truth) == len(answer) and all(map(same_answer, truth, answer))
    if "{}" not in kinds and len(truth) != len(answer):
        return False
    pairs = [[same_answer(element, other) for other in answer] for element in truth]
    return all(map(any, pairs)) and all(map(any, zip(*pairs, strict=True)))


def _same_formula(truth: str, answer: str, a: Number | None, b: Number | None) -> bool:
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    # Among its units are "t", "o" and "by", so that 5t would be 5; its search for numbers finds one in any text.
    normal = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=normal)]
    # no timeout of its own: math-verify's uses SIGALRM, the worker is killed instead
    gold, said = (parse(f"${UNIT_BEHIND.sub('', t)}$", latex, parsing_timeout=None) for t in (truth, answer))
    # It compares a decimal at six places whatever the size: where one is a numeral, our own rule decides.
    if a is not None and a.last_place and (value := _value(said)) is not None:
        return _same_number(a, Number(value))
    if b is not None and b.last_place and (value := _value(gold)) is not None:
        return _same_number(Number(value), b)
    return bool(verify(gold, said, allow_set_relation_comp=True, timeout_seconds=None))


def _value(parsed: list[Any]) -> Fraction | None:
    if not parsed or not getattr(parsed[0], "is_number", False):
        return None
    number = parsed[0].evalf(30)
    return Fraction(str(number)) if number.is_Rational or number.is_Float else None
