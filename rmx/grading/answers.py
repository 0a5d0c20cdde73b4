"""Answers: what a completion says, and whether it is the same as the truth. Workers import this, so it needs no torch.

docs/answers.md has the grammar, the rules, and what math-verify alone makes of the table that they are tested on.
:func:`extract_answer` takes time in proportion to the text.
"""

import calendar
import itertools
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from typing import Any

from rmx.grading.numerals import GROUPED, SUBSCRIPTED, Found, Number, in_ten, last_number, number, plain
from rmx.grading.spellings import EDGE, spelled, unwrapped
from rmx.grading.units import FORMULA_WORDS

BRACE = re.compile(
    r"(\\(?:boxed|fbox)\s*)\{|(?<!\\)(?:\\\\)+(?=[{}])|\\[{}]|[{}]"
)  # a backslash before it makes it text
BOX_JOINT = re.compile(r"[\s$]*(?:[,;]|(?:,\s*)?(?:\\text\s*\{)?\s*(?:and|or)\s*\}?)[\s$]*(?:[a-zA-Z]\s*=\s*)?")
JOINT = 60  # characters between two boxes of one list
HASHES = re.compile(r"^[ \t]*####[ \t]*(?=[-+$€£¥.\\]*[ ]?\d)([^\s][^\n]{0,200})$", re.MULTILINE)  # GSM8K
NUMBERED = re.compile(r"[-+]?\s?(?:\\?\$|[€£¥])?\s?-?[\d.,/:^%]+(?:\s\d+/\d+)?(?:e[-+]?\d+)?[ .]*", re.IGNORECASE)
BOLD = re.compile(r"(?<=\S )\*\*([^*\n]{1,60})\*\*")  # not at the start of a line, where steps are counted
BOLD_NUMBER = re.compile(rf"{NUMBERED.pattern}(?:[a-zA-Z]+)?", re.IGNORECASE)
PHRASE = re.compile(r"\b(?:answer|correct (?:option|choice))\b[^.:=\n]{0,80}?(?:\bis\b|:|=)", re.IGNORECASE)
DISPLAY = re.compile(r"[:\s]*(?:\\\[|\$\$)?\s*")  # between the phrase and what it announces
SENTENCE_END = re.compile(r"[.!?](?:\s|$)|,?\s(?:because|since|but)\b|\n")
INLINE = re.compile(r"\$(?=\S)([^$\n]*[^$\s])\$(?!\d)|\\\(((?:(?!\\\().)+?)\\\)")
FUNCTIONS = "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|sqrt|pi|infinity|inf"
EXPRESSION = re.compile(
    rf"(?:[-+*/^=(),\[\]{{}}<>|!√π∞×·−°²³\d.\s]|(?<![a-zA-Z])(?:[a-zA-Z]|{FUNCTIONS}|and|or)(?![a-zA-Z]))+"
)
SUM = re.compile(r"-?\s?[\d.]+(?:\s?[-+*/^]\s?-?[\d.]+)+")  # of plain numbers: a formula too
ALONE = re.compile(r"\(?[a-zA-Z]\)?|[a-zA-Z]\(.*\)")  # x or f(x), left of an equals sign
CHOICE = re.compile(r"(?:(?:option|choice)\s+)?(?:\(([A-J])\)|([A-J])(?:[.:),]|\s*$))", re.IGNORECASE)
YES_NO = re.compile(r"(?:yes|no|true|false)\b(?=\s*(?:[,;.*]|$))", re.IGNORECASE)


def extract_answer(text: str, *, words: bool = True) -> str | None:
    """The last box, else "#### 42", else what follows the last "answer is", else the last number; None without any.

    Args:
        words: whether a number in running text keeps the words behind it that say what it is worth, as "3 dozen" and
            "5 km"; without them it is what a scorer of plain numbers expects.
    """
    text = plain(text)
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    if marked := [line for line in HASHES.findall(text) if NUMBERED.fullmatch(line)]:
        return _last_number(marked[-1], words)
    said = _said(text)
    for sentence in reversed(said):
        if (found := _stated(sentence, words)) is not None:
            return found
    if rest := said[-1].strip(EDGE) if said else "":
        return rest
    whole = text.strip(EDGE + ".")
    if "\n" not in whole and ((found := _expression(whole)) or CHOICE.fullmatch(whole)):
        return found or whole
    if len(whole) <= 60 and not re.search(r"[\d\n]", whole) and number(whole) is not None:
        return whole  # in words
    if bold := [content for content in BOLD.findall(text) if BOLD_NUMBER.fullmatch(content)]:
        return _last_number(bold[-1], words)
    if (last := last_number(text, words=words)) is not None:
        return _in_formula(text, last) or last.said
    return whole if whole and not re.search(r"\s", whole) else None


def _said(text: str) -> list[str]:
    """What follows each phrase, to the end of its sentence; a phrase within it begins anew."""
    phrases = list(PHRASE.finditer(text))
    sentences = []
    for phrase, after in itertools.zip_longest(phrases, phrases[1:]):
        end = after.start() if after else len(text)
        begin = min(DISPLAY.match(text, phrase.end()).end(), end)  # type: ignore[union-attr]  # it matches nothing too
        stop = SENTENCE_END.search(text, begin, end)
        sentences.append(text[begin : stop.start() if stop else end])
    return sentences


def _stated(sentence: str, words: bool) -> str | None:
    """The answer in what follows the phrase; None where there are only words."""
    if spans := list(INLINE.finditer(sentence)):
        found = [a or b for a, b in (span.groups() for span in spans)]
        if re.fullmatch(r"(?:[\s,.*]|and|or)*", INLINE.sub("", sentence)):
            return ", ".join(found)
        if number(found[-1]) is None:
            return found[-1]
        bare = f"{sentence[: spans[-1].start()]}{found[-1]}{sentence[spans[-1].end() :]}"  # with its sign and unit
        return _last_number(bare, words, limit=spans[-1].start() + len(found[-1]))
    stated = re.sub(r"^[Aa]n? (?=[\d$])", "", sentence.strip(EDGE))
    if "\\" in stated:
        return stated.removesuffix("\\]").strip(EDGE)
    if (formula := _expression(stated)) is not None:
        return formula
    if re.fullmatch(r"-?\s?\d{1,3}(?: \d{3})+(?:\.\d+)?\.?", stated):
        return stated.rstrip(".")
    if SUM.fullmatch(stated) and number(stated) is None:
        return stated
    if (choice := CHOICE.match(stated)) or (choice := YES_NO.match(stated)):
        return choice[0].strip(" .:,")
    if "$" in sentence and (money := re.match(r"[^a-zA-Z]*\d\S* (?=(?:for|per|in|to|each|a)\b)", sentence)):
        return _last_number(money[0], words)
    return _last_number(sentence, words)


def _expression(words: str) -> str | None:
    """The words where they are one formula that a number alone would not stand for, without "x =" before it."""
    product = re.sub(r"(?<=\d)(?<!\b0)\s*[x×]\s*(?=\d)", " * ", words)
    left, _, right = product.rpartition("=")
    if right and (not re.search("[a-zA-Z]", left) or ALONE.fullmatch(left.strip())):
        product = right.strip()
    if re.search(r"[\^*_]|\b0[xXbBoO]", product) and number(product.strip()) is not None:
        return product.strip()
    if not EXPRESSION.fullmatch(product) or re.fullmatch(rf"[-+*/=<>.\d\s]*|-?\s?{GROUPED}(?:\.\d+)?", product):
        return None
    return product.strip()


def _last_number(text: str, words: bool, limit: int | None = None) -> str | None:
    found = last_number(text, words=words, limit=limit)
    return None if found is None else found.said


def _in_formula(text: str, last: Found) -> str | None:
    """The right side of the inline formula that the number stands in; None where it stands for itself."""
    line = text.rfind("\n", 0, last.start) + 1
    end = text.find("\n", last.end)
    for span in INLINE.finditer(text, line, len(text) if end < 0 else end):
        inner = span[1] or span[2]
        if span.start() <= last.start < span.end():
            right = inner.rpartition("=")[2].strip() or inner
            return None if number(right) is not None and re.fullmatch(r"[-+\d.,/\s]*", right) else right
    return None


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
            opening = text.rindex("\\", 0, begin)
            if not (answers and opening - last <= JOINT and BOX_JOINT.fullmatch(text, last, opening)):
                answers = []
            answers.append(text[begin:end])
            last = end + 1
    return ", ".join(answers)


UNIT_BEHIND = re.compile(r"(?<=\S)\s*(?:\\(?:text|mathrm|mbox)\s*\{[a-zA-Z^/\d. ]*\}\s*(?:\^\s*\{?\d\}?)?|°)$")
OTHER_BASE = re.compile(r"(?<![\w}\\])\d\w*_|\b0[xXbBoO]\w")
ROUNDED_TRUTH, ROUNDED_ANSWER, FLOAT = 3, 6, 15  # significant digits: docs/answers.md
TIME = re.compile(
    r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?\s*(?:([ap])\.?\s*m\b\.?)?|\s*(?P<half>[ap])\.?\s*m\b\.?)", re.IGNORECASE
)
ASSIGNMENT = re.compile(r"([a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\s*=\s*([^=]+)")
MONTHS = [month.lower() for month in calendar.month_name[1:]]


def same_answer(truth: str, answer: str) -> bool:
    """Whether the answer equals the truth; the form of the truth decides which rule applies. It may never return."""
    truth, answer = spelled(truth), spelled(answer)
    if truth == answer:
        return True
    said, true = unwrapped(answer), unwrapped(truth)
    if (choice := CHOICE.fullmatch(true)) and (found := CHOICE.match(said)):
        return (found[1] or found[2]).lower() == (choice[1] or choice[2]).lower()
    if (time := TIME.fullmatch(true)) and (found := TIME.fullmatch(said)):
        return _same_time(time, found)
    if YES_NO.fullmatch(true):
        return (YES_NO.match(said) or [""])[0].lower() == true.lower()
    if (variable := ASSIGNMENT.fullmatch(true)) and (other := ASSIGNMENT.fullmatch(said)) and variable[1] == other[1]:
        return same_answer(variable[2], other[2])
    if (shown := SUBSCRIPTED.fullmatch(true)) and shown["digits"].lower() == said.lower():
        return True  # the question names the base
    a, b = number(true), number(said if "=" in true else _assigned(said))
    if a is not None and b is not None:
        return _same_number(a, b)
    several, listed = _elements(true), _elements(said)
    if several is not None and listed is not None:
        return _same_elements(*several, *listed)
    if a is None and _is_text(true):
        return _words(true) == _words(said)
    return _same_formula(truth, answer, a, b)


def _assigned(text: str) -> str:
    return re.sub(r"^(?:[a-zA-Z]|[a-zA-Z]\([a-zA-Z]\))\s*=\s*", "", text)


def _same_number(truth: Number, answer: Number) -> bool:
    if truth.unit and answer.unit:
        if truth.unit != answer.unit:
            return False
        truth, answer = _converted(truth), _converted(answer)
    if truth.counted is not None and _same_number(replace(truth, value=truth.counted, counted=None), answer):
        return True
    if answer.counted is not None and _same_number(truth, replace(answer, value=answer.counted, counted=None)):
        return True
    if truth.percent == answer.percent:
        return _close(truth, answer)
    # "50 %" stands for 0.5, and for 50 where the question asks for percents; "0.5 %" stands for 0.005 alone.
    marked = truth if truth.percent else answer
    share = Fraction(1, 100)
    last = marked.last_place and marked.last_place * share
    readings = [replace(marked, value=marked.value * share, last_place=last)]
    readings += [marked] if abs(marked.value) >= 1 else []
    return any(_close(reading, answer) if truth.percent else _close(truth, reading) for reading in readings)


def _converted(number: Number) -> Number:
    last = number.last_place and number.last_place * number.factor
    return replace(number, value=number.value * number.factor, last_place=last)


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
        return int(time[1]), int(time[2] or 0), int(time[3] or 0)

    def whole(time: re.Match[str]) -> tuple[int, int, int]:  # of 24 hours
        hour, minute, second = read(time)
        return (hour % 12 + 12 * (half(time) in "pP") if half(time) else hour), minute, second

    def half(time: re.Match[str]) -> str:
        return time[4] or time["half"] or ""

    if half(truth) and half(answer):
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
    """Order counts in tuples and intervals, whose brackets must agree; an answer may leave a tuple's away.

    In a list it counts how often an element stands there, in a set it does not.
    """
    kinds = {kind, answer_kind}
    if len(kinds) == 2 and kinds not in ({"", "{}"}, {"", "()"}):
        return False
    if not kinds <= {"", "{}"}:
        return len(truth) == len(answer) and all(map(same_answer, truth, answer))
    if kind == "{}":
        found = [[same_answer(element, other) for other in answer] for element in truth]
        return all(map(any, found)) and all(map(any, zip(*found, strict=True)))
    if len(truth) != len(answer):
        return False
    both = Counter(truth) & Counter(answer)  # what is spelled alike is not compared
    left, right = (list((Counter(elements) - both).elements()) for elements in (truth, answer))
    return _paired([[same_answer(element, other) for other in right] for element in left])


def _paired(same: list[list[bool]]) -> bool:
    """Whether each row has a column of its own, by augmenting paths: rounded elements may equal several others."""
    row_of: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, fits in enumerate(same[row]):
            if fits and column not in seen:
                seen.add(column)
                if column not in row_of or place(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(same)))


def _same_formula(truth: str, answer: str, a: Number | None, b: Number | None) -> bool:
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig, NormalizationConfig

    # Among its units are "t", "o" and "by", so that 5t would be 5; its search for numbers finds one in any text.
    normal = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=normal)]
    sides = [in_ten(UNIT_BEHIND.sub("", text)) for text in (truth, answer)]
    if any(map(OTHER_BASE.search, sides)):  # digits that the base has not
        return False
    # no timeout of its own: math-verify's uses SIGALRM, the worker is killed instead
    gold, said = (parse(f"${text}$", latex, parsing_timeout=None) for text in sides)
    # It compares a decimal at six places whatever the size: where one is a numeral, our own rule decides.
    if a is not None and (value := _value(said, exact=a.last_place is None)) is not None:
        return _same_number(a, Number(value))
    if b is not None and (value := _value(gold, exact=b.last_place is None)) is not None:
        return _same_number(Number(value), b)
    return bool(verify(gold, said, allow_set_relation_comp=True, timeout_seconds=None)) and _agree(gold[0], said[0])


def _value(parsed: list[Any], exact: bool) -> Fraction | None:
    """Of a formula without variables; with ``exact`` where it is rational, else to 30 digits."""
    if not parsed or not getattr(parsed[0], "is_number", False):
        return None
    found = parsed[0].doit()
    if found.is_Rational and found.is_finite:
        return Fraction(int(found.p), int(found.q))
    found = found.evalf(30)
    return Fraction(str(found)) if found.is_Float and found.is_finite and not exact else None


def _agree(gold: Any, said: Any) -> bool:
    """Whether the values agree relative to their size; what math-verify calls the same may differ by 1e-15."""
    from sympy import Expr, Float, Interval, MatrixBase, Rational

    if isinstance(gold, MatrixBase) and isinstance(said, MatrixBase):
        return all(map(_agree, gold.flat(), said.flat()))
    if isinstance(gold, Interval) and isinstance(said, Interval):
        return _agree(gold.start, said.start) and _agree(gold.end, said.end)
    if not (isinstance(gold, Expr) and isinstance(said, Expr)):
        return True
    names = sorted(gold.free_symbols | said.free_symbols, key=str)
    point = {name: Rational(10 + 3 * place, 7) for place, name in enumerate(names)}
    x, y = (side.subs(point).doit() for side in (gold, said))
    if x.is_Rational and y.is_Rational:
        return bool(x == y)
    tolerance = 1e-6 if gold.has(Float) or said.has(Float) else 1e-25
    x, y = x.evalf(40), y.evalf(40)
    if not (x.is_Float and y.is_Float) or min(x._prec, y._prec) < 40:  # no real number, or a difference of equals
        return True
    return bool(abs(x - y) <= tolerance * max(abs(x), abs(y)))
