"""Numerals: what a number looks like, and what it is worth, exactly. docs/answers.md has the grammar."""

import re
from dataclasses import dataclass
from fractions import Fraction

from rmx.grading.units import read_unit

# One spelling of what Unicode writes in several ways.
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_NUMBERS = (
    "½ 1/2 ⅓ 1/3 ⅔ 2/3 ¼ 1/4 ¾ 3/4 ⅕ 1/5 ⅖ 2/5 ⅗ 3/5 ⅘ 4/5 ⅙ 1/6 ⅚ 5/6 ⅐ 1/7 ⅛ 1/8 ⅜ 3/8 ⅝ 5/8 ⅞ 7/8 ⅑ 1/9 ⅒ 1/10"
)
VULGAR = dict(zip(_NUMBERS.split()[::2], _NUMBERS.split()[1::2], strict=True))
SAME = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\ufe63", "-"),  # minus sign, hyphens
        **dict.fromkeys("\u2044\u2215", "/"),  # fraction slash, division slash
        **{chr(c): chr(c - 0xFEE0) for c in [*range(0xFF10, 0xFF1A), *map(ord, "＋－．，／％＝（）")]},  # full width
        "µ": "μ",
        "’": "'",
    }
)
THIN = "\u00a0\u2007\u2009\u202f"  # spaces between groups of digits
THIN_SPACE, THIN_GROUP = re.compile(f"[{THIN}]"), re.compile(rf"(?<=\d)[{THIN}](?=\d{{3}}(?!\d))")
DASH_SIGN = re.compile(r"(?<![\w ])–(?=[\d.$€£¥₹\\])|(?<=[^\s\d] )–(?=[\d.$€£¥₹\\])|^–")
RAISED, LOWERED = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
VULGAR_SIGN = re.compile(f"[{''.join(VULGAR)}]")

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_PARTS = "half third quarter fifth sixth seventh eighth ninth tenth eleventh twelfth"
ONES, TENS, PARTS = _ONES.split(), _TENS.split(), _PARTS.split()
CARDINALS = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, start=2)}
THOUSANDS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12, "quadrillion": 15, "quintillion": 18}
SCALES = {"hundred": Fraction(100), "dozen": Fraction(12), "lakh": Fraction(10**5), "crore": Fraction(10**7)}
SCALES |= {word: Fraction(10**power) for word, power in THOUSANDS.items()}
SHORT_SCALES = {"k": 3, "K": 3, "M": 6, "m": 6, "mn": 6, "B": 9, "b": 9, "bn": 9}  # of money alone
PARTS_OF = {word: Fraction(1, n) for n, word in enumerate(PARTS, start=2)}
PARTS_OF |= {"fourth": Fraction(1, 4), "twentieth": Fraction(1, 20), "hundredth": Fraction(1, 100)}
PARTS_OF |= {f"{word}th": 1 / value for word, value in SCALES.items() if word in THOUSANDS}
PLURALS = {"halves" if word == "half" else f"{word}s": value for word, value in PARTS_OF.items()}

CURRENCY = r"(?:US|A|C)?\\?\$|[€£¥₹]"
GROUPED = r"\d{1,3}(?:[,'_]\d{3})+(?!\d)"
BASED = r"0[xX][\da-fA-F]+|0[bB][01]+|0[oO][0-7]+"
BASE = r"_\s*(?:\{\s*(?:\\(?:text|mathrm)\s*\{)?\s*(?:\d+|[a-z]+)\s*\}?\s*\}|\d+)"
SUBSCRIPTED = re.compile(rf"(?P<digits>(?=[A-Z]*\d|[A-F]{{2}})[\dA-Za-z]+)(?P<base>{BASE})")
SCALE_WORDS = "|".join(SCALES)
ARTICLE = re.compile(rf"^an?\s+(?=(?:half|{'|'.join([*SCALES, *PARTS_OF])})\b)")
PART_WORDS = "|".join([*PLURALS, *PARTS_OF])
AND_PART = re.compile(rf"(.*\d)\s+and\s+(a|one|\d+|{'|'.join(ONES)})[\s-]+({PART_WORDS})\b")


def _ten(name: str) -> str:
    """ "x 10^5" behind a number; its exponent is the group of this name, if any."""
    exponent = rf"(?P<{name}>[-+]?\d+)" if name else r"[-+]?\d+"
    return rf"\s*(?:\\times|\\cdot|[×·⋅*x])\s*10\s*(?:\^|\*\*)\s*\{{?\s*{exponent}\s*\}}?"


NUMERAL = re.compile(
    rf"""(?P<sign>(?:[-+]|(?:minus|negative)\s)?)\s*
    (?:(?P<literal>{BASED})|(?P<subscripted>[\dA-Z][\dA-Za-z]*{BASE})
      |(?P<root>\d+)\s*(?:\^|\*\*)\s*(?:(?P<exponent>[-+]?\d+)|[{{(]\s*(?P<braced>[-+]?\d+)\s*[}})])
      |(?:(?P<whole>\d+)(?:\s+(?=\d+\s*/)|\s*(?=\\frac)))?
       (?:\\frac\s*\{{\s*(?P<top>-?\d+)\s*\}}\s*\{{\s*(?P<bottom>\d+)\s*\}}|(?P<over>\d+)\s*/\s*(?P<under>\d+))
      |(?P<decimal>(?:\d{{1,3}}(?:[,'_ ]\d{{3}})+(?!\d)|\d+)(?:\.\d*)?|\.\d+)(?:\\overline\s*\{{(?P<repeat>\d+)\}})?
       (?:[eE](?P<e>[-+]?\d+)|{_ten("power")})?)
    (?P<ordinal>(?:st|nd|rd|th)\b)?
    (?P<scale>(?:\s*(?:{SCALE_WORDS})s?\b)+)?
    (?:[\s-]*(?P<part>{PART_WORDS})\b)?
    \s*(?P<percent>\\?%|percent(?:age)?(?:\s+points?)?\b|pct\b|per\s+cent\b|‰)?
    (?P<short>(?:k|K|M|mn|m|bn|B|b)(?=\s*(?:[$€£¥₹]|dollars?\b|euros?\b)))?
    \s*(?P<unit>(?:(?<=[\s%])|(?![a-zA-Z]\b))[a-zA-ZμΩ°$€£¥₹¢][a-zA-ZμΩ°$€£¥₹¢/^{{}}\d .-]*)?""",
    re.VERBOSE,
)
# A number in running text: time, power of what is no number, name with an index, number.
_CUT = r"(?<![A-Za-z_\d])"
_POWER = r"(?:\s?\^\s?|\s\*\*\s|\*\*)(?:\{\s?[-+]?\d+\s?\}|\(\s?[-+]?\d+\s?\)|[-+]?\d+)"
TOKEN = re.compile(
    rf"""(?P<time>\b\d+(?::\d+)+(?:\s?[ap]\.?m\b)?)
    |(?P<symbol>(?:(?<![A-Za-z\\])[A-Za-z]|[)\]}}])(?:\s?\^\s?|\s\*\*\s|\*\*)(?:\{{[^{{}}]{{0,60}}\}}|\(?[-+]?\w+\)?)
      |{_CUT}\d+(?:\s?\^\s?|\s\*\*\s|\*\*)(?:\{{[^{{}}]{{0,30}}[A-Za-z][^{{}}]{{0,30}}\}}|\(?[A-Za-z]\w*\)?))
    |(?P<name>[A-Za-z]_(?:\{{[^{{}}]{{0,60}}\}}|\w+)|(?<![A-Za-z])[A-Za-z]{{2,}}\s?\^\s?\{{?-?\d+\}}?)
    |(?P<number>{_CUT}(?:{BASED})(?!\w)|{_CUT}\d[\dA-F]*(?:{BASE}|[ ](?:in[ ])?\(?base[ ]\w+\)?)
      |{_CUT}\d+[ ]and[ ](?:a|one)[ ](?:{PART_WORDS})\b|\\[dtc]?frac[ ]?\d[ ]?\d(?!\d)|{_CUT}\d+[ ]\d+/\d+(?![\d/])
      |(?:{_CUT}\d+\s?)?\\[dtc]?frac\s?\{{\s?-?\d+\s?\}}\s?\{{\s?\d+\s?\}}|(?:{_CUT}\d+\s?)?\\sqrt\s?\{{[^{{}}]{{0,60}}\}}
      |(?:{_CUT}(?:{GROUPED}|\d{{1,3}}(?:[ ]\d{{3}})*[ ]000(?!\d)|\d+)|(?<![\w.])(?=\.\d))(?:\.\d+)?
       (?:[eE][-+]?\d+(?!\w)|{_ten("")}|{_POWER}|/\d+)?)""",
    re.VERBOSE,
)
MIXED = re.compile(r"\d+ (\d+)/(\d+)")
BEHIND = re.compile(
    rf"""(?:[ -]?(?:{SCALE_WORDS})s?\b)*(?:[ -](?:{PART_WORDS})\b)?
    (?P<percent>\s?(?:\\?%|percent\b|pct\b|per\ cent\b|‰))?""",
    re.VERBOSE,
)
_UNIT = r"[ -]?((?:(?:square|sq\.?|cubic) )?[A-Za-zμΩ°$€£¥₹¢]+(?:\s?\^\s?\{?-?\d\}?|\d(?!\d))?"
UNITS_BEHIND = [re.compile(_UNIT + r"(?: ?/ ?| per )[A-Za-zμΩ]+(?:\^?\{?\d\}?)?)"), re.compile(_UNIT + r")(?![\w])")]
PROSE = ("in", "A", "a", "As", "as", "us", "Us")  # words of a sentence before they are units
LONGEST = 4000  # characters of a numeral, within the digits that Python reads
LARGEST = 100_000  # powers of ten that are written out


@dataclass(frozen=True, slots=True)
class Number:
    value: Fraction
    last_place: Fraction | None = None  # of a decimal point's last digit; None: exact
    digits: int = 0  # significant, where there is a decimal point
    percent: bool = False
    unit: tuple[tuple[str, int], ...] = ()  # dimensions and their powers; () where it has none that is known
    factor: Fraction = Fraction(1)  # of the unit, in the dimensions' own units
    counted: Fraction | None = None  # another reading: "3 quarters" are 3 coins too


@dataclass(frozen=True, slots=True)
class Found:
    """A number in a running text: where it is, and how it is written down as an answer."""

    start: int
    end: int
    said: str


def plain(text: str) -> str:
    """Text with one spelling of signs, digits, fractions, powers and spaces; in linear time."""
    text = THIN_GROUP.sub(",", text.translate(SAME))
    text = DASH_SIGN.sub("-", THIN_SPACE.sub(" ", text))
    text = RAISED.sub(lambda m: _script("^", m[0].translate(SUPERSCRIPTS)), text)
    text = LOWERED.sub(lambda m: _script("_", m[0].translate(SUBSCRIPTS)), text)
    return VULGAR_SIGN.sub(lambda m: " " * (m.start() > 0 and text[m.start() - 1].isdigit()) + VULGAR[m[0]], text)


def _script(mark: str, digits: str) -> str:
    return f"{mark}{digits}" if len(digits) == 1 else f"{mark}{{{digits}}}"


def from_words(text: str) -> str:
    """The cardinal in words at the head of a text in digits: "twenty-five apples" is "25 apples"."""
    lowered = ARTICLE.sub("one ", text.lower())
    sign = re.match(r"(?:minus|negative|-)\s+", lowered)
    words = re.split(r"([\s-]+)", lowered[sign.end() if sign else 0 :])
    total = current = used = 0
    for place in range(0, len(words), 2):
        word = words[place]
        if word in CARDINALS:
            n = CARDINALS[word]
            free = current % 100 == 0 if n >= 10 else current % 10 == 0 and current % 100 not in range(10, 20)
            if not free or (n == 0 and place):
                return text
            current += n
        elif word == "hundred" and 0 < current < 100:
            current *= 100
        elif word in THOUSANDS and current and (not total or total % 10 ** (THOUSANDS[word] + 3) == 0):
            total, current = total + current * 10 ** THOUSANDS[word], 0
        elif not (word == "and" and used and words[place - 2] in ("hundred", *THOUSANDS) and _goes_on(words, place)):
            break
        used = place + 1
    rest = text[len(text) - len("".join(words[used:])) :]
    if used and re.search(r"\s[A-Z][a-z]", rest):  # a name, as One Direction
        return text
    head = (sign[0] if sign else "") + str(total + current)
    if not used:
        if not re.match(r"half\b", rest):
            return _mixed(text)
        head, rest = (sign[0] if sign else "") + "1/2", re.sub(r"^half(?:\s+an?\b)?", "", rest)
    return _mixed(head + rest)


def _goes_on(words: list[str], place: int) -> bool:
    return place + 2 < len(words) and words[place + 2] in CARDINALS


def _mixed(text: str) -> str:
    """ "3 and a half" is "3 1/2"."""
    found = AND_PART.match(text)
    if found is None:
        return text
    top = 1 if found[2] in ("a", "one") else CARDINALS.get(found[2]) or int(found[2])
    return f"{found[1]} {top}/{(PARTS_OF | PLURALS)[found[3]].denominator}{text[found.end() :]}"


def number(text: str) -> Number | None:
    """What a text that is one numeral is worth; None for another text."""
    found = NUMERAL.fullmatch(from_words(text)) if len(text) <= LONGEST else None
    if found is None:
        return None
    unit = read_unit(found["unit"] or "")
    exact = _exact(found)
    power = found["e"] or found["power"] or "0"
    if unit is None or (exact is None and found["decimal"] is None) or abs(int(power)) > LARGEST:
        return None
    value, last, digits = (exact, None, 0) if exact is not None else _decimal(found)
    scale = Fraction(-1 if found["sign"] and found["sign"][0] in "-mn" else 1)
    for word in (found["scale"] or "").split():
        scale *= SCALES[word.removesuffix("s")]
    scale *= Fraction(10) ** SHORT_SCALES[found["short"]] if found["short"] else 1
    scale *= Fraction(1, 1000) if found["percent"] == "‰" else 1
    counted = None
    if (part := found["part"]) and (part in PLURALS or value == 1):
        counted = value * scale if part.startswith("quarter") else None
        scale *= (PLURALS | PARTS_OF)[part]
    percent = found["percent"] not in (None, "‰")
    return Number(value * scale, last and abs(last * scale), digits, percent, *unit, counted)


def _exact(found: re.Match[str]) -> Fraction | None:
    """The value of all forms but decimals; None where there is none, or it would be too long to write out."""
    if found["literal"]:
        return Fraction(int(found["literal"], 0))
    if found["subscripted"]:
        return based(found["subscripted"])
    if found["root"]:
        root, exponent = int(found["root"]), int(found["exponent"] or found["braced"])
        fits = len(found["root"]) * abs(exponent) <= LARGEST and (root or exponent > 0)
        return Fraction(root) ** exponent if fits else None
    top, bottom = found["top"] or found["over"], int(found["bottom"] or found["under"] or 0)
    return int(found["whole"] or 0) + Fraction(int(top), bottom) if bottom else None


def _decimal(found: re.Match[str]) -> tuple[Fraction, Fraction | None, int]:
    text = re.sub("[,'_ ]", "", found["decimal"])
    places = len(text.partition(".")[2])
    value, last = Fraction(text + "0" if text[-1] == "." else text), Fraction(1, 10**places)
    if found["repeat"]:
        value, places = value + last * Fraction(int(found["repeat"]), 10 ** len(found["repeat"]) - 1), 0
    shift = Fraction(10) ** int(found["e"] or found["power"] or 0)
    digits = len(text.replace(".", "").lstrip("0")) if places else 0
    return value * shift, last * shift if places else None, digits


def based(text: str) -> Fraction | None:
    """12_7 is 9; None where the base has no such digits."""
    found = SUBSCRIPTED.fullmatch(text)
    if found is None:
        return None
    name = re.sub(r"\\(?:text|mathrm)|[_{}\s]", "", found["base"])
    base = int(name) if name.isdigit() else CARDINALS.get(name, 0)
    try:
        return Fraction(int(found["digits"], base)) if 2 <= base <= 36 else None
    except ValueError:
        return None


def last_number(text: str, *, words: bool = True, limit: int | None = None) -> Found | None:
    """The last number of a running text, with its sign, and with ``words`` what says how much it is worth.

    Exponents, subscripts and digits within names are no numbers; a power of a letter is found as it stands.

    Args:
        limit: the number begins before it.
    """
    before = last = None
    for token in TOKEN.finditer(text):
        if limit is not None and token.start() >= limit:
            break
        if not token["name"]:
            before, last = last, token
    if last is None:
        return None
    if last["symbol"]:
        adjacent = before is not None and not before["symbol"] and not text[before.end() : last.start()].strip(" ")
        if adjacent and last["symbol"][0] in "ms":  # a unit, as in 5 m^2
            last = before
        else:
            start = before.start() if adjacent and before else last.start()
            glued = re.search(r"[^\s,;:=$]*$", text[max(0, start - 80) : start])
            start -= len(glued[0]) if glued else 0
            return Found(start, last.end(), text[start : last.end()])
    assert last is not None
    start, end, said = last.start(), last.end(), last["number"] or last["time"]
    if last["time"]:
        return Found(start, end, said)
    if (mixed := MIXED.fullmatch(said)) and int(mixed[1]) >= int(mixed[2]):
        start, said = start + said.rindex(" ") + 1, said[said.rindex(" ") + 1 :]
    said = re.sub("[,'_ ](?=\\d{3})", "", said) if re.fullmatch(rf"(?:{GROUPED}|\d+ [\d ]*000).*", said) else said
    currency = re.search(rf"({CURRENCY})\s?$", text[max(0, start - 5) : start])
    symbol = currency[1] if currency and "$" not in currency[1] else ""
    suffix = BEHIND.match(text, end)
    assert suffix is not None  # it matches nothing too
    behind = suffix[0] if words else suffix["percent"] or ""
    if words and suffix.end() - end == len(behind):
        behind += _unit_behind(text, suffix.end())
    return Found(start, end + len(behind), _sign(text, start) + symbol + said + behind)


def _sign(text: str, start: int) -> str:
    """The minus before the number that begins there, if it is a sign: apart from it, before a currency, or a word."""
    tail = text[max(0, start - 40) : start]
    found = re.search(rf"(\b[Mm]inus\s|\b[Nn]egative\s|-)(\s*)(?:{CURRENCY})?(\s*)$", tail)
    if found is None:
        return ""
    if found[1][0] in "nN":
        return "-"
    rest = tail[: found.start()]
    operand = rest.rstrip(" ")
    if not operand or operand[-1] == "\n":  # the head of a line: "- 3" is an item of a list
        alone = "\n" not in text.strip()
        return "-" if not found[2] or found[1] != "-" or alone else ""
    if operand[-1].isdigit() or operand[-1] in ")]}%°!":
        return "-" if found[1] == "-" and not found[2] and rest != operand else ""
    if found[1] != "-":
        return "-"
    if rest == operand and re.search(r"\w$", operand):  # a hyphen, or a difference
        return ""
    difference = found[2] and re.search(r"(?<![A-Za-z])[A-Za-z]$", operand)  # x - 3
    return "" if difference else "-"


def _unit_behind(text: str, end: int) -> str:
    """A known unit behind a number in running text, where it cannot be another word."""
    for pattern in UNITS_BEHIND:
        found = pattern.match(text, end)
        if found and found[1] not in PROSE and (unit := read_unit(found[0].strip(" -"))) and unit[0]:
            return found[0]
    return ""


def in_ten(text: str) -> str:
    """A formula with every number of another base in base ten."""
    text = re.sub(rf"(?<![\w.\\])(?:{BASED})(?!\w)", lambda m: str(int(m[0], 0)), text)
    return re.sub(rf"(?<![\w.\\}}])\d[\dA-F]*{BASE}", lambda m: str(_or_text(based(m[0]), m[0])), text)


def _or_text(value: Fraction | None, text: str) -> Fraction | str:
    return text if value is None else value
