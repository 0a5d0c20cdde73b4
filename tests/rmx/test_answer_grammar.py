"""Cases built from the table of spellings in docs/answers.md, and texts that once took quadratic time."""

import itertools
import re
import sys
from fractions import Fraction
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import pytest

from rmx.grading.answers import extract_answer, same_answer
from rmx.grading.numerals import number
from rmx.grading.verify import judge
from rmx.records import Problem

PAGE = Path(__file__).parents[2] / "docs" / "answers.md"


class Form(NamedTuple):
    name: str
    value: Fraction
    places: list[str]
    spellings: list[str]


PLACES = {"any": [r"\boxed{%s}", "The answer is %s.", "So we get %s", "We get 7, no:\nit is **x** %s, I think"]}
PLACES["whole"] = PLACES["any"][:2]


def forms() -> list[Form]:
    rows = re.findall(r"^\| ([a-z ]+) \| ([-\d/^]+) \| (any|whole) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    found = []
    for name, value, place, spellings in rows:
        top, _, bottom = value.partition("/")
        base, _, power = bottom.partition("^")
        found.append(
            Form(
                name,
                Fraction(int(top), int(base or 1) ** int(power or 1)),
                PLACES[place],
                re.findall("`([^`]+)`", spellings),
            )
        )
    return found


FORMS = forms()


def test_the_table_of_spellings_is_read() -> None:
    assert len(FORMS) > 30 and sum(len(form.spellings) for form in FORMS) > 100


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_spelling_in_every_place_has_its_value_and_no_other(form: Form) -> None:
    near = {
        form.value + 1,
        -form.value,
        form.value / 10,
        form.value * 10,
        Fraction(form.value.numerator),
        1 / form.value,
    }
    near |= {Fraction(form.value.denominator), abs(form.value) % 1, Fraction(int(form.value))}
    for spelling, place in itertools.product(form.spellings, form.places):
        text = place % spelling
        assert judge(Problem("p", "q", str(form.value)), text)[0] == "right", text
        for other in near - {form.value}:
            assert judge(Problem("p", "q", str(other)), text)[0] == "wrong", (text, other)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_spellings_are_the_same_as_those_of_their_value_alone(form: Form) -> None:
    for truth in form.spellings:
        for spelling in form.spellings:
            assert same_answer(truth, spelling), (truth, spelling)
        for other in FORMS:
            bare = re.match(r"[\dA-F]+(?=_)", truth)  # the digits of a truth in another base will do
            for spelling in other.spellings if other.value != form.value else []:
                if not bare or number(spelling) != number(bare[0]):
                    assert not same_answer(truth, spelling), (truth, spelling)


@pytest.mark.parametrize(
    ("truth", "text", "right"),
    [
        ("3", "from 5 - 3", True),
        ("3", "we see 5-3", True),
        ("-3", "5 is above\n-3", True),
        ("3", "- 2 apples\n- 3 pears", True),  # items, not signs
        ("3", "COVID-3", True),
        ("10", "there are 10^5 ways", False),
        ("2", "so it is x^2", False),
        ("x^2", "so it is x^2", True),
        ("3x^2", "so it is 3x^2.", True),
        ("2", "we have (x+1)^2", False),
        ("2", "it is 2^n", False),
        ("5", "The area is 5 cm^2", True),
        ("5", "the area is 5 m^2", True),
        ("7", "7 is what x_2 says", True),
        ("4", r"So it is $\frac{3}{4}$.", False),
        ("3/4", r"So it is $\frac{3}{4}$.", True),
        ("4", r"So it is \frac{3}{4}.", False),
        ("17", "In all $12 + 5 = 17$ apples", True),
        ("5", "The answer is 2 + 3.", True),
        ("3", "The answer is 2 + 3.", False),
        ("1000", "one thousand", True),
        ("10", "ten of them are left, he said", False),  # prose is not searched for words
        ("5 Hz", "It hums at 5 MHz", False),
        ("5 MHz", "It hums at 5000 kHz", True),
        ("5 m", "It is 5 km long", False),
        ("5", "It is 5 km long", True),
        ("5 cm", r"\boxed{5 cm2}", False),
        ("60 min", r"\boxed{1 \text{ hour}}", True),
        ("25 C", r"\boxed{25°C}", True),
        ("25 F", r"\boxed{25°C}", False),
        ("3", "She has 3 quarters", True),
        ("3", "3 in 5 rows of 3", True),
        ("3 pm", r"\boxed{3 am}", False),
        ("15:00", r"\boxed{3 pm}", True),
        ("12_7", r"\boxed{12}", True),  # the question names the base
        ("12", r"\boxed{12_7}", False),
        ("19_7", r"\boxed{19_8}", False),
        ("12_7 + 1", r"\boxed{10}", True),
        ("36", r"\boxed{36 \text{ cents}}", True),
        ("$36", r"\boxed{36 \text{ cents}}", False),
        ("$0.36", r"\boxed{36 \text{ cents}}", True),
    ],
)
def test_running_text_and_units(truth: str, text: str, right: bool) -> None:
    assert (judge(Problem("p", "q", truth), text)[0] == "right") == right


@pytest.mark.parametrize(
    ("truth", "answer", "same"),
    [
        ("2^{-2023}", "2^{-2024}", False),
        (r"\frac{1}{2^{2024}}", "2^{-2024}", True),
        (r"\frac{1}{2^{2023}}", "2^{-2024}", False),
        ("e^{-100}", "e^{-101}", False),
        ("e^{-100}", r"\frac{1}{e^{100}}", True),
        ("0", "10^{-17}", False),
        (r"\frac{x}{2^{60}}", r"\frac{x}{2^{61}}", False),
        (r"\frac{x}{2^{60}}", "2^{-60}x", True),
        (r"\frac{\sqrt{2}}{10^{20}}", r"\frac{\sqrt{3}}{10^{20}}", False),
        (r"\frac{\sqrt{2}}{10^{20}}", r"\frac{2}{\sqrt{2}\cdot 10^{20}}", True),
        ("(0,10^{-17})", "(0,10^{-18})", False),
        (r"\begin{pmatrix}10^{-17}\end{pmatrix}", r"\begin{pmatrix}10^{-18}\end{pmatrix}", False),
        ("x=2^{-2024}", "x=2^{-2023}", False),
        ("1e-500", "1e-501", False),
        (str(2**2000), "2^{2000}", True),
        (str(2**2000), str(2**2000 + 1), False),
    ],
)
def test_small_and_large_values_are_compared_exactly(truth: str, answer: str, same: bool) -> None:
    assert same_answer(truth, answer) == same


@pytest.mark.parametrize(
    ("truth", "answer", "same"),
    [
        ("1, 2, 2", "1, 1, 2", False),
        ("1, 2, 2", "2, 1, 2", True),
        ("1, 2, 2", "1, 2", False),
        ("1, 1/2, 1/2", "0.5, 1, 1/2", True),
        ("0.333, 1/3", "1/3, 0.333", True),  # 1/3 equals both: who is paired with whom counts
        ("1/3, 0.333", "1/3, 1/3", True),
        (r"\{1, 2\}", r"\{1, 2, 2\}", True),
        ("1, 2, 2", r"\{1, 2, 2\}", True),
        ("Amy, Tom, Tom", "Tom, Amy, Amy", False),
    ],
)
def test_how_often_an_element_stands_in_a_list_counts(truth: str, answer: str, same: bool) -> None:
    assert same_answer(truth, answer) == same


LOOPS = ["answer: ", "answer is ", "answer:\n", "\n", "\\", "$ ", "\\(", "\\boxed{1} ", "\\boxed{", "1 ", "####\n"]
LOOPS += [
    "1e",
    "2^",
    "1 1/",
    "minus ",
    "x_{",
    "{",
    "1,111,",
    "1 x 10 ",
    "a",
    "7",
    "1:",
    "\\frac{1}{",
    "2^{a",
    "- ",
    " ",
]


@pytest.mark.parametrize("loop", LOOPS)
def test_work_grows_no_faster_than_a_looping_text(loop: str) -> None:
    def work(length: int) -> int:
        """Lines of Python run; searches in C are bounded by the next test."""
        count = 0

        def trace(frame: FrameType, *_: object) -> object:
            nonlocal count
            count += "rmx" in frame.f_code.co_filename
            return trace

        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            extract_answer(loop * (length // len(loop)))
        finally:
            sys.settrace(None)
        return count

    assert work(8000) < 3 * work(4000) + 500


@pytest.mark.parametrize("loop", LOOPS)
def test_a_looping_rollout_is_judged(loop: str) -> None:
    outcome = judge(Problem("p", "q", "12"), (loop * 60_000)[:60_000])
    assert outcome[0] in ("wrong", "no_answer"), outcome


def test_an_answer_that_loops_is_wrong_without_being_parsed() -> None:
    outcome, _, reason = judge(Problem("p", "q", "12"), r"\boxed{" + "1+" * 20_000 + "1}")
    assert (outcome, reason) == ("wrong", "an answer of 40001 characters where 2 are expected")
