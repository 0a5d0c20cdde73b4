"""Extraction and comparison of answers; a verifier that hangs or dies is an outcome of its own."""

import importlib.metadata
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import math_verify
import pytest
from answers import MATH_VERIFY, ROWS, Row

from rmx.grading.answers import extract_answer
from rmx.grading.problems import generate
from rmx.grading.verify import Judgement, judge, verify
from rmx.records import Problem, Rollout


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}", "12"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"we get \boxed{7", None),  # cut off inside the box
        (r"the answer is 9. \boxed{3}", "3"),
        ("The final answer to this arithmetic problem is 11.", "11"),
        ("The answer is 5. There are 3 ways.", "5"),
        ("Answer: 4 * 5 = 20", "20"),
        ("2 + 3 = 5", "5"),
        ("5-3", "3"),
        ("it is -3", "-3"),
        ("about 1,234.5 in all", "1234.5"),
        ("$12", "12"),
        ("The answer is **blue**.", "blue"),
        ("The answer is 5. No, wait: the answer is 7.", "7"),
        (r"The answer is $\sqrt{2}$.", r"\sqrt{2}"),
        (r"The final answer is $x+1$", "x+1"),
        ("The final answer is 5, but that answer is not plausible", "5"),
        ("It is .5", ".5"),
        ("the pair 1,2", "2"),
        ("1e-3 in all", "1e-3"),
        ("1/2 of it", "1/2"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extraction(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("truth", "text", "outcome"),
    [
        ("1/2", r"\boxed{0.5}", "right"),
        ("0.5", r"\boxed{\frac{1}{2}}", "right"),
        ("x+1", r"\boxed{1+x}", "right"),
        ("12", "the answer is 13", "wrong"),
        ("12", "I cannot tell", "no_answer"),
    ],
)
def test_judgement_of_mathematics(truth: str, text: str, outcome: str) -> None:
    assert judge(Problem("p", "q", truth), text)[0] == outcome


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.note)
def test_verdicts_of_the_table_are_right_but_for_the_rows_left_wrong(row: Row) -> None:
    outcome = judge(Problem("p", "q", row.truth), row.text)[0]
    assert (outcome == "right") == (row.right != row.left), outcome


@pytest.mark.skipif(
    importlib.metadata.version("math-verify") != MATH_VERIFY, reason=f"recorded with math-verify {MATH_VERIFY}"
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.note)
def test_math_verify_alone_judges_the_table_as_recorded(row: Row) -> None:
    gold, said = (math_verify.parse(text, parsing_timeout=None) for text in (f"${row.truth}$", row.text))
    assert math_verify.verify(gold, said, timeout_seconds=None) == row.alone


def test_the_page_on_answers_lists_what_math_verify_gets_wrong_and_what_is_left_wrong() -> None:
    assert len({row.note for row in ROWS}) == len(ROWS)
    page = (Path(__file__).parents[2] / "docs" / "answers.md").read_text()
    listed = re.findall(r"^\| ([^|]+) \| `.*\| (right|wrong) \| ([^|]+) \|$", page, re.MULTILINE)
    wrong = [row for row in ROWS if row.alone != row.right]
    assert [(note, verdict) for note, verdict, _ in listed] == [
        (row.note, "right" if row.right else "wrong") for row in wrong
    ]
    left = {row.note for row in ROWS if row.left}
    assert {note for note, _, done in listed if done.startswith("**left wrong**")} == left
    counts = re.search(r"(\d+) texts .* errs on (\d+) of them; `rmx verify` on (\d+)", page.replace("\n", " "))
    assert counts is not None
    assert counts.groups() == (str(len(ROWS)), str(len(wrong)), str(len(left)))


def test_partial_credit_of_reasoning_gym_is_wrong() -> None:
    problems = generate("gcd", {"min_numbers": 2, "max_numbers": 2, "min_value": 2, "max_value": 9}, 20, 0)
    problem = next(problem for problem in problems if problem.answer == "1")
    assert judge(problem, "so it is 1")[0] == "right"
    assert judge(problem, "17") == ("wrong", "17", "expected 1, score 0.5")


def moody(problem: Problem, text: str) -> Judgement:
    """A judge that hangs, dies or throws on demand."""
    if text == "hang":
        time.sleep(60)
    if text == "die":
        os._exit(3)
    if text == "grow":
        bytearray(3 << 30)
    if text == "throw":
        raise ValueError("what is this?")
    return "right", text, ""


@pytest.mark.thorough
def test_a_hanging_or_dying_verifier_costs_only_its_own_rollout() -> None:
    texts = ["a", "hang", "die", "throw", "b", "a", "c"]
    rollouts = [Rollout("p", i, [1], [2], "stop", text) for i, text in enumerate(texts)]
    seen: list[int] = []
    verdicts = verify([Problem("p", "q", "1")], rollouts, timeout_s=1.0, judge=moody, on_done=seen.append)
    assert [v.outcome for v in verdicts] == ["right", "timeout", "crash", "crash", "right", "right", "right"]
    assert [v.sample for v in verdicts] == list(range(7))
    assert [v.reward for v in verdicts] == [1, None, None, None, 1, 1, 1]
    assert "within 1 s" in verdicts[1].reason
    assert "exit code 3" in verdicts[2].reason
    assert "ValueError: what is this?" in verdicts[3].reason
    assert seen == [1, 2, 3, 4, 5, 6]  # the repeated text is judged once


def test_an_answer_that_takes_all_memory_is_a_crash_of_its_own() -> None:
    rollouts = [Rollout("p", i, [1], [2], "stop", text) for i, text in enumerate(["grow", "a"])]
    verdicts = verify([Problem("p", "q", "1")], rollouts, workers=1, judge=moody)
    assert [v.outcome for v in verdicts] == ["crash", "right"]
    assert verdicts[0].reason == "no verdict within 1024 MiB of memory"


def test_a_large_expansion_is_held_within_the_memory_of_a_worker() -> None:
    """By whichever limit comes first; it took 6 GiB."""
    rollout = Rollout("p", 0, [1], [2], "stop", r"\boxed{(x+1)^{1000000} - (x-1)^{1000000}}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert verify([Problem("p", "q", "x^{1000000} + 1")], [rollout], timeout_s=2.0)[0].outcome != "right"
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(before, 2 << 20)  # KiB


def starved(problem: Problem, text: str) -> Judgement:
    """What sympy does inside math-verify where memory is short."""
    from math_verify import grader

    class Greedy:
        def doit(self) -> None:
            raise MemoryError if text == "much" else ValueError

    grader.safe_sympy_doit(Greedy())
    return "wrong", text, ""


def test_math_verify_does_not_take_a_lack_of_memory_for_a_wrong_answer() -> None:
    rollouts = [Rollout("p", i, [1], [2], "stop", text) for i, text in enumerate(["much", "odd"])]
    verdicts = verify([Problem("p", "q", "1")], rollouts, workers=1, judge=starved)
    assert [(v.outcome, v.reward) for v in verdicts] == [("crash", None), ("wrong", 0)]
    assert verdicts[0].reason == "no verdict within 1024 MiB of memory"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory has no limit")
def test_a_formula_that_takes_all_memory_has_no_verdict() -> None:
    """The same with real formulas, in a process that may take 8 MiB more."""
    script = r"""
        import math_verify
        from rmx.grading import memory, verify
        from rmx.records import Problem
        memory.let_memory_errors_pass()
        memory.MEMORY_BYTES = 8 << 20
        verify.judge(Problem("p", "q", "1 + x"), r"\boxed{x + 1}")
        memory.limit_memory()
        for truth, answer in (("x^{2} + 1", "(x+1)^{20000}"), ("1 + x", "x + 1"), ("x^{2}", "(x+1)^{2}")):
            try:
                print(verify.judge(Problem("p", "q", truth), rf"\boxed{{{answer}}}")[0])
            except MemoryError:
                print("none")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert ran.stdout.split() == ["none", "right", "wrong"]


def busy(problem: Problem, text: str) -> Judgement:
    print(os.getpid(), flush=True)
    while True:
        pass


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a thread looks once a second")
def test_a_worker_dies_with_a_parent_that_is_killed() -> None:
    script = f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_verify import busy
        from rmx.records import Problem, Rollout
        from rmx.grading.verify import verify
        if __name__ == "__main__":
            verify([Problem("p", "q", "1")], [Rollout("p", 0, [1], [2], "stop", "a")], timeout_s=60, judge=busy)
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(200):
        stat = Path(f"/proc/{worker}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX":  # gone, or not yet reaped
            return
        time.sleep(0.02)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


def modules(problem: Problem, text: str) -> Judgement:
    judge(problem, text)
    return "right", None, " ".join(name for name in ("math_verify", "torch") if name in sys.modules)


def test_a_worker_imports_no_torch() -> None:
    rollout = Rollout("p", 0, [1], [2], "stop", r"\boxed{\sqrt{2}}")
    assert verify([Problem("p", "q", "1.414")], [rollout], judge=modules)[0].reason == "math_verify"
