"""Units: what they measure, and how they are converted, exactly."""

import re
from fractions import Fraction

# Each unit: its dimension, and how many of the dimension's own unit it is; exact, so that units can be converted.
SI = """
    m meter metre; g gram; s sec second; L l liter litre; N newton; J joule; W watt; V volt; A amp ampere; Hz hertz;
    Pa pascal; B byte; Ω ohm; eV electronvolt; mol mole; cal calorie; bit
"""
OTHER = """
    $ dollar usd USD buck; ¢ cent 1/100 $; € euro eur EUR; £ gbp GBP; ¥ yen jpy JPY; ₹ rupee inr INR;
    in inch inche 127/5000 m; ft foot feet 381/1250 m; yd yard 1143/1250 m; mi mile 201168/125 m; cc 1/1000 L;
    lb pound 45359237/100000 g; oz ounce 45359237/1600000 g; min minute 60 s; h hr hour 3600 s;
    day 86400 s; week 604800 s; tonne 1000000 g; month; year yr 12 month; ° degree deg; rad radian; K kelvin;
    C celsius; F fahrenheit
"""
PREFIXES = {"p": -12, "n": -9, "μ": -6, "u": -6, "m": -3, "c": -2, "d": -1, "k": 3, "M": 6, "G": 9, "T": 12}
PREFIX_NAMES = {"pico": -12, "nano": -9, "micro": -6, "milli": -3, "centi": -2, "deci": -1, "kilo": 3, "mega": 6}
PREFIX_NAMES |= {"giga": 9, "tera": 12}
ALIASES = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "sqft": "ft^2"}
ODD = {"pm", "dA", "cA"}  # half past noon, no picometre


def _units() -> dict[str, tuple[str, Fraction]]:
    found: dict[str, tuple[str, Fraction]] = {}
    for names in SI.split(";"):
        first, *others = names.split()
        for name in [first, *others]:
            found[name] = (first, Fraction(1))
            prefixes = PREFIX_NAMES if len(name) > 2 else PREFIXES
            for prefix, power in prefixes.items():
                if len(name) > 2 or prefix not in "cd" or name in ("m", "g", "L", "l"):
                    found.setdefault(prefix + name, (first, Fraction(10) ** power))
    for names in OTHER.split(";"):
        said = names.split()
        factor, dimension = (Fraction(said[-2]), said[-1]) if said[-2:-1] and said[-2][0].isdigit() else (1, said[0])
        for name in said:
            if not name[0].isdigit():
                found.setdefault(name, (dimension, Fraction(factor)))
    found |= {"KB": found["kB"], "Kg": found["kg"], "KM": found["km"], "Km": found["km"], "CM": found["cm"]}
    found |= {"MHZ": found["MHz"], "KHz": found["kHz"], "KHZ": found["kHz"], "GHZ": found["GHz"]}
    return {name: unit for name, unit in found.items() if name not in ODD}


UNITS = _units()
# Words that make a formula of what stands behind a number.
_FORMULA = """sin cos tan cot sec csc arcsin arccos arctan log ln exp sqrt pi infinity inf squared cubed factorial times
    plus minus over mod and or max min"""
FORMULA_WORDS = frozenset(_FORMULA.split())
SQUARE, CUBIC = re.compile(r"\b(?:square|sq)\.? (\w+)"), re.compile(r"\bcubic (\w+)")
DEGREES = re.compile(r"[°]\s*(?=[CF]\b)|\bdeg(?:rees?)?\s+(?=[CF]\b|[Cc]elsius|[Ff]ahrenheit)")
ALIAS = re.compile(rf"\b(?:{'|'.join(ALIASES)})\b")
PIECE = re.compile(r"[a-zA-ZμΩ]+|[°$€£¥₹¢]|\^?-?\d+|/")


def read_unit(text: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """(dimensions and powers, factor); ((), 1) for other words, taken for what was counted; None for a formula."""
    text = SQUARE.sub(r"\1^2", CUBIC.sub(r"\1^3", text.replace("per ", "/ ")))
    text = DEGREES.sub("", re.sub("[{}]", "", text))
    parts = PIECE.findall(ALIAS.sub(lambda m: ALIASES[m[0]], text))
    powers: dict[str, int] = {}
    factor, sign, last, scale = Fraction(1), 1, "", Fraction(1)
    for part in parts:
        if part == "/":
            sign = -1
        elif part.lstrip("^-").isdigit():
            if not last or abs(int(part.lstrip("^"))) > 9:
                return None
            power = int(part.lstrip("^"))
            factor *= scale ** (sign * (power - 1))
            powers[last] += sign * (power - 1)
        elif unit := known_unit(part):
            last, scale = unit
            factor *= scale**sign
            powers[last] = powers.get(last, 0) + sign
        else:
            words = [word.lower() for word in parts if word.isalpha()]
            formula = FORMULA_WORDS.intersection(words) or all(len(word) < 3 for word in words)
            return None if formula or re.search(r"[\d^]", text) else ((), Fraction(1))
    return tuple(sorted((name, power) for name, power in powers.items() if power)), factor


def known_unit(word: str) -> tuple[str, Fraction] | None:
    """Symbols as they are written, since m is not M; names in any case, and in the plural."""
    names = [word, word.removesuffix("s")] + ([word.lower(), word.lower().removesuffix("s")] if len(word) > 2 else [])
    return next((UNITS[name] for name in names if name in UNITS and (name == word or len(name) > 1)), None)
